"""`python -m counterpoint`, the form that torchrun starts."""

from counterpoint.cli.main import main

if __name__ == "__main__":
    main()
