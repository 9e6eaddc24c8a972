"""The benchmarks, each run at a tiny size: the rows are there and hold finite numbers. Speed is never asserted.

They run in the process of the tests, but for three: one as people run it, and two that start processes themselves.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from unittest import mock

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, Features, Value
from peft import get_peft_model
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from oialr_peft import OIALRConfig, factorize

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
BERT = ("--layers", 1, "--hidden", 64, "--repeats", 2)


def run(script: str, *arguments: object) -> str:
    """What the benchmark prints when its `main` runs here, where all that it needs is imported."""
    threads = torch.get_num_threads()
    with (
        mock.patch.object(sys, "argv", [str(BENCHMARKS / script), *map(str, arguments)]),
        redirect_stdout(io.StringIO()) as output,
    ):
        load(script).main()
    torch.set_num_threads(threads)
    return checked(script, output.getvalue())


def run_alone(script: str, *arguments: object) -> str:
    """What the benchmark prints in a process of its own; nothing may be downloaded."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCHMARKS / script, *map(str, arguments)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]
    return checked(script, process.stdout)


def checked(script: str, output: str) -> str:
    """The output, which says what ran and with which torch."""
    assert output.startswith(f"`python benchmarks/{script} ")
    assert f"torch {torch.__version__}" in output
    return output


def tables(output: str) -> list[list[dict[str, str]]]:
    """The Markdown tables in the output, each as rows from column to cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", output, re.MULTILINE):
        header, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        assert all(re.fullmatch(r"-+:?", cell) for cell in rule)
        assert all(len(row) == len(header) == len(set(header)) for row in rows)
        found.append([dict(zip(header, row)) for row in rows])
    return found


def numbers(row: dict[str, str], *columns: str) -> list[float]:
    values = [float(row[column].replace(",", "")) for column in columns]
    assert all(math.isfinite(value) for value in values), row
    return values


def load(script: str) -> ModuleType:
    """The script as a module, under a name that shadows no other."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{script.removesuffix('.py')}", BENCHMARKS / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    sys.path.insert(0, str(BENCHMARKS))  # the scripts import each other by name
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_every_benchmark_is_tested():
    tested = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text()))
    assert tested >= {path.name for path in BENCHMARKS.glob("*.py") if path.name != "models.py"}


def test_live_bytes_count_every_tensor_once_and_while_it_lives():
    memory = load("memory.py")
    layer = nn.Linear(10, 100, bias=False, dtype=torch.float32)
    x = torch.ones(5, 10, dtype=torch.float32)
    with memory.LiveBytes([*layer.parameters(), layer.weight.detach(), x]) as counter:
        kept = layer(x).relu()  # two tensors of 5×100 while relu runs
        view = kept.T
    assert counter.peak == 4 * (1000 + 50 + 2 * 500)
    assert counter.now == 4 * (1000 + 50 + 500)
    del kept
    assert counter.now == 4 * (1000 + 50 + 500)
    del view
    assert counter.now == 4 * (1000 + 50)


def test_live_bytes_see_gradients_and_optimizer_state():
    memory = load("memory.py")
    layer = nn.Linear(10, 100, bias=False, dtype=torch.float32)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer.weight.grad = torch.ones_like(layer.weight)
    with memory.LiveBytes([layer.weight, layer.weight.grad]) as counter:
        optimizer.step()
    assert 4 * 4000 <= counter.peak <= 4 * 4000 + 100  # and the step count
    with memory.LiveBytes([layer.weight]) as counter:
        layer(torch.ones(1, 10, dtype=torch.float32)).sum().backward()
    assert counter.now == 2 * 4000 - 4000 * (layer.weight.grad is None)


def test_a_ratio_is_the_median_over_rounds():
    timings = load("common.py").Timings()
    for factor in (1.0, 10.0, 100.0):  # the machine slows down
        timings.add("dense", 2 * factor)
        timings.add("factored", factor)
    assert timings.median("dense") == 20
    assert timings.ratio("factored", "dense") == 0.5


