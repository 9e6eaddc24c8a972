"""What a run did or would take, for people: a table of ranks, plots of the history, HTML pages, estimates.

Never here: what changes a model, a file that is read back, a page that needs a network.
"""

from oialr_peft.report.plots import plot_history
from oialr_peft.report.ranks import LayerRank, RankTable, rank_table

__all__ = ["LayerRank", "RankTable", "plot_history", "rank_table"]
