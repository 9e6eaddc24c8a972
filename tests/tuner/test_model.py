"""The tuner on whole models: which modules it takes, what trains, and PEFT's operations on adapters."""

from __future__ import annotations

import copy
import gc
import re
import warnings
import weakref

import pytest
import torch
from peft import PeftModel, get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.testing import assert_close

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.tuner.layer import OIALRLinear
from oialr_peft.tuner.lookup import adapter_layers
from oialr_peft.tuner.model import OIALRModel
from oialr_peft.tuner.targets import exactly
from oialr_peft.tuner.watch import STEPS_UNTIL_WARNING

DENSE = {}
FACTORED = {"freeze_when": "delay", "delay": 0}
RESIDUAL = {"mode": "adapter"}
MODES = {"dense": DENSE, "factored": FACTORED, "residual": RESIDUAL}
ARCHITECTURES = ["mlp", "bert", "gpt2", "vit", "t5"]
HEADS = {"mlp": "head", "bert": "classifier", "vit": "classifier"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:The head:UserWarning"),
    # pytest.warns raises what it did not match again, and then the module is no longer transformers
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True:UserWarning"),
]


@pytest.fixture(params=MODES.values(), ids=MODES.keys())
def mode(request):
    return request.param


def config(**fields):
    return OIALRConfig(**{"mode": "replace", "target_modules": ["up", "down"], **fields})


def train(model: nn.Module) -> None:
    """Moves every parameter that trains away from where it is."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter), alpha=0.3)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's own tensors, by their original names."""
    state = model.state_dict()
    original = {key.replace("base_model.model.", "").replace(".base_layer", ""): key for key in state}
    return {name: state[key].clone() for name, key in original.items() if ".oialr_" not in name}


def linear_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}


