"""Damaged and hostile files: each is loaded with exactly the values that it holds, or refused with the model as it was.

Every case is one random damage, from a fixed seed, to one file of a small checkpoint. Errors name the file.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from damage import JSON_DAMAGES, TENSOR_DAMAGES, parts_of
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_runs import record
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from oialr_cli.output import inspection_text
from oialr_peft import OIALRCallback, OIALRConfig, OIALRController, save_low_rank
from oialr_peft.engine.state import STATE_NAME, read_state
from oialr_peft.storage.conversion import convert
from oialr_peft.storage.inspection import inspect_checkpoint
from oialr_peft.storage.record import RECORD_NAME, read_record, write_record
from oialr_peft.tuner.lookup import adapter_layers

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FACTORED = {"freeze_when": "delay", "delay": 0, "rank": 3}


def cases(some: int, many: int) -> pytest.MarkDecorator:
    """How many damages a test tries: few by default, all with `-m slow`."""
    return pytest.mark.parametrize("count", [some, pytest.param(many, marks=pytest.mark.slow)])


class Damaged:
    """A directory of files of which one at a time is damaged."""

    def __init__(self, directory: Path, *names: str) -> None:
        self.directory = directory
        self.contents = {name: (directory / name).read_bytes() for name in names}

    def cases(self, count: int) -> Iterator[tuple[str, str]]:
        """For each case its description and the name of the damaged file; the file is whole again afterwards."""
        for number in range(count):
            random = Random(f"{self.directory.name} {number}")
            name = random.choice(list(self.contents))
            damages = TENSOR_DAMAGES if name.endswith(".safetensors") else JSON_DAMAGES
            damage = random.choice(damages)
            (self.directory / name).write_bytes(damage(random, self.contents[name]))
            yield f"{number}: {damage.__name__} {name}", name
            (self.directory / name).write_bytes(self.contents[name])


@contextmanager
def noted() -> Iterator[list[str]]:
    """The warnings that are given inside; none is an error here."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught]


def attempt(
    load: Callable[..., Any], *args: Any, expected: type[Exception] = Exception, **kwargs: Any
) -> tuple[Any, Exception | None, list[str]]:
    """What `load` returns, or the error of the expected kind that it raises, and its warnings."""
    with noted() as messages:
        try:
            return load(*args, **kwargs), None, messages
        except expected as error:
            return None, error, messages


def names_the_file(error: BaseException, directory: Path) -> bool:
    return str(directory) in str(error)


def snapshot(model: nn.Module) -> tuple[list[tuple[str, type]], dict[str, Any], list[str]]:
    """Structure, values and attributes of a model."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules, {key: value.clone() for key, value in model.state_dict().items()}, sorted(vars(model))


def assert_unchanged(model: nn.Module, before: tuple[Any, dict[str, Any], Any], case: str) -> None:
    modules, values, attributes = snapshot(model)
    assert (modules, attributes) == (before[0], before[2]), case
    assert values.keys() == before[1].keys(), case
    assert all(torch.equal(value, before[1][key]) for key, value in values.items()), case


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit where the types agree, else as numbers; NaN equals NaN."""
    return a.shape == b.shape and torch.allclose(a.double(), b.to(a.dtype).double(), rtol=0, atol=0, equal_nan=True)


# ---- adapters --------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.ModuleDict(
        {"up": nn.Linear(6, 5), "down": nn.Linear(5, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 3)}
    )


