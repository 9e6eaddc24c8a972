"""Models and runs on disk and on the Hub: the low-rank format, exports, conversion, inspection, records of runs, pushes.

Never here: training, plots.
"""
