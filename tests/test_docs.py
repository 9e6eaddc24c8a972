"""The documentation: every Python snippet is run, every error message has an entry, every link and command exists.

Snippets of a page run in order and in one namespace, in a directory of their own. What a page takes as given (a model, a
data set) is made by `SCENES`, tiny; the settings of the snippets are used as they stand.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    TrainingArguments,
    ViTConfig,
    get_linear_schedule_with_warmup,
)
from trl_models import llama, preferences, sentences, tokenizer

from oialr_peft import OIALRConfig
from oialr_peft.tuner.rules import COMBINATIONS, RULES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGE = ROOT / "oialr_peft"

# the first line of a snippet: why it cannot be run here, and what runs it instead
NOT_RUN = {
    'model.push_to_hub("user/my-adapter")': "pushes to the Hub; test_hub.py does so with a local one",
}


class Snippet(NamedTuple):
    """A fenced block of a page."""

    page: str
    section: str
    line: int
    code: str


# a heading, or a fenced block, in which "#" begins a comment
BLOCK = re.compile(r"^#+ (?P<heading>.+?)$|^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def snippets(page: Path, language: str) -> Iterator[Snippet]:
    """The fenced blocks of a language, with the heading they stand under."""
    text = page.read_text(encoding="utf-8")
    section = ""
    for block in BLOCK.finditer(text):
        section = block["heading"] or section
        if block["language"] == language:
            yield Snippet(page.name, section, text.count("\n", 0, block.start("code")) + 1, block["code"])


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks."""
    return BLOCK.sub(lambda block: block["heading"] or "", page.read_text(encoding="utf-8"))


# ---- Python ----------------------------------------------------------------------------------------------------------


def bert() -> nn.Module:
    """A BERT classifier of two layers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=16, **sizes))


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    return get_peft_model(model, OIALRConfig(task_type="SEQ_CLS", **{"mode": "replace", **settings}))


def texts(count: int = 32) -> Dataset:
    tokens = torch.arange(count * 6).reshape(count, 6) % 64
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": [index % 2 for index in range(count)]})


def images(count: int = 32) -> Dataset:
    pixels = torch.randn(count, 3, 8, 8)
    data = {"pixel_values": pixels.tolist(), "labels": [index % 2 for index in range(count)]}
    return Dataset.from_dict(data).with_format("torch")


def saved_bert() -> nn.Module:
    """A BERT that was loaded from the directory "base", as the adapter's configuration will say."""
    bert().save_pretrained("base")
    return BertForSequenceClassification.from_pretrained("base")


def language_model() -> nn.Module:
    """A Llama with a tokenizer, from the directory "my-language-model"."""
    llama().save_pretrained("my-language-model")
    tokenizer().save_pretrained("my-language-model")
    return LlamaForCausalLM.from_pretrained("my-language-model")


def loop() -> dict[str, Any]:
    """What a loop of one's own has before the first step."""
    model = adapted(bert(), freeze_when="delay", delay=4, update_every=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(texts().with_format("torch"), batch_size=4)
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, 16)
    return {"model": model, "optimizer": optimizer, "loader": loader, "scheduler": scheduler, "epochs": 2}


# page and section: what the snippets there take as given
SCENES: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
    ("README.md", "Quick start"): lambda: {
        "model": bert(),
        "training_args": TrainingArguments("runs/quick", num_train_epochs=1),
        "dataset": texts(),
    },
    ("README.md", "With the Trainer"): lambda: {
        "config": ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        "train": images(8),
        "validation": images(8),
        "preferences": preferences(),
        "_": language_model(),
    },
    ("README.md", "In a loop of your own"): loop,
    ("README.md", "Save, load, merge"): lambda: {
        "base_model": saved_bert(),
        "model": adapted(saved_bert(), freeze_when="delay", delay=0, rank=8),
        "adapted_model": adapted(saved_bert(), mode="adapter", rank=4),
    },
    ("troubleshooting.md", "Float16"): loop,
    ("fine-tuning.md", "With TRL"): lambda: {"texts": sentences(), "_": language_model()},
    ("compile.md", "torch.compile"): lambda: {"model": bert()},
    ("compile.md", "Regional compilation"): lambda: {"model": get_peft_model(llama(), OIALRConfig(mode="replace"))},
}


# pages that are run together, because a guide goes on where another one ended; all others are run alone
TOGETHER = [["pretraining.md", "fine-tuning.md", "deploy.md"]]


def runs() -> list[list[Path]]:
    """The pages with snippets, in groups that share a directory."""
    by_name = {page.name: page for page in PAGES if any(snippets(page, "python"))}
    together = [[by_name.pop(name) for name in names] for names in TOGETHER]
    return together + [[page] for page in by_name.values()]


