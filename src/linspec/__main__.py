"""`python -m linspec` is the command `linspec`."""

from linspec.cli import main

if __name__ == "__main__":
    main()
