"""``python -m epslots``: the command line."""

from epslots.cli import main

if __name__ == "__main__":
    main()
