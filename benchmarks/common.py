"""What all benchmarks share: options, timing of several things side by side, tables.

Times are medians over rounds. In each round everything that is compared runs once, in rotating order, and a ratio is
the median over rounds of the ratio within one round: a machine that slows down slows both sides.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from peft import TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from oialr_peft import OIALRConfig, OIALRController

Job = tuple[str, str, dict[str, Any], int, argparse.Namespace]  # name, method, settings, seed, options of the script

METHODS = {"full", *(kind.value.lower() for kind in PeftType)}
TUNING_SEED = 1000
SAMPLE_SECONDS = 0.02  # what is faster is called several times per sample, so that the clock does not matter


def parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark.

    Args:
        description: the docstring of the script.
        repeats: default number of rounds.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats, help=f"rounds (default {repeats})")
    made.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    made.add_argument("--dtype", default="float32", help="dtype that is computed in: float32 (default), bfloat16, …")
    made.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    return made


def start(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Set threads and seed, print what was run where, and return device and dtype."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    print(
        f"`{command}`\n{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}, torch "
        f"{torch.__version__}, {args.dtype}, {args.repeats} rounds, {datetime.date.today()}\n",
        flush=True,
    )
    return device, getattr(torch, args.dtype)


# ---- time ------------------------------------------------------------------------------------------------------------


class Timings(dict[str, list[float]]):
    """Seconds by name, one sample per round."""

    def add(self, name: str, seconds: float) -> None:
        """Append a sample."""
        self.setdefault(name, []).append(seconds)

    def median(self, name: str) -> float:
        """Median in seconds."""
        return median(self[name])

    def ratio(self, name: str, to: str) -> float:
        """Median over rounds of the time of `name` over that of `to`."""
        return median(a / b for a, b in zip(self[name], self[to]))


def seconds_of(call: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Wall-clock seconds of one call, from `calls` in a row, work on the device included."""
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    _synchronize(device)
    return (time.perf_counter() - started) / calls


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> Timings:
    """Time all calls in each of `repeats` rounds, after two calls of each to warm up."""
    each = {}
    for name, call in calls.items():
        call()
        each[name] = max(1, min(1000, math.ceil(SAMPLE_SECONDS / seconds_of(call, device))))
    timings, names = Timings(), list(calls)
    for _ in range(repeats):
        for name in names:
            timings.add(name, seconds_of(calls[name], device, each[name]))
        names.append(names.pop(0))
    return timings


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


# ---- trainings -------------------------------------------------------------------------------------------------------


def training_options(made: argparse.ArgumentParser) -> None:
    """Options of benchmarks that train several settings with several seeds."""
    made.add_argument("--run", nargs=3, action="append", required=True, metavar=("NAME", "METHOD", "JSON"))
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    made.add_argument("--output", help="file that every run is added to")
    made.add_argument(
        "--trials",
        type=int,
        default=0,
        help='tune with so many trials the settings that are written as {"range": [low, high]} (on a logarithmic scale) or '
        '{"choices": […]}; tuned with seed 1000, which is not among the results',
    )


def jobs_of(args: argparse.Namespace, methods: Collection[str]) -> list[Job]:
    """The runs that `--run` and `--seeds` ask for, seed by seed.

    Raises:
        ValueError: for a method that is not in `methods`, and for a name that stands twice.
    """
    names = [name for name, *_ in args.run]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"`--run` must have different names, but {', '.join(sorted(twice))} is there twice. Rename one."
        )
    for name, method, _ in args.run:
        if method not in methods:
            raise ValueError(
                f"`--run` must name one of the methods {', '.join(sorted(methods))}, but the method of {name!r} is "
                f"{method!r}. Name, method and settings follow each other."
            )
    return [(name, method, json.loads(text), seed, args) for seed in args.seeds for name, method, text in args.run]


def tuned(
    run: Callable[[Any], dict[str, Any]], jobs: Sequence[Job], args: argparse.Namespace, objective: str, direction: str
) -> list[Job]:
    """The jobs with their settings tuned: as many trials for each run that has something to tune.

    Args:
        run: trains one job.
        jobs: of all runs and seeds.
        args: `--trials`, and what `run` needs.
        objective: key of the result that is tuned for.
        direction: `"minimize"` or `"maximize"`.
    """
    best: dict[str, dict[str, Any]] = {}
    for name, method, settings, _, _ in jobs:
        if name in best or not any(map(_is_open, settings.values())):
            best.setdefault(name, settings)
            continue
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=0))
        for _ in range(args.trials):
            trial = study.ask()
            tried = {key: _suggested(trial, key, value) for key, value in settings.items()}
            result = _kept(run((f"{name}, trial {trial.number}", method, tried, TUNING_SEED, args)), args)
            study.tell(trial, result[objective])
        best[name] = {key: study.best_params.get(key, value) for key, value in settings.items()}
    return [(name, method, best[name], seed, args) for name, method, _, seed, args in jobs]


