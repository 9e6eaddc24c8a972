"""Memory, counted in bytes of live tensors: what training needs at its peak, what it keeps, and what it gives back."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.linalg.basis import SKETCH_COLUMNS
from oialr_peft.tuner.lookup import adapter_layers

_SPEC = importlib.util.spec_from_file_location(
    "benchmarks_memory", Path(__file__).resolve().parents[1] / "benchmarks" / "memory.py"
)
memory = importlib.util.module_from_spec(_SPEC)  # its counting is tested in test_benchmarks.py
_SPEC.loader.exec_module(memory)

FLOAT = 4  # bytes


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    # what is allocated in other threads would not be counted
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def bert(layers: int = 2, hidden: int = 192) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
        vocab_size=100,
        max_position_embeddings=32,
    )
    return BertModel(config)


class Training:
    """A model with AdamW and, for OIALR, a controller; `peak` is that of one step with its check."""

    def __init__(self, model: nn.Module, config=None, *, batch: int = 4, total_steps: int = 100) -> None:
        self.model = (model if config is None else get_peft_model(model, config)).train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        del self.trained
        self.controller = None
        if isinstance(config, OIALRConfig):
            self.controller = OIALRController(self.model, self.optimizer, total_steps=total_steps)
        self.tokens = torch.randint(0, 100, (batch, 16))
        self.step()  # makes the optimizer's state

    def step(self) -> None:
        output = self.model(input_ids=self.tokens)
        (output.last_hidden_state.square().mean() + output.pooler_output.square().mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.controller is not None:
            self.controller.step()

    def kept(self) -> list[torch.Tensor]:
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        bases = [] if self.controller is None else list(self.controller.state_dict()["bases"].values())
        return [*self.model.parameters(), *self.model.buffers(), *state, *bases, self.tokens]

    def peak(self) -> int:
        return memory.peak_bytes(self.step, self.kept(), torch.device("cpu"))

    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def bytes_of(tensors) -> int:
    return sum({id(s): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


@pytest.mark.parametrize("batch", [1, 16])
def test_the_dense_phase_of_pretraining_peaks_within_six_percent_of_dense_adamw(batch):
    dense = Training(bert(), batch=batch).peak()
    # a check, with its decompositions, after every step
    config = OIALRConfig(mode="pretraining", delay=90, update_every=1)
    ours = Training(bert(), config, batch=batch)
    assert ours.controller.state_dict()["bases"]
    assert ours.peak() <= 1.06 * dense


def test_between_checks_only_sketches_are_kept_and_nothing_once_all_layers_are_factored():
    training = Training(bert(), OIALRConfig(mode="pretraining", freeze_when="delay", delay=3, update_every=1))
    bases = training.controller.state_dict()["bases"]
    layers = adapter_layers(training.model)
    assert {name: basis.numel() for name, basis in bases.items()} == {
        name: SKETCH_COLUMNS * max(layer.out_features, layer.in_features) for name, layer in layers.items()
    }
    training.step()
    training.step()
    assert training.controller.state_dict()["bases"] == {}


@pytest.mark.parametrize("mode", ["pretraining", "replace"])
def test_what_is_kept_after_the_freeze_follows_from_the_ranks_to_the_byte(mode):
    pretraining = mode == "pretraining"
    config = OIALRConfig(
        mode=mode,
        freeze_when="delay",
        delay=2,
        update_every=1,
        cutoff=0.4,
        max_rank_drop=0.7,
    )
    training = Training(bert(), config)
    before, peak_before = bytes_of(training.kept()), training.peak()
    training.step()
    layers = adapter_layers(training.model)
    assert all(not layer.is_dense("default") for layer in layers.values())
    ranks = {name: layer.rank("default") for name, layer in layers.items()}
    factors = sum(
        (layer.out_features + layer.in_features) * ranks[name] + ranks[name] ** 2 for name, layer in layers.items()
    )
    targets = sum(layer.out_features * layer.in_features for layer in layers.values())
    everything = sum(parameter.numel() for parameter in bert().parameters())
    others = everything - targets
    trained = sum(rank**2 for rank in ranks.values()) + (others if pretraining else 0)
    stored = factors + others + (0 if pretraining else targets)
    steps = sum("step" in entry for entry in training.optimizer.state.values())
    buffers = bytes_of([*training.model.buffers(), training.tokens])
    assert bytes_of(training.kept()) == FLOAT * (stored + 2 * trained + steps) + buffers
    assert bytes_of(training.kept()) < (0.75 if pretraining else 0.85) * before
    assert training.peak() < (0.75 if pretraining else 0.85) * peak_before


@pytest.mark.parametrize("batch", [1, 16])
def test_residual_mode_peaks_no_higher_than_lora_with_as_many_parameters(batch):
    residual = OIALRConfig(mode="adapter", rank=0.25, update_every=50, cutoff=0.0)
    ours = Training(bert(), residual, batch=batch)
    lora = Training(bert(), LoraConfig(r=4, target_modules="all-linear"), batch=batch)
    assert lora.trainable() == pytest.approx(ours.trainable(), rel=0.1)
    bound = 1.05 * lora.peak()
    if batch == 1:
        # weights alone: U and V are frozen, but larger than LoRA's A and B with their gradients and moments
        bound += FLOAT * sum(
            (layer.out_features + layer.in_features) * layer.rank("default")
            for layer in adapter_layers(ours.model).values()
        )
    assert ours.peak() <= bound


def watched(tensors) -> list[weakref.ref]:
    return [weakref.ref(tensor.untyped_storage()) for tensor in tensors]


def alive(storages: list[weakref.ref]) -> int:
    return sum(storage() is not None for storage in storages)


def test_the_freeze_gives_back_weights_gradients_and_moments_at_once():
    training = Training(bert(1), OIALRConfig(mode="replace", freeze_when="delay", delay=3, update_every=1))
    training.step()
    gc.collect()
    gc.disable()
    try:
        weights = [layer.trained_parameter("default") for layer in adapter_layers(training.model).values()]
        moments = [training.optimizer.state[weight][key] for weight in weights for key in ("exp_avg", "exp_avg_sq")]
        gone = watched([*weights, *moments])
        del weights, moments
        assert alive(gone) == len(gone)
        training.step()
        assert alive(gone) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("leave", ["delete_adapter", "merge_and_unload", "unload"])
def test_removing_an_adapter_frees_its_tensors(leave):
    model = get_peft_model(bert(1), OIALRConfig(mode="replace", freeze_when="delay", delay=0, rank=0.5))
    tensors = [
        container["default"]
        for layer in adapter_layers(model).values()
        for container in (layer.oialr_u, layer.oialr_sigma, layer.oialr_vh)
    ]
    gone = watched(tensors)
    del tensors
    if leave == "delete_adapter":
        model.base_model.delete_adapter("default")
    else:
        model = getattr(model, leave)()
    gc.collect()
    assert alive(gone) == 0


def test_an_optimizer_does_not_keep_its_controller():
    training = Training(bert(1), OIALRConfig(mode="replace", update_every=1))
    gone = weakref.ref(training.controller)
    bases = watched(training.controller.state_dict()["bases"].values())
    training.controller = None
    gc.collect()
    assert gone() is None
    assert alive(bases) == 0
    training.step()


def test_an_optimizer_does_not_keep_the_frozen_bases_of_a_model_that_is_gone():
    training = Training(bert(1), OIALRConfig(mode="replace", freeze_when="delay", delay=0, rank=0.5))
    gone = watched(parameter for parameter in training.model.parameters() if not parameter.requires_grad)
    training.controller = training.model = None
    gc.collect()
    assert alive(gone) == 0
    training.optimizer.step()
