"""`python -m u2a` is the `u2a` command."""

from u2a.cli import main

if __name__ == "__main__":
    main()
