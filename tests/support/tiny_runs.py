"""Runs that reports are made of: one that a tiny model really trained, and records of any size, made by hand."""

from __future__ import annotations

import math
from pathlib import Path

from trainer_runs import adapted, trained

from oialr_peft import OIALRUpdate
from oialr_peft.files.described import SavedLayer
from oialr_peft.storage.record import RunRecord

HOSTILE = '<script>document.title="owned"</script>'


def train(directory: Path, **settings: object) -> None:
    """24 steps of a tiny BERT, with evaluations and checkpoints."""
    options = {
        "save_strategy": "steps",
        "save_steps": 12,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "save_total_limit": 1,
    }
    trained(directory, model=adapted(**settings), **options)


def record(blocks: int = 2, *, stable: bool = True, evaluated: bool = True, hostile: bool = False) -> RunRecord:
    """A run of ten checks in which the layers are factored one after the other."""
    kinds = ("attention.query", "attention.value", "mlp.up")
    names = [f"model.layers.{block}.{kind}" for block in range(blocks) for kind in kinds]
    if hostile:
        names[1] = f"model.{HOSTILE}.query"
    ranks: dict[str, int] = {}
    history = []
    for check in range(1, 11):
        frozen = [name for index, name in enumerate(names) if 3 + index * 5 // len(names) == check]
        dense = [name for name in names if name not in ranks]
        measured = {name: 0.7 + 0.02 * check + 0.01 * (len(name) % 3) for name in dense} if check > 1 and stable else {}
        before = {**ranks, **dict.fromkeys(frozen, 64)}
        after = {name: max(8, 3 * rank // 4) for name, rank in before.items()}
        trainable = 64 * 64 * (len(names) - len(after)) + sum(rank**2 for rank in after.values()) + 500
        updates = {name: (before[name], after[name]) for name in after}
        history.append(
            OIALRUpdate(10 * check, measured, frozen, updates, trainable, 64 * 64 * len(names) + 500, 0.01 * check)
        )
        ranks = after
    log = [{"step": step, "loss": 3 * math.exp(-step / 30)} for step in range(5, 101, 5)]
    if evaluated:
        log += [
            {"step": step, "eval_loss": 3.1 * math.exp(-step / 30), "eval_accuracy": step / 101} for step in (50, 100)
        ]
    log.append({"step": 100, "train_runtime": 12.5})
    return RunRecord(
        steps=100,
        total_steps=100,
        adapter_name="default",
        model=HOSTILE if hostile else "BertModel",
        settings={"cutoff": 0.1, "delay": 0.3},
        arguments={"learning_rate": 1e-3, "optim": HOSTILE if hostile else "adamw_torch"},
        layers=[SavedLayer(name, 64, 64, ranks.get(name)) for name in names],
        history=history,
        log=log,
        versions={"torch": "2.13.0"},
    )
