"""`python -m veneer`: the command line, where `veneer` is not on the path."""

from veneer.cli.main import main

if __name__ == "__main__":
    main()
