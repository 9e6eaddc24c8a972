"""What PEFT sees: configuration and registration, kinds of target modules, the adapter layer, and the tuner.

Never here: steps of training, optimizers, checks.
"""
