"""`python -m meshd` is `meshd`."""

from meshd.cli import main

if __name__ == "__main__":
    main()
