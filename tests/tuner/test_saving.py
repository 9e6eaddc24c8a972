"""Saving and loading in every phase, by every way in; none of them decomposes anything again."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from oialr_peft import OIALRConfig, OIALRController, factorize
from oialr_peft.tuner.lookup import adapter_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:The head:UserWarning"),
    # pytest.warns raises what it did not match again, and then the module is no longer transformers
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

WEIGHTS = "adapter_model.safetensors"
CUT = {"update_every": 2, "cutoff": 0.5, "layers_per_update": 0.4}
FACTORED = {"freeze_when": "delay", "delay": 2, **CUT}
PHASES = {
    "dense": {"update_every": 2, "stability_threshold": 1.0},
    "partly frozen": {"delay": 0, **CUT},
    "factored": FACTORED,
    "residual": {"mode": "adapter", **CUT},
    "mask": {**FACTORED, "shrink": "mask"},
    "pretraining dense": {"mode": "pretraining", "stability_threshold": 1.0},
    "pretraining": {"mode": "pretraining", **FACTORED},
    "pretraining mask": {"mode": "pretraining", "shrink": "mask", **FACTORED},
}
NOT_PRETRAINED = [phase for phase in PHASES if "pretraining" not in phase]
PRETRAINED = [phase for phase in PHASES if "pretraining" in phase]
TASKS = {
    "bert": ("SEQ_CLS", AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification),
    "gpt2": ("CAUSAL_LM", AutoModelForCausalLM, AutoPeftModelForCausalLM),
}


@dataclass
class Saved:
    """A base model and a trained adapter on disk, and what the adapted model answered."""

    name: str
    phase: str
    base: Path
    adapter: Path
    model: nn.Module
    inputs: dict[str, Tensor]
    output: Tensor

    def load_base(self) -> nn.Module:
        return TASKS[self.name][1].from_pretrained(self.base)

    @property
    def auto_peft(self):
        return TASKS[self.name][2]

    @property
    def auto_model(self):
        return TASKS[self.name][1]


def train(model: nn.Module, inputs: dict[str, Tensor], controller: OIALRController, steps: int) -> None:
    for _ in range(steps):
        model(**inputs).logits.square().mean().backward()
        controller.optimizer.step()
        controller.optimizer.zero_grad()
        controller.step()


def controlled(model: nn.Module, steps: int = 6) -> OIALRController:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return OIALRController(model, torch.optim.AdamW(parameters, lr=0.02), total_steps=steps)


def adapted_and_trained(base: nn.Module, inputs: dict[str, Tensor], fields: dict) -> tuple[nn.Module, OIALRController]:
    model = get_peft_model(base, OIALRConfig(**{"mode": "replace", **fields}))
    controller = controlled(model)
    train(model, inputs, controller, 6)
    return model.eval(), controller


def only(*phases: str):
    """Restricts a test to some phases."""
    return pytest.mark.parametrize(
        "saved", [(name, phase) for name in TASKS for phase in phases], ids=" ".join, indirect=True, scope="module"
    )


@pytest.fixture(scope="module", params=[(name, phase) for name in TASKS for phase in PHASES], ids=" ".join)
def saved(request, make_model, make_inputs, outputs_of, tmp_path_factory):
    name, phase = request.param
    directory = tmp_path_factory.mktemp("saved")
    task, auto_model, _ = TASKS[name]
    inputs = make_inputs(name)
    make_model(name).save_pretrained(directory / "base")
    fields = {"task_type": task, **PHASES[phase]}
    if phase == "partly frozen":  # the middle of what an endless dense phase measures
        _, controller = adapted_and_trained(
            auto_model.from_pretrained(directory / "base"), inputs, {**fields, "stability_threshold": 1.0}
        )
        measured = sorted(controller.history[1].stability.values())
        fields["stability_threshold"] = measured[len(measured) // 2]
    model, _ = adapted_and_trained(auto_model.from_pretrained(directory / "base"), inputs, fields)
    model.save_pretrained(directory / "adapter")
    return Saved(name, phase, directory / "base", directory / "adapter", model, inputs, outputs_of(model, inputs))


@pytest.fixture
def no_decomposition(monkeypatch):
    """Any matrix decomposition fails the test."""
    for name in ("svd", "eigh", "qr", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, lambda *args, **kwargs: pytest.fail("a matrix was decomposed"))


def by_peft(saved):
    return PeftModel.from_pretrained(saved.load_base(), saved.adapter)


def by_peft_under_another_name(saved):
    return PeftModel.from_pretrained(saved.load_base(), saved.adapter, adapter_name="other")


def by_peft_on_meta(saved):
    return PeftModel.from_pretrained(saved.load_base(), saved.adapter, low_cpu_mem_usage=True)


def by_peft_for_training(saved):
    return PeftModel.from_pretrained(saved.load_base(), saved.adapter, is_trainable=True).eval()


def by_auto_peft(saved):
    return saved.auto_peft.from_pretrained(saved.adapter)


def by_transformers(saved):
    model = saved.load_base()
    model.load_adapter(str(saved.adapter))
    return model


def by_transformers_under_another_name(saved):
    model = saved.load_base()
    model.load_adapter(str(saved.adapter), adapter_name="other")
    return model


def by_auto_model(saved):
    return saved.auto_model.from_pretrained(saved.adapter)


LOADERS = [
    by_peft,
    by_peft_under_another_name,
    by_peft_on_meta,
    by_peft_for_training,
    by_auto_peft,
    by_transformers,
    by_transformers_under_another_name,
    by_auto_model,
]


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_the_phases_are_what_their_names_say(saved):
    layers = adapter_layers(saved.model).values()
    dense = [layer for layer in layers if layer.is_dense("default")]
    ranks = {layer.rank("default") for layer in layers}
    if "dense" in saved.phase:
        assert len(dense) == len(layers)
    elif saved.phase == "partly frozen":
        assert 0 < len(dense) < len(layers)
    else:
        assert not dense
        assert len(ranks) > 1
        assert min(ranks) < 8


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
def test_every_way_of_loading_restores_outputs_phases_and_ranks_without_a_decomposition(
    saved, load, no_decomposition, outputs_of
):
    model = load(saved)
    assert not model.training
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert_close(outputs_of(model, saved.inputs), saved.output, rtol=1e-9, atol=1e-9)

    name = "other" if "another_name" in load.__name__ else "default"
    loaded, original = adapter_layers(model, name), adapter_layers(saved.model)
    assert list(loaded) == list(original)
    for key, layer in loaded.items():
        twin = original[key]
        assert layer.is_dense(name) == twin.is_dense("default")
        assert layer.rank(name) == twin.rank("default")
        assert layer.base_released == twin.base_released
        assert layer.trained_parameter(name).requires_grad is (load is by_peft_for_training)
        assert not any(p.requires_grad for p in (*layer.oialr_u.values(), *layer.oialr_vh.values()))


@only(*NOT_PRETRAINED)
def test_an_adapter_loads_beside_another_one(saved, no_decomposition, outputs_of):
    model = get_peft_model(
        saved.load_base(), OIALRConfig(mode="replace", target_modules=["dense", "c_fc"], init_weights=False)
    ).eval()
    first = outputs_of(model, saved.inputs)
    model.load_adapter(saved.adapter, adapter_name="second")
    assert_close(outputs_of(model, saved.inputs), first, rtol=0, atol=0)
    model.set_adapter("second")
    assert_close(outputs_of(model, saved.inputs), saved.output, rtol=1e-9, atol=1e-9)


def test_a_loaded_model_merges_to_the_same_outputs(saved, outputs_of):
    merged = by_peft(saved).merge_and_unload(safe_merge=True)
    assert_close(outputs_of(merged, saved.inputs), saved.output, rtol=1e-9, atol=1e-9)


def test_training_continues_from_a_loaded_adapter(saved, outputs_of):
    model = PeftModel.from_pretrained(saved.load_base(), saved.adapter, is_trainable=True)
    before = {name: layer.rank("default") for name, layer in adapter_layers(model).items()}
    controller = controlled(model, steps=8)
    train(model, saved.inputs, controller, 8)
    assert controller.history
    assert all(layer.rank("default") <= before[name] for name, layer in controller.layers.items())
    assert not torch.allclose(outputs_of(model.eval(), saved.inputs), saved.output)
    trained = {id(p) for group in controller.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_loaded_adapter_is_saved_again_to_the_same_files(saved, tmp_path):
    by_peft(saved).save_pretrained(tmp_path)
    first, second = load_file(saved.adapter / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert (
        json.loads((saved.adapter / "adapter_config.json").read_text())["rank_pattern"]
        == (json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"])
    )


def test_saving_does_not_change_the_model(saved, tmp_path, outputs_of):
    before = {name: (parameter, parameter.requires_grad) for name, parameter in saved.model.named_parameters()}
    config = copy.deepcopy(saved.model.peft_config)
    saved.model.save_pretrained(tmp_path)
    after = dict(saved.model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, (parameter, _) in before.items())
    assert all(after[name].requires_grad == trains for name, (_, trains) in before.items())
    assert saved.model.peft_config == config
    assert_close(outputs_of(saved.model, saved.inputs), saved.output, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mlp", "vit", "t5"])
@pytest.mark.parametrize("fields", [{}, {"freeze_when": "delay", "delay": 0}], ids=["dense", "factored"])
def test_a_pretrained_model_of_any_kind_is_restored_whole(name, fields, make_model, make_inputs, outputs_of, tmp_path):
    model = get_peft_model(make_model(name), OIALRConfig(mode="pretraining", **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = outputs_of(model, make_inputs(name))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path).eval()
    assert_close(outputs_of(loaded, make_inputs(name)), expected)
    if name == "t5":
        assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


@pytest.mark.parametrize("fields", [{}, {"freeze_when": "delay", "delay": 0}, {"mode": "adapter"}], ids=str)
def test_an_adapter_in_float32_on_a_bfloat16_model_is_restored(fields, make_model, make_inputs, outputs_of, tmp_path):
    model = get_peft_model(
        make_model("bert", torch.bfloat16), OIALRConfig(init_weights=False, **{"mode": "replace", **fields})
    )
    expected = outputs_of(model, make_inputs("bert"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("bert", torch.bfloat16), tmp_path)
    assert {p.dtype for name, p in loaded.named_parameters() if ".oialr_" in name} == {torch.float32}
    assert_close(outputs_of(loaded, make_inputs("bert")), expected, rtol=0, atol=0)
    other = make_model("bert", torch.bfloat16)
    other.load_adapter(str(tmp_path))
    # PEFT's injection keeps the adapter in the dtype of the model
    assert_close(outputs_of(other, make_inputs("bert")), expected, rtol=0.1, atol=0.1)


# ---- what is in the files --------------------------------------------------------------------------------------------


def test_the_files_are_safetensors_and_a_configuration(saved):
    names = {path.name for path in saved.adapter.iterdir()}
    assert names == {WEIGHTS, "adapter_config.json", "README.md"}


def test_the_files_hold_only_what_is_needed(saved):
    tensors = load_file(saved.adapter / WEIGHTS)
    expected = {}
    for name, layer in adapter_layers(saved.model).items():
        m, n, rank = layer.out_features, layer.in_features, layer.rank("default")
        shapes = (
            {"weight": (m, n)} if layer.is_dense("default") else {"u": (m, rank), "sigma": (rank,) * 2, "vh": (rank, n)}
        )
        expected |= {f"base_model.model.{name}.oialr_{part}": shape for part, shape in shapes.items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items() if ".oialr_" in key}
    assert found == expected
    others = {key for key in tensors if ".oialr_" not in key}
    if "pretraining" not in saved.phase:
        task_head = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
        assert others == (task_head if saved.name == "bert" else set())


@only(*PRETRAINED)
def test_pretraining_saves_everything_else_under_each_of_its_names(saved):
    keys = {
        key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key in load_file(saved.adapter / WEIGHTS)
    }
    targets = {f"{name}.weight" for name in adapter_layers(saved.model)}
    untargeted = set(saved.load_base().state_dict()) - targets
    assert untargeted <= keys
    assert not keys & targets


@pytest.mark.parametrize("phase", ["dense", "factored", "mask"])
def test_the_file_is_hardly_larger_than_its_tensors(phase, tmp_path):
    base = nn.Sequential(nn.Linear(256, 192), nn.Linear(192, 256))
    model = get_peft_model(base, OIALRConfig(target_modules=["0", "1"], **{"mode": "replace", **PHASES[phase]}))
    if phase != "dense":
        for layer in adapter_layers(model).values():
            cut = factorize(layer.adapter_weight("default"), rank=40)
            layer.set_factors("default", cut, size=192 if phase == "mask" else None)
    model.save_pretrained(tmp_path)
    parameters = 2 * (256 * 192 if phase == "dense" else (256 + 192 + 40) * 40)
    size = (tmp_path / WEIGHTS).stat().st_size
    assert 4 * parameters <= size <= 1.03 * 4 * parameters


def test_saving_without_safetensors_is_not_the_default(saved):
    assert not list(saved.adapter.glob("*.bin"))


# ---- checkpoints that do not fit -------------------------------------------------------------------------------------


def resized(tensors: dict[str, Tensor], pattern: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    keys = [key for key in tensors if re.search(pattern, key)]
    assert keys
    return {**tensors, keys[-1]: torch.zeros(shape, dtype=torch.float64)}


@pytest.fixture
def factored_bert(bert, make_inputs):
    model, _ = adapted_and_trained(bert, make_inputs("bert"), FACTORED)
    return model


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [("oialr_sigma$", (9, 9)), ("oialr_sigma$", (4,)), ("oialr_u$", (8, 9)), ("oialr_vh$", (2, 9))],
)
def test_a_checkpoint_of_another_shape_is_refused_by_name_and_changes_nothing(
    factored_bert, bert, pattern, shape, make_model, make_inputs, outputs_of
):
    tensors = resized(get_peft_model_state_dict(factored_bert), pattern, shape)
    model = get_peft_model(make_model("bert"), OIALRConfig(mode="replace"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = outputs_of(model, make_inputs("bert"))
    with pytest.raises(
        ValueError, match=r"The checkpoint does not fit `bert\.pooler\.dense`, a layer of 8×8: it holds"
    ):
        set_peft_model_state_dict(model, tensors)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_close(outputs_of(model, make_inputs("bert")), expected, rtol=0, atol=0)


@pytest.mark.parametrize("load", [by_peft, by_auto_peft], ids=lambda load: load.__name__)
def test_a_damaged_file_is_refused_with_the_name_of_the_module(saved, load, tmp_path):
    damaged = copy.copy(saved)
    damaged.adapter = tmp_path
    tensors = load_file(saved.adapter / WEIGHTS)
    save_file(resized(tensors, r"oialr_(weight|u)$", (5, 2)), tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text((saved.adapter / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match=r"would fit the model.* is damaged|does not fit `(bert|transformer)\."):
        load(damaged)


@pytest.mark.parametrize("load", [by_transformers, by_auto_model], ids=lambda load: load.__name__)
def test_transformers_refuses_a_damaged_file_too(saved, load, tmp_path):
    damaged = copy.copy(saved)
    damaged.adapter = tmp_path
    tensors = load_file(saved.adapter / WEIGHTS)
    save_file(resized(tensors, r"oialr_(weight|u)$", (5, 2)), tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text((saved.adapter / "adapter_config.json").read_text())
    with pytest.raises(RuntimeError, match="(?s)ignore_mismatched_sizes"):
        load(damaged)


def test_a_configuration_without_its_weights_never_works_silently(saved, outputs_of):
    config = OIALRConfig.from_pretrained(saved.adapter)
    model = get_peft_model(saved.load_base(), config).eval()
    assert outputs_of(model, saved.inputs).isnan().all()


def test_a_checkpoint_that_lacks_a_layer_does_not_pass_for_a_working_one(saved, tmp_path, outputs_of):
    tensors = load_file(saved.adapter / WEIGHTS)
    last = list(adapter_layers(saved.model))[-1]
    kept = {key: value for key, value in tensors.items() if f".{last}.oialr_" not in key}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text((saved.adapter / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match=f"adapter_model.safetensors` holds nothing for `{last}`"):
        PeftModel.from_pretrained(saved.load_base(), tmp_path)
    # through plain dictionaries PEFT only warns; what is missing is NaN
    model = get_peft_model(saved.load_base(), OIALRConfig.from_pretrained(saved.adapter)).eval()
    set_peft_model_state_dict(model, kept)
    assert outputs_of(model, saved.inputs).isnan().any()


# ---- state dictionaries ----------------------------------------------------------------------------------------------


def restores(state: dict[str, Tensor], saved: Saved, **fields: object) -> bool:
    model = get_peft_model(
        saved.load_base(), OIALRConfig(task_type=TASKS[saved.name][0], **{"mode": "replace", **fields})
    ).eval()
    result = model.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    original = adapter_layers(saved.model)
    assert {name: layer.rank("default") for name, layer in adapter_layers(model).items()} == {
        name: layer.rank("default") for name, layer in original.items()
    }
    with torch.no_grad():
        return torch.allclose(model(**saved.inputs).logits, saved.output, rtol=1e-9, atol=1e-9)


@only("dense", "partly frozen", "factored", "mask")
@pytest.mark.parametrize("fields", [{}, {"freeze_when": "delay", "delay": 0}], ids=["into dense", "into factored"])
def test_a_state_dict_loads_into_a_model_in_any_other_phase(saved, fields):
    assert restores(saved.model.state_dict(), saved, **fields)


@only("residual")
def test_a_state_dict_loads_into_a_residual_model_of_another_rank(saved):
    assert restores(saved.model.state_dict(), saved, mode="adapter")
    assert restores(saved.model.state_dict(), saved, mode="adapter", rank=1)


@only(*PRETRAINED)
def test_a_state_dict_loads_into_another_pretrained_model(saved):
    assert restores(saved.model.state_dict(), saved, mode="pretraining")


def test_the_adapter_state_dict_names_no_adapter(saved):
    assert not [key for key in get_peft_model_state_dict(saved.model) if "default" in key]
