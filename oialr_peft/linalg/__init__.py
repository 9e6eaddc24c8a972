"""Mathematics on tensors: factors and Stability, routes of decomposition, products, stored bases, moments of optimizers.

Never here: PEFT, transformers, processes, settings. A function takes tensors and numbers, and gives tensors and numbers.
"""
