"""Plots of a run, each drawn into given axes; `plot_history` puts them into one figure.

Colours come from a `Palette`, so that a page can put others in their place in light and in dark.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from oialr_peft.engine.update import OIALRUpdate
from oialr_peft.report.labels import kinds, layer_ticks
from oialr_peft.report.spectra import Spectra, spectra_of_checkpoint, spectra_of_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Mapping[int, float]  # values by optimizer step
_POINTS = 48  # of a spectrum that is drawn
_WIDE = 50  # largest over smallest value, from which on an axis is logarithmic
_SMALLEST = 1e-6  # of σ/σ_max that is drawn


class Palette(NamedTuple):
    """Colours of a plot, as matplotlib understands them."""

    ink: str  # text and single lines
    muted: str  # axes and marks
    grid: str
    void: str  # cells without a value
    series: tuple[str, ...]  # eight


PAPER = Palette(
    ink="#1b1f24",
    muted="#6a7380",
    grid="#d9dde3",
    void="#eceef1",
    series=("#2563c9", "#c2570c", "#16803c", "#8b3fd1", "#c81e4a", "#0b7a8a", "#8a6a12", "#5b6472"),
)


class Room(NamedTuple):
    """How much a plot may show."""

    layers: int = 16  # labels on an axis of layers
    name: int = 26  # characters of a layer's name
    ticks: int = 6  # on an axis of steps


def plot_history(
    history: Sequence[OIALRUpdate],
    path: str | os.PathLike[str] | None = None,
    *,
    metric: Curve | Sequence[Mapping[str, Any]] | None = None,
    metric_name: str | None = None,
    spectra: nn.Module | str | os.PathLike[str] | Spectra | None = None,
) -> Figure:
    """Plot Stability and ranks of the layers and the trainable share over the optimizer steps of a run.

    Args:
        history: the updates of `OIALRController.history`.
        path: where to save the figure; the ending chooses the format. `None` does not save it.
        metric: adds a plot of a metric against the trainable share: its values by step, or `trainer.state.log_history`.
        metric_name: of the metric; with a log, which of its entries, by default `eval_loss`, or `loss` without it.
        spectra: adds a plot of the singular values of Σ: the model, the directory of a saved adapter, or the values by
            full module name, largest first.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the history is empty, or there is no such metric in the log.

    Examples:
        >>> history = [
        ...     OIALRUpdate(step=10, stability={"up": 0.8}, trainable=100, total=100),
        ...     OIALRUpdate(step=20, stability={"up": 0.95}, frozen=["up"], ranks={"up": (10, 6)}, trainable=36, total=100),
        ... ]
        >>> figure = plot_history(history, "history.png")
        >>> [axes.get_title(loc="left") for axes in figure.axes[:3]]
        ['Stability of dense layers', 'Rank of factored layers', 'Trainable parameters']
    """
    if not history:
        raise ValueError("`history` must hold at least one check, but is empty. Train past the first check.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot_history needs matplotlib. Run: pip install "oialr-peft[plots]"') from error

    panels: list[Callable[[Axes], None]] = [
        lambda axes: draw_stability(axes, history),
        lambda axes: draw_ranks(axes, history),
        lambda axes: draw_trainable(axes, {"": history}),
    ]
    if metric is not None:
        curve, label = _metric_of(metric, metric_name)
        panels.append(lambda axes: draw_metric_against_trainable(axes, history, curve, label))
    if spectra is not None:
        values = _spectra_of(spectra)
        panels.append(lambda axes: draw_spectra(axes, values))
    columns = 2 if len(panels) == 4 else 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 4.2 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, draw in zip(places, panels, strict=False):
        draw(axes)
    for axes in list(places)[len(panels) :]:
        axes.remove()
    if path is not None:
        figure.savefig(path)
    return figure


def _metric_of(metric: Curve | Sequence[Mapping[str, Any]], name: str | None) -> tuple[Curve, str]:
    if isinstance(metric, Mapping):
        return metric, name or "metric"
    logged = {key for entry in metric for key in entry}
    name = name or next((key for key in ("eval_loss", "loss") if key in logged), None)
    if name not in logged or name is None:
        raise ValueError(
            f"The log in `metric` has no {name or 'eval_loss'!r}. Set `metric_name` to one of: "
            f"{', '.join(sorted(logged - {'step', 'epoch'})) or 'nothing is logged'}."
        )
    return {int(entry["step"]): float(entry[name]) for entry in metric if name in entry}, name


def _spectra_of(source: nn.Module | str | os.PathLike[str] | Spectra) -> Spectra:
    if isinstance(source, Mapping):
        return source
    return spectra_of_model(source) if isinstance(source, nn.Module) else spectra_of_checkpoint(source)


# ---- one plot each -------------------------------------------------------------------------------------------------------


def draw_stability(
    axes: Axes, history: Sequence[OIALRUpdate], palette: Palette = PAPER, room: Room | None = None
) -> None:
    """Stability of dense layers: a cell for each layer and each interval between two checks; none once it is factored."""
    import numpy as np

    names = layers_of(history)
    cells = np.full((len(names), len(history)), np.nan)
    for column, update in enumerate(history):
        for name, value in update.stability.items():
            cells[names.index(name), column] = value
    _style(axes, palette, room, "Stability of dense layers", "")
    axes.grid(False)
    if np.isnan(cells).all():
        message = "No layer was dense at two checks." if names else "No layer took part in a check."
        axes.text(0.5, 0.5, message, ha="center", va="center", color=palette.muted, transform=axes.transAxes)
        axes.set_yticks([])
        return
    # a value belongs to the interval that ends with its check
    edges = [max(0, 2 * history[0].step - history[1].step) if len(history) > 1 else 0, *(u.step for u in history)]
    rows = np.arange(len(names) + 1) - 0.5
    axes.axvspan(edges[0], edges[-1], color=palette.void, lw=0)
    lowest = min(0.95, float(np.floor(20 * np.nanmin(cells)) / 20))
    shown = axes.pcolormesh(edges, rows, cells, cmap="viridis", vmin=lowest, vmax=1, rasterized=True)
    ticks = layer_ticks(names, (room or Room()).layers, (room or Room()).name)
    axes.set_yticks([tick.position for tick in ticks], [tick.text for tick in ticks])
    axes.set_ylim(len(names) - 0.5, -0.5)
    bar = axes.figure.colorbar(shown, ax=axes, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=palette.ink)


def draw_ranks(axes: Axes, history: Sequence[OIALRUpdate], palette: Palette = PAPER, room: Room | None = None) -> None:
    """Rank of factored layers: a line for each of up to eight layers, else mean and range of each kind of layers."""
    _style(axes, palette, room, "Rank of factored layers", "rank")
    known: dict[str, int] = {}
    ranks: list[tuple[int, dict[str, int]]] = []
    for update in history:
        known |= {name: after for name, (_, after) in update.ranks.items()}
        ranks.append((update.step, dict(known)))
    lines = _series(known)
    for colour, (label, members) in zip(palette.series, lines, strict=False):
        seen = [(step, [now[name] for name in members if name in now]) for step, now in ranks]
        seen = [(step, values) for step, values in seen if values]
        steps = [step for step, _ in seen]
        means = [sum(values) / len(values) for _, values in seen]
        axes.plot(steps, means, color=colour, drawstyle="steps-post", marker=".", ms=4, lw=1.8, label=label)
        if len(members) > 1:
            low, high = ([pick(values) for _, values in seen] for pick in (min, max))
            axes.fill_between(steps, low, high, step="post", color=colour, alpha=0.05 if len(lines) > 4 else 0.12, lw=0)
    axes.set_xlim(0, history[-1].step * 1.02)
    axes.set_ylim(bottom=0)
    _legend(axes, palette)


def draw_trainable(
    axes: Axes, runs: Mapping[str, Sequence[OIALRUpdate]], palette: Palette = PAPER, room: Room | None = None
) -> None:
    """Share of trainable parameters after each check, of one or several runs."""
    _style(axes, palette, room, "Trainable parameters", "% of the dense model")
    for colour, (label, history) in zip(palette.series, runs.items(), strict=False):
        if not history:
            continue
        steps, shares = [u.step for u in history], [u.trainable_percent for u in history]
        axes.plot(steps, shares, color=colour, drawstyle="steps-post", marker=".", ms=4, lw=1.8, label=label)
        if len(runs) == 1:
            axes.fill_between(steps, shares, step="post", color=colour, alpha=0.13, lw=0)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 104)
    _legend(axes, palette)


def draw_metric_against_trainable(
    axes: Axes,
    history: Sequence[OIALRUpdate],
    metric: Curve,
    name: str,
    palette: Palette = PAPER,
    room: Room | None = None,
) -> None:
    """A metric against the share of parameters that were trainable when it was measured, in the order of the run."""
    _style(axes, palette, room, f"{name} against trainable parameters", name)
    shares = {step: share for step in sorted(metric) if (share := trainable_at(history, step)) is not None}
    points = [(share, metric[step]) for step, share in shares.items()]
    axes.set_xlabel("trainable, % of the dense model")
    if not points:
        return
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=palette.series[0], lw=1.2, alpha=0.6)
    axes.plot(x, y, color=palette.series[0], ls="", marker="o", ms=3.5)
    steps = list(shares)
    ends = ((steps[0], points[0]), (steps[-1], points[-1])) if len(points) > 1 else ((steps[0], points[0]),)
    for step, point in ends:
        axes.annotate(
            f"step {step:,}",
            point,
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            color=palette.ink,
            size="small",
        )
    axes.margins(0.14)
    axes.invert_xaxis()
    _scale(axes, y)


def draw_curves(
    axes: Axes,
    curves: Mapping[str, Curve],
    title: str,
    history: Sequence[OIALRUpdate] = (),
    palette: Palette = PAPER,
    room: Room | None = None,
) -> None:
    """Curves over the optimizer steps; checks are ticks at the bottom, those that factored layers dashed lines."""
    _style(axes, palette, room, title, "")
    for colour, (label, curve) in zip(palette.series, curves.items(), strict=False):
        if not curve:
            continue  # its colour stays its own in other plots
        steps = sorted(curve)
        marker = "o" if len(steps) <= 40 else None
        axes.plot(steps, [curve[s] for s in steps], color=colour, lw=1.6, marker=marker, ms=3, label=label)
    for update in history:
        if update.frozen:
            axes.axvline(update.step, color=palette.muted, lw=0.9, ls=(0, (3, 3)), zorder=0)
    axes.set_xlim(left=0)
    if history:
        checks, bottom = [update.step for update in history], axes.get_xaxis_transform()
        axes.vlines(checks, 0, 0.03, color=palette.ink, lw=1, transform=bottom)
    _scale(axes, [value for curve in curves.values() for value in curve.values()])
    if len(curves) > 1:
        _legend(axes, palette)


def draw_spectra(
    axes: Axes, spectra: Spectra, cutoff: float | None = None, palette: Palette = PAPER, room: Room | None = None
) -> None:
    """Singular values of Σ over the largest of their layer; a line for each layer, a colour for each kind."""
    _style(axes, palette, room, "Spectrum of Σ", "σ / largest σ")
    axes.set_xlabel("direction")
    for colour, (label, members) in zip(palette.series, _series(spectra), strict=False):
        for number, name in enumerate(members):
            points = _relative(spectra[name])
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                lw=1.6 if len(members) == 1 else 0.9,
                alpha=1 if len(members) == 1 else 0.55,
                marker="." if len(points) == 1 else None,
                label=None if number else label,
            )
    _use_logarithm(axes)
    if cutoff:
        axes.axhline(cutoff, color=palette.ink, lw=0.9, ls=(0, (3, 3)), label=f"cutoff β = {cutoff:g}")
    _legend(axes, palette)


# ---- parts ---------------------------------------------------------------------------------------------------------------


def layers_of(history: Sequence[OIALRUpdate]) -> list[str]:
    """Names of the layers that the checks mention, those that were dense first."""
    return list(
        dict.fromkeys(name for update in history for name in (*update.stability, *update.frozen, *update.ranks))
    )


def trainable_at(history: Sequence[OIALRUpdate], step: int) -> float | None:
    """Trainable share after the last check before this step or at it, in percent; `None` before the first check."""
    before = [update for update in history if update.step <= step]
    return before[-1].trainable_percent if before else None


def _series(names: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Label and layers of each line: single layers, or kinds if there are more than eight."""
    if len(names) <= len(PAPER.series):
        return [(tick.text, [name]) for tick, name in zip(layer_ticks(list(names)), names, strict=True)]
    return list(kinds(list(names), len(PAPER.series)).items())


