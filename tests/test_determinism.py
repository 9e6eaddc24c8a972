"""Runs that repeat bit for bit, and random states of the user that nothing touches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from processes import ProcessPool
from runs import STABLE, cuts, run_trainer, train
from torch import nn
from trainer_runs import adapted as adapted_bert
from trainer_runs import assert_equal_models, assert_equal_optimizers
from trainer_runs import trained as trained_bert
from transformers import AutoModelForSequenceClassification, Trainer

from oialr_peft import OIALRConfig, OIALRController, OIALRTrainer, plot_history, rank_table
from oialr_peft.linalg import decompositions
from oialr_peft.report.run import run_report
from oialr_peft.storage.export import save_dense, save_lora, save_low_rank, to_dense
from oialr_peft.tuner.lookup import adapter_layers


def some_of(cases: Iterable[str], *fast: str) -> list[Any]:
    """All cases; those that are not named are slow tests."""
    return [pytest.param(case, marks=() if case in fast else pytest.mark.slow) for case in cases]


# ---- the same run again ----------------------------------------------------------------------------------------------

RUNS = {
    "stable": (STABLE, {}),
    "half precision": (STABLE, {"dtype": torch.bfloat16}),
    "bounded": ({**STABLE, "max_output_loss": 0.01, "max_rank_drop": 0.5}, {"dtype": torch.float32}),
    "masked, sketched": (
        {**STABLE, "shrink": "mask", "stability_storage": "sketch"},
        {"dtype": torch.float32, "accumulate": 2},
    ),
}


def without_objects(run: dict) -> dict:
    return {key: run[key] for key in ("states", "losses", "history")}


@pytest.fixture(scope="module")
def another() -> Iterator[ProcessPool]:
    """One process of its own: another interpreter, with other hashes of strings."""
    pool = ProcessPool(1)
    yield pool
    pool.stop()


@pytest.mark.parametrize("case", some_of(RUNS, "stable", "bounded"))
def test_a_run_is_equal_bit_for_bit_in_this_process_and_in_another(another, case):
    here = without_objects(train(*RUNS[case]))
    assert cuts(here["history"]) >= 2
    assert without_objects(train(*RUNS[case])) == here
    assert without_objects(another.run(train, *RUNS[case])[0]) == here


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32, "accumulate": 2}, {"fsdp": {}}], ids=str)
def test_a_run_on_two_processes_is_equal_bit_for_bit_when_repeated(two, options):
    first, second = (list(map(without_objects, two.run(train, STABLE, options))) for _ in range(2))
    assert cuts(first[0]["history"]) >= 2
    assert first == second


# ---- resuming --------------------------------------------------------------------------------------------------------

STEPS = 14
SETTINGS = {"update_every": 2, "delay": 4, "stability_threshold": 0.9, "cutoff": 0.3}


@pytest.mark.parametrize("mode", [{}, {"shrink": "mask"}], ids=str)
def test_resuming_at_every_step_of_a_run_is_equal_bit_for_bit(tmp_path, mode):
    def run(directory, **options):
        return trained_bert(directory, model=adapted_bert(**{**SETTINGS, **mode}), max_steps=STEPS, **options)

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=1)
    history = whole.oialr_controller.history
    frozen = [update.step for update in history if update.frozen]
    pruned = [u.step for u in history if any(after < before for before, after in u.ranks.values())]
    assert 4 <= frozen[0] < frozen[-1] < STEPS
    assert len([step for step in pruned if step < STEPS]) >= 2
    for step in range(1, STEPS):
        resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_equal_models(whole.model, resumed.model)
        assert_equal_optimizers(whole.optimizer, resumed.optimizer)


@pytest.mark.slow
def test_resuming_at_every_step_of_a_run_on_two_processes_is_equal_bit_for_bit(two, tmp_path):
    whole = two.run(partial(run_trainer, tmp_path / "whole", save_steps=1))
    for step in range(1, 12):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = two.run(partial(run_trainer, tmp_path / "resumed", resume=checkpoint, save_strategy="no"))
        for ours, theirs in zip(whole, resumed, strict=True):
            assert ours["state"] == theirs["state"]
            assert ours["history"] == theirs["history"]


# ---- the random states of the user -----------------------------------------------------------------------------------


def random_states() -> list[object]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = [state.tolist() for state in (torch.get_rng_state(), *cuda)]
    return [states, random.getstate(), [np.asarray(part).tolist() for part in np.random.get_state()]]


@contextmanager
def untouched(what: str) -> Iterator[None]:
    """Fails if the random state of torch, NumPy or Python is another one afterwards."""
    before = random_states()
    yield
    assert random_states() == before, what


def tower() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))


MODES = {
    "stable": {"freeze_when": "stable", "delay": 4, "stability_threshold": 0.5},
    "bounded": {"freeze_when": "delay", "delay": 4, "max_output_loss": 0.1, "max_rank_drop": 0.5},
    "factored": {"freeze_when": "delay", "delay": 0, "rank": 6},
    "masked": {"freeze_when": "delay", "delay": 4, "shrink": "mask"},
    "residual": {"mode": "adapter", "rank": 6},
    "pretraining": {"freeze_when": "delay", "delay": 4, "mode": "pretraining"},
    "sketch": {"freeze_when": "delay", "delay": 8, "stability_storage": "sketch"},
    "bf16": {"freeze_when": "delay", "delay": 8, "stability_storage": "bf16"},
    "cpu": {"freeze_when": "delay", "delay": 8, "stability_storage": "cpu"},
}


@pytest.mark.parametrize("mode", some_of(MODES, "stable", "residual"))
def test_the_life_of_an_adapter_draws_no_random_numbers(tmp_path, mode):
    base, x = tower(), torch.randn(32, 10)
    with untouched("get_peft_model"):
        model = get_peft_model(
            base,
            OIALRConfig(
                target_modules=["0", "2"],
                update_every=2,
                cutoff=0.5,
                **{"mode": "replace", **MODES[mode]},
            ),
        )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with untouched("OIALRController"):
        controller = OIALRController(model, optimizer, total_steps=12)
    for _ in range(12):
        with untouched("training and checks"):
            (model(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step()
    assert any(after < before for update in controller.history for before, after in update.ranks.values())
    with untouched("saving"):
        state = controller.state_dict()
        model.save_pretrained(tmp_path)
    with untouched("loading the state of a controller"):
        controller.load_state_dict(state)
    other = tower()
    with untouched("loading"):
        PeftModel.from_pretrained(other, tmp_path)
    with untouched("reports"):
        str(rank_table(model))
        plot_history(controller.history, tmp_path / "history.png")
    with untouched("merging"):
        model.merge_adapter()
        model.unmerge_adapter()
        to_dense(model)


@pytest.mark.filterwarnings("ignore:The OIALR adapter .* has trained for:UserWarning")
def test_the_trainer_draws_what_it_draws_without_the_method(tmp_path):
    after = []
    for kind in (OIALRTrainer, Trainer):
        model = adapted_bert(**SETTINGS)
        trained_bert(tmp_path / kind.__name__, model=model, trainer_class=kind, max_steps=8, save_steps=2)
        after.append(random_states())
    assert after[0] == after[1]


@pytest.mark.parametrize("residual", [False, True])
def test_exports_and_pages_draw_no_random_numbers(tmp_path, residual):
    mode = {"mode": "adapter", "rank": 6, "delay": 0} if residual else {"freeze_when": "delay", "delay": 4}
    trained = trained_bert(
        tmp_path / "run",
        model=adapted_bert(update_every=2, cutoff=0.5, **mode),
        max_steps=8,
        save_strategy="steps",
        save_steps=4,
    )
    model = trained.model.eval()
    with untouched("the page of a run"):
        run_report(tmp_path / "run")
    with untouched("a dense export"):
        save_dense(model, tmp_path / "dense")
    if residual:
        with untouched("a LoRA export"):
            save_lora(model, tmp_path / "lora")
        return
    with untouched("a low-rank export"):
        save_low_rank(model, tmp_path / "low_rank")
    with untouched("loading a low-rank checkpoint"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "low_rank")


ROUTES = {
    "SVD": lambda weight: decompositions.thin_svd(weight, "weight"),
    "retry": lambda weight: decompositions._svd_by_gram(weight),
    "polar": lambda weight: decompositions.svd_by_polar(weight, "weight"),
    "Gram": lambda weight: decompositions.leading_svd(weight, weight.shape[1] // 4, "weight"),
    "subspace": lambda weight: decompositions.leading_svd(weight, 4, "weight"),
    "batches": lambda weight: list(decompositions.decompose([("weight", weight)] * 3)),
    "batches by polar": lambda weight: decompositions._by_polar([("weight", weight)] * 3),
}


@pytest.mark.parametrize("route", ROUTES)
def test_no_route_of_a_decomposition_draws_random_numbers(route):
    weight = torch.randn(1030 if route == "subspace" else 140, 1024 if route == "subspace" else 136)
    with untouched(route):
        ROUTES[route](weight)


def test_only_an_adapter_that_shall_differ_from_the_base_draws_random_numbers():
    before, weights = random_states(), []
    for _ in range(2):
        torch.manual_seed(7)
        model = get_peft_model(
            nn.Sequential(nn.Linear(4, 3)), OIALRConfig(mode="replace", target_modules=["0"], init_weights=False)
        )
        weights.append(adapter_layers(model)["0"].adapter_weight("default"))
    assert torch.equal(*weights)
    assert random_states()[0] != before[0]
    assert random_states()[1:] == before[1:]
