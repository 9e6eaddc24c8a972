"""Model cards: the section that says what the method did to a checkpoint, as Markdown, and where it goes in a card.

Everything is made from plain data. Who describes a model is `model.py`; who knows a run, `trainer.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from huggingface_hub import ModelCard, RepoCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in `__all__`

from oialr_peft.files.writing import replacing

CARD_NAME = "README.md"
ADAPTER_TAGS = ("peft", "oialr")
LOW_RANK_TAGS = ("oialr",)  # not "peft": that would list a model which PEFT cannot load

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


class SavedLayer(NamedTuple):
    """A target layer in a checkpoint."""

    name: str  # full module name
    out_features: int  # m
    in_features: int  # n
    rank: int | None  # None: dense

    @property
    def dense_parameters(self) -> int:
        """m·n."""
        return self.out_features * self.in_features

    @property
    def rank_or_full(self) -> int:
        """r, or min(m, n) of a dense layer."""
        return min(self.out_features, self.in_features) if self.rank is None else self.rank

    @property
    def stored_parameters(self) -> int:
        """(m + n + r)·r, or m·n of a dense layer."""
        if self.rank is None:
            return self.dense_parameters
        return (self.out_features + self.in_features + self.rank) * self.rank


class LayerKind(NamedTuple):
    """Layers of one shape whose names differ in indices only."""

    name: str  # with `*` for indices
    out_features: int  # m
    in_features: int  # n
    layers: list[SavedLayer]

    @property
    def ranks(self) -> list[int]:
        """Of the factored layers."""
        return [layer.rank for layer in self.layers if layer.rank is not None]

    @property
    def compression(self) -> float:
        """Numbers of the dense weights over those that are stored."""
        dense = len(self.layers) * self.out_features * self.in_features
        return dense / sum(layer.stored_parameters for layer in self.layers)


@dataclass(frozen=True)
class SavedModel:
    """What a card says of a model with an adapter, or of a standalone low-rank model.

    Attributes:
        layers: the target layers, in module order.
        adapter_name: under which PEFT saved it; every name but "default" is also that of its folder.
        base_class: class of the model that was adapted, if it is one of transformers.
        num_labels: of its head, if it is a classifier.
    """

    layers: tuple[SavedLayer, ...]
    adapter_name: str = "default"
    base_class: str | None = None
    num_labels: int | None = None


@dataclass(frozen=True)
class SavedSettings:
    """What a card says of an adapter's configuration.

    Attributes:
        base_model: repository or directory of the base model, if it has one.
        revision: of that repository; `None` means its main branch.
        is_correction: whether the adapter is added to the base weights.
        from_scratch: whether the adapter holds everything that trained.
        shown: settings of the method, by name.
    """

    base_model: str | None
    revision: str | None
    is_correction: bool
    from_scratch: bool
    shown: Mapping[str, Any]


class Check(Protocol):
    """What a card says of a check: an `OIALRUpdate` has all of it."""

    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def frozen(self) -> list[str]: ...  # noqa: D102
    @property
    def total(self) -> int: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102
    @property
    def trainable_percent(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class Run:
    """What a card says of a training run.

    Attributes:
        steps: optimizer steps.
        history: every check.
        metrics: of the last evaluation, by name; empty if there was none.
    """

    steps: int
    history: Sequence[Check]
    metrics: Mapping[str, float]


# ---- tables --------------------------------------------------------------------------------------------------------------


def layer_group(name: str) -> str:
    """The module name with layer indices replaced.

    >>> layer_group("bert.encoder.layer.11.attention.self.query")
    'bert.encoder.layer.*.attention.self.query'
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def layer_kinds(layers: Sequence[SavedLayer]) -> list[LayerKind]:
    """The layers by kind, in the order of the first of each."""
    groups: dict[tuple[str, int, int], list[SavedLayer]] = {}
    for layer in layers:
        groups.setdefault((layer_group(layer.name), layer.out_features, layer.in_features), []).append(layer)
    return [LayerKind(*key, members) for key, members in groups.items()]


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


# ---- a run ---------------------------------------------------------------------------------------------------------------


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


# ---- how to load ---------------------------------------------------------------------------------------------------------


def hub_id(name: str | None) -> str | None:
    """The name, if it can be that of a repository; `None` for a local directory, an impossible name or no name."""
    return name if name and _is_repo_id(name) and not os.path.isdir(name) else None


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


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


# ---- sections ------------------------------------------------------------------------------------------------------------


def section(
    title: str,
    method: str,
    loading: str,
    layers: Sequence[SavedLayer],
    settings: Mapping[str, Any],
    run: Run | None = None,
) -> str:
    """The whole section.

    Args:
        title: its heading.
        method: what it says of the method.
        loading: how to load the checkpoint.
        layers: in the checkpoint.
        settings: of the method.
        run: that trained it; `None` if it is not known.
    """
    parts = [f"## {title}", method, "### How to load", loading, "### Ranks", layers_table(layers)]
    parts += ["### Schedule", settings_table(settings)]
    if run is not None:
        parts += ["### Run", run_text(run)]
    parts += ["### Citation", f"```bibtex\n{CITATION}\n```"]
    return "\n\n".join(parts)


