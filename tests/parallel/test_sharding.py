"""FSDP2: sharded parameters train as one process does, and full and sharded checkpoints resume exactly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from runs import (
    STABLE,
    Tower,
    assert_equal_processes,
    cuts,
    demo_model,
    process_count,
    process_index,
    run_trainer,
    shard,
    state_of,
    train,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.testing import assert_close

import oialr_peft.parallel.distributed as distributed_module
from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.engine.check import Check
from oialr_peft.tuner.lookup import adapter_layers

# ---- equality --------------------------------------------------------------------------------------------------------


FSDP_OPTIONS = [
    {"fsdp": {}},
    {"fsdp": {"reshard_after_forward": False}},
    {"fsdp": {"units": ()}},
    {"fsdp": {}, "accumulate": 3},
    {"fsdp": {}, "tower": {"recompute": True}},
    {"fsdp": {}, "optimizer": "sgd"},
    {"fsdp": {}, "batch": 2000, "steps": 12},
]


@pytest.mark.parametrize(
    ("options", "shrink"),
    [
        pytest.param(options, shrink, marks=pytest.mark.slow if shrink == "mask" and options != FSDP_OPTIONS[0] else ())
        for options in FSDP_OPTIONS
        for shrink in ("physical", "mask")
    ],
    ids=str,
)
def test_sharded_parameters_train_as_one_process_does(two, options, shrink):
    settings = {**STABLE, "shrink": shrink}
    results = two.run(train, settings, options)
    assert_equal_processes(results)
    alone = train(settings, options)
    assert [ranks for *_, ranks in results[0]["history"]] == [ranks for *_, ranks in alone["history"]]
    for name, weight in alone["weights"].items():
        assert_close(results[0]["weights"][name], weight, rtol=0, atol=1e-9)
    assert cuts(alone["history"]) >= 3


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shrink": "mask", "layers_per_update": 0.4},
        {"max_output_loss": 0.01, "max_rank_drop": 0.5},
        {"mode": "adapter", "delay": 0, "cutoff": 0.5},
    ],
    ids=str,
)
def test_one_process_with_sharded_parameters_trains_as_without(request, settings, optimizer):
    settings = {**STABLE, **settings}
    if settings.get("mode") == "adapter":
        settings.pop("stability_threshold")
    options = {"optimizer": optimizer, "fsdp": {}}
    plain = train(settings, options)
    request.getfixturevalue("alone")
    sharded = train(settings, options)
    assert [step[2:] for step in sharded["history"]] == [step[2:] for step in plain["history"]]
    for ours, theirs in zip(sharded["history"], plain["history"], strict=True):
        assert ours[1] == pytest.approx(theirs[1], abs=1e-9)
    for name, weight in plain["weights"].items():
        assert_close(sharded["weights"][name], weight, rtol=0, atol=1e-9)
    assert cuts(plain["history"]) >= 1


@pytest.mark.usefixtures("alone")
def test_one_process_with_sharded_parameters_names_what_is_not_finite():
    config = OIALRConfig(exclude_modules=["head"], mode="pretraining", update_every=1, delay=4)
    model = get_peft_model(Tower(), config)
    wrapped = shard(model)
    controller = OIALRController(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1), total_steps=8)
    assert controller.step() is not None
    with torch.no_grad():
        controller.layers["middle"].oialr_weight["default"].to_local()[0, 0] = torch.nan
    with pytest.raises(ValueError, match="`middle` holds NaN or Inf"):
        controller.step()


@pytest.mark.parametrize(
    "settings",
    [
        {"stability_storage": "full"},
        {"freeze_when": "delay", "delay": 0, "rank": 0.5, "stability_threshold": 1.0},
        {"mode": "replace"},
        {"mode": "adapter", "delay": 0, "cutoff": 0.5},
        {"layers_per_update": 0.4},
        {"min_rank": 1, "cutoff": 0.9, "max_rank_drop": 0.9},  # fewer directions than processes
    ],
    ids=str,
)
def test_every_mode_trains_sharded_as_one_process_does(two, settings):
    settings = {**STABLE, **settings}
    if settings.get("mode") == "adapter":
        settings.pop("stability_threshold")
    results = two.run(train, settings, {"fsdp": {}})
    assert_equal_processes(results)
    alone = train(settings)
    assert [ranks for *_, ranks in results[0]["history"]] == [ranks for *_, ranks in alone["history"]]
    for name, weight in alone["weights"].items():
        assert_close(results[0]["weights"][name], weight, rtol=0, atol=1e-9)


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {"dtype": torch.float32, "fsdp": {"mp_policy": HALF}}),
        ({"shrink": "mask"}, {"dtype": torch.float32, "fsdp": {"mp_policy": HALF}, "accumulate": 2}),
        ({}, {"dtype": torch.bfloat16, "fsdp": {}}),
        ({}, {"dtype": torch.float32, "fsdp": {}, "batch": 17}),
    ],
    ids=str,
)
def test_processes_with_sharded_parameters_stay_equal_in_half_precision(two, settings, options):
    results = two.run(train, {**STABLE, **settings}, options)
    assert_equal_processes(results)
    assert cuts(results[0]["history"]) >= 3


def train_and_watch_gathers(settings) -> tuple[int, list[int]]:
    """The number of target layers, and how many a process holds whole at once."""
    held = []
    original = Check.found

    def watching(self, names):
        held.append(len(self.trained._whole))
        return original(self, names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_module, "WORKSPACE_BYTES", 1)
        patch.setattr(Check, "found", watching)
        layers = len(train(settings, {"fsdp": {}})["weights"])
    return layers, held


def test_a_check_never_holds_the_whole_model(two):
    for layers, held in two.run(train_and_watch_gathers, STABLE):
        assert layers == 3
        assert set(held) <= {0, 1}
        assert 1 in held


# ---- through Accelerate ----------------------------------------------------------------------------------------------


def forget_accelerate() -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def sharded_accelerator(kind: str = "FULL_STATE_DICT", **options) -> Accelerator:
    """Accelerate offers FSDP on accelerators only; what follows does not depend on the device."""
    forget_accelerate()
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        **{
            "fsdp_version": 2,
            "auto_wrap_policy": "transformer_based_wrap",
            "transformer_cls_names_to_wrap": ["ViTLayer"],
            "state_dict_type": kind,
            "cpu_ram_efficient_loading": False,
            "reshard_after_forward": True,
            **options,
        }
    )
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def run_sharded(directory, kind, shrink, *, start=0, stop=20, save=None, **options) -> dict:
    """The demo's model from step `start`, which is loaded, to `stop`; saved at `save`."""
    accelerator = sharded_accelerator(kind, **options)
    torch.manual_seed(0)
    settings = {"delay": 4, "update_every": 4, "stability_threshold": 0.991, "cutoff": 0.1, "max_rank_drop": 0.2}
    model = get_peft_model(demo_model().double(), OIALRConfig(mode="pretraining", shrink=shrink, **settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    controller = OIALRController(wrapped, optimizer, total_steps=20)
    controller.register(accelerator)
    if start:
        controller.match(directory)
        accelerator.load_state(str(directory))
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 1, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 10, (32,), generator=generator)
        index, count = process_index(), process_count()
        accelerator.backward(wrapped(pixel_values=x[index::count], labels=y[index::count]).loss)
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        if step + 1 == save:
            accelerator.save_state(str(directory))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(wrapped, options=options)
    if save and process_index() == 0:
        model.save_pretrained(Path(directory, "adapter"), state_dict=state)
    return {
        "state": state_of(model, optimizer.optimizer, controller),
        "history": [(u.step, u.stability, u.frozen, u.ranks) for u in controller.history],
        "held": sum(p.to_local().numel() for p in wrapped.parameters()),
        "parameters": sum(p.numel() for p in wrapped.parameters()),
        "ranks": {name: layer.rank("default") for name, layer in controller.layers.items()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("shrink", ["physical", "mask"])
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_sharded_run_resumes_exactly_and_loads_into_one_process(two, tmp_path, kind, shrink):
    whole_run = two.run(partial(run_sharded, tmp_path / "whole", kind, shrink))
    stopped = two.run(partial(run_sharded, tmp_path / "parts", kind, shrink, stop=13, save=13))
    resumed = two.run(partial(run_sharded, tmp_path / "parts", kind, shrink, start=13))
    for a, b in zip(whole_run, resumed, strict=True):
        assert a["state"] == b["state"]
        assert a["history"] == b["history"]
    assert whole_run[0]["state"] == whole_run[1]["state"]
    assert cuts(whole_run[0]["history"]) >= 5
    assert max(part["held"] for part in whole_run) <= 0.51 * whole_run[0]["parameters"]

    torch.manual_seed(0)
    model = get_peft_model(demo_model().double(), OIALRConfig(mode="pretraining"))
    file = tmp_path / "parts" / "pytorch_model_fsdp.bin"
    if kind == "SHARDED_STATE_DICT":
        file = tmp_path / "merged.pt"
        dcp_to_torch_save(tmp_path / "parts" / "pytorch_model_fsdp_0", file)
    loaded = torch.load(file, weights_only=True)
    model.load_state_dict(loaded.get("model", loaded))
    assert {name: layer.rank("default") for name, layer in adapter_layers(model).items()} == stopped[0]["ranks"]
    model.save_pretrained(tmp_path / "adapter")
    alone = PeftModel.from_pretrained(demo_model().double(), tmp_path / "adapter")
    shards = PeftModel.from_pretrained(demo_model().double(), tmp_path / "parts" / "adapter")
    for (name, layer), other in zip(adapter_layers(alone).items(), adapter_layers(shards).values(), strict=True):
        rank = stopped[0]["ranks"][name]
        if not layer.is_dense("default"):
            assert layer.oialr_sigma["default"].shape == (rank, rank)
        assert torch.equal(layer.adapter_weight("default"), other.adapter_weight("default"))


def run_sharded_trainer(directory, kind, **options) -> dict:
    forget_accelerate()
    original = AcceleratorState.__init__

    def on_cpu(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    config = {"version": 2, "transformer_layer_cls_to_wrap": ["ViTLayer"], "state_dict_type": kind}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AcceleratorState, "__init__", on_cpu)
            return run_trainer(directory, fsdp=True, fsdp_config=config, **options)
    finally:
        forget_accelerate()
        os.environ.pop("ACCELERATE_USE_FSDP", None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("FULL_STATE_DICT", marks=pytest.mark.sentinel), "SHARDED_STATE_DICT"])
def test_the_trainer_trains_saves_and_resumes_with_sharded_parameters(two, tmp_path, kind):
    whole_run = two.run(partial(run_sharded_trainer, tmp_path / "whole", kind))
    assert whole_run[0]["state"] == whole_run[1]["state"]
    assert whole_run[0]["sharded"] > 30
    assert cuts(whole_run[0]["history"]) >= 3
    two.run(partial(run_sharded_trainer, tmp_path / "parts", kind, stop=7))
    resumed = two.run(partial(run_sharded_trainer, tmp_path / "parts", kind, resume=True))
    for a, b in zip(whole_run, resumed, strict=True):
        assert a["state"] == b["state"]
        assert a["history"] == b["history"]


def test_ranks_are_matched_only_with_a_state_of_the_same_layers(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = get_peft_model(demo_model(), OIALRConfig(mode="pretraining", update_every=1))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    controller = OIALRController(model, optimizer, total_steps=4)
    with pytest.raises(ValueError, match=r"has no oialr_ranks.json. Call `controller.register\(accelerator\)`"):
        controller.match(tmp_path)
    (tmp_path / "oialr_ranks.json").write_text('{"other": null}')
    with pytest.raises(ValueError, match="The saved state is of other layers"):
        controller.match(tmp_path)
