"""The cost model of benchmarks/scaling.py where it is exact: multiply-adds, parameters, bytes, the assignment of work."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForCausalLM

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.linalg.decompositions import polar_iteration
from oialr_peft.linalg.ops import built_cost, chain_cost, cheapest_route, folded_cost

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
BATCH, LENGTH = 2, 8
COSTS = {"chain": chain_cost, "folded": folded_cost, "built": built_cost}


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))  # the scripts import each other by name
    try:
        import scaling as module
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture
def config(scaling):
    return scaling.llama(32, 2, 48, 4, 2, 40)


@pytest.fixture
def run(scaling):
    return scaling.Run(tokens=BATCH * LENGTH, length=LENGTH, ratio=0.25)


def trained(config, *, factored: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A tiny model, trained for one step so that gradients and moments exist."""
    model: nn.Module = LlamaForCausalLM(config).float()
    if factored:
        options = {"freeze_when": "delay", "delay": 0, "rank": 0.25}
        model = get_peft_model(model, OIALRConfig(task_type="CAUSAL_LM", mode="pretraining", **options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if factored:
        OIALRController(model, optimizer, total_steps=100)  # products may be kept between steps
    backward(model)
    optimizer.step()
    return model, optimizer


def backward(model: nn.Module) -> None:
    tokens = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
    model(input_ids=tokens, labels=tokens).loss.backward()


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@pytest.mark.parametrize("factored", [False, True])
def test_flops_per_token_are_what_pytorch_counts(scaling, config, run, factored):
    model, _ = trained(config, factored=factored)
    with FlopCounterMode(display=False) as counter:
        backward(model)
    by_operation = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    counted = sum(count for op, count in by_operation.items() if op in ("aten.mm", "aten.addmm"))
    shapes = scaling.Shapes.of_config(config)
    expected = scaling.flops_per_token(shapes, run, dense=not factored, attention=False)
    assert counted == expected * run.tokens


@pytest.mark.parametrize("factored", [False, True])
def test_parameters_gradients_and_memory_are_those_of_the_model(scaling, config, run, factored):
    model, optimizer = trained(config, factored=factored)
    shapes, dense = scaling.Shapes.of_config(config), not factored
    weights = list(model.parameters())
    gradients = [p.grad for p in weights if p.requires_grad]
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim > 0]
    assert scaling.parameters(shapes, run, dense=dense) == sum(p.numel() for p in weights)
    assert scaling.gradient_bytes(shapes, run, dense=dense) == bytes_of(gradients)
    expected = bytes_of([*weights, *gradients, *moments])
    assert scaling.state_bytes(shapes, run, dense=dense, sketches=False) == expected
    eight = replace(run, gpus=8, sharded=True)
    assert scaling.state_bytes(shapes, eight, dense=dense, sketches=False) == expected / 8
    assert scaling.state_bytes(shapes, replace(eight, sharded=False), dense=dense, sketches=False) == expected


@pytest.mark.parametrize("width", [16, 160])  # the whole basis is kept, or a sketch
def test_sketches_are_what_the_controller_keeps(scaling, width):
    config = scaling.llama(width, 1, 2 * width, 4, 2, 40)
    model = get_peft_model(LlamaForCausalLM(config), OIALRConfig(task_type="CAUSAL_LM", mode="pretraining"))
    optimizer = torch.optim.AdamW(model.parameters())
    controller = OIALRController(model, optimizer, total_steps=100)
    for _ in range(4):
        controller.step()
    bases = list(controller.state_dict()["bases"].values())
    shapes, run = scaling.Shapes.of_config(config), scaling.Run()
    assert len(bases) == len(shapes.targets) == 7
    assert sum(scaling.sketch_bytes(m, n) for m, n in shapes.targets) == bytes_of(bases)
    with_sketches, without = (scaling.state_bytes(shapes, run, dense=True, sketches=on) for on in (True, False))
    assert with_sketches - without == bytes_of(bases)


@pytest.mark.parametrize("shape", [(24, 24), (48, 12), (12, 48)])
def test_products_of_a_layer_cost_what_its_route_does(scaling, shape):
    taken = set()
    for rank, tokens in itertools.product(range(1, 13), (8, 400)):
        route = cheapest_route(*shape, rank, tokens)
        taken.add(route)
        products = scaling.layer_products(*shape, rank, tokens)
        assert sum(a * b * c for a, b, c in products) == COSTS[route](*shape, rank, tokens)
    assert {"chain", "folded"} <= taken


@pytest.mark.parametrize("shape", [(9, 9), (12, 5), (5, 12)])
def test_the_polar_iteration_costs_what_pytorch_counts(scaling, shape):
    with FlopCounterMode(display=False) as counter:
        polar_iteration(torch.randn(shape, dtype=torch.float32))
    assert counter.get_total_flops() == scaling.polar_flops(*shape)


def test_more_gpus_shorten_a_check_and_one_gpu_communicates_nothing(scaling, config, run):
    shapes = scaling.Shapes.of_config(config)
    slow = scaling.Cluster(inside=1.0, between=1.0)
    fast = scaling.Cluster(inside=1e30, between=1e30)
    for kind in ("dense", "freeze", "update"):
        assert scaling.check_seconds(kind, shapes, run, slow) == scaling.check_seconds(kind, shapes, run, fast)
        seconds = [scaling.check_seconds(kind, shapes, replace(run, gpus=p), fast) for p in (1, 2, 4)]
        assert seconds == sorted(seconds, reverse=True)
        assert scaling.check_seconds(kind, shapes, replace(run, gpus=2), slow) > seconds[0]
    for dense in (True, False):
        one, two = (scaling.step_seconds(shapes, replace(run, gpus=p), slow, dense=dense) for p in (1, 2))
        assert one == scaling.step_seconds(shapes, run, fast, dense=dense)
        # of one gradient, half goes out twice
        assert two == pytest.approx(scaling.gradient_bytes(shapes, run, dense=dense), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "parameters"), [("1b", 1_235_814_400), ("7b", 6_738_415_616), ("70b", 68_976_648_192)]
)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_the_table_needs_no_weights(scaling, monkeypatch, capsys, name, parameters, engine):
    made = []
    from_config = AutoModelForCausalLM.from_config
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_config", lambda config: made.append(from_config(config)) or made[-1]
    )
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--model", name, "--gpus", "1,8,64", "--engine", engine])
    scaling.main()
    assert {p.device.type for model in made for p in model.parameters()} == {"meta"}
    output = capsys.readouterr().out
    assert f"{parameters:,} parameters, {engine}" in output
    assert "On paper" in output
    rows = [line.strip("| ").split("|") for line in output.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["1", "8", "64"]
    for row in rows:
        assert all(float(cell) > 0 for cell in row if cell.strip() != "-")


def test_a_model_of_ones_own_is_read_from_its_configuration(scaling, monkeypatch, capsys, tmp_path):
    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=16).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--config", str(tmp_path), "--gpus", "2"])
    scaling.main()
    assert "ddp" in capsys.readouterr().out
    with torch.device("meta"):
        shapes = scaling.Shapes.of(AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=4)))
    assert shapes.targets == 2 * ((96, 32), (32, 32), (128, 32), (32, 128))


