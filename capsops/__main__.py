"""The program `capsops`, also `python -m capsops`."""

from __future__ import annotations

import argparse
import sys

from . import __version__


def main() -> int:
    """Run the command that the command line names; the exit status."""
    parser = argparse.ArgumentParser(prog="capsops", description="Capsule routing for PyTorch.")
    parser.add_argument("--version", action="version", version=f"capsops {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("info", help="print what was built, what runs here, and why not the rest")
    parser.parse_args()
    from .info import main as print_info

    return print_info()


if __name__ == "__main__":
    sys.exit(main())
