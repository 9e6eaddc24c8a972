"""Layer names where there is little room: shortened, grouped by block or by kind."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from oialr_peft.files.described import layer_group


class Tick(NamedTuple):
    """A label on an axis of layers."""

    position: float  # index of a layer, or the middle of several
    text: str


def common_prefix(names: Sequence[str]) -> str:
    """What all names begin with, up to and with a dot; empty for a single name.

    >>> common_prefix(["vit.layers.0.q", "vit.layers.1.q"])
    'vit.layers.'
    """
    if len(names) < 2:
        return ""
    outer = zip(*(name.split(".")[:-1] for name in names))
    return "".join(f"{parts[0]}." for parts in takewhile(lambda parts: len(set(parts)) == 1, outer))


def short_names(names: Sequence[str], width: int = 34) -> list[str]:
    """The names without what all begin with, cut in the middle where they are longer than `width` characters.

    >>> short_names(["vit.layers.0.q", "vit.layers.1.q"])
    ['0.q', '1.q']
    """
    start = len(common_prefix(names))
    return [elided(name[start:], width) for name in names]


def elided(text: str, width: int) -> str:
    """The text, with its middle left out where it is longer than `width` characters.

    >>> elided("encoder.attention", 9)
    'enco…tion'
    """
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"


def layer_ticks(names: Sequence[str], limit: int = 16, width: int = 26) -> list[Tick]:
    """Labels of an axis of layers, of at most `width` characters: each layer, or if there are more than `limit`, blocks.

    Of more than `limit` blocks, every n-th has a label.

    >>> layer_ticks(["b.0.q", "b.0.k", "b.1.q", "b.1.k"], limit=2)
    [Tick(position=0.5, text='b.0'), Tick(position=2.5, text='b.1')]
    """
    if len(names) <= limit:
        return [Tick(index, text) for index, text in enumerate(short_names(names, width))]
    blocks: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        blocks.setdefault(_block(name), []).append(index)
    stacks = {block.rpartition(".")[0] for block in blocks if block.rpartition(".")[2].isdecimal()}
    ticks = [
        Tick((found[0] + found[-1]) / 2, elided(_without_outer(block) if len(stacks) == 1 else block, width))
        for block, found in blocks.items()
    ]
    return ticks[:: -(-len(ticks) // limit)]


def _block(name: str) -> str:
    """The name up to its first index: the block of a transformer that the layer is in; without one, the whole name."""
    parts = name.split(".")
    first = next((position for position, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: first + 1])


def _without_outer(block: str) -> str:
    return ".".join(block.split(".")[-2:])


def kinds(names: Sequence[str], limit: int = 8) -> dict[str, list[str]]:
    """Names by kind: equal but for indices, such as all query projections; the kinds beyond `limit` are one, "others".

    >>> kinds(["b.0.q", "b.0.k", "b.1.q"])
    {'q': ['b.0.q', 'b.1.q'], 'k': ['b.0.k']}
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(layer_group(name), []).append(name)
    by_size = sorted(groups, key=lambda group: -len(groups[group]))
    kept = by_size if len(by_size) <= limit else by_size[: limit - 1]
    shown = dict(zip(kept, short_names(kept, 30), strict=True))
    found: dict[str, list[str]] = {}
    for group, members in groups.items():
        found.setdefault(shown.get(group, "others"), []).extend(members)
    return found
