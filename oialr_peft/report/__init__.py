"""What a run did, for people: a table of ranks, plots of the history, and HTML pages without a network."""

from oialr_peft.report.plots import plot_history
from oialr_peft.report.ranks import LayerRank, RankTable, rank_table

__all__ = ["LayerRank", "RankTable", "plot_history", "rank_table"]
