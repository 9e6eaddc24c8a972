"""The examples, each run as a user runs it: reduced here, in full under `-m slow`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from hub import HubClient, HubServer
from hub_clients import TOKEN
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, PatchTSTForPrediction

import oialr_peft  # noqa: F401  (lets transformers load low-rank checkpoints)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def run(example: str, *arguments: object, launcher: tuple[object, ...] = ()) -> str:
    """What the example prints; nothing may be downloaded."""
    return process_of(example, *arguments, launcher=launcher).stdout


def process_of(example: str, *arguments: object, launcher: tuple[object, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The example, run to its end."""
    command = [sys.executable, *launcher, EXAMPLES / example, *arguments]
    process = subprocess.run([*map(str, command)], env=OFFLINE, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    return process


def before_and_after(what: str, output: str) -> tuple[float, float]:
    return tuple(map(float, re.search(rf"{what}: ([\d.]+) before, ([\d.]+) after", output).groups()))


def comparison(output: str) -> dict[str, dict[str, float]]:
    """The rows of the table that example 01 ends with."""
    pattern = r"^(dense|OIALR)\s+([\d.]+)%\s+([\d,]+)\s+([\d.]+)%\s+([\d.]+)\s+([\d.]+)$"
    return {
        name: {
            "accuracy": float(accuracy),
            "trainable": int(trainable.replace(",", "")),
            "share": float(share),
            "seconds": float(seconds),
            "megabytes": float(megabytes),
        }
        for name, accuracy, trainable, share, seconds, megabytes in re.findall(pattern, output, re.MULTILINE)
    }


def test_every_example_is_tested():
    tested = set(re.findall(r'"(\d\d_\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("[0-9]*.py")}


def test_image_classification_compares_dense_and_oialr(tmp_path):
    process = process_of("01_image_classification.py", "--output_dir", tmp_path, "--max_steps", 10)
    output = process.stdout
    rows = comparison(output)
    assert rows.keys() == {"dense", "OIALR"}
    assert rows["dense"]["share"] == 100
    assert rows["OIALR"]["trainable"] < rows["dense"]["trainable"]
    assert output.count("factored") == 24
    assert (tmp_path / "history.png").stat().st_size > 10_000
    assert (tmp_path / "oialr" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "dense" / "model.safetensors").is_file()
    # bars of progress are all that a first look shows beside the output: no warning, no line of a logger
    assert not re.search(r"Warning|warn|Failed|deprecated|^[WE]\d{4} ", process.stderr, re.MULTILINE), process.stderr


@pytest.mark.slow
def test_the_demo_keeps_the_accuracy_of_dense_training_at_half_the_parameters(tmp_path):
    rows = comparison(run("01_image_classification.py", "--output_dir", tmp_path))
    assert rows["dense"]["accuracy"] > 95
    assert rows["OIALR"]["accuracy"] >= rows["dense"]["accuracy"] - 1
    assert rows["OIALR"]["share"] <= 50
    assert rows["OIALR"]["megabytes"] < rows["dense"]["megabytes"]


def test_the_accelerate_loop_resumes_bit_for_bit(tmp_path):
    output = run("02_accelerate_loop.py", "--output_dir", tmp_path, "--max_steps", 20)
    assert "weights equal bit for bit: True" in output
    share = float(re.search(r"trainable parameters: ([\d.]+) %", output).group(1))
    assert 0 < share < 100
    uninterrupted, resumed = re.search(r"accuracy: ([\d.]+)% uninterrupted, ([\d.]+)% resumed", output).groups()
    assert uninterrupted == resumed


@pytest.mark.slow
def test_fine_tuning_an_adapter_learns_a_small_correction(tmp_path):
    output = run("03_finetune_adapter.py", "--output_dir", tmp_path)
    before, after, chance = map(float, re.search(r"([\d.]+)% before, ([\d.]+)% after; ([\d.]+)% by", output).groups())
    assert after > before + 10
    # 53 to 60 % were seen; the tokenizer's own training breaks ties at random, so no two runs are equal
    assert after > chance + 15
    share = float(re.search(r"trainable: ([\d.]+) %", output).group(1))
    assert 0 < share < 10
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("oialr_sigma" in name for name in tensors)
    assert not any("oialr_weight" in name for name in tensors)


def test_the_metric_beside_the_examples_counts_right_answers():
    evaluate = pytest.importorskip("evaluate")
    metric = evaluate.load(str(EXAMPLES / "metrics" / "accuracy"))
    assert metric.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}


def launched(config: Path) -> tuple[object, ...]:
    return ("-m", "accelerate.commands.launch", "--config_file", config)


@pytest.mark.slow
@pytest.mark.sentinel
def test_two_launched_processes_resume_bit_for_bit(tmp_path):
    launcher = launched(EXAMPLES / "accelerate_configs" / "two_processes.yaml")
    output = run("02_accelerate_loop.py", "--output_dir", tmp_path, "--max_steps", 40, "--cpu", launcher=launcher)
    assert "processes: 2" in output
    assert "weights equal bit for bit: True" in output


@pytest.mark.slow
def test_two_launched_processes_train_with_the_trainer(tmp_path):
    launcher = launched(EXAMPLES / "accelerate_configs" / "two_processes.yaml")
    output = run("05_forecasting.py", "--output_dir", tmp_path, "--max_steps", 20, "--use_cpu", launcher=launcher)
    before, after = before_and_after("mean squared error", output)
    assert after < before
    assert output.count("trainable: ") == 1  # the main process speaks for both
    assert (tmp_path / "low_rank" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """What example 04 printed and wrote in a short run from scratch."""
    directory = tmp_path_factory.mktemp("language_model")
    return directory, run("04_language_model.py", "--output_dir", directory, "--max_steps", 20, "--cutoff", 0.5)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(300, 332)[None]).logits


def test_a_language_model_learns_from_scratch_and_is_written_twice(language_model):
    directory, output = language_model
    before, after = before_and_after("perplexity", output)
    assert 1000 < before < 4000  # about uniform over 2,000 tokens
    assert after < before / 2
    low_rank, dense = (AutoModelForCausalLM.from_pretrained(directory / form) for form in ("low_rank", "dense"))
    assert low_rank.num_parameters() < dense.num_parameters()
    assert_close(logits(low_rank), logits(dense), atol=1e-4, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(directory / "low_rank")
    assert tokenizer.decode(tokenizer('The "if" statement')["input_ids"]) == 'The "if" statement'


@pytest.mark.slow
def test_a_pretrained_language_model_is_tuned_and_converts_to_lora(language_model, tmp_path):
    base = language_model[0] / "dense"
    arguments = ("--dataset", "docstrings", "--output_dir", tmp_path, "--max_steps", 40)
    before, after = before_and_after("perplexity", run("04_language_model.py", "--model", base, *arguments))
    assert after < 0.98 * before  # the base has trained for 20 steps, so its bases have little to offer
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    for form in ("adapter", "lora"):
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / form)
        assert_close(logits(tuned), expected, atol=1e-4, rtol=0)


@contextmanager
def served(*arguments: object):
    """Address of a server that runs example 08."""
    command = [sys.executable, str(EXAMPLES / "08_serve.py"), "--port", "0", *map(str, arguments)]
    with subprocess.Popen(
        command, env=OFFLINE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield re.search(r"at (http://\S+)", process.stdout.readline())[1]
        finally:
            process.terminate()


def answer(address: str, body: bytes | None = None):
    with urlopen(Request(address, data=body), timeout=120) as response:
        return json.load(response)


def test_a_low_rank_checkpoint_is_served(language_model):
    directory = language_model[0] / "low_rank"
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    tokens = tokenizer("The class", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**tokens, max_new_tokens=8, do_sample=False)[0])
    request = {"inputs": "The class", "parameters": {"max_new_tokens": 8, "do_sample": False}}
    with served("--model", directory) as address:
        assert answer(address)["parameters"] == model.num_parameters()
        assert answer(address, json.dumps(request).encode()) == [{"generated_text": expected}]
        with pytest.raises(HTTPError, match="Bad Request"):
            answer(address, b"The class")


@pytest.mark.slow
def test_the_server_says_which_example_writes_its_model(tmp_path):
    command = [sys.executable, str(EXAMPLES / "08_serve.py")]
    process = subprocess.run(command, env=OFFLINE, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert "Run examples/04_language_model.py first" in process.stderr


def test_a_forecaster_learns(tmp_path):
    output = run("05_forecasting.py", "--output_dir", tmp_path, "--max_steps", 30)
    before, after = before_and_after("mean squared error", output)
    assert after < 0.9 * before
    assert float(re.search(r"trainable: ([\d.]+) %", output)[1]) < 60
    assert (tmp_path / "history.png").stat().st_size > 10_000
    forecast = PatchTSTForPrediction.from_pretrained(tmp_path / "low_rank")(past_values=torch.zeros(1, 104, 1))
    assert forecast.prediction_outputs.shape == (1, 26, 1)


@pytest.mark.slow
def test_a_forecaster_in_full_beats_the_last_season(tmp_path):
    output = run("05_forecasting.py", "--output_dir", tmp_path)
    seasonal = float(re.search(r"([\d.]+) seasonal", output)[1])
    assert before_and_after("mean squared error", output)[1] < seasonal


@pytest.mark.slow
def test_supervised_fine_tuning_with_trl_learns(tmp_path):
    output = run("06_sft.py", "--output_dir", tmp_path, "--max_steps", 20)
    before, after = before_and_after("loss of the completions", output)
    assert after < before - 0.5
    assert any("oialr_sigma" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def difference_after_loading(output: str) -> float:
    return float(re.search(r"after loading: (\S+)", output)[1])


@pytest.mark.slow
def test_what_would_be_pushed_is_written_with_its_card(tmp_path):
    output = run("07_push_to_hub.py", "--output_dir", tmp_path, "--max_steps", 25)
    assert difference_after_loading(output) < 1e-4
    assert "<!-- oialr_peft: adapter default -->" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "low_rank" / "README.md").is_file()
    assert output.endswith(f"written to {tmp_path} and {tmp_path / 'low_rank'}\n")


def test_adapter_and_low_rank_checkpoint_are_pushed_and_load_from_there(tmp_path):
    arguments = ("--output_dir", str(tmp_path / "run"), "--max_steps", "25", "--report_to", "none", "--push_to_hub")
    with HubServer(tmp_path / "objects", {TOKEN: "owner"}) as server:
        client = HubClient(server, tmp_path)
        script = str(EXAMPLES / "07_push_to_hub.py")
        output = client.run(script, *arguments, "--hub_model_id", "owner/digits", token=TOKEN)
        assert server.unknown == []
    assert server.repositories.keys() == {"owner/digits", "owner/digits-low-rank"}
    assert difference_after_loading(output) < 1e-4
    assert "adapter_model.safetensors" in server.files("owner/digits")
    assert "model.safetensors" in server.files("owner/digits-low-rank")
