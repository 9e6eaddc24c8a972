"""Several processes over gloo: equal to one process, equal among themselves, little traffic, and no silent failures."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import signal
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import get_peft_model
from processes import ProcessPool
from runs import (
    STABLE,
    Tower,
    assert_equal_processes,
    cuts,
    demo_model,
    process_count,
    run_trainer,
    state_of,
    train,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.testing import assert_close

import oialr_peft.engine.check as check_module
import oialr_peft.engine.controller as controller_module
import oialr_peft.parallel.distributed as distributed_module
from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.engine.check import Check
from oialr_peft.linalg.basis import SKETCH_COLUMNS
from oialr_peft.parallel.distributed import Job, Processes, longest_first
from oialr_peft.tuner.lookup import adapter_layers

# ---- equality --------------------------------------------------------------------------------------------------------


def test_two_processes_train_as_one_does(two):
    results = two.run(train, STABLE)
    assert_equal_processes(results)
    alone = train(STABLE)
    for ours, theirs in zip(results[0]["history"], alone["history"], strict=True):
        assert ours[2:] == theirs[2:]
        assert ours[1] == pytest.approx(theirs[1], abs=1e-9)
    for name, weight in alone["weights"].items():
        assert_close(results[0]["weights"][name], weight, rtol=0, atol=1e-9)
    assert cuts(alone["history"]) >= 3


DDP_OPTIONS = [
    {"ddp": {"find_unused_parameters": True}},
    {"ddp": {"gradient_as_bucket_view": True}},
    {"ddp": {"gradient_as_bucket_view": True}, "set_to_none": False},
    {"ddp": {"gradient_as_bucket_view": True, "find_unused_parameters": True, "broadcast_buffers": False}},
    {"ddp": {"find_unused_parameters": True}, "tower": {"sometimes": True}},
    {"ddp": {"bucket_cap_mb": 0.0001}},
    {"accumulate": 3},
    {"tower": {"recompute": True}},
    {"tower": {"recompute": True}, "accumulate": 2, "ddp": {"find_unused_parameters": True}},
    {"optimizer": "sgd"},
    {"dtype": torch.float32},
]


@pytest.mark.parametrize("options", DDP_OPTIONS, ids=str)
def test_every_way_to_use_ddp_trains_as_one_process_does(two, options):
    results = two.run(train, STABLE, options)
    assert_equal_processes(results)
    alone = train(STABLE, options)
    tolerance = 1e-9 if options.get("dtype", torch.float64) == torch.float64 else 1e-3
    assert [ranks for *_, ranks in results[0]["history"]] == [ranks for *_, ranks in alone["history"]]
    for name, weight in alone["weights"].items():
        assert_close(results[0]["weights"][name], weight, rtol=0, atol=tolerance)
    assert cuts(alone["history"]) >= 3


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"dtype": torch.float32, "autocast": True}, {"batch": 17}, {"batch": 5}],
    ids=str,
)
def test_processes_stay_equal_in_half_precision_and_with_uneven_batches(two, options):
    results = two.run(train, STABLE, options)
    assert_equal_processes(results)
    assert cuts(results[0]["history"]) >= 3
    assert results[0]["losses"] != results[1]["losses"]  # each saw its own data


@pytest.mark.parametrize(
    "settings",
    [
        {"stability_storage": "full"},
        {"stability_storage": "bf16"},
        {"stability_storage": "cpu"},
        {"shrink": "mask"},
        {"freeze_when": "delay", "delay": 0, "rank": 0.5, "stability_threshold": 1.0},
        {"mode": "adapter", "delay": 0, "cutoff": 0.5},
        {"layers_per_update": 0.4},
    ],
    ids=str,
)
def test_every_mode_trains_as_one_process_does(two, settings):
    settings = {**STABLE, **settings}
    if settings.get("mode") == "adapter":
        settings.pop("stability_threshold")
    results = two.run(train, settings)
    assert_equal_processes(results)
    alone = train(settings)
    assert [ranks for *_, ranks in results[0]["history"]] == [ranks for *_, ranks in alone["history"]]
    for name, weight in alone["weights"].items():
        assert_close(results[0]["weights"][name], weight, rtol=0, atol=1e-9)


def random_schedule(seed: int) -> tuple[dict, dict]:
    """Settings and options drawn at random: which layer is factored when, how far ranks fall, and how it is trained."""
    draw = random.Random(seed)
    settings = {
        "delay": draw.choice([1, 2, 4, 6]),
        "update_every": draw.choice([1, 2, 3]),
        "stability_threshold": draw.choice([0.3, 0.9, 0.97, 0.99]),
        "freeze_when": draw.choice(["stable", "stable", "delay"]),
        "cutoff": draw.choice([0.1, 0.3, 0.5, 0.8]),
        "max_rank_drop": draw.choice([0.1, 0.5, 0.9]),
        "min_rank": draw.choice([1, 2, 0.2]),
        "layers_per_update": draw.choice([0.1, 0.5, 1.0]),
        "rank": draw.choice([None, None, 0.5, 5]),
        "stability_storage": draw.choice(["sketch", "full", "bf16", "cpu"]),
        "shrink": draw.choice(["physical", "physical", "mask"]),
        "mode": "pretraining" if draw.random() < 0.7 else "replace",
    }
    options = {
        "steps": 16,
        "dtype": draw.choice([torch.float64, torch.float32, torch.bfloat16]),
        "optimizer": draw.choice(["adamw", "sgd"]),
        "accumulate": draw.choice([1, 1, 2]),
        **({"fsdp": {"reshard_after_forward": draw.random() < 0.5}} if draw.random() < 0.3 else {}),
        "ddp": {
            "find_unused_parameters": draw.random() < 0.3,
            "gradient_as_bucket_view": draw.random() < 0.3,
            "bucket_cap_mb": draw.choice([0.0005, 25]),
        },
    }
    settings["max_output_loss"] = draw.choice([None, None, 0.0, 0.05])
    return settings, options


def train_at_random(seeds) -> list[dict]:
    return [train(*random_schedule(seed)) for seed in seeds]


@pytest.mark.slow
@pytest.mark.parametrize("block", [pytest.param(0, marks=pytest.mark.sentinel), *range(1, 8)])
def test_random_schedules_leave_all_processes_bitwise_equal(two, block):
    results = two.run(train_at_random, range(25 * block, 25 * (block + 1)))
    for runs in zip(*results, strict=True):
        assert_equal_processes(runs)
    histories = {json.dumps(run["history"]) for run in results[0]}
    assert len(histories) >= 20
    assert sum(cuts(run["history"]) for run in results[0]) > 30


def train_on_digits(steps: int) -> dict:
    """The demo's model and data in float64, in a loop with Accelerate; the global batch is 32 images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 8 - 1)[:, None]
    dataset = list(zip(images, torch.tensor(data.target)))
    settings = {"delay": 4, "update_every": 4, "stability_threshold": 0.991, "cutoff": 0.1, "max_rank_drop": 0.2}
    torch.manual_seed(0)
    model = get_peft_model(demo_model().double(), OIALRConfig(mode="pretraining", **settings))
    accelerator = Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(
        dataset, 32 // accelerator.num_processes, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    controller = OIALRController(wrapped, optimizer, total_steps=steps)
    accelerator.register_for_checkpointing(controller)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for x, y in itertools.islice(batches, steps):
        accelerator.backward(wrapped(pixel_values=x, labels=y).loss)
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    return {
        "history": [(u.step, u.stability, u.frozen, u.ranks) for u in controller.history],
        "parameters": [parameter.detach() for parameter in model.parameters()],
        "state": state_of(model, optimizer.optimizer, controller),
    }


@pytest.mark.slow
def test_the_demo_on_two_processes_equals_the_demo_on_one(two):
    ours, theirs = two.run(train_on_digits, 28)
    assert ours["state"] == theirs["state"]
    alone = train_on_digits(28)
    freezes = [frozen for _, _, frozen, _ in alone["history"] if frozen]
    assert len(freezes) >= 3
    assert cuts(alone["history"]) >= 5
    assert [h[2:] for h in ours["history"]] == [h[2:] for h in alone["history"]]
    difference = max(float((a - b).abs().max()) for a, b in zip(ours["parameters"], alone["parameters"], strict=True))
    assert difference <= 1e-6
    print(
        f"\nlargest difference of a parameter: {difference:.1e}; {len(freezes)} freezes, {cuts(alone['history'])} cuts"
    )


# ---- work and traffic ------------------------------------------------------------------------------------------------


def bytes_of(*tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def train_and_count(settings, width: int, steps: int) -> list[dict]:
    """Bytes of gradients in each step, and bytes, tensors and decompositions in each check of this process."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))
    model = get_peft_model(layers, OIALRConfig(mode="pretraining", target_modules="all-linear", **settings))
    wrapped = DistributedDataParallel(model)
    real_broadcast, real_reduce, real_decompose = dist.broadcast, dist.all_reduce, check_module.decompose
    counted = {"gradient": 0, "sent": 0, "agreed": 0, "tensors": 0, "decomposed": 0}

    def hook(state, bucket):
        counted["gradient"] += bytes_of(bucket.buffer())
        work = real_reduce(bucket.buffer().div_(process_count()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, hook)

    def broadcast(tensor, *args, **kwargs):
        counted["sent"] += bytes_of(tensor)
        counted["tensors"] += 1
        return real_broadcast(tensor, *args, **kwargs)

    def all_reduce(tensor, *args, **kwargs):
        counted["agreed"] += bytes_of(tensor)
        return real_reduce(tensor, *args, **kwargs)

    def decompose(weights):
        counted["decomposed"] += len(weights)
        return real_decompose(weights)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = OIALRController(wrapped, optimizer, total_steps=steps)
    records = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_module.dist, "broadcast", broadcast)
        patch.setattr(distributed_module.dist, "all_reduce", all_reduce)
        patch.setattr(check_module, "decompose", decompose)
        for _ in range(steps):
            counted.update(dict.fromkeys(counted, 0))
            wrapped(torch.randn(8, width)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step()
            ranks = [layer.rank("default") for layer in adapter_layers(model).values()]
            dense = [layer.is_dense("default") for layer in adapter_layers(model).values()]
            records.append(
                {**counted, "ranks": ranks, "dense": dense, "trainable": controller._trained.count_trainable()}
            )
    return records


def test_after_the_freeze_only_cores_are_reduced_and_bases_never_except_in_checks(two):
    width, rank, steps = 160, 40, 10
    settings = {"freeze_when": "delay", "delay": 4, "update_every": 2, "rank": rank, "cutoff": 0.0}
    results = two.run(train_and_count, settings, width, steps)
    dense, core, sketch = 4 * width**2, 4 * rank**2, 4 * width * SKETCH_COLUMNS
    changed = 4 * (2 * width * rank) + 3 * core  # U, Vᵀ, Σ, and both moments of Σ
    for records in results:
        for step, record in enumerate(records, start=1):
            assert record["gradient"] == 4 * (dense if step <= 4 else core)
            if step % 2:
                assert record["sent"] == record["agreed"] == 0
        assert records[1]["sent"] == 4 * sketch
        assert records[1]["tensors"] == 4
        for step in (4, 6, 8, 10):
            assert records[step - 1]["sent"] == 4 * changed
            assert records[step - 1]["tensors"] == 4 * 5
        assert records[-1]["gradient"] * 16 <= records[0]["gradient"]
        assert all(record["agreed"] <= 8 * (3 + 4 * 4) for record in records)


def test_every_matrix_is_decomposed_once_and_the_work_is_even(two):
    settings = {"freeze_when": "delay", "delay": 4, "update_every": 2, "cutoff": 0.3}
    results = two.run(train_and_count, settings, 20, 8)
    for records in zip(*results, strict=True):
        decomposed = [record["decomposed"] for record in records]
        checked = records[0]["sent"] > 0
        assert decomposed == ([2, 2] if checked else [0, 0])


def slowest(costs, owners) -> float:
    return max(sum(c for c, o in zip(costs, owners, strict=True) if o == owner) for owner in set(owners))


def test_the_longest_jobs_first_never_take_more_than_four_thirds_of_the_best():
    draw = random.Random(0)
    for _ in range(200):
        costs = sorted((draw.choice([1, 2, 3, 5, 8, 13]) for _ in range(draw.randint(1, 8))), reverse=True)
        processes = draw.randint(1, 3)
        best = min(slowest(costs, owners) for owners in itertools.product(range(processes), repeat=len(costs)))
        assert slowest(costs, longest_first(costs, processes)) <= 4 / 3 * best


def test_rounds_hold_every_job_once_and_bounded_memory(monkeypatch):
    monkeypatch.setattr(distributed_module, "WORKSPACE_BYTES", 100_000)
    processes = Processes.__new__(Processes)
    processes.count = 3
    draw = random.Random(1)
    jobs = [Job(f"layer {i}", (draw.choice([10, 30, 60]), draw.choice([10, 20])), 4) for i in range(40)]
    rounds = list(processes.rounds(jobs))
    assert sorted(job.name for shares in rounds for job, _ in shares) == sorted(job.name for job in jobs)
    assert len(rounds) > 1
    largest = max(job.bytes for job in jobs)
    for shares in rounds:
        assert sum(job.bytes for job, _ in shares) <= 3 * 100_000 + largest
        assert {owner for _, owner in shares} <= {0, 1, 2}
    assert list(processes.rounds(list(reversed(jobs)))) == rounds


def test_the_reducer_is_made_again_only_when_a_trained_parameter_was_replaced(two):
    for result in two.run(train, {**STABLE, "shrink": "mask", "stability_threshold": 0.5}):
        frozen_at = [bool(frozen) for _, _, frozen, _ in result["history"]]
        changed = [before != after for before, after in itertools.pairwise(result["reducers"])]
        assert any(changed)
        assert changed == frozen_at[1:]
        assert cuts(result["history"]) >= 3
    for result in two.run(train, {**STABLE, "stability_threshold": 0.5}):
        changed = [before != after for before, after in itertools.pairwise(result["reducers"])]
        replaced = [bool(f) or any(b != a for b, a in ranks.values()) for _, _, f, ranks in result["history"]]
        assert changed == replaced[1:]
        assert not all(changed)


def train_and_watch_buckets() -> tuple[int, int, int]:
    """Buckets of the dense phase that are alive before the freeze and after it, and how many there are after it."""
    torch.manual_seed(0)
    schedule = {"freeze_when": "delay", "delay": 3, "update_every": 1, "cutoff": 0.5}
    model = get_peft_model(Tower(), OIALRConfig(mode="pretraining", exclude_modules=["head"], **schedule))
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    seen: list[weakref.ref] = []

    def hook(state, bucket):
        seen.append(weakref.ref(bucket.buffer().untyped_storage()))
        return default_hooks.allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, hook)
    optimizer = torch.optim.AdamW(model.parameters())
    controller = OIALRController(wrapped, optimizer, total_steps=10)
    for step in range(1, 5):
        wrapped(torch.randn(4, 12)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            dense = list(seen)
            before = sum(storage() is not None for storage in dense)
            seen.clear()
        controller.step()
    gc.collect()
    return before, sum(storage() is not None for storage in dense), len(seen)


def test_the_freeze_frees_the_buckets_of_the_dense_gradients(two):
    for before, after, new in two.run(train_and_watch_buckets):
        assert before > 0
        assert after == 0
        assert new > 0


# ---- what is refused -------------------------------------------------------------------------------------------------


def tower():
    torch.manual_seed(0)
    return get_peft_model(Tower(), OIALRConfig(mode="replace", exclude_modules=["head"]))


def controlled(wrapped, optimizer=None):
    optimizer = optimizer or torch.optim.AdamW(p for p in wrapped.parameters() if p.requires_grad)
    return OIALRController(wrapped, optimizer, total_steps=100)


def make_unwrapped():
    controlled(tower())


def make_static_graph():
    controlled(DistributedDataParallel(tower(), static_graph=True))


def make_power_sgd():
    wrapped = DistributedDataParallel(tower())
    wrapped.register_comm_hook(PowerSGDState(None), powerSGD_hook)
    controlled(wrapped)


def make_zero():
    model = tower()
    trained = [p for p in model.parameters() if p.requires_grad]
    controlled(DistributedDataParallel(model), ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=1e-3))


def make_fsdp1():
    controlled(FullyShardedDataParallel(tower(), device_id=torch.device("cpu"), use_orig_params=True))


def make_hsdp():
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    controlled(fully_shard(tower(), mesh=mesh))


def make_cpu_offload():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    controlled(fully_shard(tower(), mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)))


def make_tensor_parallel():
    model = tower()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model.base_model.model.head.weight = nn.Parameter(
        distribute_tensor(model.base_model.model.head.weight.detach(), mesh, [Shard(1)])
    )
    controlled(model)


def make_different_settings():
    torch.manual_seed(0)
    config = OIALRConfig(mode="pretraining", cutoff=0.1 * (1 + dist.get_rank()))
    controlled(DistributedDataParallel(get_peft_model(Tower(), config)))


def make_different_lengths():
    wrapped = DistributedDataParallel(tower())
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    OIALRController(wrapped, torch.optim.AdamW(trained), total_steps=100 + dist.get_rank())


def make_loaded_with_nan():
    model = tower()
    wrapped = DistributedDataParallel(model)
    if dist.get_rank() == 1:
        adapter_layers(model)["down"].trained_parameter("default").data[0, 0] = float("inf")
    controlled(wrapped)


REFUSED = [
    (make_unwrapped, "not wrapped for it, so each would train its own. Pass the model as `accelerator.prepare`"),
    (make_static_graph, "`static_graph=True` fixes the set of parameters"),
    (make_power_sgd, "PowerSGD hook keeps errors of the old shapes"),
    (make_zero, "ZeroRedundancyOptimizer spreads the optimizer state"),
    (make_fsdp1, "FSDP1 joins parameters to flat ones"),
    (make_hsdp, "Sharding with replication (HSDP) is not supported"),
    (make_cpu_offload, "CPU offloading is not supported"),
    (make_tensor_parallel, "tensor parallelism"),
    (make_different_settings, "The configuration differs between the 2 processes"),
    (make_different_lengths, "The configuration differs between the 2 processes"),
    (make_loaded_with_nan, "The adapter's weight of `down` holds NaN or Inf"),
]


def errors_of(functions) -> list[str]:
    found = []
    for function in functions:
        try:
            function()
            found.append("nothing was refused")
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_cannot_work_is_refused_at_the_start_on_every_process(two):
    functions = [function for function, _ in REFUSED]
    for errors in two.run(errors_of, functions):
        for error, (_, expected) in zip(errors, REFUSED, strict=True):
            assert expected in error


def test_what_processes_compare_says_nothing_of_their_devices():
    """Each has a GPU of its own, whose number PyTorch shows when it prints a parameter."""
    layers = adapter_layers(tower())
    _, _, shapes = controller_module._shared_facts(OIALRConfig(mode="replace").resolved(), 10, layers)
    assert shapes["up"] == [16, 12, "default: dense"]
    assert set(shapes) == {"up", "middle", "down"}


def test_data_parallel_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="nn.DataParallel copies the model at every step"):
        controlled(DataParallel(tower()))


def test_deepspeed_is_refused():
    class Engine(nn.Module):
        __module__ = "deepspeed.runtime.engine"

        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(ValueError, match="DeepSpeed keeps its own copies"):
        controlled(Engine(tower()))


def test_an_offloaded_model_is_refused():
    model = tower()
    model.base_model.model.head.to("meta")
    with pytest.raises(ValueError, match=r"`base_model.model.head.weight` is on the meta device"):
        controlled(model)


class OnAnotherDevice(nn.Parameter):
    device = torch.device("cuda:0")


def test_a_model_on_several_devices_is_refused():
    model = tower()
    model.base_model.model.head.bias = OnAnotherDevice(torch.zeros(3))
    with pytest.raises(ValueError, match="The model is spread over cpu, cuda:0"):
        controlled(model)


def train_inside_join():
    wrapped = DistributedDataParallel(tower())
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    controller = OIALRController(wrapped, optimizer, total_steps=25)
    with wrapped.join():
        wrapped(torch.randn(4, 12)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()


def test_join_is_refused(two):
    for outcome in two.outcomes(train_inside_join):
        assert outcome.kind == "RuntimeError"
        assert "Give every process the same number of batches" in outcome.message


# ---- faults ----------------------------------------------------------------------------------------------------------


def train_with_fault(fault: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Tower(), OIALRConfig(mode="pretraining", update_every=1, exclude_modules=["head"]))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    controller = OIALRController(wrapped, optimizer, total_steps=100)
    for step in range(5):
        wrapped(torch.randn(4, 12)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        faulty = step == 3 and dist.get_rank() == 1
        if faulty and fault == "nan":
            adapter_layers(model)["middle"].trained_parameter("default").data[2, 1] = float("nan")
        if faulty and fault == "step missed":
            controller._state.steps -= 1
        if faulty and fault == "decomposition":

            def failing(weights):
                raise torch.linalg.LinAlgError("it did not converge")

            check_module.decompose = failing
        if faulty and fault == "check missed":
            continue
        if faulty and fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        controller.step()


def test_nan_on_one_process_stops_all_with_the_name_of_the_module(two):
    for outcome in two.outcomes(train_with_fault, "nan"):
        assert outcome.kind == "ValueError"
        assert "`middle` holds NaN or Inf" in outcome.message


def test_a_decomposition_that_fails_on_one_process_stops_all(two):
    other, failed = two.outcomes(train_with_fault, "decomposition")
    assert (failed.kind, failed.message) == ("_LinAlgError", "it did not converge")
    assert other.kind == "RuntimeError"
    assert "Process 1 could not decompose `" in other.message


def test_processes_at_different_steps_stop(two):
    for outcome in two.outcomes(train_with_fault, "step missed"):
        assert outcome.kind == "RuntimeError"
        assert "at different optimizer steps, 3 to 4" in outcome.message


def train_with_broken_state() -> dict:
    """Second moments overflow on process 0 alone, just before the check that factors every layer."""
    torch.manual_seed(0)
    config = OIALRConfig(
        mode="replace", update_every=1, freeze_when="delay", delay=3, cutoff=0.3, exclude_modules=["head"]
    )
    model = get_peft_model(Tower(), config)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    controller = OIALRController(wrapped, optimizer, total_steps=100)
    warned = []
    for step in range(6):
        wrapped(torch.randn(4, 12)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2 and dist.get_rank() == 0:
            for layer in adapter_layers(model).values():
                optimizer.state[layer.trained_parameter("default")]["exp_avg_sq"][0, 0] = float("inf")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            controller.step()
        warned += [str(warning.message) for warning in caught if "NaN or Inf" in str(warning.message)]
    layers = adapter_layers(model).values()
    states = [
        [layer.oialr_sigma["default"], *optimizer.state[layer.oialr_sigma["default"]].values()] for layer in layers
    ]
    return {
        "states": [tensor.detach().tolist() for state in states for tensor in state],
        "warned": warned,
        "layers": len(layers),
    }


def test_a_state_that_is_not_finite_never_reaches_another_process(two):
    first, second = two.run(train_with_broken_state)
    assert first["states"] == second["states"]
    assert torch.isfinite(torch.cat([torch.tensor(values).flatten() for values in first["states"]])).all()
    # reset everywhere for the layers that process 0 decomposes; for the others the sound state of process 1 is taken
    assert first["warned"] == second["warned"]
    assert 0 < len(first["warned"]) < first["layers"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["check missed", pytest.param("killed", marks=pytest.mark.sentinel)])
def test_no_process_waits_for_ever(fault):
    pool = ProcessPool(2, timeout=4)
    outcomes = pool.outcomes(train_with_fault, fault)
    assert [outcome.kind != "Hang" for outcome in outcomes] == [True, True]
    assert outcomes[0].kind in ("RuntimeError", "DistBackendError", "DistNetworkError")
    pool.stop()


# ---- the Trainer -----------------------------------------------------------------------------------------------------


def test_the_trainer_on_two_processes_equals_itself_on_one(two, tmp_path):
    ours, theirs = two.run(run_trainer, tmp_path / "two")
    assert ours["state"] == theirs["state"]
    alone = run_trainer(tmp_path / "one")
    assert cuts(alone["history"]) >= 3
    assert [h[2:] for h in ours["history"]] == [h[2:] for h in alone["history"]]
    for a, b in zip(ours["weights"], alone["weights"], strict=True):
        assert_close(a, b, rtol=0, atol=1e-3)
    assert len(ours["logged"]) == len(alone["logged"]) == 6


@pytest.fixture(scope="module")
def whole(two, tmp_path_factory) -> list[dict]:
    """What both processes of an uninterrupted run end with."""
    return two.run(run_trainer, tmp_path_factory.mktemp("whole"))


def test_a_run_on_two_processes_resumes_exactly(two, whole, tmp_path):
    two.run(partial(run_trainer, tmp_path, stop=7))
    resumed = two.run(partial(run_trainer, tmp_path, resume=True))
    for a, b in zip(whole, resumed, strict=True):
        assert a["state"] == b["state"]
        assert a["history"] == b["history"]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_resumes_on_another_number_of_processes(two, tmp_path, before, after):
    on = {1: lambda call: [call()], 2: two.run}
    stopped = on[before](partial(run_trainer, tmp_path, stop=6))[0]
    # nothing is trained after the resumed step, so this is what was loaded
    loaded = on[after](partial(run_trainer, tmp_path, resume=str(tmp_path / "checkpoint-6"), max_steps=6))[0]
    assert loaded["state"]["parameters"] == stopped["state"]["parameters"]
    assert loaded["state"]["bases"] == stopped["state"]["bases"]
    assert loaded["history"] == stopped["history"]
    whole = on[before](partial(run_trainer, tmp_path / "whole"))[0]
    resumed = on[after](partial(run_trainer, tmp_path, resume=str(tmp_path / "checkpoint-6")))[0]
    assert [h[2:] for h in resumed["history"]] == [h[2:] for h in whole["history"]]
    for a, b in zip(resumed["weights"], whole["weights"], strict=True):
        assert_close(a, b, rtol=0, atol=1e-3)


MOMENTS_OF_A_SAVE = [
    ("save_model", 0),
    ("_save_optimizer_and_scheduler", 0),
    ("_save_scaler", 0),
    ("_save_rng_state", 0),
    ("_save_rng_state", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "process"), MOMENTS_OF_A_SAVE)
def test_a_process_killed_in_a_save_leaves_a_checkpoint_that_resumes_exactly(two, whole, tmp_path, method, process):
    mortal = ProcessPool(2, timeout=5)
    outcomes = mortal.outcomes(partial(run_trainer, tmp_path / "killed", kill=(method, 3, process)))
    assert outcomes[process].kind == "Exit"
    assert outcomes[1 - process].kind != "Hang"
    resumed = two.run(partial(run_trainer, tmp_path / "killed", resume=True))
    for a, b in zip(whole, resumed, strict=True):
        assert a["state"] == b["state"]


def kill_in_check(directory) -> None:
    original = Check.found

    def dying(self, names):
        if self.step == 8 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, names)

    Check.found = dying
    run_trainer(directory)


@pytest.mark.slow
@pytest.mark.sentinel
def test_a_process_killed_in_a_check_leaves_a_checkpoint_that_resumes_exactly(two, whole, tmp_path):
    mortal = ProcessPool(2, timeout=5)
    other, killed = mortal.outcomes(kill_in_check, tmp_path / "killed")
    assert killed.kind == "Exit"
    assert other.kind != "Hang"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was left half-written
        resumed = two.run(partial(run_trainer, tmp_path / "killed", resume=True))
    for a, b in zip(whole, resumed, strict=True):
        assert a["state"] == b["state"]
