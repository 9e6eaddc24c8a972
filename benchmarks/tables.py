"""The tables of accuracies in docs/benchmarks/, written from the raw lines in docs/results.

    python benchmarks/tables.py

Between `<!-- table: NAME -->` and `<!-- end -->` a page holds the table NAME of `TABLES`. Its rows are runs with the same settings:
mean ± standard deviation over their seeds. What was run with one seed stands in a table of its own below. Settings are named
unless they were the defaults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from common import spread

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = DOCS / "benchmarks"
RESULTS = DOCS / "results"

MARKED = re.compile(r"(<!-- table: (?P<name>.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
RULE = re.compile(r"(?:without a|with a|a) ceiling(?: of 1)?(?:, at most 4)?|restart of \d")  # in names of runs

Run = dict[str, Any]  # a line of a file
Group = Sequence[Run]  # of the same settings, one for each seed


class Key(NamedTuple):
    """What makes a row, in the order in which rows are sorted."""

    fields: tuple[Any, ...]
    method: int  # place in ORDER
    length: int  # number of settings
    name: str
    lr: float


# ---- what a run is called --------------------------------------------------------------------------------------------

ORDER = ["dense", "full", "oialr", "lora", "adalora", "psoft", "osf", "galore"]
PAPER = {"cutoff": 0.15, "freeze_when": "delay", "delay": 0.17, "layers_per_update": 0.1, "sigma_lr_scale": 1}
WORDS = {  # settings that only a benchmark has
    'moments="reset"': "Adam's moments reset",
    'moments="slice"': "Adam's moments sliced",
    'optimizer="muon"': "Muon",
    "sigma_decay=False": "no weight decay on Σ",
    'sigma_lr="spectral"': "a spectral scale of Σ's learning rate",
}


def label(method: str, settings: Mapping[str, Any], rule: str) -> str:
    """Method and settings in words; of OIALR as they are written in Python."""
    written = [f"{key}={_written(value)}" for key, value in sorted(settings.items())]
    if method in METHODS:
        named = METHODS[method](settings)
    elif settings == PAPER:
        named = "the paper's schedule"
    else:
        named = f"`{', '.join(each for each in written if each not in WORDS) or 'OIALRConfig()'}`"
    return ", ".join([named, *(WORDS[each] for each in written if each in WORDS), *([rule] if rule else [])])


METHODS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "dense": lambda settings: "dense",
    "full": lambda settings: "full fine-tuning",
    "lora": lambda settings: (
        f"{'rsLoRA' if 'use_rslora' in settings else 'LoRA'}, r = {settings['r']}"
        + (f", α = {settings['lora_alpha']}" if "lora_alpha" in settings else "")
    ),
    "adalora": lambda settings: f"AdaLoRA, r = {settings['init_r']} to {settings['target_r']}",
    "psoft": lambda settings: f"PSOFT, r = {settings['r']}",
    "osf": lambda settings: "OSF",
    "galore": lambda settings: f"GaLore, rank {settings['rank']}",
}


def _written(value: Any) -> str:
    """A value in Python, a float with two digits and without an exponent."""
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, str):
        return f'"{value}"'
    return format(Decimal(f"{value:.2g}"), "f") if isinstance(value, float) else str(value)


# ---- columns ---------------------------------------------------------------------------------------------------------

Column = Callable[[Group], str]


def number(key: str, digits: int) -> Column:
    """Mean ± standard deviation of a field."""
    return lambda runs: spread([run[key] for run in runs], digits)


def jump(runs: Group) -> str:
    """The largest rise of the loss at a check, where there are checks."""
    return number("jump", 4)(runs) if runs[0]["method"] == "oialr" else ""


def largest_jump(runs: Group) -> str:
    """The same in percent, and the largest of all seeds."""
    return f"{100 * max(run['jump'] for run in runs):.1f}" if runs[0]["method"] == "oialr" else ""


def freezes(runs: Group) -> str:
    """When layers freeze, in percent of the run."""
    shares = [100 * int(step) / run["steps"] for run in runs for step in run["frozen_at"]]
    return " to ".join(sorted({f"{share:.0f}" for share in (min(shares), max(shares))}, key=int)) if shares else ""


def seeds(runs: Group) -> str:
    """The seeds, as a range where they are many."""
    own = sorted(run["seed"] for run in runs)
    return f"{own[0]} to {own[-1]}" if len(own) > 3 else ", ".join(map(str, own))


def to_baseline(key: str, digits: int, unit: str) -> Callable[[Group, Group], str]:
    """Mean difference to the baseline with the same seeds, in points or in percent of it; none where it lacks a seed."""

    def difference(runs: Group, baseline: Group) -> str:
        other = {run["seed"]: run[key] for run in baseline}
        if not other.keys() >= {run["seed"] for run in runs}:
            return ""
        pairs = [(run[key], other[run["seed"]]) for run in runs]
        return f"{100 * mean(a - b if unit == 'points' else a / b - 1 for a, b in pairs):+.{digits}f}"

    return difference


# ---- tables ----------------------------------------------------------------------------------------------------------


class Against(NamedTuple):
    """The column that compares rows with one of them."""

    row: str  # the beginning of "settings, learning rate"
    header: str
    difference: Callable[[Group, Group], str]


@dataclass(frozen=True)
class Table:
    """What a table shows of a file.

    Args:
        file: in docs/results, without its ending.
        columns: what is shown of each group of runs, by header.
        only: which runs are shown.
        defaults: settings that are not named where they have these values.
        by: fields that begin a row, by header; runs that differ in them are different rows.
        lr: the learning rate of a run that names none.
        against: the row that others are compared with.
    """

    file: str
    columns: Mapping[str, Column]
    only: Callable[[Run], bool] = lambda run: True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    by: Mapping[str, Callable[[Run], Any]] = field(default_factory=dict)
    lr: float = 0.001
    against: Against | None = None

    def lines(self) -> str:
        """The table of several seeds, and below it that of one."""
        groups = self.groups()
        several = [key for key, runs in groups.items() if len(runs) > 1]
        single = [key for key, runs in groups.items() if len(runs) == 1]
        first = [self._markdown(several, groups, "seeds")] if several else []
        second = ["One seed each:", self._markdown(single, groups, "seed")] if single else []
        return "\n\n".join(first + second)

    def groups(self) -> dict[Key, Group]:
        """Runs of the same settings, one for each seed, in the order of rows."""
        found: dict[Key, dict[int, Run]] = {}
        for line in (RESULTS / f"{self.file}.jsonl").read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            if self.only(run):
                found.setdefault(self.key(run), {})[run["seed"]] = run
        return {key: [runs[seed] for seed in sorted(runs)] for key, runs in sorted(found.items())}

    def key(self, run: Run) -> Key:
        """The row of a run."""
        hidden = {"target_modules": "all-linear", **self.defaults}
        settings = {key: value for key, value in run["settings"].items() if key != "lr" and hidden.get(key) != value}
        rule = RULE.search(run["run"])
        fields = tuple(each(run) for each in self.by.values())
        name = label(run["method"], settings, rule[0] if rule else "")
        return Key(fields, ORDER.index(run["method"]), len(settings), name, run["settings"].get("lr", self.lr))

    def _markdown(self, keys: Sequence[Key], groups: Mapping[Key, Group], seed: str) -> str:
        header = [*self.by, "settings", "learning rate", seed, *self.columns]
        rows = [self._row(key, groups[key]) for key in keys]
        if self.against:
            header.append(self.against.header)
            rows = [[*row, self._compared(key, groups)] for key, row in zip(keys, rows)]
        left = len(self.by) + 1  # columns of words
        rule = ["---:"] * len(self.by) + ["---"] + ["---:"] * (len(header) - left)
        return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *rows])

    def _row(self, key: Key, runs: Group) -> list[str]:
        figures = [column(runs) for column in self.columns.values()]
        return [*(f"{each:,}" for each in key.fields), key.name, _written(key.lr), seeds(runs), *figures]

    def _compared(self, key: Key, groups: Mapping[Key, Group]) -> str:
        for other, runs in groups.items():
            if other.fields == key.fields and f"{other.name}, {_written(other.lr)}".startswith(self.against.row):
                return "" if other == key else self.against.difference(groups[key], runs)
        return ""


# ---- which tables there are ------------------------------------------------------------------------------------------

TRAINABLE = {"trainable %, mean": number("trainable_mean", 1), "at the end": number("trainable_end", 1)}
IMAGES = {"accuracy": number("accuracy", 3), **TRAINABLE}
SCRATCH = {"max_output_loss": 0.003, "max_rank_drop": 0.1, "sigma_basis": "singular"}
TO_DENSE = Against("dense, 0.001", "to dense, points", to_baseline("accuracy", 1, "points"))

FINE_TUNING = {"max_output_loss": 0.00005, "delay": 0.7}
CLASSES = {
    "accuracy": number("accuracy", 3),
    "loss at the end": number("loss", 2),
    "trainable % at the end": number("trainable", 2),
    "jump": jump,
    "checkpoint, MB": number("checkpoint", 1),
}
TO_FULL = to_baseline("accuracy", 2, "points")
STEPS = {"steps": lambda run: run["steps"]}
TEXTS = {"test texts": lambda run: run.get("evaluated") or 1000}

ADAPTATION = {
    "perplexity": number("perplexity", 2),
    "forgetting": number("forgetting", 3),
    "trainable %, mean": number("trainable_mean", 2),
    "largest jump, %": largest_jump,
    "memory, MB": number("memory_start", 0),
    "adapter or model, MB": number("checkpoint", 1),
}
LANGUAGE = {"perplexity": number("perplexity", 1), "TFLOP": number("tflop", 2), **TRAINABLE}
SERIES = {
    "MSE, best": number("mse", 4),
    "MAE": number("mae", 4),
    "MSE, last": number("last_mse", 4),
    "trainable %, mean": number("trainable_mean", 1),
    "at the best": number("trainable_best", 1),
    "at the end": number("trainable_end", 1),
}


def tuned(run: Run) -> bool:
    """Whether the settings of the run were found by trials, or it is a trial."""
    return "tuned" in run["run"]


def with_head(steps: int, texts: int | None = None) -> Callable[[Run], bool]:
    """Which runs have so many steps, a learning rate of their own for the head, and so many texts to test with."""
    return lambda run: (
        run["steps"] == steps and run.get("head_lr") is not None and texts in (None, run.get("evaluated") or 1000)
    )


TABLES = {
    "images": Table(
        "pretraining-cifar10", {**IMAGES, "jump": jump}, defaults={**SCRATCH, "cutoff": 0.9}, against=TO_DENSE
    ),
    "ablations": Table("ablation-cifar10", IMAGES, only=lambda run: not tuned(run), defaults=SCRATCH, against=TO_DENSE),
    "tuned": Table(
        "ablation-cifar10",
        IMAGES,
        only=lambda run: run["seed"] < 3 and (tuned(run) or run["run"] in ("dense", "drop.1")),
        defaults=SCRATCH,
    ),
    "lengths": Table(
        "lengths-cifar10",
        {**IMAGES, "layers freeze in % of the run": freezes},
        defaults=SCRATCH,
        by=STEPS,
        against=TO_DENSE,
    ),
    "r52": Table(
        "finetuning-r52",
        CLASSES,
        only=with_head(150),
        defaults=FINE_TUNING,
        against=Against("full fine-tuning, 0.0001", "to full, points", TO_FULL),
    ),
    "r52-epoch": Table(
        "finetuning-r52",
        CLASSES,
        only=with_head(400),
        defaults=FINE_TUNING,
        by=TEXTS,
        against=Against("full fine-tuning, 0.0001", "to full, points", TO_FULL),
    ),
    "r52-one-rate": Table(
        "finetuning-r52",
        CLASSES,
        only=lambda run: run.get("head_lr") is None,
        defaults={"cutoff": 0.9},
        by=STEPS,
        against=Against("full fine-tuning, 0.0003", "to full, points", TO_FULL),
    ),
    "20newsgroups": Table(
        "finetuning-20newsgroups",
        CLASSES,
        only=with_head(150, texts=3000),
        defaults=FINE_TUNING,
        against=Against("full fine-tuning, 0.0002", "to full, points", TO_FULL),
    ),
    "20newsgroups-fewer": Table(
        "finetuning-20newsgroups",
        CLASSES,
        only=with_head(150, texts=1000),
        defaults=FINE_TUNING,
        against=Against("full fine-tuning, 0.0001", "to full, points", TO_FULL),
    ),
    "20newsgroups-longer": Table(
        "finetuning-20newsgroups",
        CLASSES,
        only=with_head(400),
        defaults=FINE_TUNING,
        against=Against("full fine-tuning, 0.0001", "to full, points", TO_FULL),
    ),
    "gemma": Table(
        "adaptation-gemma",
        ADAPTATION,
        defaults={**FINE_TUNING, "update_every": 0.2},
        against=Against("full fine-tuning, 0.00002", "to full, %", to_baseline("perplexity", 1, "percent")),
    ),
    "language": Table(
        "language-summaries",
        {**LANGUAGE, "jump": jump},
        defaults=SCRATCH,
        against=Against("dense, 0.002", "to dense, %", to_baseline("perplexity", 1, "percent")),
    ),
    "language-small": Table(
        "language-small",
        LANGUAGE,
        defaults=SCRATCH,
        against=Against("dense, 0.002", "to dense, %", to_baseline("perplexity", 1, "percent")),
    ),
    "forecasting": Table(
        "forecasting-etth2",
        SERIES,
        only=lambda run: run["windows"] == 1024,
        defaults=SCRATCH,
        by={"horizon": lambda run: run["horizon"]},
        against=Against("dense, 0.001", "to dense, %", to_baseline("mse", 1, "percent")),
    ),
    "forecasting-short": Table(
        "forecasting-etth2",
        SERIES,
        only=lambda run: run["windows"] == 512,
        defaults=SCRATCH,
        by={"horizon": lambda run: run["horizon"]},
        against=Against("dense, 0.001", "to dense, %", to_baseline("mse", 1, "percent")),
    ),
}


def filled(text: str) -> str:
    """The text of a page with its tables."""
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found['name']].lines()}\n\n{found[3]}", text)


def main() -> None:
    for page in sorted(PAGES.glob("*.md")):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
