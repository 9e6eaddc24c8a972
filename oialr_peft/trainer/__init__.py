"""transformers' Trainer with the engine in it: Trainer, mixin and callback.

Never here: what a check does. Importing this room imports `transformers.Trainer`, which takes seconds.
"""
