"""`python -m oialr_cli`."""

from oialr_cli.app import main

if __name__ == "__main__":
    main()
