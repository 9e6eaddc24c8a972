"""Model cards: the section that says what the method did to a checkpoint, as Markdown, and where it goes in a card.

Everything is made from plain data. Who describes a model is `saved.py` of the tuner; who knows a run, the Trainer's mixin.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, RepoCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in `__all__`

from oialr_peft.files.card_text import (
    CITATION,
    CORRECTION_METHOD,
    METHOD,
    adapter_loading,
    layers_table,
    run_text,
    settings_table,
)
from oialr_peft.files.described import Run, SavedLayer, SavedModel, SavedSettings
from oialr_peft.files.writing import replacing

CARD_NAME = "README.md"
ADAPTER_TAGS = ("peft", "oialr")
LOW_RANK_TAGS = ("oialr",)  # not "peft": that would list a model which PEFT cannot load


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
