"""Several processes: who decomposes what, what is sent, wrappers of models, shards, and engines that are refused.

Never here: what a check decides, what a layer is, files.
"""
