"""matplotlib figures as SVG elements of a page: text stays text, and colours are variables of its style sheet."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from oialr_peft.report.plots import PAPER, Palette, Room

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# stand-ins that no plot uses otherwise; in the SVG, variables of the style sheet take their places
THEMED = Palette("#010201", "#010202", "#010203", "#010204", tuple(f"#01030{index}" for index in range(8)))
VARIABLES = {
    THEMED.ink: "var(--ink)",
    THEMED.muted: "var(--mark)",
    THEMED.grid: "var(--line)",
    THEMED.void: "var(--void)",
    **{colour: f"var(--series-{index})" for index, colour in enumerate(THEMED.series)},
}
assert len(THEMED.series) == len(PAPER.series)

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 13,
    "text.parse_math": False,  # names of modules are no formulas
    "text.color": THEMED.ink,
    "axes.labelcolor": THEMED.ink,
    "figure.constrained_layout.w_pad": 0.02,
}


class Size(NamedTuple):
    """A size in which a plot is drawn."""

    name: str  # class of the element: the style sheet shows one of them
    width: float  # points
    height: float
    room: Room


SIZES = (Size("wide", 580, 390, Room(16, 22, 6)), Size("narrow", 360, 340, Room(12, 14, 4)))


class Plot(NamedTuple):
    """A plot of a page."""

    key: str
    title: str
    caption: str  # what is to be seen, in words
    svg: Markup  # one element for each of `SIZES`


def plot(key: str, title: str, caption: str, draw: Callable[[Axes, Palette, Room], None]) -> Plot:
    """Draw a plot in all sizes.

    Args:
        key: prefix of its ids, which must be unique on the page.
        title: its heading; also what a screen reader says of it.
        caption: what is to be seen.
        draw: draws it with the given colours and room.
    """
    return Plot(key, title, caption, Markup("\n").join(_drawn(key, title, draw, size) for size in SIZES))


def _drawn(key: str, title: str, draw: Callable[[Axes, Palette, Room], None], size: Size) -> Markup:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_SETTINGS, "svg.hashsalt": key}):
        figure = Figure(figsize=(size.width / 72, size.height / 72), layout="constrained")
        axes = figure.subplots()
        draw(axes, THEMED, size.room)
        axes.set_title("", loc="left")  # the page has it as a heading
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, dpi=200, metadata={"Date": None})
    return _inline(file.getvalue(), f"{key}-{size.name}", title, size.name)


def _inline(svg: bytes, key: str, title: str, css_class: str) -> Markup:
    """The element as it stands in a page: its ids begin with `key`, and it has no style of its own."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            element.set(name, _rewritten(name.rpartition("}")[2], value, key))
        if f"{{{_XLINK}}}href" in element.attrib:
            element.set("href", element.attrib.pop(f"{{{_XLINK}}}href"))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"class": f"plot {css_class}", "role": "img", "aria-label": title}
    return Markup(ET.tostring(root, encoding="unicode"))


def _rewritten(name: str, value: str, key: str) -> str:
    if name == "id":
        return f"{key}-{value}"
    if name == "href" and value.startswith("#"):
        return f"#{key}-{value[1:]}"
    value = re.sub(r"url\(#", f"url(#{key}-", value)
    return (
        re.sub(r"#[0-9a-f]{6}\b", lambda colour: VARIABLES.get(colour[0], colour[0]), value)
        if name == "style"
        else value
    )
