"""Clustering inside other people's training loops: `integrations.lightning`, `.transformers`.

Each is imported by itself, and needs the package of that name. `.notebook` draws curves in Jupyter.
"""
