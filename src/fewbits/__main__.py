"""`fewbits` and `python -m fewbits`."""

import sys


def main() -> None:
    """Run the command line, or say what to install for it."""
    try:
        import click  # noqa: F401
    except ImportError:
        print("fewbits: the command line needs: pip install 'fewbits[cli]'", file=sys.stderr)
        raise SystemExit(1) from None
    from ._cli import run

    run()


if __name__ == "__main__":
    main()
