"""`python -m oialr_peft`: the command `oialr`."""

from oialr_cli import main

if __name__ == "__main__":
    main()