def _is_open(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() <= {"range", "choices"}


def _suggested(trial: Any, name: str, value: Any) -> Any:
    if not _is_open(value):
        return value
    if "choices" in value:
        return trial.suggest_categorical(name, value["choices"])
    return trial.suggest_float(name, *value["range"], log=True)


def adapted(model: nn.Module, method: str, settings: dict[str, Any], task: TaskType, steps: int) -> Any:
    """The model with an adapter of the method (`oialr`, or one of PEFT by its name); `full` leaves it as it is."""
    if method == "full":
        return model
    if method == "oialr":
        return get_peft_model(model, OIALRConfig(task_type=task, **settings))
    if method == "adalora":
        settings = {"total_step": steps, **settings}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.upper())]
    return get_peft_model(model, config(task_type=task, **settings))


def checked(controller: Any, step: int, probe: Callable[[], float]) -> tuple[Any, float, float]:
    """Let the controller count a step: its update if that was a check, the rise of the probe's loss, and the seconds."""
    before = probe() if controller.schedule.is_check(step) else 0.0
    started = time.perf_counter()
    update = controller.step()
    seconds = time.perf_counter() - started
    return update, 0.0 if update is None else probe() / before - 1, seconds


class Training:
    """One run of a model: warm-up and cosine decay, OIALR's checks where there are any, and what is reported of them.

    Args:
        model: with its adapter, in training mode.
        optimizer: of all that trains.
        steps: optimizer steps of the whole run.
        total: parameters of the dense model.
        adaptive: whether the model has an OIALR adapter.
        probe: loss on one fixed batch, before and after every check; `None` looks for no jumps.
        after_step: called with the number of each step, before gradients are cleared.

    Attributes:
        seconds: of all steps and checks so far.
        percent: trainable parameters in percent of `total`, after the last step.
        trainable: the same after each step.
        losses: of each step.
        jumps: relative rise of the probe's loss in each check.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        *,
        total: int,
        adaptive: bool,
        probe: Callable[[], float] | None = None,
        after_step: Callable[[int], Any] | None = None,
    ) -> None:
        self.model, self.optimizer, self.probe, self.after_step = model, optimizer, probe, after_step
        self.scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
        self.controller = OIALRController(model, optimizer, total_steps=steps) if adaptive else None
        self.seconds = 0.0
        self.percent = 100 * sum(p.numel() for p in model.parameters() if p.requires_grad) / total
        self.trainable: list[float] = []
        self.losses: list[float] = []
        self.jumps = [0.0]

    def step(self, loss_of_batch: Callable[[], Tensor]) -> Any:
        """One optimizer step on the loss that the call returns; the controller's update if it was a check, else None."""
        started = time.perf_counter()
        loss = loss_of_batch()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        step = len(self.trainable) + 1
        if self.after_step is not None:
            self.after_step(step)
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - started
        update = None
        if self.controller is not None:
            update, jump, seconds = checked(self.controller, step, self.probe or (lambda: 1.0))
            self.seconds += seconds
            if update is not None:
                self.percent = update.trainable_percent
                self.jumps.append(jump)
        self.trainable.append(self.percent)
        return update

    def summary(self) -> dict[str, Any]:
        """What every run reports."""
        history = [] if self.controller is None else self.controller.history
        return {
            "trainable_mean": round(mean(self.trainable), 2),
            "trainable_end": round(self.percent, 2),
            "jump": round(max(self.jumps), 4),
            "frozen_at": {str(update.step): len(update.frozen) for update in history if update.frozen},
            "seconds": round(self.seconds, 1),
        }


def trained(
    run: Callable[[Any], dict[str, Any]], jobs: Sequence[Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The result of each job, printed and added to `--output` as a line of JSON as soon as it is there."""
    if args.jobs == 1:
        return [_kept(result, args) for result in map(run, jobs)]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        return [_kept(result, args) for result in pool.imap(run, jobs)]


def _kept(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The result, printed and added to `--output`."""
    line = json.dumps(result)
    print(line, flush=True)
    if args.output:
        with Path(args.output).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return result


def print_spreads(
    found: Sequence[dict[str, Any]], names: Sequence[str], columns: Mapping[str, tuple[str, int]]
) -> None:
    """A table of means ± standard deviations over seeds: a row for each name, of columns {header: (key, digits)}."""
    rows = []
    for name in names:
        own = [result for result in found if result["run"] == name]
        rows.append([name, *(spread([result[key] for result in own], digits) for key, digits in columns.values())])
    print_table(["run", *columns], rows)


# ---- tables ----------------------------------------------------------------------------------------------------------


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table, aligned for reading as plain text; the first column to the left, others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths)))
        return f"| {' | '.join([first, *others])} |"

    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    print("\n".join([line(header), f"|{rule}|", *map(line, rows)]) + "\n", flush=True)
