"""`python -m dynrl VERB ...` is `dynrl VERB ...`."""

from dynrl.scripts.cli import main

if __name__ == "__main__":
    main()
