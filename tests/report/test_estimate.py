"""Estimates before training agree with the models that are then made, and crossovers with the cost formulas."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from oialr_peft import OIALRConfig
from oialr_peft.linalg.ops import (
    built_cost,
    chain_cost,
    crossover_rank,
    folded_cost,
    inference_crossover_rank,
    route_cost,
)
from oialr_peft.report.estimate import estimate

TOKENS = 64
SETTINGS = {
    "replace": {"freeze_when": "delay", "delay": 0, "rank": 0.25},
    "pretraining": {"freeze_when": "delay", "delay": 0, "rank": 0.25, "mode": "pretraining"},
    "adapter": {"mode": "adapter", "rank": 0.25},
}


@pytest.fixture(scope="module")
def config():
    return LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        architectures=["LlamaForCausalLM"],
    )


@pytest.fixture(scope="module")
def directory(config, tmp_path_factory):
    """Nothing but a configuration."""
    path = tmp_path_factory.mktemp("llama")
    config.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("mode", SETTINGS)
def test_parameters_are_those_of_the_model(mode, config, directory):
    found = estimate(directory, mode=mode, tokens=TOKENS)
    model = get_peft_model(
        LlamaForCausalLM(config),
        OIALRConfig(task_type="CAUSAL_LM", **{"mode": "replace", **SETTINGS[mode]}),
    )
    factored = found.phases[-1]
    assert factored.parameters == sum(p.numel() for p in model.parameters())
    assert factored.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    names = {"adapter": ["dense", "OIALR, factored"]}.get(mode, ["dense", "OIALR, dense phase", "OIALR, factored"])
    assert [phase.name for phase in found.phases] == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_that_of_weights_gradients_and_moments(dtype, config, directory):
    dense = estimate(directory, dtype=dtype).phases[0]
    count, size = LlamaForCausalLM(config).num_parameters(), dtype.itemsize
    assert (dense.weight_bytes, dense.gradient_bytes, dense.moment_bytes) == (
        size * count,
        size * count,
        2 * size * count,
    )
    assert dense.total_bytes == 4 * size * count


def test_flops_of_a_dense_step_are_those_that_torch_counts(config, directory):
    model = LlamaForCausalLM(config)
    tokens = torch.randint(0, 40, (TOKENS, 1))  # of one token each, so that attention is next to nothing
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for name, count in counts.items() if "attention" not in str(name) and "bmm" not in str(name))
    assert estimate(directory).phases[0].training_flops == pytest.approx(products / TOKENS, rel=0.01)


def test_flops_of_factored_layers_are_those_of_the_routes(config, directory):
    found = estimate(directory, mode="pretraining", rank=4, tokens=TOKENS)
    layers = sum(shape.layers * route_cost(shape.out_features, shape.in_features, 4, TOKENS) for shape in found.shapes)
    assert found.phases[-1].training_flops == pytest.approx(2 * layers / TOKENS + 6 * 32 * 40)
    correction = estimate(directory, mode="adapter", rank=4, tokens=TOKENS)
    base = sum(2 * shape.layers * shape.out_features * shape.in_features for shape in correction.shapes)
    assert correction.phases[-1].training_flops == pytest.approx(2 * (layers / TOKENS + base) + 4 * 32 * 40)


def test_shapes_are_counted(directory):
    shapes = {(shape.out_features, shape.in_features): shape for shape in estimate(directory, rank=0.3).shapes}
    assert {key: shape.layers for key, shape in shapes.items()} == {(32, 32): 4, (16, 32): 4, (48, 32): 4, (32, 48): 2}
    assert shapes[16, 32].rank == 5


@pytest.mark.parametrize(("m", "n"), [(768, 768), (3072, 768), (100, 900)])
def test_at_the_crossover_both_cost_the_same(m, n):
    for beside_base, dense in ((False, 3 * m * n), (True, m * n)):
        rank = crossover_rank(m, n, beside_base=beside_base)
        assert chain_cost(m, n, math.floor(rank), 1) <= dense < chain_cost(m, n, math.floor(rank) + 1, 1)
    below = inference_crossover_rank(m, n)
    assert (m + n) * math.floor(below) <= m * n < (m + n) * (math.floor(below) + 1)


def test_the_cheapest_route_costs_least_or_nearly(seed):
    for rank in (8, 64, 300, 500):
        costs = [cost(512, 512, rank, 1000) for cost in (chain_cost, folded_cost, built_cost)]
        assert min(costs) <= route_cost(512, 512, rank, 1000) <= min(costs) / 0.95


def test_what_is_no_model_is_named():
    with pytest.raises(ValueError, match="`./nowhere/at/all` is no directory, and no name of a repository"):
        estimate("./nowhere/at/all")
