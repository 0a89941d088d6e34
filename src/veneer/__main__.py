"""`python -m veneer`: the command line, where `veneer` is not on the path. A signal is heard from here on."""

import sys

from veneer.cli.lasting import polite_kills


def main() -> None:
    """Import the command line and run it; never returns."""
    with polite_kills():
        try:
            from veneer.cli.main import main as run
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)
        run()


if __name__ == "__main__":
    main()
