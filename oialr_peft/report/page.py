"""HTML pages: one file that loads nothing, readable in light and dark, on paper and on a phone. Here is what all share."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment


class Tile(NamedTuple):
    """A key figure."""

    name: str
    value: str
    detail: str


class Column(NamedTuple):
    """A column of a table."""

    title: str
    is_number: bool = False


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    value: float | str = ""  # by which it is sorted
    share: float | None = None  # of a bar before the text, in [0, 1]


class Table(NamedTuple):
    """A table of a page; the first cell of a row is its heading."""

    key: str  # its id
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = False


def number(value: float, text: str | None = None, share: float | None = None) -> Cell:
    """A cell that is sorted by its value."""
    return Cell(f"{value:,}" if text is None else text, value, share)


def plain_table(key: str, caption: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of text; all columns but the first two are numbers if there are more."""
    columns = [Column(title, index > 0 and len(titles) > 2) for index, title in enumerate(titles)]
    return Table(key, caption, columns, [[Cell(text, text) for text in row] for row in rows])


def render(template: str, *, title: str, kind: str, lead: str, **content: Any) -> str:
    """The page; strings are escaped, `Markup` is not.

    Args:
        template: name of the file.
        title: of the page.
        kind: what the page is.
        lead: the most important sentence.
        **content: what the template asks for.
    """
    script = _file("sort.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            kind=kind,
            lead=lead,
            style=Markup(_file("style.css")),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            version=version("oialr-peft"),
            **content,
        )
    )


@cache
def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError('Reports need jinja2. Run: pip install "oialr-peft[cli]"') from error
    return Environment(
        loader=PackageLoader("oialr_peft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _file(name: str) -> str:
    return resources.files("oialr_peft.report").joinpath("templates", name).read_text(encoding="utf-8")
