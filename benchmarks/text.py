"""What the benchmarks on language models share: documents, packed sequences, losses, and the memory of a step."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import Training
from memory import peak_bytes
from torch import Tensor, nn

HELD_OUT = 0.05  # share of the documents


def documents(path: str) -> list[str]:
    """The texts of a file.

    Args:
        path: plain text, split at blank lines; or JSON, a list of texts or a map from title to text, to a list of texts,
            or to an entry with an "extract".
    """
    text = Path(path).read_text(encoding="utf-8")
    if not path.endswith(".json"):
        return [part.strip() for part in text.split("\n\n") if part.strip()]
    loaded = json.loads(text)
    entries = loaded.values() if isinstance(loaded, dict) else loaded
    return [found for entry in entries if (found := _text_of(entry).strip())]


def _text_of(entry: Any) -> str:
    if isinstance(entry, dict):
        return entry["extract"]
    return entry if isinstance(entry, str) else "\n".join(entry)


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents, by a fixed shuffle."""
    shuffled = random.Random(0).sample(texts, len(texts))
    count = math.ceil(HELD_OUT * len(texts))
    return shuffled[count:], shuffled[:count]


def packed(encoded: Iterable[list[int]], length: int, first: int | None = None) -> Tensor:
    """Tokens of documents, one after the other, in rows of `length`; each starts with `first`, if that is given."""
    stream = torch.tensor([token for ids in encoded for token in ids])
    width = length if first is None else length - 1
    rows = stream[: len(stream) // width * width].view(-1, width)
    if not len(rows):
        raise ValueError(
            f"`--text` must hold {width} tokens or more in each split, but holds {len(stream)}. Give more."
        )
    return rows if first is None else torch.cat([rows.new_full((len(rows), 1), first), rows], 1)


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches without end; every row comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        while len(order) < size:
            order += torch.randperm(len(rows), generator=generator).tolist()
        yield rows[order[:size]]
        order = order[size:]


def loss_on(model: nn.Module, rows: Tensor) -> Tensor:
    """What is trained on: the mean loss of the next token, and what the model's adapter adds to it, with gradient."""
    return model(input_ids=rows, labels=rows, use_cache=False).loss


@torch.no_grad()
def evaluated(model: nn.Module, rows: Tensor, size: int) -> float:
    """Mean loss of the next token over all rows and nothing else, in evaluation mode."""
    model.eval()
    total = 0.0
    for part in rows.split(size):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        total += nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / rows[:, 1:].numel()


def step_and_peak(training: Training, loss: Callable[[], Tensor], device: torch.device) -> tuple[Any, int]:
    """One step of a training, and its peak memory in bytes: weights, optimizer state, gradients, activations."""
    found = []
    peak = peak_bytes(lambda: found.append(training.step(loss)), list(_resident(training)), device)
    return found[0], peak


def _resident(training: Training) -> Iterator[Tensor]:
    yield from training.model.parameters()
    yield from training.model.buffers()
    for state in training.optimizer.state.values():
        # GaLore keeps a projector there
        values = (getattr(value, "ortho_matrix", value) for value in state.values())
        yield from (value for value in values if isinstance(value, Tensor))
