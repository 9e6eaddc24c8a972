"""Two runs side by side: as rows of text, as data, and as an HTML page."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from oialr_peft.report import plots
from oialr_peft.report.page import Cell, Column, Table, number, plain_table, render
from oialr_peft.report.svg import Plot, plot
from oialr_peft.report.words import duration, figure, metric_name, percent, setting
from oialr_peft.storage.record import RunRecord, find_record, read_record

ABSENT = "–"


class Figure(NamedTuple):
    """A figure of both runs."""

    key: str  # in machine-readable output
    title: str
    values: tuple[float | None, float | None]  # `None` where a run does not have it
    write: Callable[[float], str]

    @property
    def row(self) -> tuple[str, ...]:
        """Title and both values as text."""
        return self.title, *(ABSENT if value is None else self.write(value) for value in self.values)


class Comparison(NamedTuple):
    """Two runs, each with the name of its directory."""

    names: tuple[str, str]
    records: tuple[RunRecord, RunRecord]

    @classmethod
    def of(cls, one: str | os.PathLike[str], other: str | os.PathLike[str]) -> Comparison:
        """Read two run directories.

        Raises:
            ValueError: one has no record, or it is damaged.
        """
        names = Path(one).resolve().name, Path(other).resolve().name
        if names[0] == names[1]:
            names = os.fspath(one), os.fspath(other)
        return cls(names, (read_record(find_record(one)), read_record(find_record(other))))

    @property
    def figures(self) -> list[Figure]:
        """Last metrics, then sizes, then times."""
        metrics = dict.fromkeys(name for record in self.records for name in record.final_metrics)
        found = [self._figure(name, metric_name(name), partial(_last, name), figure) for name in metrics]
        return [
            *found,
            self._figure("trainable_percent_mean", "Trainable, mean over the checks", _trainable_mean, percent),
            self._figure("trainable_percent", "Trainable, at the end", _trainable_end, percent),
            self._figure("rank_mean", "Mean rank", lambda record: record.rank_mean, "{:,.1f}".format),
            self._figure("factored_layers", "Factored layers", lambda record: record.factored, "{:,}".format),
            self._figure("layers", "Target layers", lambda record: len(record.layers), "{:,}".format),
            self._figure("stored_parameters", "Numbers stored of target layers", _stored, "{:,}".format),
            self._figure("steps", "Optimizer steps", lambda record: record.steps, "{:,}".format),
            self._figure("seconds", "Training time", lambda record: record.seconds, duration),
            self._figure("check_seconds", "Time in checks", lambda record: record.check_seconds, duration),
        ]

    def _figure(
        self, key: str, title: str, of: Callable[[RunRecord], float | None], write: Callable[[float], str]
    ) -> Figure:
        return Figure(key, title, (of(self.records[0]), of(self.records[1])), write)

    @property
    def differing_settings(self) -> dict[str, tuple[Any, Any]]:
        """Settings and arguments that are not the same, by name; `None` where a run does not have one."""
        both: list[Mapping[str, Any]] = [
            {"total_steps": record.total_steps, "model": record.model, **record.settings, **record.arguments}
            for record in self.records
        ]
        names = dict.fromkeys([*both[0], *both[1]])
        pairs = {name: (both[0].get(name), both[1].get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @property
    def ranks(self) -> dict[str, tuple[int | None, int | None]]:
        """Rank of each layer, min(m, n) of a dense one; `None` where a run does not have the layer."""
        found = [{layer.name: layer.rank_or_full for layer in record.layers} for record in self.records]
        return {name: (found[0].get(name), found[1].get(name)) for name in dict.fromkeys([*found[0], *found[1]])}

    def to_dict(self) -> dict[str, Any]:
        """What a program reads."""
        return {
            "runs": list(self.names),
            "figures": {found.key: list(found.values) for found in self.figures},
            "differing_settings": {name: list(pair) for name, pair in self.differing_settings.items()},
            "ranks": {name: list(pair) for name, pair in self.ranks.items()},
        }

    def to_html(self) -> str:
        """A page that loads nothing.

        Raises:
            ImportError: jinja2 or matplotlib is not installed.
        """
        settings = [(name, setting(one), setting(other)) for name, (one, other) in self.differing_settings.items()]
        return render(
            "comparison.html.jinja",
            title=" and ".join(self.names),
            kind="Two OIALR runs",
            lead=_lead(self),
            summary=plain_table(
                "figures", "At the end of each run.", ("figure", *self.names), [found.row for found in self.figures]
            ),
            plots=_plots(self),
            settings=plain_table("settings", "All others are equal.", ("setting", *self.names), settings),
            ranks=self._rank_table(),
        )

    def _rank_table(self) -> Table:
        columns = [Column("layer"), *(Column(name, True) for name in self.names), Column("difference", True)]
        rows = []
        for name, (one, other) in self.ranks.items():
            values = [Cell(ABSENT) if rank is None else number(rank) for rank in (one, other)]
            change = Cell("") if one is None or other is None else number(other - one, f"{other - one:+,}")
            rows.append([Cell(name), *values, change])
        return Table("ranks", "Rank of each target layer; a click on a heading sorts.", columns, rows, sortable=True)


def _last(metric: str, record: RunRecord) -> float | None:
    return record.final_metrics.get(metric)


def _trainable_mean(record: RunRecord) -> float | None:
    return record.trainable_percent_mean


def _trainable_end(record: RunRecord) -> float | None:
    return record.history[-1].trainable_percent if record.history else None


def _stored(record: RunRecord) -> int:
    return sum(layer.stored_parameters for layer in record.layers)


def _lead(found: Comparison) -> str:
    parts = []
    for name, record in zip(found.names, found.records, strict=True):
        share = _trainable_end(record)
        trains = "had no check yet" if share is None else f"ends with {percent(share)} of the parameters trainable"
        parts.append(f"{name} {trains}, at a mean rank of {record.rank_mean:,.1f}")
    return "; ".join(parts) + "."


def _plots(found: Comparison) -> list[Plot]:
    made: list[Plot] = []
    labelled = list(zip(found.names, found.records, strict=True))
    for name in dict.fromkeys(name for record in found.records for name in ("loss", *record.metrics)):
        curves = {label: record.curve(name) for label, record in labelled}
        if any(curves.values()):
            made.append(_curve_plot(f"metric-{len(made)}", metric_name(name), curves))
    histories = {label: record.history for label, record in labelled}
    if any(histories.values()):
        made.append(
            plot(
                "trainable",
                "Trainable parameters",
                "Share of the dense model’s parameters that trains, after each check.",
                lambda axes, *how: plots.draw_trainable(axes, histories, *how),
            )
        )
    return made


def _curve_plot(key: str, title: str, curves: Mapping[str, plots.Curve]) -> Plot:
    last = " and ".join(f"{label} {figure(curve[max(curve)])}" for label, curve in curves.items() if curve)
    return plot(key, title, f"Last: {last}.", lambda axes, *how: plots.draw_curves(axes, curves, title, (), *how))
