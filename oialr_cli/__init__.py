"""The command `oialr`. A package of its own, because importing `oialr_peft` imports torch and transformers first."""

from oialr_cli.app import main

__all__ = ["main"]