ADAPTERS: dict[str, dict[str, Any]] = {
    "replace": {**FACTORED, "modules_to_save": ["head"], "bias": "oialr_only"},
    "residual": {"mode": "adapter", "rank": 2},
    "pretraining": {"mode": "pretraining", **FACTORED},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved adapters of `network`; one layer of that with `pretraining` is dense."""
    root = tmp_path_factory.mktemp("adapters")
    for name, settings in ADAPTERS.items():
        model = get_peft_model(
            network(),
            OIALRConfig(target_modules=["up", "down"], init_weights=False, **{"mode": "replace", **settings}),
        )
        if name == "pretraining":
            adapter_layers(model)["up"].set_dense("default", torch.randn(5, 6))
        model.save_pretrained(root / name)
    return {name: root / name for name in ADAPTERS}


def values_by_stored_name(model: PeftModel) -> dict[str, torch.Tensor]:
    """What a model holds by the names of an adapter's file."""
    layer_parts = ("oialr_weight", "oialr_u", "oialr_sigma", "oialr_vh")
    values = {}
    for key, value in model.state_dict().items():
        module, _, last = key.rpartition(".")
        in_layer = last == "default" and module.endswith(layer_parts)
        values[module if in_layer else key.replace(".modules_to_save.default.", ".")] = value
    return values


def assert_holds_the_file(model: PeftModel, file: Path, messages: list[str]) -> None:
    """Every tensor of the file is in the model, bit for bit, or a warning says that it is not; no layer lacks values."""
    stored, held = load_file(file), values_by_stored_name(model)
    for key, value in stored.items():
        if key in held:
            assert same(held[key], value), key
        elif value.is_floating_point():
            assert any(
                key in message or key.rpartition(".oialr_")[0].removeprefix("base_model.model.") in message
                for message in messages
            ), key
    assert {key for key in held if ".oialr_" in key} <= stored.keys()


@cases(150, 3000)
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_damaged_adapter_is_refused_or_holds_what_the_file_holds(name: str, count: int, adapters: dict[str, Path]):
    directory, untouched = adapters[name], network()
    before, outcomes = snapshot(untouched), Counter()
    for case, _ in Damaged(directory, WEIGHTS, CONFIG).cases(count // 3):
        model, error, messages = attempt(PeftModel.from_pretrained, untouched, directory)
        if error is not None:
            outcomes["refused"] += 1
            assert_unchanged(untouched, before, f"{case}: {error!r}")
            assert names_the_file(error, directory) or not_read_by_this_package(directory), f"{case}: {error!r}"
        else:
            outcomes["loaded"] += 1
            assert_holds_the_file(model, directory / WEIGHTS, messages)
            untouched = network()
    assert min(outcomes["refused"], outcomes["loaded"]) > count / 30


def not_read_by_this_package(directory: Path) -> bool:
    """Whether PEFT reads the configuration and finds no adapter of this method in it: then the error is PEFT's."""
    try:
        return json.loads((directory / CONFIG).read_text())["peft_type"] != "OIALR"
    except (ValueError, KeyError, TypeError, RecursionError):
        return True


# ---- standalone checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., nn.Module]) -> Path:
    """A standalone low-rank checkpoint in shards."""
    directory = tmp_path_factory.mktemp("standalone") / "model"
    adapted = get_peft_model(
        make_model("bert", torch.float32),
        OIALRConfig(task_type="SEQ_CLS", **{"mode": "replace", **FACTORED}),
    )
    with noted():
        save_low_rank(adapted, directory, max_shard_size="3KB")
    return directory


def shards(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.safetensors"))


@pytest.fixture
def quiet() -> Iterator[None]:
    """transformers says nothing of what is missing; tests ask it."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()
    transformers_logging.set_verbosity(before)


@cases(30, 300)
@pytest.mark.usefixtures("quiet")
def test_a_damaged_standalone_checkpoint_is_refused_or_holds_what_its_files_hold(count: int, standalone: Path):
    names, outcomes = shards(standalone), Counter()
    assert len(names) > 1
    for case, damaged in Damaged(standalone, *names, "model.safetensors.index.json", "config.json").cases(count):
        loaded, error, _ = attempt(
            AutoModelForSequenceClassification.from_pretrained, standalone, output_loading_info=True
        )
        if error is not None:
            outcomes["refused"] += 1
            # transformers itself reads the two JSON files, and compares shapes with those of the model
            by_transformers = damaged.endswith(".json") or "ignore_mismatched_sizes" in str(error)
            assert names_the_file(error, standalone) or by_transformers, f"{case}: {error!r}"
        else:
            outcomes["loaded"] += 1
            model, report = loaded
            held = model.state_dict()
            reported = {key for keys in report.values() for key in keys}
            for name in names:
                for key, value in load_file(standalone / name).items():
                    assert key in reported or same(held[key], value), f"{case}: {key}"
    assert min(outcomes["refused"], outcomes["loaded"]) > count / 30


@cases(10, 60)
@pytest.mark.usefixtures("quiet")
def test_a_damaged_checkpoint_is_exported_whole_or_not_at_all(count: int, standalone: Path, tmp_path: Path):
    outcomes: Counter[str] = Counter()
    checkpoint = Damaged(standalone, *shards(standalone), "model.safetensors.index.json", "config.json")
    for number, (case, _) in enumerate(checkpoint.cases(count)):
        output = tmp_path / str(number)
        _, error, _ = attempt(convert, str(standalone), "dense", output)
        if error is not None:
            outcomes["refused"] += 1
            assert not output.exists() or not list(output.iterdir()), f"{case}: {error!r}"
        else:
            outcomes["loaded"] += 1
            assert AutoModelForSequenceClassification.from_pretrained(output).config.num_labels == 3
    assert outcomes["refused"] > count / 30


# ---- what is read without a model ------------------------------------------------------------------------------------


@cases(150, 2600)
@pytest.mark.parametrize("kind", ["adapter", "standalone"])
def test_a_damaged_checkpoint_is_inspected_as_its_headers_say_or_refused(
    kind: str, count: int, adapters: dict[str, Path], standalone: Path
):
    if kind == "adapter":
        checkpoint = Damaged(adapters["pretraining"], WEIGHTS, CONFIG)
    else:
        checkpoint = Damaged(standalone, *shards(standalone), "model.safetensors.index.json", "config.json")
    outcomes: Counter[str] = Counter()
    for case, _ in checkpoint.cases(count // 2):
        found, error, _ = attempt(inspect_checkpoint, str(checkpoint.directory), expected=ValueError)
        if error is not None:
            outcomes["refused"] += 1
            assert names_the_file(error, checkpoint.directory), f"{case}: {error!r}"
        else:
            outcomes["loaded"] += 1
            for path in {tensor.file for tensor in found.tensors.values()}:
                header, _ = parts_of(Path(path).read_bytes())
                held = {key: tensor for key, tensor in found.tensors.items() if tensor.file == path}
                assert {key: list(tensor.shape) for key, tensor in held.items()} == {
                    key: entry["shape"] for key, entry in header.items() if key != "__metadata__"
                }
            json.dumps(found.to_dict(), allow_nan=False)
            assert inspection_text(found, every_layer=True)
            assert inspection_text(found, every_layer=False)
    assert min(outcomes["refused"], outcomes["loaded"]) > count / 30


@cases(200, 2100)
def test_a_damaged_record_is_read_as_it_is_written_or_refused(count: int, tmp_path: Path):
    write_record(record(), tmp_path)
    outcomes: Counter[str] = Counter()
    for case, damaged in Damaged(tmp_path, RECORD_NAME).cases(count):
        read, error, _ = attempt(read_record, tmp_path / damaged, expected=ValueError)
        if error is not None:
            outcomes["refused"] += 1
            assert names_the_file(error, tmp_path), f"{case}: {error!r}"
        else:
            outcomes["loaded"] += 1
            write_record(read, tmp_path / "again")
            again = read_record(tmp_path / "again" / RECORD_NAME)
            assert (again.layers, again.history, again.metrics) == (read.layers, read.history, read.metrics), case
            assert again.check_seconds >= 0 or again.trainable_percent_mean is not None
    assert min(outcomes["refused"], outcomes["loaded"]) > count / 30


# ---- the state of a schedule -----------------------------------------------------------------------------------------


def controlled(model: nn.Module) -> OIALRCallback:
    """A callback in the middle of a training of the dense phase."""
    callback = OIALRCallback()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    callback.start(model, torch.optim.SGD(parameters), 20)
    return callback


def comparable(controller: OIALRController) -> str:
    state = controller.state_dict()
    tensors = {name: tensor.tolist() for name, tensor in state.pop("bases").items()}
    return json.dumps([state, tensors], sort_keys=True)


@cases(200, 2100)
def test_a_damaged_state_is_refused_with_the_schedule_as_it_was_or_loaded(count: int, tmp_path: Path):
    config = OIALRConfig(mode="replace", target_modules=["up", "down"], update_every=3, delay=6)
    model = get_peft_model(network(), config)
    callback = controlled(model)
    assert callback.controller is not None
    for step in range(5):  # after one check
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        model.base_model.model.down(model.base_model.model.up(x))
        callback.controller.step()
    callback.save(tmp_path)
    outcomes: Counter[str] = Counter()
    before, original = comparable(callback.controller), read_state(tmp_path / STATE_NAME)
    for case, damaged in Damaged(tmp_path, STATE_NAME).cases(count):
        _, error, _ = attempt(callback.load, tmp_path, expected=ValueError)
        if error is not None:
            outcomes["refused"] += 1
            assert comparable(callback.controller) == before
            assert names_the_file(error, tmp_path), f"{case}: {error!r}"
        else:
            outcomes["loaded"] += 1
            state, stored = callback.controller.state_dict(), load_file(tmp_path / damaged)
            for name, basis in state["bases"].items():
                assert same(basis, stored[name])
            callback.controller.load_state_dict(original)
    assert min(outcomes["refused"], outcomes["loaded"]) > count / 30
