"""Pages of the site that are made from something else: the README is the front page, the settings are `OIALRConfig`'s.

Links that lead out of `docs/` (to code, to tests) become plain text on the site, where that code is not; that what they
name exists is checked.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from griffe import Docstring, DocstringSectionParameters
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from oialr_peft import OIALRConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")

SETTINGS_INTRODUCTION = """\
# Settings

Every field of `OIALRConfig`, from its source. Steps follow `transformers.TrainingArguments`: an int ≥ 1 is a number of
optimizer steps, a float in (0, 1) a fraction of all of them. Ranks and floors: an int ≥ 1 is a count, a float in (0, 1) a
fraction of k = min(out, in) of each layer, rounded up. [Choose settings](choosing.md) says which to change, and when.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, content in (("index.md", front_page()), ("settings.md", settings_page())):
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Make plain text of links that lead out of the documentation."""
    return LINK.sub(lambda link: _inside(link, page.file.src_uri), markdown)


def front_page() -> str:
    """The README, with its links as seen from the site, and no list of pages beside it: it is the only one of its kind."""
    return "---\nhide: [navigation]\n---\n\n" + LINK.sub(_from_readme, (ROOT / "README.md").read_text(encoding="utf-8"))


def _from_readme(link: re.Match[str]) -> str:
    target, anchor = link["target"], link["anchor"] or ""
    if "://" in target or not target:
        return link[0]
    if target.startswith("docs/"):
        text = _title_of(ROOT / target) if link["text"] == target else link["text"]
        return f"[{text}]({target.removeprefix('docs/')}{anchor})"
    return f"[{link['text']}](../{target}{anchor})"


def _title_of(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _inside(link: re.Match[str], page: str) -> str:
    target = link["target"]
    if not target.startswith("../"):
        return link[0]
    if target == "../README.md":
        return f"[{link['text']}](index.md{link['anchor'] or ''})"
    path = (DOCS / page).parent / target
    if not path.exists():
        raise PluginError(f"{page} links to {target}, which does not exist.")
    return link[0] if path.resolve().is_relative_to(DOCS) else link["text"]


def settings_page() -> str:
    """One entry for every field that `OIALRConfig` declares: type, default, and what its docstring says."""
    return "\n".join([SETTINGS_INTRODUCTION, *_entries()])


def _entries() -> Iterator[str]:
    sections = Docstring(OIALRConfig.__doc__ or "").parse("google", warnings=False)
    described = {
        parameter.name: " ".join(parameter.description.split())
        for section in sections
        if isinstance(section, DocstringSectionParameters)
        for parameter in section.value
    }
    for field in dataclasses.fields(OIALRConfig):
        if field.name not in OIALRConfig.__annotations__:  # PEFT's own
            continue
        if field.name not in described:
            raise PluginError(f"The docstring of OIALRConfig does not describe `{field.name}`.")
        text = _as_sentence(described[field.name])
        yield f"## `{field.name}`\n\n`{field.type}`, default `{field.default!r}`\n\n{text}\n"


def _as_sentence(text: str) -> str:
    """With a capital at the start, except of a symbol: ν is no N."""
    return f"{text[0].upper()}{text[1:]}" if text[0].isascii() else text
