"""`python -m kvferry` is the command `kvferry`."""

from .cli import main

if __name__ == "__main__":
    main()
