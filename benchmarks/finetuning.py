r"""Text classification with a pretrained encoder: full fine-tuning, PEFT's methods and OIALR with the same budget.

    python benchmarks/finetuning.py --model MODEL --train train.tab --test test.tab \
        --run full full '{}' --run lora lora '{"r": 16}' --run oialr oialr '{"mode": "replace", "max_output_loss": 0.001}'

Each `--run` is a name, a method (`full`, `oialr`, or a method of PEFT by its name) and the settings of its configuration as
JSON; "lr" among them is the learning rate. The files are tab-separated, three header rows, label and text. The head, new and dense,
trains in every run, with the learning rate `--head-lr`: what is best for an adapter or a pretrained weight is too little for it.
Printed are means and standard deviations over seeds:

accuracy      on the test file (the first `--evaluated` rows of a fixed shuffle)
trainable     percent of the dense model's parameters that train after the last step, head included
jump          largest relative rise of the loss on one fixed batch from before a check to after it
s/step        seconds per step, checks included
checkpoint    MB of what `save_pretrained` writes

`--output` keeps every run as one line of JSON.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import METHODS, adapted, checked, jobs_of, parser, print_spreads, start, trained, training_options, tuned
from peft import TaskType
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from oialr_peft import OIALRController

PROBE = 64  # texts of the fixed batch on which jumps are measured


def read(path: str) -> list[tuple[str, str]]:
    """(label, text) of each row."""
    csv.field_size_limit(1 << 24)
    with Path(path).open(encoding="utf-8", errors="replace", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[3:]
    return [(row[0], row[1]) for row in rows if len(row) == 2 and row[1].strip()]


class Task:
    """Tokenized texts with their labels."""

    def __init__(self, args: argparse.Namespace) -> None:
        train, test = read(args.train), read(args.test)
        self.labels = sorted({label for label, _ in train})
        index = {label: i for i, label in enumerate(self.labels)}
        test = [row for row in test if row[0] in index]
        random.Random(0).shuffle(test)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.train, self.test = (
            (self._tokens(tokenizer, rows, args.length), torch.tensor([index[label] for label, _ in rows]))
            for rows in (train, test[: args.evaluated])
        )

    @staticmethod
    def _tokens(tokenizer: Any, rows: list[tuple[str, str]], length: int) -> dict[str, Tensor]:
        texts = [text for _, text in rows]
        return dict(tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt"))


def batch_of(tokens: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: values[rows] for name, values in tokens.items()}


@torch.no_grad()
def accuracy(model: nn.Module, tokens: dict[str, Tensor], labels: Tensor) -> float:
    model.eval()
    rows = torch.arange(len(labels)).split(100)
    correct = sum((model(**batch_of(tokens, part)).logits.argmax(-1) == labels[part]).sum().item() for part in rows)
    model.train()
    return correct / len(labels)


def groups_of(model: nn.Module, lr: float, head_lr: float) -> list[dict[str, Any]]:
    """The trained parameters, each part with its learning rate: all but the head, and the head."""
    body: dict[str, Any] = {"params": [], "lr": lr}
    head: dict[str, Any] = {"params": [], "lr": head_lr}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if "classifier" in name.split(".") else body)["params"].append(parameter)
    return [body, head]


def train(method: str, settings: dict[str, Any], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run, and what is reported of it."""
    torch.set_num_threads(args.threads or 1)
    task = Task(args)
    torch.manual_seed(seed)
    settings = dict(settings)
    lr = settings.pop("lr", args.lr)
    base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(task.labels))
    dense = sum(p.numel() for p in base.parameters())
    model = adapted(base, method, settings, TaskType.SEQ_CLS, args.steps).train()
    optimizer = torch.optim.AdamW(groups_of(model, lr, lr if args.head_lr is None else args.head_lr), weight_decay=0.01)
    scheduler = get_linear_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    controller = OIALRController(model, optimizer, total_steps=args.steps) if method == "oialr" else None
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = task.train
    loss_of = nn.CrossEntropyLoss()
    fixed = torch.arange(len(labels))[:: max(1, len(labels) // PROBE)][:PROBE]

    @torch.no_grad()
    def probe() -> float:
        model.eval()
        loss = loss_of(model(**batch_of(tokens, fixed)).logits, labels[fixed]).item()
        model.train()
        return loss

    jumps, losses, seconds = [0.0], [], 0.0
    for step in range(1, args.steps + 1):
        started = time.perf_counter()
        rows = torch.randint(len(labels), (args.batch,), generator=generator)
        loss = loss_of(model(**batch_of(tokens, rows)).logits, labels[rows])
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        scheduler.step()
        if method == "adalora":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        seconds += time.perf_counter() - started
        if controller is not None:
            _, jump, took = checked(controller, step, probe)
            seconds += took
            jumps.append(jump)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        size = sum(file.stat().st_size for file in Path(directory).rglob("*.safetensors"))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "accuracy": accuracy(model, *task.test),
        "loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "trainable": round(100 * trainable / dense, 3),
        "jump": round(max(jumps), 4),
        "history": []
        if controller is None
        else [(u.step, len(u.frozen), u.trainable_percent) for u in controller.history],
        "seconds_per_step": round(seconds / args.steps, 4),
        "checkpoint": round(size / 1e6, 2),
    }


def one(job: tuple[str, str, dict[str, Any], int, argparse.Namespace]) -> dict[str, Any]:
    """What is kept of a run."""
    name, method, settings, seed, args = job
    described = {
        "method": method,
        "settings": settings,
        "seed": seed,
        "steps": args.steps,
        "data": Path(args.train).name,
        "head_lr": args.head_lr,
        "evaluated": args.evaluated,
    }
    return {"run": name, **described, **train(method, settings, seed, args)}


def main() -> None:
    options = parser(__doc__, repeats=1)
    options.add_argument("--model", required=True, help="path or hub id of a pretrained encoder")
    options.add_argument("--train", required=True)
    options.add_argument("--test", required=True)
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--length", type=int, default=64)
    options.add_argument("--evaluated", type=int, default=1000)
    options.add_argument("--lr", type=float, default=1e-4)
    options.add_argument("--head-lr", type=float, help="(default: that of the run)")
    training_options(options)
    args = options.parse_args()
    start(args)
    jobs = tuned(one, jobs_of(args, METHODS), args, "accuracy", "maximize")
    columns = {
        "accuracy": ("accuracy", 4),
        "trainable %": ("trainable", 2),
        "jump": ("jump", 3),
        "s/step": ("seconds_per_step", 3),
        "checkpoint, MB": ("checkpoint", 2),
    }
    print_spreads(trained(one, jobs, args), [name for name, *_ in args.run], columns)


if __name__ == "__main__":
    main()