def test_jobs_are_seed_by_seed_and_of_known_methods():
    common = load("common.py")
    args = argparse.Namespace(run=[("a", "dense", "{}"), ("b", "oialr", '{"lr": 1}')], seeds=[3, 4])
    jobs = common.jobs_of(args, ("dense", "oialr"))
    assert [(name, method, settings, seed) for name, method, settings, seed, _ in jobs] == [
        (name, method, settings, seed)
        for seed in (3, 4)
        for name, method, settings in (("a", "dense", {}), ("b", "oialr", {"lr": 1}))
    ]
    with pytest.raises(ValueError, match="must name one of the methods dense, lora, but the method of 'b' is 'oialr'"):
        common.jobs_of(args, ("dense", "lora"))
    args.run.append(["a", "dense", '{"lr": 0.1}'])
    with pytest.raises(ValueError, match="must have different names, but a is there twice"):
        common.jobs_of(args, ("dense", "oialr"))


def test_tuning_finds_the_best_settings_and_leaves_the_others_alone():
    common = load("common.py")
    tried = []

    def run(job):
        name, method, settings, seed, _ = job
        tried.append((method, seed, settings["lr"]))
        wrong = 0 if settings["kind"] == "good" else 1
        return {"run": name, "loss": wrong + abs(math.log10(settings["lr"]) + 3)}

    args = argparse.Namespace(trials=25, output=None)
    open_settings = {"lr": {"range": [1e-5, 1e-1]}, "kind": {"choices": ["bad", "good"]}, "rank": 4}
    jobs = [("a", "x", open_settings, seed, args) for seed in (0, 1)] + [("b", "y", {"lr": 0.1}, 0, args)]
    found = common.tuned(run, jobs, args, "loss", "minimize")
    assert [(job[0], job[3]) for job in found] == [("a", 0), ("a", 1), ("b", 0)]
    assert found[2][2] == {"lr": 0.1}
    assert found[0][2] == found[1][2]
    assert found[0][2]["kind"] == "good"
    assert found[0][2]["rank"] == 4
    assert 10**-3.5 < found[0][2]["lr"] < 10**-2.5
    assert len(tried) == 25
    assert {(method, seed) for method, seed, _ in tried} == {("x", common.TUNING_SEED)}


def test_layer_compares_all_routes_in_every_cell_and_says_what_it_skips():
    sizes = ("--shapes", "32x16,16x16", "--tokens", "8,4096", "--ratios", "0.25,1", "--max-gflop", 0.01)
    output = run_alone("layer.py", *sizes, "--repeats", 2)
    (rows,) = tables(output)
    assert [(row["layer"], row["tokens"], row["r/k"]) for row in rows] == [
        ("32×16", "8", "0.25"),
        ("32×16", "8", "1"),
        ("16×16", "8", "0.25"),
        ("16×16", "8", "1"),
        ("16×16", "4096", "0.25"),
        ("16×16", "4096", "1"),
    ]
    routes = {"chain", "folded", "built/narrow", "built/wide"}
    for row in rows:
        assert min(numbers(row, "dense ms", *routes, "floor", "chosen / floor")) >= 0
        assert {row["chosen"], row["fastest"]} <= routes
    agreeing = sum(row["agrees"] == "yes" for row in rows)
    assert f"agrees in {agreeing} of 6 cells" in output
    assert "Skipped: 32×16 with 4096 tokens" in output


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert", "gpt2", "gemma-270m", "llama-1b"])
def test_step_has_a_row_for_every_method(model):
    output = run("step.py", *BERT, "--model", model, "--batch", 2, "--length", 8)
    (rows,) = tables(output)
    methods = [row.pop("method") for row in rows]
    assert {method.split()[0] for method in methods} == {"dense", "LoRA", "AdaLoRA", "OSF", "PSOFT", "OIALR"}
    failed = [method for method, row in zip(methods, rows) if set(row.values()) == {"-"}]
    # neither OSF nor PSOFT knows GPT-2's Conv1D
    assert [method.split()[0] for method in failed] == (["OSF", "PSOFT"] if model == "gpt2" else [])
    for method, row in zip(methods, rows):
        if method in failed:
            assert f"{method} does not run on this model: " in output
        else:
            assert min(numbers(row, *row)) > 0
    assert numbers(rows[0], "time ratio", "memory ratio") == [1, 1]