def test_calibration_reproduces_what_it_was_fitted_to(scaling, monkeypatch):
    cluster = scaling.Cluster(flops=1e11, flops32=9e10, bandwidth=1e10, passes=7.0, fixed=2e-3, svd=(1e-9, 2.8, 1e-10))
    args = scaling.argparse.Namespace(batch=2, ratio=0.25)
    shapes = scaling.Shapes.of_config(scaling.small_llama(scaling.FITTED))
    run = scaling.small_run(args, torch.float32)
    threads = 2 * torch.get_num_threads()
    times = scaling.Timings()
    times.add("flops", 2 * 1024**3 / 1e11)
    times.add("flops32", 2 * 1024**3 / 9e10)
    times.add("bandwidth", 2**28 / 1e10)
    for name, (m, n) in scaling.SVDS.items():
        times.add(name, threads * scaling.decomposition_seconds(m, n, cluster, factors=True))
    times.add(f"{scaling.FITTED} dense step", scaling.step_seconds(shapes, run, cluster, dense=True))
    times.add(f"{scaling.FITTED} Σ update", scaling.check_seconds("update", shapes, run, cluster))
    found = scaling.calibrate(args, times, torch.device("cpu"), torch.float32)
    for name in ("flops", "flops32", "bandwidth", "passes", "fixed", "svd"):
        assert getattr(found, name) == pytest.approx(getattr(cluster, name), rel=1e-6)
