"""What a run does after its optimizer steps: when there is a check, what it finds and decides, and what it changes.

Never here: transformers' Trainer, files, reports.
"""
