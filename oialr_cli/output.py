"""What the commands print: aligned text that stays readable in a pipe, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from oialr_peft.files.described import SavedLayer, layer_group, layer_kinds
from oialr_peft.report.comparison import ABSENT, Comparison
from oialr_peft.report.estimate import Estimate, Phase
from oialr_peft.report.ranks import aligned
from oialr_peft.report.words import byte_size, setting
from oialr_peft.storage.inspection import Inspection


def print_json(content: Any) -> None:
    """One JSON document; numbers that JSON does not know never get here."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def write_text(file: Path, text: str) -> None:
    """Write a file.

    Raises:
        ValueError: its directory does not exist.
    """
    if not file.parent.is_dir():
        raise ValueError(f"`{file.parent}` is no directory, so {file.name} cannot be written there. Make it first.")
    file.write_text(text, encoding="utf-8")


def inspection_text(found: Inspection, *, every_layer: bool) -> str:
    """Facts, layers, settings."""
    facts = {
        "kind": found.kind,
        "location": found.location,
        "format": str(found.format_version),
        "base model": found.base_model or "not named",
        "size": f"{byte_size(found.bytes)}, {found.stored + found.others:,} numbers",
        "target layers": f"{len(found.layers)}, {found.stored:,} numbers for {found.dense:,}{_compression(found)}",
    }
    if found.record is not None:
        facts["run"] = (
            f"step {found.record.steps:,} of {found.record.total_steps:,}, {len(found.record.history)} checks"
        )
    parts = [_facts(facts), _layer_rows(found.layers) if every_layer else _kind_rows(found.layers)]
    if found.settings:
        parts.append(_facts({name: setting(value) for name, value in found.settings.items()}))
    return "\n\n".join(parts)


def _compression(found: Inspection) -> str:
    return f", compression {found.dense / found.stored:.2f}×" if found.stored else ""


def _layer_rows(layers: Sequence[SavedLayer]) -> str:
    rows = [
        [
            layer.name,
            f"{layer.out_features}×{layer.in_features}",
            "dense" if layer.rank is None else str(layer.rank),
            f"{layer.stored_parameters:,}",
            f"{layer.dense_parameters / layer.stored_parameters:.2f}×",
        ]
        for layer in layers
    ]
    return aligned(("layer", "shape", "rank", "stored", "compression"), rows)


def _kind_rows(layers: Sequence[SavedLayer]) -> str:
    rows = []
    for kind in layer_kinds(layers):
        ranks = kind.ranks
        rows.append(
            [
                kind.name,
                f"{kind.out_features}×{kind.in_features}",
                str(len(kind.layers)),
                str(len(kind.layers) - len(ranks)),
                f"{min(ranks)} / {sum(ranks) / len(ranks):.1f} / {max(ranks)}" if ranks else "",
                f"{sum(layer.stored_parameters for layer in kind.layers):,}",
                f"{kind.compression:.2f}×",
            ]
        )
    header = ("layers", "shape", "count", "dense", "rank: min / mean / max", "stored", "compression")
    return aligned(header, rows)


def estimate_text(found: Estimate) -> str:
    """Phases, then shapes."""
    phases = [[row.name, *_phase_cells(row)] for row in found.phases]
    header = ("", "parameters", "trainable", "weights", "gradients", "AdamW", "sum", "MFLOP/token", "inference")
    shapes = [
        [
            f"{shape.out_features}×{shape.in_features}",
            str(shape.layers),
            str(shape.rank),
            f"{shape.training_below:.0f}",
            f"{shape.inference_below:.0f}",
        ]
        for shape in found.shapes
    ]
    crossovers = aligned(("shape", "layers", "rank", "training below", "inference below"), shapes)
    return (
        f"{found.model}, {found.mode} mode. Estimated from shapes, not measured; without activations and attention scores.\n\n"
        f"{aligned(header, phases)}\n\nFactors are cheaper than a dense weight below these ranks:\n\n{crossovers}"
    )


def _phase_cells(phase: Phase) -> list[str]:
    sizes = (phase.weight_bytes, phase.gradient_bytes, phase.moment_bytes, phase.total_bytes)
    return [
        f"{phase.parameters:,}",
        f"{phase.trainable:,}",
        *map(byte_size, sizes),
        f"{phase.training_flops / 1e6:,.4g}",
        f"{phase.inference_flops / 1e6:,.4g}",
    ]


def comparison_text(found: Comparison) -> str:
    """Figures, settings that differ, ranks that differ."""
    header = ("", *found.names)
    parts = [aligned(header, [row.row for row in found.figures])]
    differing = [[name, *map(setting, pair)] for name, pair in found.differing_settings.items()]
    parts.append(aligned(("settings that differ", *found.names), differing) if differing else "No setting differs.")
    parts.append(aligned(("mean rank", *found.names), _mean_ranks(found)))
    return "\n\n".join(parts)


def _mean_ranks(found: Comparison) -> list[list[str]]:
    """By kind of layers; the page and the JSON have each layer."""
    kinds: dict[str, tuple[list[int], list[int]]] = {}
    for name, pair in found.ranks.items():
        of_kind = kinds.setdefault(layer_group(name), ([], []))
        for ranks, rank in zip(of_kind, pair, strict=True):
            ranks += [] if rank is None else [rank]
    return [
        [name, *(f"{sum(ranks) / len(ranks):,.1f}" if ranks else ABSENT for ranks in pair)]
        for name, pair in kinds.items()
    ]


def _facts(facts: dict[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