def with_section(text: str, made: str, key: str) -> str:
    """The text of a card with the section of this key in it exactly once; everything else stays as it is.

    A new section goes behind those of other keys; the first goes before the first heading of its level, below the title
    and what introduces the model. Markers around it, HTML comments that readers do not see, let the next call find it.

    Args:
        text: of the card, without its metadata.
        made: the section.
        key: what the section is about.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    start, end = f"<!-- oialr_peft: {key} -->", f"<!-- /oialr_peft: {key} -->"
    block = f"{start}\n{made}\n{end}".replace("\n", newline)
    # the shortest match: a lone start marker, whose end was deleted, must not swallow what follows it
    pattern = re.compile(f"{re.escape(start)}(?:(?!{re.escape(start)}).)*?{re.escape(end)}", re.DOTALL)
    first = pattern.search(text)
    if first is not None:
        return text[: first.start()] + block + pattern.sub("", text[first.end() :])
    position = _place_of_new_section(text)
    before, after = text[:position].rstrip(), text[position:].lstrip()
    return (2 * newline).join(part for part in (before, block, after) if part) + ("" if after else newline)


def _place_of_new_section(text: str) -> int:
    ours = list(re.finditer(r"<!-- /oialr_peft: .*? -->", text))
    if ours:
        return ours[-1].end()
    fenced, position = False, 0
    for line in text.splitlines(keepends=True):
        fenced ^= line.lstrip().startswith("```")
        if line.startswith("## ") and not fenced:
            return position
        position += len(line)
    return position


def directory_of(save_directory: str | os.PathLike[str], adapter_name: str) -> Path:
    """Where the card of an adapter is.

    The Hub shows one card, the `README.md` at the root of a repository. PEFT saves every adapter that is not called
    "default" in a folder of its name and writes the card beside that folder, so the section belongs there too: a reader
    finds all adapters of the repository on its page.
    """
    directory = Path(save_directory).resolve()
    is_inside = adapter_name not in ("default", "") and directory.name == adapter_name
    return directory.parent if is_inside and (directory.parent / CARD_NAME).is_file() else directory


def write_adapter_card(
    directory: str | os.PathLike[str],
    settings: SavedSettings,
    saved: SavedModel,
    *,
    repo_id: str | None = None,
    run: Run | None = None,
) -> None:
    """Put the section about an adapter into the model card of a directory.

    Args:
        directory: of the card.
        settings: of the adapter.
        saved: the adapter.
        repo_id: the repository that the directory goes to; `None` names the directory instead.
        run: that trained the adapter; `None` if it is not known.
    """
    title = (repo_id or str(Path(directory).resolve())).rpartition("/")[2]
    base_model = hub_id(settings.base_model)
    loading = adapter_loading(
        saved,
        location=repo_id or title,
        base_model=base_model,
        revision=settings.revision,
        from_scratch=settings.from_scratch,
    )
    name = saved.adapter_name
    method = CORRECTION_METHOD if settings.is_correction else METHOD
    heading = "OIALR adapter" if name == "default" else f"OIALR adapter `{name}`"
    write_section(
        directory,
        section(heading, method, loading, saved.layers, settings.shown, run),
        key=f"adapter {name}",
        library="peft",
        tags=ADAPTER_TAGS,
        base_model=base_model,
        title=title,
    )


def write_section(
    directory: str | os.PathLike[str],
    made: str,
    *,
    key: str,
    library: str,
    tags: Sequence[str],
    base_model: str | None,
    title: str,
) -> None:
    """Put a section into the model card of a directory, and its facts into the card's metadata.

    Args:
        directory: with or without a card.
        made: the section.
        key: what it is about, see `with_section`.
        library: that loads the checkpoint.
        tags: added to those that the card has.
        base_model: repository of the base model, unless the card names one; `None` if there is none.
        title: of a new card.
    """
    path = Path(directory, CARD_NAME)
    card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{{}}\n---\n\n# {title}\n")
    card.text = with_section(card.text, made, key)
    _describe(card, library, tags, base_model)
    with replacing(path) as unfinished:
        card.save(unfinished)


def _describe(card: RepoCard, library: str, tags: Sequence[str], base_model: str | None) -> None:
    data = card.data
    data["library_name"] = library
    # the Hub refuses a card whose base model is a local path or empty, which is what PEFT writes of such a model
    named = data.get("base_model")
    names = named if isinstance(named, list) else [named]
    if not all(name and _is_repo_id(name) for name in names):
        data["base_model"] = None
    data["base_model"] = data.get("base_model") or base_model
    kept = [tag for tag in data.get("tags", []) if _is_valid_tag(tag)]
    data["tags"] = list(dict.fromkeys([*kept, *tags]))


def _is_valid_tag(tag: str) -> bool:
    prefix, _, name = tag.rpartition(":")
    return prefix != "base_model:adapter" or _is_repo_id(name)