@pytest.mark.slow
def test_creation_compares_times_and_truncation_errors():
    times, errors = tables(run("creation.py", *BERT))
    assert [row["method, rank 16"] for row in times] == [
        "LoRA, PiSSA",
        "LoRA, PiSSA with 4 iterations",
        "OSF",
        "LoRA",
        "OIALR",
    ]
    assert all(min(numbers(row, "seconds", "ratio to PiSSA")) > 0 for row in times)
    for row in errors:
        assert 0 < numbers(row, "best error")[0] < 1
        assert abs(numbers(row, "OIALR: excess")[0]) < 1e-4


@pytest.mark.slow
def test_inference_has_a_row_for_every_rank_and_batch():
    output = run("inference.py", *BERT, "--ratios", "0.125,0.5", "--batches", "1,2", "--length", 8)
    (rows,) = tables(output)
    assert [(row["r/k"], row["batch"]) for row in rows] == [("0.125", "1"), ("0.125", "2"), ("0.5", "1"), ("0.5", "2")]
    for row in rows:
        assert min(numbers(row, *row)) > 0
        assert numbers(row, "multiply-adds")[0] <= 1


@pytest.mark.slow
def test_convolution_compares_both_ways_at_every_rank():
    arguments = ("--shapes", "8x4x3@8,8x4x1@8", "--ratios", "0.25,1", "--batch", 2, "--repeats", 2)
    (rows,) = tables(run("convolution.py", *arguments))
    assert [(row["shape"], row["r"]) for row in rows] == [
        (shape, r) for shape, k in (("8x4x3@8", 8), ("8x4x1@8", 4)) for r in (str(k // 4), str(k))
    ]
    for row in rows:
        assert min(numbers(row, "chain", "built", "floor")) > 0
        assert row["taken"] in ("chain", "built")


@pytest.mark.slow
@pytest.mark.parametrize("rule", [(), ("--drop", 0.1)], ids=["default", "drop"])
def test_checks_has_a_row_for_every_width(rule):
    arguments = ("--widths", "64,128", "--layers", 1, "--batch", 2, "--length", 8, "--repeats", 2, "--freezes", 1)
    (rows,) = tables(run("checks.py", *arguments, *rule))
    assert [row["width"] for row in rows] == ["64", "128"]
    assert all(min(numbers(row, *row)) > 0 for row in rows)


@pytest.mark.slow
def test_stability_storage_has_a_row_for_every_storage_and_distance():
    (rows,) = tables(
        run("stability_storage.py", "--layers", 1, "--hidden", 192, "--distances", "0.2,1", "--repeats", 2)
    )
    assert [row.pop("storage") for row in rows] == 2 * ["full", "sketch", "bf16", "cpu"]
    for row in rows:
        numbers(row, *row)
        assert 0 <= numbers(row, "largest error")[0] < 0.1
    full, sketch = rows[0], rows[1]
    assert numbers(sketch, "% of the model") < numbers(full, "% of the model")


@pytest.mark.slow
def test_the_processes_benchmark():
    (rows,) = tables(run_alone("processes.py", *BERT, "--processes", "1,2"))
    assert [(row["check"], row["processes"]) for row in rows] == [
        (check, count) for check in ("dense check", "freezing check", "Σ update") for count in ("1", "2")
    ]
    for row in rows:
        assert min(numbers(row, "wall s", "busy s", "busy / 1")) > 0


@pytest.mark.slow
def test_the_scaling_script():
    for table in tables(run("scaling.py", "--model", "1b")):
        assert table


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A parquet file of random images with labels."""
    images = [
        Image.fromarray(np.random.default_rng(i).integers(256, size=(32, 32, 3), dtype=np.uint8)) for i in range(60)
    ]
    features = Features({"img": datasets.Image(), "label": Value("int64")})
    table = Dataset.from_dict({"img": images, "label": [i % 10 for i in range(60)]}, features=features)
    table.to_parquet(tmp_path / "images.parquet")
    return tmp_path / "images.parquet"


@pytest.mark.slow
def test_stability_of_every_layer_is_recorded_and_drawn(tmp_path, pictures):
    size = (
        "--images",
        40,
        "--validation",
        20,
        "--batch",
        8,
        "--steps",
        20,
        "--hidden",
        16,
        "--layers",
        1,
        "--patch",
        8,
    )
    files = ("--data", pictures, "--plot", tmp_path / "plot.svg", "--output", tmp_path / "found.json")
    curve, layers = tables(run("stability.py", *files, *size, "--heads", 2, "--every", 0.25))
    assert [row["step"] for row in curve] == ["5", "10", "15", "20"]
    for row in curve:
        numbers(row, *row)
    for row in layers:
        numbers(row, "least Stability", "at step", "last")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["layers"]) == len(layers) == 6  # q, k, v, o and the two of the MLP
    for name in ("stability", "similarity", "distance"):
        assert np.array(found[name]).shape == (6, 4)
    assert np.all(np.array(found["stability"]) <= 1)
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_mixing_is_compared_by_an_r_that_is_unique():
    stability = load("stability.py")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    for first, second in ((weight, rotation @ weight), (weight.T, (rotation @ weight).T)):
        torch.testing.assert_close(stability.mixing(first), stability.mixing(second))
    assert stability.settled([0.5, 0.99, 0.94, 0.96, 0.995]) == 3
    assert stability.settled([0.5, 0.96, 0.94]) == 3  # not yet


def test_small_has_a_form_of_every_benchmark(tmp_path):
    small = load("small.py")
    commands = [*small.speed(), *(command for command, _ in small.accuracy(tmp_path, tmp_path))]
    scripts = {path.name for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()}
    assert {command[0] for command in commands} == scripts - {"small.py", "tables.py"}


@pytest.mark.slow
def test_small_runs_what_has_its_data_and_names_the_rest(tmp_path):
    only = ("--only", "scaling.py,forecasting.py")
    output = run_alone("small.py", "--data", tmp_path, "--packages", tmp_path, *only)
    assert "## scaling.py" in output
    assert "## forecasting.py" not in output
    assert f"skipped forecasting.py: needs {tmp_path / 'ETTh2-train-val.csv'}" in output


@pytest.mark.slow
def test_pretraining_compares_dense_and_oialr_on_images(tmp_path, pictures):
    size = ("--images", 40, "--validation", 20, "--steps", 20, "--hidden", 32, "--layers", 1, "--patch", 8)
    runs = (
        "--run",
        "dense",
        "dense",
        "{}",
        "--run",
        "ours",
        "oialr",
        '{"cutoff": 0.5, "delay": 2, "stability_threshold": 0.1}',
    )
    output = run(
        "pretraining.py", "--data", pictures, *size, *runs, "--seeds", 0, 1,
        "--output", tmp_path / "runs.jsonl",
    )  # fmt: skip
    (rows,) = tables(output)
    assert [row["run"] for row in rows] == ["dense", "ours"]
    assert rows[0]["at the end"].split()[0] == "100.0"
    assert float(rows[1]["at the end"].split()[0]) < 100
    kept = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(each["run"], each["seed"]) for each in kept] == [("dense", 0), ("ours", 0), ("dense", 1), ("ours", 1)]


@pytest.mark.slow
def test_forecasting_reports_every_epoch(tmp_path):
    hours = 16 * 30 * 24
    values = np.sin(np.arange(hours)[:, None] * 2 * np.pi / np.array([24, 168])) + np.arange(2)
    table = pd.DataFrame(
        {"date": pd.date_range("2016-07-01", periods=hours, freq="h"), "a": values[:, 0], "b": values[:, 1]}
    )
    table.to_csv(tmp_path / "series.csv", index=False)
    size = (
        "--horizon",
        24,
        "--windows",
        32,
        "--batch",
        8,
        "--stride",
        400,
        "--epochs",
        2,
        "--hidden",
        16,
        "--layers",
        1,
    )
    settings = json.dumps({"update_every": 2, "delay": 2, "stability_threshold": 0.1, "cutoff": 0.5, "lr": 0.01})
    output = run(
        "forecasting.py", "--data", tmp_path / "series.csv", *size, "--run", "dense", "dense", "{}", "--run", "ours", "oialr", settings,
        "--seeds", 0, "--output", tmp_path / "runs.jsonl",
    )  # fmt: skip
    (rows,) = tables(output)
    assert [row.pop("run") for row in rows] == ["dense", "ours"]
    for row in rows:
        numbers(row, *row)
    dense, ours = (json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines())
    assert (dense["lr"], ours["lr"]) == (0.001, 0.01)
    for kept in (dense, ours):
        assert len(kept["curve"]) == 2
        assert min(kept["curve"]) == [
            kept["mse"],
            kept["mae"],
            kept["trainable_best"],
            kept["curve"][kept["best_epoch"] - 1][3],
        ]
    assert dense["curve"][-1][2] == 100 > ours["curve"][-1][2]


def test_forecasting_splits_and_standardizes_as_the_literature_does(tmp_path):
    forecasting = load("forecasting.py")
    quarters = 16 * 30 * 24 * 4
    dates = pd.date_range("2016-07-01", periods=quarters + 5, freq="15min")
    values = np.random.default_rng(0).normal(3, 2, size=len(dates))
    pd.DataFrame({"date": dates, "a": values}).to_csv(tmp_path / "series.csv", index=False)
    series = forecasting.Series.read(tmp_path / "series.csv", None)
    assert series.border == 12 * 30 * 24 * 4
    assert series.values.shape == (quarters, 1)  # what follows the validation months is not looked at
    training = series.values[: series.border]
    torch.testing.assert_close(training.std(correction=0).item(), 1.0, rtol=1e-4, atol=0)
    assert abs(training.mean()) < 1e-4
    assert series.clock.shape == (quarters, 5)
    assert series.clock.abs().max() <= 0.5
    starts = series.validation_starts(96, 1)
    assert starts[0] + forecasting.CONTEXT == series.border
    assert starts[-1] + forecasting.CONTEXT + 96 == quarters
    assert series.training_starts(96)[-1] + forecasting.CONTEXT + 96 == series.border
    with pytest.raises(ValueError, match="Give the whole file"):
        forecasting.Series.read(tmp_path / "series.csv", 8)


@pytest.fixture
def summaries(tmp_path: Path) -> Path:
    """Documents of random words, title to text."""
    generator = np.random.default_rng(0)
    path = tmp_path / "summaries.json"
    path.write_text(
        json.dumps({f"title {i}": " ".join(f"word{j}" for j in generator.integers(5, size=40)) for i in range(60)})
    )
    return path


@pytest.mark.slow
def test_language_has_a_row_for_every_method(tmp_path, summaries):
    model = ("--hidden", 16, "--layers", 1, "--vocabulary", 300)
    size = (*model, "--length", 16, "--batch", 4, "--evaluated", 4, "--steps", 8)
    methods = {
        "dense": "{}", "oialr": '{"update_every": 2, "delay": 2, "stability_threshold": 0.1}',
        "lora": '{"r": 2, "lr": 0.01}', "galore": '{"rank": 4, "update_proj_gap": 3}',
    }  # fmt: skip
    runs = [part for name, settings in methods.items() for part in ("--run", name, name, settings)]
    output = run("language.py", "--text", summaries, *size, "--seeds", 0, "--output", tmp_path / "runs.jsonl", *runs)
    (rows,) = tables(output)
    assert [row.pop("run") for row in rows] == list(methods)
    for row in rows:
        numbers(row, *row)
    kept = {found["run"]: found for found in map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())}
    for name, found in kept.items():
        steps, flops, *_ = zip(*found["curve"])
        assert steps == tuple(range(1, 9))
        assert list(flops) == sorted(flops)
        assert found["lr"] == (0.01 if name == "lora" else 0.002)
    assert kept["oialr"]["trainable_end"] < 100 == kept["galore"]["trainable_end"]
    assert kept["lora"]["tflop"] < kept["dense"]["tflop"] < kept["galore"]["tflop"]


@pytest.mark.parametrize("method", ["dense", "oialr", "lora", "galore"])
def test_flops_of_a_language_model_are_those_that_torch_counts(method):
    language = load("language.py")
    args = argparse.Namespace(hidden=64, layers=2, length=16, batch=2)
    model = language.llama(50, args).float()
    model.set_attn_implementation("eager")
    settings = {"oialr": {"freeze_when": "delay", "delay": 1, "update_every": 1, "cutoff": 0.5}, "lora": {"r": 4}}
    model, optimizer = language.prepared(model, method, settings.get(method, {}), 1e-3, 0.0)
    training = language.Training(model.train(), optimizer, 9, total=1, adaptive=method == "oialr")
    flops = language.Flops(training, args.batch, args.length)
    rows = torch.randint(50, (args.batch, args.length))
    for _ in range(2):  # OIALR: the first step is dense, the second factored
        before = flops.total
        with FlopCounterMode(display=False) as counter:
            language.loss_on(model, rows).backward()
        assert counter.get_total_flops() == flops.step
        flops.count(training.step(lambda: language.loss_on(model, rows)))
        assert (flops.total - before > counter.get_total_flops()) == (method in ("oialr", "galore"))


def test_text_is_split_and_packed(tmp_path, summaries):
    text = load("text.py")
    found = text.documents(str(summaries))
    assert len(found) == 60
    (tmp_path / "plain.txt").write_text("\n\n".join(found))
    assert text.documents(str(tmp_path / "plain.txt")) == found
    training, held_out = text.split(found)
    assert len(held_out) == 3
    assert sorted(training + held_out) == sorted(found)
    assert text.packed([[1, 2, 3], [4, 5]], 2).tolist() == [[1, 2], [3, 4]]
    assert text.packed([[1, 2, 3], [4, 5]], 3, first=9).tolist() == [[9, 1, 2], [9, 3, 4]]
    with pytest.raises(ValueError, match="Give more"):
        text.packed([[1]], 2)
    rows = torch.arange(5)[:, None]
    drawn = torch.cat(list(itertools.islice(text.batches(rows, 2, seed=0), 5))).flatten().tolist()
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_adaptation_has_a_row_for_every_method(tmp_path, summaries):
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "<s>", *(f"word{j}" for j in range(30))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>")
    fast.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(tmp_path)
    (tmp_path / "other.txt").write_text("\n\n".join(["word1 word2 word3"] * 60))
    methods = {
        "full": '{"lr": 0.01}', "lora": '{"r": 2}', "adalora": '{"target_r": 2, "target_modules": ["q_proj"]}',
        "oialr": '{"mode": "adapter", "rank": 4, "update_every": 2}',
    }  # fmt: skip
    runs = [part for name, settings in methods.items() for part in ("--run", name, name, settings)]
    files = ("--model", tmp_path, "--text", summaries, "--other", tmp_path / "other.txt")
    (found,) = tables(run("adaptation.py", *files, "--steps", 6, "--seeds", 0, "--length", 8, *runs))
    assert [row.pop("run") for row in found] == list(methods)
    for row in found:
        numbers(row, *row)
    assert len({row["before"] for row in found}) == 1
    full = found[0]
    assert numbers(full, "perplexity") < numbers(full, "before")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # AdaLoRA drops all of a layer in so short a run
def test_finetuning_has_a_row_for_every_method(tmp_path):
    words = [f"word{i}" for i in range(50)]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path)
    rows = "".join(f"{'ab'[i % 2]}\tword{i % 50} word{i * 7 % 50}\n" for i in range(40))
    for name in ("train", "test"):
        (tmp_path / f"{name}.tab").write_text(f"Category\tText\nd\tstring\nclass\t\n{rows}")
    methods = {
        "full": "{}", "lora": '{"r": 2, "lr": 0.001}', "adalora": '{"target_r": 2}', "psoft": '{"r": 2}', "osf": "{}",
        "oialr": '{"mode": "replace", "update_every": 2, "delay": 2}',
    }  # fmt: skip
    runs = [part for name, settings in methods.items() for part in ("--run", name, name, settings)]
    files = ("--model", tmp_path, "--train", tmp_path / "train.tab", "--test", tmp_path / "test.tab")
    sizes = ("--steps", 6, "--seeds", 0, "--length", 8, "--head-lr", 0.01)
    (found,) = tables(run("finetuning.py", *files, *sizes, *runs))
    assert [row["run"] for row in found] == list(methods)
    for row in found:
        numbers(row, "accuracy", "trainable %", "jump", "s/step", "checkpoint, MB")


def test_the_head_has_its_own_learning_rate_and_everything_trains_once():
    model = nn.ModuleDict({"encoder": nn.Linear(3, 2), "classifier": nn.Linear(2, 2)})
    model["encoder"].bias.requires_grad = False
    body, head = load("finetuning.py").groups_of(model, 1e-4, 1e-2)
    assert (body["lr"], head["lr"]) == (1e-4, 1e-2)
    assert [id(p) for p in body["params"]] == [id(model["encoder"].weight)]
    assert [id(p) for p in head["params"]] == [id(p) for p in model["classifier"].parameters()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The state that AdamW keeps")  # it is taken away
def test_ablation_takes_parts_of_the_engine_away(tmp_path, pictures):
    size = ("--images", 40, "--validation", 20, "--steps", 12, "--hidden", 32, "--layers", 1, "--patch", 8)
    ours = {"cutoff": 0.5, "delay": 2, "update_every": 3, "stability_threshold": 0.1}
    taken = {
        "whole": {},
        "reset": {"moments": "reset"},
        "slice": {"moments": "slice"},
        "no decay": {"sigma_decay": False},
        "muon": {"optimizer": "muon"},
        "spectral": {"sigma_lr": "spectral"},
    }
    runs = [part for name, what in taken.items() for part in ("--run", name, "oialr", json.dumps(ours | what))]
    dense = ("--run", "dense", "dense", "{}", "--run", "dense muon", "dense", '{"optimizer": "muon"}')
    output = run(
        "ablation.py", "--data", pictures, *size, *runs, *dense, "--seeds", 0, "--lr", 0.01,
        "--output", tmp_path / "runs.jsonl",
    )  # fmt: skip
    (rows,) = tables(output)
    assert [row["run"] for row in rows] == [*taken, "dense", "dense muon"]
    kept = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert kept[1]["settings"]["moments"] == "reset"
    assert all(each["frozen_at"] for each in kept[: len(taken)])


def test_pages_are_what_the_tables_are_made_to_be():
    tables = load("tables.py")
    pages = {page.name: page.read_text(encoding="utf-8") for page in tables.PAGES.glob("*.md")}
    assert {name for text in pages.values() for _, name, _ in tables.MARKED.findall(text)} == tables.TABLES.keys()
    stale = [name for name, text in pages.items() if tables.filled(text) != text]
    assert stale == [], "run `python benchmarks/tables.py`"


def test_every_run_is_in_a_table_and_says_the_same_each_time():
    tables = load("tables.py")
    for path in tables.RESULTS.glob("*.jsonl"):
        runs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        own = [table for table in tables.TABLES.values() if table.file == path.stem]
        assert all("trial" in run["run"] or any(table.only(run) for table in own) for run in runs), path.name
        for table in own:
            same: dict[object, str] = {}
            for run in filter(table.only, runs):
                first = next(iter(table.columns.values()))([run])
                assert same.setdefault((table.key(run), run["seed"]), first) == first, run["run"]


def test_tables_keep_one_seed_apart_from_several_and_compare_the_same_seeds(tmp_path, monkeypatch):
    tables = load("tables.py")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    runs = [("dense", {}, 0, 0.5), ("dense", {}, 1, 0.7), ("oialr", {"delay": 0.00005}, 1, 0.6), ("oialr", {}, 2, 0.4)]
    lines = [
        json.dumps({"run": "", "method": method, "settings": settings, "seed": seed, "accuracy": accuracy})
        for method, settings, seed, accuracy in runs
    ]
    (tmp_path / "made.jsonl").write_text("\n".join(lines))
    difference = tables.to_baseline("accuracy", 1, "points")
    against = tables.Against("dense, 0.001", "to dense", difference)
    assert tables.Table("made", {"accuracy": tables.number("accuracy", 2)}, against=against).lines().split("\n\n") == [
        "| settings | learning rate | seeds | accuracy | to dense |\n| --- | ---: | ---: | ---: | ---: |\n"
        "| dense | 0.001 | 0, 1 | 0.60 ± 0.14 |  |",
        "One seed each:",
        "| settings | learning rate | seed | accuracy | to dense |\n| --- | ---: | ---: | ---: | ---: |\n"
        "| `OIALRConfig()` | 0.001 | 2 | 0.40 |  |\n"
        "| `delay=0.00005` | 0.001 | 1 | 0.60 | -10.0 |",
    ]


def test_the_spectral_scale_keeps_the_norm_of_a_step_of_random_signs():
    scale = load("ablation.py").spectral_scale
    assert scale(64, 64, 64) == 1
    torch.manual_seed(0)
    dense, core = (torch.randint(2, shape).mul(2.0).sub(1) for shape in ((256, 1024), (128, 128)))
    steps = torch.linalg.matrix_norm(dense, 2) / torch.linalg.matrix_norm(core, 2)
    assert scale(256, 1024, 128) == pytest.approx(float(steps), rel=0.05)


def test_what_ablations_do_to_moments():
    ablation = load("ablation.py")
    state = {"exp_avg": torch.arange(12.0).view(4, 3), "step": torch.tensor(3.0)}
    p, q = torch.eye(4)[:, [2, 0]], torch.eye(3)[:, [1, 0]]
    assert ablation.reset(state, torch.Size((4, 3)), p, q) is None
    found = ablation.sliced(state, torch.Size((4, 3)), p, q)
    assert found["step"] == 3
    assert found["exp_avg"].tolist() == [[0, 1], [3, 4]]


def test_ablation_decays_dense_weights_as_adamw_does_and_sigma_not_at_all():
    ablation = load("ablation.py")
    args = argparse.Namespace(decay=0.1)
    config = OIALRConfig(target_modules=["0"], mode="pretraining")
    model, plain = (get_peft_model(nn.Sequential(nn.Linear(3, 3)), config) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    layer = ablation.target_layers(model)[0]
    pairs = [(model, *ablation.without_sigma_decay(model, 0.1, args)), (plain, *ablation.adamw(plain, 0.1, args))]
    for each, optimizer, after_step in pairs:
        assert after_step is None
        each(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs)
    sigma = layer.set_factors("default", factorize(layer.adapter_weight("default").detach()))
    sigma.grad = torch.zeros_like(sigma)
    before = sigma.detach().clone()
    pairs[0][1].param_groups[0]["params"] = [sigma]
    pairs[0][1].step()
    torch.testing.assert_close(sigma.detach(), before, rtol=0, atol=0)
