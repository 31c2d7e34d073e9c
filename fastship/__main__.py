"""``python -m fastship``: the command line without its script, as the demo starts its receiver."""

from fastship.cli import main

if __name__ == "__main__":
    main()
