"""What is written and read: files that are whole or not there, checks before loading, plain values, text of cards.

Never here: a model, a decision of a run, a decomposition.
"""