def steps(model, optimizer, inputs, count, after_step=None):
    for _ in range(count):
        model(**inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step()


# ---- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_default_targets_are_all_linear_layers_except_the_head(name, make_model):
    model = make_model(name)
    head = {"bert": "classifier", "gpt2": "lm_head", "vit": "classifier", "t5": "lm_head"}.get(name)
    expected = linear_names(model) - {head}
    adapted = get_peft_model(model, OIALRConfig(mode="replace"))
    assert set(adapter_layers(adapted)) == set(adapted.base_model.targeted_module_names) == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_adapter_does_not_change_the_output(name, mode, make_model, make_inputs, outputs_of):
    model, inputs = make_model(name), make_inputs(name)
    expected = outputs_of(model, inputs)
    assert_close(outputs_of(get_peft_model(model, OIALRConfig(**{"mode": "replace", **mode})), inputs), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_are_listed_in_module_order_under_their_names_in_the_base_model(name, make_model):
    model = make_model(name)
    order = [key for key, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    adapted = get_peft_model(model, OIALRConfig(mode="replace"))
    layers = adapter_layers(adapted)
    assert list(layers) == [key for key in order if key in layers]
    assert all(adapted.get_base_model().get_submodule(key) is layer for key, layer in layers.items())


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-LINEAR", None])
def test_all_linear_is_the_default_under_any_spelling(spelling, bert):
    model = get_peft_model(bert, OIALRConfig(mode="replace", target_modules=spelling))
    assert len(adapter_layers(model)) == 13


@pytest.mark.parametrize("spelling", ["all-linear", None])
def test_a_second_adapter_has_the_same_default_targets(spelling, bert):
    model = get_peft_model(bert, OIALRConfig(mode="replace"))
    model.add_adapter("second", OIALRConfig(mode="replace", target_modules=spelling))
    assert list(adapter_layers(model, "second")) == list(adapter_layers(model, "default"))


NAMES = ["a", "x", "a.x", "b.a.x", "b.x", "ba.x", "layers.0.x", "layers.1.x", "c.layers.1.x", "x.a"]


@pytest.mark.parametrize("targets", [["x"], ["a.x"], ["a", "b.a.x"], ["layers.1.x", "ba.x"]], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"exclude_modules": ["a.x"]},
        {"exclude_modules": "b.*"},
        {"modules_to_save": ["layers.1"]},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_targets_are_those_of_peft(targets, fields):
    config = OIALRConfig(target_modules=targets, **{"mode": "replace", **fields})
    before = copy.deepcopy(config)
    for name in NAMES:
        ours = OIALRModel._check_target_module_exists(config, name)
        theirs = BaseTuner._check_target_module_exists(config, name)
        assert (bool(ours), type(ours)) == (bool(theirs), type(theirs)), name
    assert config == before


def test_default_targets_do_not_stand_for_modules_whose_names_end_in_them():
    one, other = (nn.ModuleDict({"x": nn.Linear(2, 2)}) for _ in range(2))
    model = nn.ModuleDict({"a": one, "b": nn.ModuleDict({"a": other})})
    assert exactly(["a.x", "b.a.x"], model) == {"a.x", "b.a.x"}
    assert exactly(["b.a.x"], model) == {"b.a.x"}
    expression = exactly(["a.x"], model)
    assert [name for name, _ in model.named_modules() if re.fullmatch(expression, name)] == ["a.x"]


def test_modules_to_save_are_not_targets(bert):
    model = get_peft_model(bert, OIALRConfig(mode="replace", modules_to_save=["pooler", "classifier"]))
    assert len(adapter_layers(model)) == 12
    assert {name for name in trainable(model) if "modules_to_save" in name} == {
        f"base_model.model.{module}.modules_to_save.default.{path}"
        for module, path in [
            ("bert.pooler", "dense.weight"),
            ("bert.pooler", "dense.bias"),
            ("classifier", "weight"),
            ("classifier", "bias"),
        ]
    }


def test_exclude_modules_leaves_modules_out(bert):
    model = get_peft_model(bert, OIALRConfig(mode="replace", exclude_modules=["query", "pooler.dense"]))
    names = set(adapter_layers(model))
    assert len(names) == 10
    assert not [name for name in names if name.endswith(("query", "pooler.dense"))]


def test_exclude_modules_takes_a_regular_expression(bert):
    model = get_peft_model(bert, OIALRConfig(mode="replace", exclude_modules=r".*layer\.0.*"))
    assert not [name for name in adapter_layers(model) if "layer.0" in name]


@pytest.mark.parametrize("indices", [1, [1]], ids=str)
def test_layers_to_transform_restricts_the_targets_to_these_layers(bert, indices):
    model = get_peft_model(
        bert, OIALRConfig(mode="replace", target_modules=["query", "value"], layers_to_transform=indices)
    )
    prefix = "bert.encoder.layer.1.attention.self"
    assert set(adapter_layers(model)) == {f"{prefix}.query", f"{prefix}.value"}


def test_layers_pattern_names_the_list_that_is_counted_in(bert):
    fields = {"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": "layer"}
    model = get_peft_model(bert, OIALRConfig(**{"mode": "replace", **fields}))
    assert set(adapter_layers(model)) == {"bert.encoder.layer.0.attention.self.query"}


def test_a_target_that_does_not_exist_is_refused(mlp):
    with pytest.raises(ValueError, match=r"Target modules \{'nothing'\} not found in the base model"):
        get_peft_model(mlp, OIALRConfig(mode="replace", target_modules=["nothing"]))


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.ConvTranspose1d(3, 3, 1), "ConvTranspose1d"),
        (nn.Embedding(3, 3), "Embedding"),
        (nn.LayerNorm(3), "LayerNorm"),
        (nn.LSTM(3, 3), "LSTM"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unsupported_target_is_refused_with_its_name_and_kind(module, kind):
    model = nn.Sequential()
    model.add_module("encoder", module)
    with pytest.raises(ValueError, match=rf"nn\.Linear, .* modules, but `encoder` is a {kind}\. .*Leave it out"):
        get_peft_model(model, OIALRConfig(mode="replace", target_modules=["encoder"]))


def test_shared_weights_are_refused_with_the_names_that_share(gpt2):
    with pytest.raises(ValueError, match=r"`lm_head` shares its weight .*wte\.weight.*`exclude_modules`, or untie"):
        get_peft_model(gpt2, OIALRConfig(mode="replace", target_modules=["lm_head"]))


def test_two_linear_layers_that_share_a_weight_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"`0` shares its weight with another module \(.*1\.weight.*\)"):
        get_peft_model(model, OIALRConfig(mode="replace"))


def test_one_module_at_two_places_is_refused_or_works_at_both(outputs_of):
    shared = nn.Linear(3, 3).double()
    model = nn.Sequential(shared, nn.Tanh(), shared)
    x = torch.randn(2, 3, dtype=torch.float64)
    expected = model(x)
    try:
        adapted = get_peft_model(model, OIALRConfig(mode="replace", target_modules=["0", "2"]))
    except ValueError as error:
        assert "shares its weight" in str(error)  # noqa: PT017
    else:
        assert_close(adapted(x), expected)
        assert adapted.base_model.model[0] is adapted.base_model.model[2]


def test_a_refused_target_leaves_the_model_as_it_was(gpt2, make_inputs, outputs_of):
    expected = outputs_of(gpt2, make_inputs("gpt2"))
    with pytest.raises(ValueError, match="shares its weight"):
        get_peft_model(gpt2, OIALRConfig(mode="replace", target_modules=["c_attn", "lm_head"]))
    assert not [module for module in gpt2.modules() if isinstance(module, OIALRLinear)]
    assert_close(outputs_of(gpt2, make_inputs("gpt2")), expected)


def test_tied_weights_that_are_not_targets_stay_tied(t5, gpt2):
    for model in (t5, gpt2):
        adapted = get_peft_model(model, OIALRConfig(mode="replace")).get_base_model()
        assert adapted.get_input_embeddings().weight is adapted.get_output_embeddings().weight


# ---- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default:The head:UserWarning")
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_a_head_that_stays_untrained_gives_a_warning(name, make_model):
    with pytest.warns(
        UserWarning, match=r"The head \(classifier\) .* `modules_to_save=\['classifier'\]` or a `task_type`"
    ):
        get_peft_model(make_model(name), OIALRConfig(mode="replace"))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bert", {"modules_to_save": ["classifier"]}),
        ("bert", {"task_type": "SEQ_CLS"}),
        ("bert", {"mode": "pretraining"}),
        ("bert", {"target_modules": ["query"]}),
        ("bert", {"inference_mode": True}),
        ("vit", {"modules_to_save": ["classifier"]}),
        ("gpt2", {}),
        ("t5", {}),
        ("mlp", {}),
    ],
    ids=str,
)
def test_there_is_no_warning_where_the_head_trains_or_belongs_to_the_embedding(name, fields, make_model):
    get_peft_model(make_model(name), OIALRConfig(**{"mode": "replace", **fields}))