@pytest.fixture
def _new_process(tmp_path, monkeypatch) -> Iterator[None]:
    """An empty directory, and Accelerate's state of a new process; for TRL, a device that can do bfloat16."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    # a snippet raises it; the old value comes back afterwards
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def first_line(snippet: Snippet) -> str:
    return snippet.code.splitlines()[0]


@pytest.mark.usefixtures("_new_process")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("pages", runs(), ids=lambda pages: "-".join(page.stem for page in pages))
def test_every_python_snippet_runs(pages):
    for page in pages:
        names: dict[str, Any] = {"__name__": "documentation"}
        scenes = dict(SCENES)
        for snippet in snippets(page, "python"):
            if first_line(snippet) in NOT_RUN:
                continue
            make = scenes.pop((snippet.page, snippet.section), None)
            names.update(make() if make else {})
            # line numbers of errors are those of the page
            exec(compile("\n" * (snippet.line - 1) + snippet.code, str(page), "exec"), names)


def test_what_is_prepared_and_what_is_not_run_is_on_a_page():
    found = [snippet for page in PAGES for snippet in snippets(page, "python")]
    assert NOT_RUN.keys() <= {first_line(snippet) for snippet in found}
    assert SCENES.keys() <= {(snippet.page, snippet.section) for snippet in found}


# ---- commands --------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, str]]:
    """Page, and each command line of its shell snippets, or of its text in backticks."""
    for page in PAGES:
        for snippet in snippets(page, "bash"):
            for line in snippet.code.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith(" "):
                    yield page.name, line.partition("  #")[0].strip()
        for command in re.findall(r"`((?:python|make|oialr) [^`]+)`", prose(page)):
            yield page.name, " ".join(command.split())


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_command_exists():
    seen = set()
    for page, command in commands():
        program, *arguments = command.split()
        seen.add(program)
        where = f"{page}: {command}"
        if program == "make":
            targets = [argument for argument in arguments if "=" not in argument and argument != "..."]
            assert set(targets) <= make_targets(), where
        elif program == "python" and arguments[0] != "-m":
            assert (ROOT / arguments[0]).is_file(), where
    assert {"make", "python"} <= seen


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    # `make docs` checks anchors as well, of the README too, which is the front page
    generated = {"settings.md"}
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(page)):
        if "://" not in target and target not in generated:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_tests_that_are_named_exist(page):
    text = prose(page)
    assert [path for path in re.findall(r"\btests/[\w/]+\.py", text) if not (ROOT / path).is_file()] == []
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    for name, function in re.findall(r"\b(test_\w+\.py)(?:::(\w+))?", text):
        assert f"def {function}" in files[name], f"{name}::{function}"


@pytest.mark.parametrize(("marker", "heading"), [("sentinel", "| sentinel of |"), ("slow", "| file | what only ")])
def test_the_tiers_of_tests_are_listed(marker, heading):
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    table = page[page.index(heading) :].partition("\n\n")[0]
    marked = {path.name for path in (ROOT / "tests").rglob("test_*.py") if f"mark.{marker}" in path.read_text()}
    assert set(re.findall(r"test_\w+\.py", table)) == marked


# ---- error messages --------------------------------------------------------------------------------------------------


class Message(NamedTuple):
    """An error message or warning of the package; … stands for what is filled in."""

    where: str
    text: str


def messages() -> list[Message]:
    """The messages of all errors that are made, and warnings that are given, in the package."""
    found = []
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "oialr_cli").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and _tells_the_user(node.func) and node.args):
                continue
            if ast.unparse(node.args[0]) not in FROM_THE_TABLE:
                found.append(Message(f"{path.name}:{node.lineno}", _template(node.args[0])))
    return found + [Message("rules.py", text) for text in _rules()]


# messages of `tuner/rules.py`, whose text is in its table, and what `engine/warn.py` is given
FROM_THE_TABLE = ("rule.message(asked[rule.field])", "combination.message.format(**asked)", "message")


def _rules() -> Iterator[str]:
    """What the table of rules says of values that are not allowed."""
    for rule in RULES:
        yield f"`{rule.field}` must {rule.must_be}, but is …. {rule.remedy}"
    for combination in COMBINATIONS:
        yield re.sub(r"\{\w+!r\}", "…", combination.message)


def _tells_the_user(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name.endswith("Error") or name == "warn"


def _template(message: ast.expr) -> str:
    if isinstance(message, ast.Constant):
        return str(message.value)
    if isinstance(message, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in message.values]
        return re.sub("…+", "…", "".join(map(str, parts)))
    raise AssertionError(f"{ast.unparse(message)!r} is no literal: write the message where it is raised")


def entries() -> list[str]:
    """The beginnings of messages that the troubleshooting page lists, one a line of its `text` blocks."""
    blocks = snippets(ROOT / "docs" / "troubleshooting.md", "text")
    return [line for block in blocks for line in block.code.splitlines()]


def test_every_error_message_has_an_entry():
    listed = entries()
    missing = [f"{m.where} {m.text}" for m in messages() if not any(m.text.startswith(entry) for entry in listed)]
    assert missing == []


def test_every_entry_is_a_message_that_is_raised():
    templates = [message.text for message in messages()]
    assert len(templates) > 100
    stale = [entry for entry in entries() if not any(template.startswith(entry) for template in templates)]
    assert stale == []


def test_entries_are_specific_and_listed_once():
    listed = entries()
    assert len(listed) == len(set(listed))
    vague = [entry for entry in listed if len(re.findall(r"\w{2,}", entry)) < 3]
    assert vague == []
