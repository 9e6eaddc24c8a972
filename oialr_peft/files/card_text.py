"""The text of a model card: tables, what a run did, and how to load a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from oialr_peft.files.described import Check, LayerKind, Run, SavedLayer, SavedModel, layer_group, layer_kinds

CITATION = r"""@inproceedings{coquelin2024harnessing,
  title     = {Harnessing Orthogonality to Train Low-Rank Neural Networks},
  author    = {Coquelin, Daniel and Fl{\"u}gel, Katharina and Weiel, Marie and Kiefer, Nicholas and Debus, Charlotte
               and Streit, Achim and G{\"o}tz, Markus},
  booktitle = {ECAI 2024},
  note      = {arXiv:2401.08505},
  year      = {2024}
}"""


METHOD = """\
Trained with orthogonality-informed adaptive low-rank training (OIALR, [arXiv 2401.08505](https://arxiv.org/abs/2401.08505)).
A layer trains in full until its basis U Vᵀ is stable; then U and V are frozen, only the square Σ between them trains, and
directions with small singular values are dropped. So the rank r of each layer was found, not chosen: it is stored as
U (m×r), Σ (r×r) and Vᵀ (r×n)."""


CORRECTION_METHOD = """\
Trained with orthogonality-informed adaptive low-rank training (OIALR, [arXiv 2401.08505](https://arxiv.org/abs/2401.08505))
as a correction. The weights of the base model stay as they are; the adapter holds a low-rank correction U Σ Vᵀ of each
layer. Only the square Σ trains, and directions with small singular values are dropped. A correction of rank r is stored as
U (m×r), Σ (r×r) and Vᵀ (r×n)."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right.

    >>> print(table(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|--:|
    | x | 1 |
    """
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    lines.insert(1, f"|---|{'--:|' * (len(header) - 1)}")
    return "\n".join(lines)


def layers_table(layers: Sequence[SavedLayer]) -> str:
    """Ranks and compression by kind. The last row is the sum."""
    rows = [
        [
            f"`{kind.name}`",
            str(len(kind.layers)),
            f"{kind.out_features}×{kind.in_features}",
            _ranks(kind),
            *_sizes(kind.layers),
        ]
        for kind in layer_kinds(layers)
    ]
    rows.append(["**all**", str(len(layers)), "", "", *_sizes(layers)])
    header = ("layers", "count", "m×n", "rank: min / mean / max", "parameters, dense", "stored", "compression")
    return table(header, rows)


def _ranks(kind: LayerKind) -> str:
    ranks = kind.ranks
    if not ranks:
        return "dense"
    text = f"{min(ranks)} / {sum(ranks) / len(ranks):.1f} / {max(ranks)}"
    dense = len(kind.layers) - len(ranks)
    return f"{text}, {dense} dense" if dense else text


def _sizes(layers: Sequence[SavedLayer]) -> list[str]:
    dense = sum(layer.dense_parameters for layer in layers)
    stored = sum(layer.stored_parameters for layer in layers)
    return [f"{dense:,}", f"{stored:,}", f"{dense / stored:.2f}×" if stored else ""]


def settings_table(settings: Mapping[str, Any]) -> str:
    """One row for each setting."""
    return table(("setting", "value"), [[f"`{name}`", f"`{value!r}`"] for name, value in settings.items()])


def run_text(run: Run) -> str:
    """Steps, checks, trainable share, when layers were factored, and metrics: a list and up to two tables."""
    parts = ["\n".join(f"- {line}" for line in _run_lines(run))]
    factored = [update for update in run.history if update.frozen]
    if factored:
        header = ("factored layers", "count", "step", "then trainable")
        parts.append(table(header, [row for update in factored for row in _factored_rows(update)]))
    if run.metrics:
        rows = [[f"`{name}`", f"{value:.4g}"] for name, value in run.metrics.items()]
        parts.append(table(("metric of the last evaluation", "value"), rows))
    return "\n\n".join(parts)


def _run_lines(run: Run) -> list[str]:
    lines = [f"optimizer steps: {run.steps:,}"]
    if not run.history:
        return [*lines, "checks: none"]
    first, last = run.history[0], run.history[-1]
    seconds = sum(update.seconds for update in run.history)
    return [
        *lines,
        f"checks: {len(run.history)}, which took {seconds:.2f} s in all",
        f"trainable parameters, of the dense model's {last.total:,}: {first.trainable_percent:.2f} % after the first check "
        f"(step {first.step:,}), {last.trainable_percent:.2f} % after the last (step {last.step:,})",
    ]


def _factored_rows(update: Check) -> list[list[str]]:
    counts: dict[str, int] = {}
    for name in update.frozen:
        counts[layer_group(name)] = counts.get(layer_group(name), 0) + 1
    end = [f"{update.step:,}", f"{update.trainable_percent:.2f} %"]
    return [[f"`{name}`", str(count), *end] for name, count in counts.items()]


def adapter_loading(
    saved: SavedModel,
    *,
    location: str,
    base_model: str | None,
    revision: str | None = None,
    from_scratch: bool = False,
) -> str:
    """How to load an adapter: a sentence when the reader has something to fill in, and code.

    Args:
        saved: what was saved.
        location: repository or directory that it is loaded from.
        base_model: repository of the base model; `None` if there is none.
        revision: of that repository; `None` means its main branch.
        from_scratch: whether the adapter holds everything that trained, so that a model from a configuration will do.
    """
    lines, before = ["import oialr_peft  # registers the method with PEFT", "from peft import PeftModel"], ""
    known = saved.base_class is not None and (base_model is not None or from_scratch)
    if known:
        lines.append(f"from transformers import {saved.base_class}")
    if known and base_model is not None:
        version = "" if revision is None else f', revision="{revision}"'
        labels = "" if saved.num_labels is None else f", num_labels={saved.num_labels}"
        lines += ["", f'base_model = {saved.base_class}.from_pretrained("{base_model}"{version}{labels})']
    elif known:
        before = "The adapter holds every weight. Let `config` be the configuration that the model was made from.\n\n"
        lines += ["", f"base_model = {saved.base_class}(config)"]
    else:
        before = "Let `base_model` be the model that the adapter was trained on.\n\n"
        lines.append("")
    folder = "" if saved.adapter_name == "default" else f', subfolder="{saved.adapter_name}"'
    lines.append(f'model = PeftModel.from_pretrained(base_model, "{location}"{folder})')
    return f"{before}{_python(lines)}"


def low_rank_loading(saved: SavedModel, *, location: str) -> str:
    """How to load a standalone low-rank model, and how to make it dense; see `adapter_loading`."""
    lines, before = ["import oialr_peft  # makes transformers know the format"], ""
    if saved.base_class is None:
        before = "Let `Model` be the class of the model.\n\n"
    else:
        lines.append(f"from transformers import {saved.base_class}")
    lines += ["", f'model = {saved.base_class or "Model"}.from_pretrained("{location}")']
    lines.append("# model = model.dequantize()  # a plain transformers model with dense weights")
    return f"{before}{_python(lines)}"


def _python(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])
