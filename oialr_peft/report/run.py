"""The report of one run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from oialr_peft.engine.update import OIALRUpdate
from oialr_peft.files.described import layer_kinds
from oialr_peft.report import plots
from oialr_peft.report.page import Cell, Column, Table, Tile, number, plain_table, render
from oialr_peft.report.spectra import Spectra, spectra_of_checkpoint
from oialr_peft.report.svg import Plot, plot
from oialr_peft.report.words import duration, figure, metric_name, percent, setting
from oialr_peft.storage.record import RunRecord, find_record, read_record

MOST_METRICS = 4  # that have plots of their own


def run_report(run: str | os.PathLike[str], *, spectra: bool = True) -> str:
    """The report of a run as an HTML page that loads nothing.

    Args:
        run: `output_dir` of the training, or one of its checkpoints.
        spectra: whether to read Σ of the saved adapter for its singular values.

    Raises:
        ValueError: the directory has no record, or a file in it is damaged.
        ImportError: jinja2 or matplotlib is not installed.
    """
    path = find_record(run)
    record = read_record(path)
    found = _spectra(path.parent, record) if spectra else {}
    return render(
        "run.html.jinja",
        title=Path(run).resolve().name,
        kind=f"OIALR run{f' of a {record.model}' if record.model else ''}",
        lead=_lead(record),
        key_figures=_key_figures(record),
        notes=_notes(record, found if spectra else None),
        plots=_plots(record, found),
        kinds=_kinds_table(record),
        layers=_layers_table(record),
        checks=_checks_table(record),
        configuration=_configuration(record),
    )


def _spectra(directory: Path, record: RunRecord) -> Spectra:
    """Of the adapter beside the record, or of the checkpoint of the same step."""
    subfolder = None if record.adapter_name == "default" else record.adapter_name
    for place in (directory / f"{PREFIX_CHECKPOINT_DIR}-{record.steps}", directory):
        found = spectra_of_checkpoint(place, subfolder) if place.is_dir() else {}
        ranks = {layer.name: layer.rank for layer in record.layers}
        if found and all(ranks.get(name) == len(values) for name, values in found.items()):
            return {name: found[name] for name in ranks if name in found}
    return {}


# ---- words ---------------------------------------------------------------------------------------------------------------


def _lead(record: RunRecord) -> str:
    done = f"After {record.steps:,} of {record.total_steps:,} optimizer steps"
    layers = f"{record.factored} of {len(record.layers)} layers are factored"
    if not record.history:
        return f"{done}, {layers}. There was no check yet."
    share = percent(record.history[-1].trainable_percent)
    return f"{done}, {layers}, and {share} of the dense model’s parameters train."


def _key_figures(record: RunRecord) -> list[Tile]:
    dense, stored = (
        sum(getattr(layer, name) for layer in record.layers) for name in ("dense_parameters", "stored_parameters")
    )
    full = sum(min(layer.out_features, layer.in_features) for layer in record.layers) / len(record.layers)
    tiles = [Tile(metric_name(name), figure(value), _range(record, name)) for name, value in _chosen_metrics(record)]
    if record.history:
        last = record.history[-1]
        detail = f"{last.trainable:,} of {last.total:,}"
        tiles.append(Tile("Trainable parameters", percent(last.trainable_percent), detail))
    tiles += [
        Tile("Compression of target layers", f"{dense / stored:.2f}×", f"{stored:,} numbers for {dense:,}"),
        Tile(
            "Mean rank", f"{record.rank_mean:.1f}", f"of {full:.1f}; {record.factored} of {len(record.layers)} factored"
        ),
    ]
    seconds, checks = record.seconds, f"{len(record.history)} checks took {duration(record.check_seconds)}"
    if seconds is None:
        return [*tiles, Tile("Checks", duration(record.check_seconds), f"{len(record.history)} so far")]
    share = f", {percent(100 * record.check_seconds / seconds)}" if seconds else ""
    return [*tiles, Tile("Training time", duration(seconds), checks + share)]


def _chosen_metrics(record: RunRecord) -> list[tuple[str, float]]:
    """Up to two: those of evaluations, the loss last; without any, the training loss."""
    found = [(name, value) for name, value in record.final_metrics.items() if name != "loss"]
    found.sort(key=lambda item: item[0] == "eval_loss")
    return found[:2] or list(record.final_metrics.items())[:1]


def _range(record: RunRecord, name: str) -> str:
    """Lowest and highest value with their steps; which of them is good, the name alone does not say."""
    curve = record.curve(name)
    low, high = (pick(curve, key=curve.__getitem__) for pick in (min, max))
    if len(curve) == 1:
        return f"measured once, at step {low:,}"
    return f"lowest {figure(curve[low])} at step {low:,}, highest {figure(curve[high])} at step {high:,}"


def _notes(record: RunRecord, spectra: Spectra | None) -> list[str]:
    notes = []
    if record.steps < record.total_steps:
        notes.append(f"The run stopped at step {record.steps:,}, or has not ended. Write the report again when it has.")
    if not record.history:
        notes.append("There was no check, so there is nothing to plot of Stability and ranks.")
    elif not any(update.stability for update in record.history):
        notes.append("No layer was dense at two checks, so there is no Stability to plot.")
    larger = [layer for layer in record.layers if layer.stored_parameters > layer.dense_parameters]
    if larger:
        notes.append(
            f"Larger as factors than as a dense weight: {len(larger)} of {len(record.layers)} layers, whose ranks are above "
            "about half of full rank. A larger cutoff or a longer run lowers them."
        )
    if not record.metrics:
        notes.append("The model was not evaluated during the run. Set `eval_strategy` to see metrics over the steps.")
    if spectra is not None and not spectra and record.factored:
        notes.append("No adapter of the last step is saved in this directory, so the spectrum of Σ is left out.")
    return notes


# ---- plots ---------------------------------------------------------------------------------------------------------------


def _plots(record: RunRecord, spectra: Spectra) -> list[Plot]:
    made = _metric_plots(record)
    if record.history:
        made += _history_plots(record)
    if spectra:
        cutoff = record.settings.get("cutoff")
        words = (
            "Singular values of the trained Σ of each factored layer, over the largest of the layer. "
            "At the next Σ update, directions below the dashed line are dropped."
        )
        made.append(
            plot("spectrum", "Spectrum of Σ", words, lambda axes, *how: plots.draw_spectra(axes, spectra, cutoff, *how))
        )
    return made


def _metric_plots(record: RunRecord) -> list[Plot]:
    """One for each metric that was measured more than once: the key figures already show a single value."""
    groups = {"Loss": ["loss", "eval_loss"]}
    groups |= {metric_name(name): [name] for name in record.metrics if name != "eval_loss"}
    made: list[Plot] = []
    for title, names in list(groups.items())[:MOST_METRICS]:
        curves = {metric_name(name): curve for name in names if (curve := record.curve(name))}
        if any(len(curve) > 1 for curve in curves.values()):
            made.append(_curve_plot(f"metric-{len(made)}", title, curves, record.history))
    return made


def _curve_plot(key: str, title: str, curves: Mapping[str, plots.Curve], history: Sequence[OIALRUpdate]) -> Plot:
    last = " and ".join(f"{name.lower()} {figure(curve[max(curve)])}" for name, curve in curves.items())
    marks = " Ticks at the bottom are checks." if history else ""
    if any(update.frozen for update in history):
        marks += " At dashed lines layers were factored."
    return plot(
        key, title, f"Last: {last}.{marks}", lambda axes, *how: plots.draw_curves(axes, curves, title, history, *how)
    )


def _history_plots(record: RunRecord) -> list[Plot]:
    history = record.history
    last = history[-1]
    made = [
        plot(
            "trainable",
            "Trainable parameters",
            f"Share of the dense model’s {last.total:,} parameters that trains, after each check.",
            lambda axes, *how: plots.draw_trainable(axes, {"": history}, *how),
        )
    ]
    judged, _ = _chosen_metrics(record)[0] if record.metrics else ("", 0.0)
    if judged and len(record.curve(judged)) > 1:
        made.append(
            plot(
                "against",
                f"{metric_name(judged)} against trainable parameters",
                "A point for each evaluation; the run goes from left to right, to fewer trainable parameters.",
                lambda axes, *how: plots.draw_metric_against_trainable(
                    axes, history, record.curve(judged), metric_name(judged), *how
                ),
            )
        )
    if any(update.stability for update in history):
        made.append(
            plot(
                "stability",
                "Stability of dense layers",
                "Agreement of each layer’s basis with that at the check before, 1 when it did not move. "
                "Without colour: the layer is factored, or was not compared.",
                lambda axes, *how: plots.draw_stability(axes, history, *how),
            )
        )
    if any(update.ranks for update in history):
        made.append(
            plot(
                "ranks",
                "Rank of factored layers",
                "After each Σ update. With more than eight layers: mean and range of layers of one kind.",
                lambda axes, *how: plots.draw_ranks(axes, history, *how),
            )
        )
    return made


# ---- tables --------------------------------------------------------------------------------------------------------------


def _kinds_table(record: RunRecord) -> Table:
    titles = (
        "layers",
        "count",
        "factored",
        "out × in",
        "rank, lowest",
        "mean",
        "highest",
        "mean / full",
        "compression",
    )
    columns = [Column(title, index > 0) for index, title in enumerate(titles)]
    rows = []
    for kind in layer_kinds(record.layers):
        name, m, n, layers = kind
        ranks = [layer.rank_or_full for layer in layers]
        mean = sum(ranks) / len(ranks)
        rows.append(
            [
                Cell(name),
                number(len(layers)),
                number(len(kind.ranks)),
                number(m * n, f"{m:,} × {n:,}"),
                number(min(ranks)),
                number(mean, f"{mean:,.1f}"),
                number(max(ranks)),
                number(mean / min(m, n), f"{mean / min(m, n):.0%}", mean / min(m, n)),
                number(kind.compression, f"{kind.compression:.2f}×"),
            ]
        )
    return Table("kinds", "By kind: names that differ in indices only.", columns, rows, sortable=True)


def _layers_table(record: RunRecord) -> Table:
    factored_at = {name: update.step for update in record.history for name in update.frozen}
    stability = {name: value for update in record.history for name, value in update.stability.items()}
    titles = (
        "layer",
        "phase",
        "out × in",
        "rank",
        "of",
        "rank / full",
        "stored",
        "compression",
        "factored at",
        "Stability",
    )
    columns = [Column(title, index > 1) for index, title in enumerate(titles)]
    rows = []
    for layer in record.layers:
        full = min(layer.out_features, layer.in_features)
        share, compression = layer.rank_or_full / full, layer.dense_parameters / layer.stored_parameters
        phase = "dense" if layer.rank is None else "factored"
        step, measured = factored_at.get(layer.name), stability.get(layer.name)
        rows.append(
            [
                Cell(layer.name),
                Cell(phase, phase),
                number(layer.dense_parameters, f"{layer.out_features:,} × {layer.in_features:,}"),
                number(layer.rank_or_full),
                number(full),
                number(share, f"{share:.0%}", share),
                number(layer.stored_parameters),
                number(compression, f"{compression:.2f}×"),
                Cell("") if step is None else number(step),
                Cell("") if measured is None else number(measured, f"{measured:.3f}"),
            ]
        )
    caption = (
        "All target layers in the order of the model; a click on a heading sorts. "
        "Compression is of the weight as it is stored; Stability is the last that was measured."
    )
    return Table("layers", caption, columns, rows, sortable=True)


def _checks_table(record: RunRecord) -> Table:
    rows = []
    for update in record.history:
        values, shrunk = list(update.stability.values()), [before > after for before, after in update.ranks.values()]
        rows.append(
            [
                f"{update.step:,}",
                f"{sum(values) / len(values):.3f}" if values else "",
                f"{min(values):.3f}" if values else "",
                f"{len(update.frozen)}" if update.frozen else "",
                f"{sum(shrunk)} of {len(shrunk)}" if shrunk else "",
                percent(update.trainable_percent),
                duration(update.seconds),
            ]
        )
    titles = ("step", "Stability, mean", "lowest", "newly factored", "ranks that fell", "trainable", "duration")
    return plain_table("checks", "What each check found and did.", titles, rows)


def _configuration(record: RunRecord) -> list[Table]:
    parts = (
        ("settings", "OIALRConfig", record.settings),
        ("arguments", "TrainingArguments, in part", record.arguments),
        ("versions", "Releases", record.versions),
    )
    return [
        plain_table(key, caption, ("name", "value"), [(name, setting(value)) for name, value in values.items()])
        for key, caption, values in parts
        if values
    ]
