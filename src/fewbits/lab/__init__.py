"""Training, comparing and measuring: what the command line runs."""
