"""`python -m veneer`: the command line, where `veneer` is not on the path. Signals are heard from its first line on."""

import shlex
import sys

from veneer.cli.lasting import polite_kills


def main(arguments: list[str] | None = None) -> None:
    """Import the command line and run it; never returns."""
    with polite_kills():
        try:
            from veneer.cli.main import main as run

            run(arguments)
        except KeyboardInterrupt:
            given = sys.argv[1:] if arguments is None else arguments
            print(f"stopped\n  start again with: veneer {shlex.join(given)}", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    main()
