"""The command `oialr`: what it prints, its exit codes, and errors of one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_runs import record, train
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

from oialr_cli.app import app
from oialr_peft import OIALRConfig
from oialr_peft.storage.record import write_record

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The head .* is not a target:UserWarning"),
    pytest.mark.filterwarnings("ignore:The factors of the .* layers hold:UserWarning"),  # of tiny layers
]
COMMANDS = ("inspect", "estimate", "export", "report", "compare")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    train(directory)
    return directory


def oialr(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def output_of(*arguments):
    result = oialr(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def as_process(*arguments, module="oialr_cli"):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


# ---- usage ---------------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands_and_each_has_examples():
    text = output_of("--help")
    for command in COMMANDS:
        assert f"  {command} " in text
        assert f"oialr {command} " in " ".join(output_of(command, "--help").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect"], "Missing argument"),
        (["wrong"], "No such command"),
        (["estimate", "x", "--rank", "1.5"], "whole number"),
        (["estimate", "x", "--mode", "residual"], "pretraining"),
        (["export", "x", "--to", "gguf", "--output", "y"], "gguf"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, message):
    result = oialr(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "./nowhere"], "no directory"),
        (["estimate", "./nowhere"], "no directory"),
        (["report", "./nowhere"], "`output_dir`"),
        (["compare", "./nowhere", "./nowhere"], "`output_dir`"),
        (["export", "./nowhere", "--to", "dense", "--output", "y"], "no directory"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(arguments, message):
    result = oialr(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("oialr: ")
    assert message in result.stderr
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["--debug", *arguments], catch_exceptions=False)


def test_help_is_there_before_torch_is_imported():
    code = (
        "import sys; from oialr_cli.app import app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
    assert as_process("--help").returncode == 0


def test_a_process_prints_the_result_alone(run):
    process = as_process("inspect", run, "--json", module="oialr_peft")
    assert process.returncode == 0
    assert len(json.loads(process.stdout)["layers"]) == 13


@pytest.mark.slow
def test_a_process_that_fails_prints_one_line(run):
    for arguments in (
        ["inspect", run / "nowhere"],
        ["export", run, "--to", "lora", "--output", run / "made", "--base", "."],
    ):
        process = as_process(*arguments)
        assert (process.returncode, process.stdout) == (1, "")
        assert len(process.stderr.splitlines()) == 1
        assert process.stderr.startswith("oialr: ")


# ---- commands ------------------------------------------------------------------------------------------------------------


def test_inspect_shows_kinds_or_layers(run):
    text = output_of("inspect", run)
    assert "13, " in text
    assert "bert.encoder.layer.*.attention.self.query" in text
    assert "step 24 of 24, 8 checks" in text
    assert "update_every" in text
    assert "bert.encoder.layer.1.attention.self.query" in output_of("inspect", run, "--layers")


def test_estimate_prints_phases_and_crossovers(run, tmp_path):
    BertForSequenceClassification.config_class(hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    text = output_of("estimate", tmp_path, "--rank", 8, "--mode", "pretraining")
    assert "OIALR, dense phase" in text
    assert "not measured" in text
    found = json.loads(output_of("estimate", tmp_path, "--rank", 8, "--json"))
    assert [phase["name"] for phase in found["phases"]] == ["dense", "OIALR, factored"]
    assert {shape["rank"] for shape in found["shapes"]} == {8}


def test_report_writes_a_page(run, tmp_path):
    assert output_of("report", run, "--no-spectra") == f"Wrote {run / 'report.html'}\n"
    assert "<h1>tiny</h1>" in (run / "report.html").read_text()
    file = tmp_path / "page.html"
    assert json.loads(output_of("report", run, "--output", file, "--json")) == {"output": str(file)}
    assert "Spectrum of Σ" in file.read_text()
    result = oialr("report", run, "--output", tmp_path / "missing" / "page.html")
    assert result.exit_code == 1
    assert "Make it first." in result.stderr


def test_compare_prints_figures_and_differences(run, tmp_path):
    write_record(record(), tmp_path / "other")
    text = output_of("compare", run, tmp_path / "other", "--html", tmp_path / "both.html")
    assert "Validation loss" in text
    assert "learning_rate" in text
    assert "<h1>tiny and other</h1>" in (tmp_path / "both.html").read_text()
    found = json.loads(output_of("compare", run, tmp_path / "other", "--json"))
    assert found["figures"]["steps"] == [24, 100]
    assert "No setting differs." in output_of("compare", run, run)


# ---- export --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(make_model, tmp_path):
    """A base model, and adapters of it: replace, adapter, and pretraining without weights of the base."""
    make_model("bert", torch.float32).save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    options = {"freeze_when": "delay", "delay": 0, "rank": 0.5, "init_weights": False}
    cases = {"replace": options, "adapter": {"mode": "adapter", "rank": 2, "init_weights": False}}
    for name, settings in cases.items():
        model = BertForSequenceClassification.from_pretrained(base)
        get_peft_model(model, OIALRConfig(**{"mode": "replace", **settings})).save_pretrained(tmp_path / name)
    model = BertForSequenceClassification.from_pretrained(base)
    get_peft_model(model, OIALRConfig(mode="pretraining", **options)).save_pretrained(tmp_path / "pretraining")
    model.config.save_pretrained(tmp_path / "config-only")
    return tmp_path


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize(
    ("adapter", "form", "base"),
    [
        ("replace", "low-rank", "base"),
        ("replace", "dense", None),
        ("adapter", "dense", None),
        ("adapter", "lora", None),
        ("pretraining", "low-rank", "config-only"),
    ],
)
def test_an_exported_model_computes_the_same(adapter, form, base, saved, make_inputs):
    named = [] if base is None else ["--base", saved / base]
    assert f"Wrote {saved / 'made'}" in output_of(
        "export", saved / adapter, "--to", form, "--output", saved / "made", *named
    )
    inputs = make_inputs("bert", torch.float32)
    original = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(saved / "base"), saved / adapter)
    expected = logits_of(original, inputs)
    if form == "lora":
        base_model = BertForSequenceClassification.from_pretrained(saved / "base")
        found = PeftModel.from_pretrained(base_model, saved / "made")
    else:
        found = BertForSequenceClassification.from_pretrained(saved / "made")
    torch.testing.assert_close(logits_of(found, inputs), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_with_a_new_head_is_exported_with_it(saved, make_inputs):
    base = BertForSequenceClassification.from_pretrained(saved / "base", num_labels=7, ignore_mismatched_sizes=True)
    config = OIALRConfig(mode="adapter", rank=2, init_weights=False, modules_to_save=["classifier"])
    model = get_peft_model(base, config)
    model.save_pretrained(saved / "new-head")
    output_of("export", saved / "new-head", "--to", "dense", "--output", saved / "made")
    inputs = make_inputs("bert", torch.float32)
    found = BertForSequenceClassification.from_pretrained(saved / "made")
    torch.testing.assert_close(logits_of(found, inputs), logits_of(model, inputs), rtol=1e-4, atol=1e-5)


def test_a_low_rank_checkpoint_becomes_dense_and_nothing_else(saved):
    output_of("export", saved / "replace", "--to", "low-rank", "--output", saved / "low")
    found = json.loads(output_of("export", saved / "low", "--to", "dense", "--output", saved / "dense", "--json"))
    assert found["form"] == "dense"
    assert found["difference"]["difference"] < 1e-5
    result = oialr("export", saved / "low", "--to", "lora", "--output", saved / "lora")
    assert result.exit_code == 1
    assert "Use `--to dense`." in result.stderr


def test_what_cannot_be_exported_says_what_can(saved):
    result = oialr("export", saved / "replace", "--to", "lora", "--output", saved / "lora")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("oialr: Only adapters with")
    config = json.loads((saved / "replace" / "adapter_config.json").read_text())
    (saved / "replace" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    result = oialr("export", saved / "replace", "--to", "dense", "--output", saved / "dense")
    assert "Name it with `--base`." in result.stderr