def _relative(values: Sequence[float]) -> list[tuple[int, float]]:
    """Number and relative size of some of the directions, evenly spread."""
    largest = max(values, default=0.0) or 1.0
    chosen = sorted({round(i * (len(values) - 1) / (_POINTS - 1)) for i in range(_POINTS)}) if values else []
    return [(index + 1, max(_SMALLEST, values[index] / largest)) for index in chosen]


def _style(axes: Axes, palette: Palette, room: Room | None, title: str, ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_title(title, color=palette.ink, loc="left", size="medium", weight="bold")
    axes.set_xlabel("optimizer step", color=palette.ink)
    axes.set_ylabel(ylabel, color=palette.ink)
    axes.set_facecolor("none")
    axes.grid(True, color=palette.grid, lw=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(color=palette.muted, labelcolor=palette.ink, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(palette.muted)
    axes.xaxis.set_major_locator(MaxNLocator((room or Room()).ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis for positive values that differ by more than their first digits."""
    if values and min(values) > 0 and max(values) > _WIDE * min(values):
        _use_logarithm(axes)


def _use_logarithm(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))


def _legend(axes: Axes, palette: Palette) -> None:
    """Below the axes, where it hides nothing; none for a single line without a label."""
    handles, labels = axes.get_legend_handles_labels()
    if any(labels):
        axes.legend(
            handles,
            labels,
            loc="upper left",
            bbox_to_anchor=(-0.02, -0.18),
            ncols=2,
            frameon=False,
            labelcolor=palette.ink,
            fontsize="small",
            handlelength=1.4,
            columnspacing=1.2,
            borderaxespad=0,
        )