def test_a_task_type_trains_the_head(bert):
    model = get_peft_model(bert, OIALRConfig(mode="replace", task_type="SEQ_CLS"))
    assert any("classifier.modules_to_save" in name for name in trainable(model))


# ---- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "biases"),
    [
        ("none", set()),
        ("oialr_only", {"up.base_layer.bias"}),
        ("all", {"up.base_layer.bias", "head.bias"}),
    ],
)
def test_biases_train_where_the_configuration_says_so(mlp, make_inputs, mode, bias, biases):
    model = get_peft_model(mlp, config(bias=bias, **mode))
    matrix = "oialr_weight" if mode is DENSE else "oialr_sigma"
    weights = {f"{layer}.{matrix}.default" for layer in ("up", "down")}
    expected = {f"base_model.model.{name}" for name in weights | biases}
    assert trainable(model) == expected
    model(**make_inputs("mlp")).square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected


@pytest.mark.parametrize("bias", ["oialr_only", "all"])
def test_biases_keep_training_after_the_layers_are_factored(mlp, make_inputs, bias):
    model = get_peft_model(mlp, config(bias=bias, freeze_when="delay", delay=1, update_every=1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    controller = OIALRController(model, optimizer, total_steps=4)
    steps(model, optimizer, make_inputs("mlp"), 1, controller.step)
    assert not any(layer.is_dense("default") for layer in controller.layers.values())
    before = mlp.up.base_layer.bias.detach().clone()
    steps(model, optimizer, make_inputs("mlp"), 1, controller.step)
    assert not torch.equal(mlp.up.base_layer.bias, before)


def test_two_adapters_with_bias_are_refused(mlp):
    model = get_peft_model(mlp, config(bias="all"))
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("second", config(bias="all"))
    assert list(model.peft_config) == ["default"]


def test_modules_to_save_train_in_full(mlp, make_inputs, outputs_of, mode):
    original = mlp.head.weight.detach().clone()
    model = get_peft_model(mlp, config(modules_to_save=["head"], **mode))
    assert {name for name in trainable(model) if "head" in name} == {
        f"base_model.model.head.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    before = outputs_of(model, make_inputs("mlp"))
    train(model)
    assert not torch.allclose(outputs_of(model, make_inputs("mlp")), before)
    assert torch.equal(mlp.head.original_module.weight, original)


def test_token_rows_of_the_embedding_train(gpt2, make_inputs, outputs_of):
    expected = outputs_of(gpt2, make_inputs("gpt2"))
    model = get_peft_model(gpt2, OIALRConfig(mode="replace", trainable_token_indices={"wte": [2, 3]}))
    assert_close(outputs_of(model, make_inputs("gpt2")), expected)
    assert any("trainable_tokens_delta" in name for name in trainable(model))


# ---- several adapters ------------------------------------------------------------------------------------------------


def test_set_adapter_switches_output_and_training(mlp, make_inputs, outputs_of):
    inputs = make_inputs("mlp")
    model = get_peft_model(mlp, config(init_weights=False))
    for name, mode in (("factored", FACTORED), ("residual", RESIDUAL)):
        model.add_adapter(name, config(init_weights=False, **mode))
    outputs = {}
    for name in ("default", "factored", "residual"):
        model.set_adapter(name)
        outputs[name] = outputs_of(model, inputs)
        assert {key.rpartition(".")[2] for key in trainable(model)} == {name}
        assert len(trainable(model)) == 2
        assert not any(".oialr_u." in key or ".oialr_vh." in key for key in trainable(model))
    model.set_adapter("default")
    assert_close(outputs_of(model, inputs), outputs["default"], rtol=0, atol=0)
    assert len({tuple(output.flatten().tolist()) for output in outputs.values()}) == 3


def test_a_new_adapter_does_not_change_what_trains(mlp):
    model = get_peft_model(mlp, config())
    before = trainable(model)
    model.add_adapter("second", config(**FACTORED))
    assert trainable(model) == before


def test_a_second_adapter_on_other_layers_leaves_the_first_one_alone(mlp, make_inputs, outputs_of):
    inputs = make_inputs("mlp")
    model = get_peft_model(mlp, OIALRConfig(mode="replace", target_modules=["up"], init_weights=False))
    expected = outputs_of(model, inputs)
    model.add_adapter("second", OIALRConfig(mode="replace", target_modules=["down"], init_weights=False))
    assert_close(outputs_of(model, inputs), expected, rtol=0, atol=0)
    model.set_adapter("second")
    second = outputs_of(model, inputs)
    model.delete_adapter("default")
    assert_close(outputs_of(model, inputs), second, rtol=0, atol=0)


@pytest.mark.parametrize("names", [("dense", "dense"), ("dense", "residual"), ("factored", "residual")], ids="+".join)
def test_two_active_adapters_add_their_changes_to_every_layer(mlp, make_inputs, outputs_of, names):
    inputs = make_inputs("mlp")
    plain = copy.deepcopy(mlp)
    model = get_peft_model(mlp, config(init_weights=False, **MODES[names[0]]), adapter_name="first")
    model.add_adapter("second", config(init_weights=False, **MODES[names[1]]))
    model.base_model.set_adapter(["first", "second"])
    with torch.no_grad():
        for name, layer in adapter_layers(model, "first").items():
            plain.get_submodule(name).weight += layer.get_delta_weight("first") + layer.get_delta_weight("second")
    assert_close(outputs_of(model, inputs), outputs_of(plain, inputs))


def test_a_second_adapter_may_be_given_by_an_expression_that_also_fits_inside_the_first(mlp):
    model = get_peft_model(mlp, config())
    model.add_adapter("second", OIALRConfig(target_modules=r"up.*", **{"mode": "replace", **FACTORED}))
    assert set(adapter_layers(model, "second")) == {"up"}


def test_a_deleted_adapter_is_gone(mlp, make_inputs, outputs_of):
    model = get_peft_model(mlp, config(init_weights=False))
    model.add_adapter("second", config(init_weights=False, **FACTORED))
    model.set_adapter("second")
    expected = outputs_of(model, make_inputs("mlp"))
    model.delete_adapter("default")
    assert list(model.peft_config) == ["second"]
    assert not [name for name in model.state_dict() if name.endswith(".default")]
    assert_close(outputs_of(model, make_inputs("mlp")), expected, rtol=0, atol=0)


def test_deleting_the_last_adapter_leaves_the_base_model(mlp, make_inputs, outputs_of, mode):
    expected = outputs_of(mlp, make_inputs("mlp"))
    model = get_peft_model(mlp, config(init_weights=False, **mode))
    model.delete_adapter("default")
    assert model.peft_config == {}
    # PeftModel itself, of any method, cannot run without an adapter
    assert_close(outputs_of(model.base_model, make_inputs("mlp")), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="Adapter default does not exist"):
        model.delete_adapter("default")


def test_disable_adapter_gives_the_base_model_for_a_while(mlp, make_inputs, outputs_of, mode):
    inputs = make_inputs("mlp")
    expected = outputs_of(mlp, inputs)
    model = get_peft_model(mlp, config(init_weights=False, **mode))
    adapted = outputs_of(model, inputs)
    with model.disable_adapter():
        assert_close(outputs_of(model, inputs), expected, rtol=0, atol=0)
    assert_close(outputs_of(model, inputs), adapted, rtol=0, atol=0)
    assert not torch.allclose(adapted, expected)


# ---- an adapter for each sample --------------------------------------------------------------------------------------


MIXED = {"first": {}, "second": {"mode": "adapter", "rank": 2}, "third": {"freeze_when": "delay", "delay": 0}}


def with_several_adapters(base, **targets):
    model = None
    for name, settings in MIXED.items():
        adapter = OIALRConfig(**{"mode": "replace", **settings}, init_weights=False, target_modules=targets.get(name))
        if model is None:
            model = get_peft_model(base, adapter, adapter_name=name)
        else:
            model.add_adapter(name, adapter)
    return model.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_sample_of_a_batch_can_have_an_adapter_of_its_own(name, make_model, make_inputs, outputs_of):
    base = make_model(name)
    model = with_several_adapters(make_model(name))
    names = ["second", "__base__", "first", "third", "second"]
    inputs = make_inputs(name, batch=5)
    mixed = outputs_of(model, {**inputs, "adapter_names": names})
    expected = {"__base__": outputs_of(base, inputs)}
    for adapter in MIXED:
        model.set_adapter(adapter)
        expected[adapter] = outputs_of(model, inputs)
    for sample, adapter in enumerate(names):
        assert_close(mixed[sample], expected[adapter][sample])
    assert_close(outputs_of(model, inputs), expected["third"])  # the hooks are gone


def test_a_sample_of_an_adapter_without_a_layer_gets_the_base_layer(mlp, make_model, make_inputs, outputs_of):
    model = with_several_adapters(mlp, first=["up"], second=["down"])
    inputs = make_inputs("mlp", batch=2)
    mixed = outputs_of(model, {**inputs, "adapter_names": ["first", "second"]})
    model.set_adapter("first")
    assert_close(mixed[0], outputs_of(model, inputs)[0])


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_beam_search_keeps_the_adapter_of_each_sample(name, make_model, make_inputs):
    model = with_several_adapters(make_model(name))
    tokens = make_inputs(name, batch=2)["input_ids"]
    search = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=tokens, adapter_names=["first", "second"], **search)
    for sample, adapter in enumerate(["first", "second"]):
        model.set_adapter(adapter)
        alone = model.generate(input_ids=tokens[sample : sample + 1], **search)[0]
        assert torch.equal(mixed[sample][: len(alone)], alone)


def test_wrong_adapter_names_are_refused(mlp, make_inputs):
    model = with_several_adapters(mlp)
    inputs = make_inputs("mlp")
    for names, message in (
        (["first"] * 2, "Length of `adapter_names` .* got 2 and 3 respectively"),
        (["first", "fourth", "fifth"], r"non-existing adapter\(s\): fifth, fourth\. There are first, second, third"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, adapter_names=names)
    with pytest.raises(TypeError, match="`adapter_names` must be a list of str"):
        model(**inputs, adapter_names="first")
    model.merge_adapter(["first"])
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        model(**inputs, adapter_names=["first"] * 3)
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model(**inputs, adapter_names=["first"] * 3)


def test_samples_without_an_adapter_need_the_base_weights(mlp, make_inputs):
    model = get_peft_model(mlp, OIALRConfig(mode="pretraining")).eval()
    with pytest.raises(RuntimeError, match="`adapter_names` needs the base weights, but `mode=.pretraining.` released"):
        model(**make_inputs("mlp"), adapter_names=["default", "__base__", "default"])


# ---- merging and unloading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_merged_model_equals_the_adapted_one_and_is_the_original_class(
    name, mode, make_model, make_inputs, outputs_of
):
    model, inputs = make_model(name), make_inputs(name)
    kind, keys = type(model), list(model.state_dict())
    adapted = get_peft_model(model, OIALRConfig(init_weights=False, **{"mode": "replace", **mode}))
    train(adapted)
    expected = outputs_of(adapted, inputs)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert_close(outputs_of(merged, inputs), expected)
    assert type(merged) is kind
    assert list(merged.state_dict()) == keys
    assert not hasattr(merged, "peft_config")


def test_unload_gives_the_base_model_back(bert, mode, make_inputs, outputs_of):
    inputs = make_inputs("bert")
    expected, before = outputs_of(bert, inputs), {k: v.clone() for k, v in bert.state_dict().items()}
    model = get_peft_model(bert, OIALRConfig(init_weights=False, **{"mode": "replace", **mode}))
    train(model)
    assert not torch.allclose(outputs_of(model, inputs), expected)
    plain = model.unload()
    assert_close(outputs_of(plain, inputs), expected, rtol=0, atol=0)
    assert list(plain.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_unmerging_restores_every_base_weight_bit_for_bit(name, dtype, mode, make_model, make_inputs, outputs_of):
    model = get_peft_model(make_model(name, dtype), OIALRConfig(**{"mode": "replace", **mode}))
    train(model)
    before, adapted = base_state(model), outputs_of(model, make_inputs(name))
    model.merge_adapter()
    if dtype is torch.float64:
        assert_close(outputs_of(model, make_inputs(name)), adapted)
    assert any(not torch.equal(value, before[key]) for key, value in base_state(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in base_state(model).items())
    assert_close(outputs_of(model, make_inputs(name)), adapted, rtol=0, atol=0)


def test_a_safe_merge_of_a_broken_adapter_is_refused_and_leaves_its_layer_unchanged(mlp, mode):
    model = get_peft_model(mlp, config(**mode))
    with torch.no_grad():
        mlp.up.trained_parameter("default").fill_(torch.nan)
    before = base_state(model)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(value, before[key]) for key, value in base_state(model).items())


def test_one_of_several_adapters_is_merged_by_name(mlp, make_inputs, outputs_of):
    model = get_peft_model(mlp, config(init_weights=False))
    model.add_adapter("second", config(init_weights=False, **RESIDUAL))
    model.set_adapter("second")
    expected = outputs_of(model, make_inputs("mlp"))
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["second"])
    assert_close(outputs_of(merged, make_inputs("mlp")), expected)


def test_a_merged_model_takes_a_new_adapter(mlp, make_inputs, outputs_of):
    merged = get_peft_model(mlp, config(init_weights=False)).merge_and_unload()
    expected = outputs_of(merged, make_inputs("mlp"))
    assert_close(outputs_of(get_peft_model(merged, config(**FACTORED)), make_inputs("mlp")), expected)


# ---- pretraining -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pretraining_releases_the_base_weights_and_trains_everything(name, make_model, make_inputs, outputs_of):
    model, inputs = make_model(name), make_inputs(name)
    expected = outputs_of(model, inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    storage = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    adapted = get_peft_model(model, OIALRConfig(mode="pretraining"))
    assert_close(outputs_of(adapted, inputs), expected)
    assert all(layer.get_base_layer().weight.numel() == 0 for layer in adapter_layers(adapted).values())
    assert sum(parameter.numel() for parameter in adapted.parameters()) == parameters
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == parameters
    bytes_of = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in adapted.state_dict().values()}
    assert sum(bytes_of.values()) <= 8 * parameters + 8 * 64  # buffers, such as position indices
    if name != "gpt2":  # Conv1D is stored transposed, so its weight is copied once
        assert {parameter.untyped_storage().data_ptr() for parameter in trained} == storage


def test_pretraining_reaches_every_parameter_with_a_gradient(gpt2, make_inputs):
    model = get_peft_model(gpt2, OIALRConfig(mode="pretraining"))
    inputs = make_inputs("gpt2")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_pretraining_leaves_frozen_what_the_user_froze(bert):
    bert.bert.embeddings.position_embeddings.requires_grad_(False)
    model = get_peft_model(bert, OIALRConfig(mode="pretraining"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"base_model.model.bert.embeddings.position_embeddings.weight"}


def test_pretraining_from_the_start_factored_trains_sigma_and_everything_else(mlp, make_inputs, outputs_of):
    expected = outputs_of(mlp, make_inputs("mlp"))
    model = get_peft_model(mlp, config(mode="pretraining", **FACTORED))
    assert_close(outputs_of(model, make_inputs("mlp")), expected)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        f"base_model.model.{layer}.oialr_{name}.default" for layer in ("up", "down") for name in ("u", "vh")
    }


def test_pretraining_trains_the_copy_of_a_module_to_save_and_not_its_original(mlp):
    model = get_peft_model(mlp, config(mode="pretraining", modules_to_save=["head"]))
    assert not any("original_module" in name for name in trainable(model))
    assert sum("modules_to_save" in name for name in trainable(model)) == 2


def test_pretraining_merges_into_a_whole_model(bert, make_inputs, outputs_of):
    keys = list(bert.state_dict())
    model = get_peft_model(bert, OIALRConfig(mode="pretraining"))
    train(model)
    expected = outputs_of(model, make_inputs("bert"))
    model.merge_adapter(safe_merge=True)
    assert_close(outputs_of(model, make_inputs("bert")), expected)
    model.unmerge_adapter()
    assert_close(outputs_of(model, make_inputs("bert")), expected)
    merged = model.merge_and_unload(safe_merge=True)
    assert_close(outputs_of(merged, make_inputs("bert")), expected)
    assert sorted(merged.state_dict()) == sorted(keys)


def test_what_needs_the_base_weights_is_refused_after_pretraining(mlp, make_inputs, outputs_of):
    model = get_peft_model(mlp, config(mode="pretraining"))
    expected = outputs_of(model, make_inputs("mlp"))
    with (
        pytest.raises(RuntimeError, match=r"`mode=.pretraining.` cannot be disabled: the base weights were released"),
        model.disable_adapter(),
    ):
        pass
    with pytest.raises(RuntimeError, match=r"`unload` needs the base weights, .* released them.* `merge_and_unload`"):
        model.unload()
    with pytest.raises(RuntimeError, match=r"`delete_adapter` needs the base weights, .* `merge_and_unload`"):
        model.delete_adapter("default")
    for second in (config(), config(mode="pretraining")):
        with pytest.raises(ValueError, match=r"exactly one adapter, but \['default', 'second'\] were asked for\. Load"):
            model.add_adapter("second", second)
    assert list(model.peft_config) == ["default"]
    assert_close(outputs_of(model, make_inputs("mlp")), expected, rtol=0, atol=0)


def test_pretraining_is_refused_beside_another_adapter(mlp, make_inputs, outputs_of):
    model = get_peft_model(mlp, config(init_weights=False))
    expected = outputs_of(model, make_inputs("mlp"))
    with pytest.raises(ValueError, match=r"exactly one adapter, but \['default', 'second'\] were asked for"):
        model.add_adapter("second", config(mode="pretraining"))
    assert list(model.peft_config) == ["default"]
    assert_close(outputs_of(model, make_inputs("mlp")), expected, rtol=0, atol=0)


# ---- dtypes and devices ----------------------------------------------------------------------------------------------


def test_an_adapter_on_a_bfloat16_model_trains_in_float32(make_model, make_inputs, outputs_of, mode):
    model, inputs = make_model("bert", torch.bfloat16), make_inputs("bert")
    expected = outputs_of(model, inputs)
    adapted = get_peft_model(model, OIALRConfig(**{"mode": "replace", **mode}))
    parameters = {name: p for name, p in adapted.named_parameters() if ".oialr_" in name}
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert {name.split(".")[-2] for name, p in parameters.items() if p.requires_grad} == {
        "oialr_weight" if mode is DENSE else "oialr_sigma"
    }
    assert {p.dtype for name, p in adapted.named_parameters() if name not in parameters} == {torch.bfloat16}
    output = outputs_of(adapted, inputs)
    assert output.dtype == torch.bfloat16
    assert_close(output, expected, atol=0.3, rtol=0.1)


def test_autocast_adapter_dtype_can_be_switched_off(make_model, mode):
    model = get_peft_model(
        make_model("bert", torch.bfloat16), OIALRConfig(**{"mode": "replace", **mode}), autocast_adapter_dtype=False
    )
    parameters = {name: p for name, p in model.named_parameters() if ".oialr_" in name}
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    assert len(trainable(model)) == len(adapter_layers(model))


def test_bases_of_a_bfloat16_model_are_orthonormal_up_to_its_rounding(make_model):
    model = get_peft_model(make_model("bert", torch.bfloat16), OIALRConfig(**{"mode": "replace", **FACTORED}))
    for layer in adapter_layers(model).values():
        u = layer.factors("default").u
        assert_close(u.T @ u, torch.eye(u.shape[1]), atol=1e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_changes_dtype_keeps_working_and_training(mlp, make_inputs, outputs_of, mode, dtype):
    model = get_peft_model(mlp, config(init_weights=False, **mode))
    expected, before = outputs_of(model, make_inputs("mlp")), trainable(model)
    inputs = make_inputs("mlp", dtype)
    model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert trainable(model) == before
    output = model(**inputs)
    assert output.dtype == dtype
    assert_close(output.double(), expected, atol=1e-5 if dtype is torch.float32 else 0.3, rtol=1e-5)
    output.square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == before


def test_half_precision_and_a_move_to_the_same_device_keep_working(mlp, mode, make_inputs):
    model = get_peft_model(mlp, config(**mode)).half().to("cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model(**make_inputs("mlp", torch.float16)).dtype == torch.float16


def test_a_model_moves_to_the_meta_device_with_everything_it_has(mlp, mode):
    model = get_peft_model(mlp, config(**mode)).to("meta")
    assert all(parameter.is_meta for parameter in model.parameters())


# ---- meta device -----------------------------------------------------------------------------------------------------


def test_a_model_on_the_meta_device_gets_an_adapter_without_a_decomposition(mode, monkeypatch, make_model):
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: pytest.fail("decomposed"))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    adapted = get_peft_model(model, OIALRConfig(**{"mode": "replace", **mode}))
    assert all(parameter.is_meta for parameter in adapted.parameters())
    assert len(trainable(adapted)) == 2


def test_low_cpu_mem_usage_makes_the_adapter_on_the_meta_device(mlp, mode, monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: pytest.fail("decomposed"))
    model = get_peft_model(mlp, config(**mode), low_cpu_mem_usage=True)
    assert all(parameter.is_meta == (".oialr_" in name) for name, parameter in model.named_parameters())


def test_an_adapter_is_injected_without_a_peft_model(mlp, make_inputs, outputs_of, mode):
    expected = outputs_of(mlp, make_inputs("mlp"))
    model = inject_adapter_in_model(config(**mode), mlp)
    assert model is mlp
    assert set(adapter_layers(model)) == {"up", "down"}
    assert_close(outputs_of(model, make_inputs("mlp")), expected)


# ---- reports of PEFT -------------------------------------------------------------------------------------------------


def test_the_status_of_layers_and_model_is_regular(mlp, mode):
    model = get_peft_model(mlp, config(**mode))
    model.add_adapter("second", config(**FACTORED))
    for status in get_layer_status(model):
        assert status.module_type == "OIALRLinear"
        assert status.enabled
        assert status.active_adapters == ["default"]
        assert status.merged_adapters == []
        assert status.requires_grad == {"default": True, "second": False}
        assert status.available_adapters == ["default", "second"]
    status = get_model_status(model)
    assert status.num_adapter_layers == 2
    assert status.enabled is True
    assert status.requires_grad == {"default": True, "second": False}
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]


def test_trainable_parameters_are_counted(mlp, mode, capsys):
    model = get_peft_model(mlp, config(**mode))
    expected = 6 * 10 + 10 * 5 if mode is DENSE else 6 * 6 + 5 * 5
    count, total = model.get_nb_trainable_parameters()
    assert count == expected
    assert total == sum(parameter.numel() for parameter in model.parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {expected:,}" in capsys.readouterr().out


# ---- shrinking by masks ----------------------------------------------------------------------------------------------


def test_masked_layers_keep_their_shapes_and_their_dropped_directions_stay_zero(mlp, make_inputs):
    fields = {"freeze_when": "delay", "delay": 1, "update_every": 1, "cutoff": 0.5, "shrink": "mask"}
    model = get_peft_model(mlp, config(**fields))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    controller = OIALRController(model, optimizer, total_steps=10)
    shapes = None

    def check():
        nonlocal shapes
        controller.step()
        now = {name: parameter.shape for name, parameter in model.named_parameters()}
        assert shapes in (None, now)
        shapes = now
        for name, layer in controller.layers.items():
            rank = layer.rank("default")
            assert not layer.oialr_sigma["default"][rank:].any(), name
            assert not layer.oialr_sigma["default"][:, rank:].any(), name
            assert not layer.oialr_vh["default"][rank:].any(), name

    steps(model, optimizer, make_inputs("mlp"), 6, check)
    assert any(layer.rank("default") < layer.full_rank["default"] for layer in controller.layers.values())


def test_masked_training_equals_physical_training(make_model, make_inputs, outputs_of):
    outputs = []
    for shrink in ("physical", "mask"):
        fields = {"freeze_when": "delay", "delay": 2, "update_every": 2, "cutoff": 0.5, "shrink": shrink}
        model = get_peft_model(make_model("mlp"), config(**fields))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        controller = OIALRController(model, optimizer, total_steps=10)
        steps(model, optimizer, make_inputs("mlp"), 10, controller.step)
        outputs.append(outputs_of(model, make_inputs("mlp")))
    assert_close(outputs[0], outputs[1])


# ---- training without a controller -----------------------------------------------------------------------------------


def optimizer_of(model, kind=torch.optim.SGD):
    return kind([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
def test_training_for_an_interval_without_a_controller_warns_once(mlp, make_inputs, mode, kind):
    model = get_peft_model(mlp, config(update_every=5, **mode))
    optimizer = optimizer_of(model, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, optimizer, make_inputs("mlp"), 5)
    with pytest.warns(
        UserWarning, match="has trained for 5 optimizer steps without a controller.* OIALRTrainer"
    ) as seen:
        steps(model, optimizer, make_inputs("mlp"), 20)
    assert len(seen) == 1


def test_an_interval_that_is_a_share_of_the_run_is_taken_as_a_fixed_number_of_steps(mlp, make_inputs):
    model = get_peft_model(mlp, config(update_every=0.1))
    optimizer = optimizer_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, optimizer, make_inputs("mlp"), STEPS_UNTIL_WARNING)
    with pytest.warns(UserWarning, match=f"for {STEPS_UNTIL_WARNING} optimizer steps without a controller"):
        steps(model, optimizer, make_inputs("mlp"), 2)


@pytest.mark.filterwarnings("error::UserWarning")
def test_training_with_a_controller_does_not_warn(mlp, make_inputs, mode):
    model = get_peft_model(mlp, config(update_every=5, cutoff=0.1, **mode))
    optimizer = optimizer_of(model)
    controller = OIALRController(model, optimizer, total_steps=20)
    steps(model, optimizer, make_inputs("mlp"), 20, controller.step)


@pytest.mark.filterwarnings("error::UserWarning")
def test_micro_batches_and_evaluation_are_not_steps(mlp, make_inputs, outputs_of):
    model = get_peft_model(mlp, config(update_every=5))
    optimizer = optimizer_of(model)
    inputs = make_inputs("mlp")
    for _ in range(3):
        for _ in range(4):
            model(**inputs).square().mean().backward()
            outputs_of(model, inputs)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("error::UserWarning")
def test_an_adapter_that_does_not_train_does_not_warn(mlp, make_inputs):
    model = get_peft_model(mlp, config(update_every=2, modules_to_save=["head"]))
    for layer in adapter_layers(model).values():
        layer.requires_grad_(False)
    steps(model, optimizer_of(model), make_inputs("mlp"), 10)


def test_a_copied_model_trains_and_the_original_still_warns(mlp, make_inputs):
    model = get_peft_model(mlp, config(update_every=3))
    twin = copy.deepcopy(model)
    controller = OIALRController(twin, optimizer_of(twin), total_steps=20)
    steps(twin, controller.optimizer, make_inputs("mlp"), 5, controller.step)
    with pytest.warns(UserWarning, match="has trained for 3 optimizer steps without a controller"):
        steps(model, optimizer_of(model), make_inputs("mlp"), 5)


def test_the_watch_does_not_keep_the_model_alive(mlp):
    model = get_peft_model(mlp, config())
    reference = weakref.ref(model)
    del model, mlp
    gc.collect()
    # the fixture itself still holds the base model, but nothing holds its wrapper
    assert reference() is None


def test_peft_and_the_tuner_agree_on_the_classes(mlp):
    model = get_peft_model(mlp, config())
    assert type(model) is PeftModel
    assert model.base_model.prefix == "oialr_"
    assert model.active_adapters == ["default"]
