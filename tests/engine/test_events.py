"""Events in any order against the literal reference: train, check, save, load, merge, switch, delete, disable, and so on.

After each event, outputs, weights, ranks, what trains, and the base weights are those that follow from the events.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import PeftModel, get_peft_model
from reference import SGD, AdamW, Layer, Reference, Settings
from torch import Tensor, nn
from torch.testing import assert_close

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.tuner.lookup import adapter_layers

TOTAL_STEPS = 30
NAMES = ["first", "second", "third"]
RULES: dict[str, dict[str, Any]] = {"update_every": 2, "cutoff": 0.35, "min_rank": 1}  # type: ignore[dict-item]
MODES = {
    "stable": {"freeze_when": "stable", "delay": 4, "stability_threshold": 0.97},
    "delay": {"freeze_when": "delay", "delay": 3},
    "mask": {"freeze_when": "delay", "delay": 4, "shrink": "mask"},
    "created": {"freeze_when": "delay", "delay": 0, "rank": 3},
    "residual": {"mode": "adapter", "delay": 0, "rank": 3},
}
OPTIMIZERS = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.01), lambda: AdamW(lr=0.03, weight_decay=0.01)),
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda: SGD(lr=0.1, momentum=0.9, weight_decay=0.0)),
}
IGNORED = [
    ".*adapter.* was active which is now deleted.*",
    "Already following adapters were merged.*",
    "All adapters are already merged.*",
    "Already unmerged.*",
    "Adapter cannot be set when the model is merged.*",
    "Found missing adapter keys.*",
]


@dataclass
class Adapter:
    """An adapter of the model, and what it must be equal to."""

    mode: str
    optimizer_name: str
    reference: Reference
    optimizer: torch.optim.Optimizer
    controller: OIALRController

    @property
    def is_correction(self) -> bool:
        return self.mode == "residual"


class Events(RuleBasedStateMachine):
    """A network of two layers with up to three adapters; each has an optimizer and a controller."""

    @initialize(mode=st.sampled_from(sorted(MODES)), optimizer=st.sampled_from(sorted(OPTIMIZERS)))
    def start(self, mode: str, optimizer: str) -> None:
        torch.manual_seed(0)
        self.base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
        self.base_weights = [self.base[i].weight.detach().clone() for i in (0, 2)]
        self.biases = [self.base[i].bias.detach().clone() for i in (0, 2)]
        self.x = torch.randn(12, 4, dtype=torch.float64)
        self.y = torch.randn(12, 5, dtype=torch.float64)
        self.adapters: dict[str, Adapter] = {}
        self.active: list[str] = ["first"]
        self.training: list[str] = ["first"]
        self.merged: list[str] = []
        self.enabled = True
        self.snapshot: dict[str, Any] | None = None
        self.model = get_peft_model(copy.deepcopy(self.base), self.config(mode), adapter_name="first")
        self.attend("first", mode, optimizer, self.fresh_reference(mode, optimizer))

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def config(self, mode: str) -> OIALRConfig:
        return OIALRConfig(target_modules=["0", "2"], **{"mode": "replace", **RULES, **MODES[mode]})

    def fresh_reference(self, mode: str, optimizer: str) -> Reference:
        fields = {key: value for key, value in MODES[mode].items() if key != "shrink"}
        rules = Settings(total_steps=TOTAL_STEPS, **RULES, **fields)
        weights, biases = ([tensor.numpy() for tensor in tensors] for tensors in (self.base_weights, self.biases))
        return Reference(weights, biases, OPTIMIZERS[optimizer][1](), rules)

    def attend(self, name: str, mode: str, optimizer_name: str, reference: Reference) -> None:
        """Give an adapter of the model an optimizer and a controller."""
        parameters = [layer.trained_parameter(name) for layer in adapter_layers(self.model, name).values()]
        optimizer = OPTIMIZERS[optimizer_name][0](parameters)
        controller = OIALRController(self.model, optimizer, total_steps=TOTAL_STEPS, adapter_name=name)
        self.adapters[name] = Adapter(mode, optimizer_name, reference, optimizer, controller)
        self.snapshot = None

    def weights(self, names: list[str]) -> list[np.ndarray]:
        """Of the network with these adapters added up."""
        total = [weight.numpy().copy() for weight in self.base_weights]
        for name in names:
            for index, weight in enumerate(self.adapters[name].reference.weights()):
                total[index] += weight - self.base_weights[index].numpy()
        return total

    def expected(self, names: list[str]) -> Tensor:
        first, second = self.weights(names)
        hidden = np.tanh(self.x.numpy() @ first.T + self.biases[0].numpy())
        return torch.from_numpy(hidden @ second.T + self.biases[1].numpy())

    def outputs(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(self.x)

    def activated(self, names: list[str]) -> None:
        """PEFT unmerges first, and lets these adapters train, and no others."""
        self.active, self.training, self.merged = names, names, []

    def unused(self) -> list[str]:
        return [name for name in NAMES if name not in self.adapters]

    # ---- events ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.unused())
    @rule(mode=st.sampled_from(sorted(MODES)), optimizer=st.sampled_from(sorted(OPTIMIZERS)))
    def add(self, mode: str, optimizer: str) -> None:
        name = self.unused()[0]
        self.model.add_adapter(name, self.config(mode))
        self.merged = []  # PEFT unmerges first
        self.attend(name, mode, optimizer, self.fresh_reference(mode, optimizer))

    @precondition(lambda self: len(self.active) == 1 and self.enabled and not self.merged)
    @rule(steps=st.integers(1, 5))
    def train(self, steps: int) -> None:
        adapter = self.adapters[self.active[0]]
        for _ in range(min(steps, TOTAL_STEPS - adapter.controller.steps)):
            nn.functional.mse_loss(self.model(self.x), self.y).backward()
            adapter.optimizer.step()
            adapter.optimizer.zero_grad()
            adapter.controller.step()
            adapter.reference.train_step(self.x.numpy(), self.y.numpy())
        assert len(adapter.controller.history) == len(adapter.reference.history)
        names = list(adapter.controller.layers)
        for update, (step, stability, frozen, ranks) in zip(adapter.controller.history, adapter.reference.history):
            assert (update.step, update.frozen) == (step, [names[i] for i in frozen])
            assert update.ranks == {names[i]: change for i, change in ranks.items()}
            assert update.stability == pytest.approx({names[i]: s for i, s in stability.items()}, abs=1e-7)

    @rule(index=st.integers(0, 2))
    def switch(self, index: int) -> None:
        name = sorted(self.adapters)[index % len(self.adapters)]
        self.model.set_adapter(name)
        self.activated([name])

    @precondition(lambda self: len(self.adapters) > 1)
    @rule(index=st.integers(0, 2))
    def use_two(self, index: int) -> None:
        names = sorted(self.adapters)
        two = [names[index % len(names)], names[(index + 1) % len(names)]]
        self.model.base_model.set_adapter(two)
        self.activated(two)

    @precondition(lambda self: self.enabled)
    @rule(safe=st.booleans())
    def merge(self, safe: bool) -> None:
        self.model.merge_adapter(safe_merge=safe)
        self.merged += [name for name in self.active if name not in self.merged]

    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = []

    @rule()
    def disable(self) -> None:
        self.model.base_model.disable_adapter_layers()
        self.enabled, self.merged = False, []

    @rule()
    def enable(self) -> None:
        self.model.base_model.enable_adapter_layers()
        self.enabled, self.training = True, self.active

    @precondition(lambda self: self.enabled)
    @rule()
    def disable_for_a_while(self) -> None:
        with self.model.disable_adapter():
            assert_close(self.outputs(self.model), self.expected([]))
        self.activated(self.active)

    @precondition(lambda self: len(self.adapters) > 1)
    @rule(index=st.integers(0, 2))
    def delete(self, index: int) -> None:
        name = sorted(self.adapters)[index % len(self.adapters)]
        if name in self.merged:
            with pytest.raises(ValueError, match="Cannot delete adapter.* while they are merged"):
                self.model.delete_adapter(name)
            return
        if name == self.model.active_adapter and name not in self.active:
            return  # PeftModel would go on asking for it: it is not told of `base_model.set_adapter`
        self.model.delete_adapter(name)
        del self.adapters[name]
        self.snapshot = None
        if name in self.active:
            self.active = list(self.model.base_model.active_adapters)
            self.training = self.active
        else:
            self.training = [other for other in self.training if other != name]
        assert self.active == list(self.model.base_model.active_adapters)
        assert self.active
        assert set(self.active) <= set(self.adapters)

    @rule(index=st.integers(0, 2))
    def save_and_load_elsewhere(self, index: int) -> None:
        name = sorted(self.adapters)[index % len(self.adapters)]
        with tempfile.TemporaryDirectory() as directory:
            self.model.save_pretrained(directory, selected_adapters=[name])
            loaded = PeftModel.from_pretrained(copy.deepcopy(self.base), Path(directory, name), adapter_name=name)
        assert_close(self.outputs(loaded), self.expected([name]))

    @precondition(lambda self: self.unused())
    @rule(index=st.integers(0, 2))
    def save_and_load_beside(self, index: int) -> None:
        source = sorted(self.adapters)[index % len(self.adapters)]
        name, saved = self.unused()[0], self.adapters[source]
        with tempfile.TemporaryDirectory() as directory:
            self.model.save_pretrained(directory, selected_adapters=[source])
            self.model.load_adapter(str(Path(directory, source)), name, is_trainable=True)
        # PEFT unmerges first, and lets what is loaded to be trained do so at once, beside the active ones
        self.merged = []
        self.training = [*self.training, name]
        # the weights, and nothing that the run had beside them
        reference = self.fresh_reference(saved.mode, saved.optimizer_name)
        reference.layers = [
            Layer(layer.base, layer.bias, *(copy.copy(part) for part in (layer.dense, layer.u, layer.sigma, layer.vh)))
            for layer in saved.reference.layers
        ]
        self.attend(name, saved.mode, saved.optimizer_name, reference)

    @precondition(lambda self: not self.merged)
    @rule()
    def save_state(self) -> None:
        parts = {
            name: (adapter.optimizer.state_dict(), adapter.controller.state_dict())
            for name, adapter in self.adapters.items()
        }
        file = io.BytesIO()
        torch.save({"model": self.model.state_dict(), "parts": parts}, file)
        references = {name: copy.deepcopy(adapter.reference) for name, adapter in self.adapters.items()}
        self.snapshot = {"file": file.getvalue(), "references": references}

    @precondition(lambda self: self.snapshot is not None and not self.merged)
    @rule()
    def load_state(self) -> None:
        state = torch.load(io.BytesIO(self.snapshot["file"]), weights_only=True)
        self.model.load_state_dict(state["model"])
        for name, (optimizer, controller) in state["parts"].items():
            self.adapters[name].optimizer.load_state_dict(optimizer)
            self.adapters[name].controller.load_state_dict(controller)
            self.adapters[name].reference = copy.deepcopy(self.snapshot["references"][name])

    @rule(pickled=st.booleans())
    def copy_the_model(self, pickled: bool) -> None:
        copied = pickle.loads(pickle.dumps(self.model)) if pickled else copy.deepcopy(self.model)
        assert torch.equal(self.outputs(copied), self.outputs(self.model))

    @precondition(lambda self: self.enabled)
    @rule()
    def merge_a_copy_for_good(self) -> None:
        merged = copy.deepcopy(self.model).merge_and_unload()
        assert type(merged[0]) is nn.Linear
        assert_close(
            self.outputs(merged), self.expected(self.merged + [n for n in self.active if n not in self.merged])
        )

    # ---- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def outputs_are_those_of_the_reference(self) -> None:
        names = (self.merged or self.active) if self.enabled else []
        assert_close(self.outputs(self.model), self.expected(names), atol=1e-7, rtol=1e-7)

    @invariant()
    def every_adapter_has_the_weights_and_ranks_of_its_reference(self) -> None:
        for name, adapter in self.adapters.items():
            layers = adapter_layers(self.model, name).values()
            for index, (layer, reference) in enumerate(zip(layers, adapter.reference.layers, strict=True)):
                weight = layer.adapter_weight(name) + (self.base_weights[index] if adapter.is_correction else 0)
                assert_close(
                    weight,
                    torch.from_numpy(reference.weight("adapter" if adapter.is_correction else "replace")),
                    atol=1e-7,
                    rtol=1e-7,
                )
                assert layer.is_dense(name) is (reference.dense is not None)
                assert layer.is_dense(name) or layer.rank(name) == len(reference.sigma)

    @invariant()
    def base_weights_are_untouched_unless_merged(self) -> None:
        layers = adapter_layers(self.model, next(iter(self.adapters))).values()
        for layer, weight in zip(layers, self.base_weights, strict=True):
            assert layer.merged is bool(self.merged)
            assert self.merged or torch.equal(layer.base_weight, weight)

    @invariant()
    def optimizers_hold_the_parameters_of_their_adapters(self) -> None:
        for name, adapter in self.adapters.items():
            trained = [layer.trained_parameter(name) for layer in adapter_layers(self.model, name).values()]
            held = [parameter for group in adapter.optimizer.param_groups for parameter in group["params"]]
            assert [id(parameter) for parameter in held] == [id(parameter) for parameter in trained]
            assert {id(parameter) for parameter in adapter.optimizer.state} <= {id(parameter) for parameter in held}

    @invariant()
    def only_active_adapters_train(self) -> None:
        training = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        kinds = {name.rsplit(".", 2)[1] for name in training}
        assert kinds <= {"oialr_weight", "oialr_sigma"}
        if self.enabled:
            assert {name.rpartition(".")[2] for name in training} == set(self.training)


def play(examples: int, events: int) -> None:
    run_state_machine_as_test(Events, settings=settings(max_examples=examples, stateful_step_count=events))


pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}:UserWarning") for message in IGNORED]


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_that_is_added_beside_a_merged_one_starts_from_the_base_weight(mode):
    events = Events()
    events.start("created", "sgd")
    events.train(2)
    events.merge(safe=True)
    events.add(mode, "sgd")
    events.switch(1)
    events.every_adapter_has_the_weights_and_ranks_of_its_reference()
    events.outputs_are_those_of_the_reference()
    events.base_weights_are_untouched_unless_merged()


def test_the_sequences_freeze_and_prune():
    """Else they would prove little of training."""
    events = Events()
    events.start("delay", "adamw")
    for _ in range(6):
        events.train(5)
    ranks = [change for update in events.adapters["first"].controller.history for change in update.ranks.values()]
    assert any(after < before for before, after in ranks)


def test_events_in_any_order_leave_what_the_reference_says():
    play(20, 15)


@pytest.mark.slow
def test_hundreds_of_long_sequences_of_events_leave_what_the_reference_says():
    play(100, 30)
