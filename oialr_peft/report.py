"""What a run did, for people: a table of ranks and a plot of the history."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from oialr_peft.controller import OIALRUpdate
from oialr_peft.model import adapter_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class LayerRank(NamedTuple):
    """One row of `rank_table`."""

    name: str
    out_features: int
    in_features: int
    rank: int
    phase: str  # "dense" or "factored"
    trainable: int  # parameters that train
    stored: int  # parameters that an adapter checkpoint holds


class RankTable(list[LayerRank]):
    """The rows of `rank_table`; `print` shows them aligned, with a sum."""

    def __str__(self) -> str:
        header = ("layer", "shape", "rank", "of", "phase", "trainable", "stored")
        rows = [
            (
                row.name,
                f"{row.out_features}×{row.in_features}",
                str(row.rank),
                str(min(row.out_features, row.in_features)),
                row.phase,
                f"{row.trainable:,}",
                f"{row.stored:,}",
            )
            for row in self
        ]
        trainable, stored = sum(row.trainable for row in self), sum(row.stored for row in self)
        rows.append(("all", "", "", "", "", f"{trainable:,}", f"{stored:,}"))
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        left = {0, 4}
        lines = [
            "  ".join(
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in [header, *rows]
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(lines)


def rank_table(model: nn.Module, adapter_name: str = "default") -> RankTable:
    """Rank, phase and parameter counts of every layer of an adapter, in module order.

    Args:
        model: a model with an OIALR adapter.
        adapter_name: which adapter.

    Raises:
        ValueError: the model has no such adapter.

    Examples:
        >>> from peft import get_peft_model
        >>> from oialr_peft import OIALRConfig
        >>> base = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> print(rank_table(get_peft_model(base, OIALRConfig(target_modules=["0", "2"]))))
        layer  shape  rank  of  phase  trainable  stored
        -----  -----  ----  --  -----  ---------  ------
        0        4×6     4   4  dense         24      24
        2        2×4     2   2  dense          8       8
        all                                   32      32
    """
    layers = adapter_layers(model, adapter_name)
    if not layers:
        raise ValueError(
            f"The model has no layer with the adapter `{adapter_name}`. Make it with "
            "get_peft_model(model, OIALRConfig()), or pass its `adapter_name`."
        )
    table = RankTable()
    for name, layer in layers.items():
        m, n, rank = layer.out_features, layer.in_features, layer.rank(adapter_name)
        dense = layer.is_dense(adapter_name)
        trains = layer.trained_parameter(adapter_name).requires_grad
        trainable = (m * n if dense else rank * rank) if trains else 0
        stored = m * n if dense else (m + n + rank) * rank
        table.append(LayerRank(name, m, n, rank, "dense" if dense else "factored", trainable, stored))
    return table


def plot_history(history: Sequence[OIALRUpdate], path: str | os.PathLike[str] | None = None) -> Figure:
    """Plot Stability per layer, ranks per layer, and the trainable share over the optimizer steps of a run.

    Args:
        history: the updates of `OIALRController.history`.
        path: where to save the figure; the ending chooses the format. `None` does not save it.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history is empty.

    Examples:
        >>> history = [
        ...     OIALRUpdate(step=10, stability={"up": 0.8}, trainable=100, total=100),
        ...     OIALRUpdate(step=20, stability={"up": 0.95}, frozen=["up"], ranks={"up": (10, 6)}, trainable=36, total=100),
        ... ]
        >>> figure = plot_history(history, "history.png")
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['Stability of dense layers', 'Rank of factored layers', 'Trainable parameters']
    """
    if not history:
        raise ValueError("`history` must hold at least one check, but is empty. Train past the first check.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot_history needs matplotlib. Run: pip install "oialr-peft[plots]"') from error

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    stability_axes, rank_axes, share_axes = figure.subplots(1, 3)
    names = list(dict.fromkeys(name for update in history for name in (*update.stability, *update.ranks)))
    for index, name in enumerate(names):
        colour = _colour(index, len(names))
        points = [(update.step, update.stability[name]) for update in history if name in update.stability]
        stability_axes.plot(*zip(*points), color=colour, marker=".") if points else None
        points = [(update.step, update.ranks[name][1]) for update in history if name in update.ranks]
        rank_axes.plot(*zip(*points), color=colour, marker=".") if points else None
    steps = [update.step for update in history]
    share_axes.plot(steps, [update.trainable_percent for update in history], color="black", marker=".")
    for axes, title, label in (
        (stability_axes, "Stability of dense layers", "S"),
        (rank_axes, "Rank of factored layers", "rank"),
        (share_axes, "Trainable parameters", "% of the dense model"),
    ):
        axes.set(title=title, xlabel="optimizer step", ylabel=label, xlim=(0, steps[-1] * 1.02))
        axes.grid(alpha=0.3)
    rank_axes.set_ylim(bottom=0)
    share_axes.set_ylim(0, 105)
    _add_layer_scale(figure, [stability_axes, rank_axes], len(names))
    if path is not None:
        figure.savefig(path)
    return figure


def _colour(index: int, count: int) -> tuple[float, ...]:
    from matplotlib import colormaps

    return colormaps["viridis"](index / max(1, count - 1))


def _add_layer_scale(figure: Figure, axes: list[Axes], layers: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(norm=Normalize(0, max(1, layers - 1)), cmap="viridis")
    bar = figure.colorbar(scale, ax=axes, ticks=[0, max(1, layers - 1)])
    bar.ax.set_yticklabels(["first layer", "last"])
