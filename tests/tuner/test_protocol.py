"""What PEFT and transformers let users do with any adapter, beyond targets, training and files, in every phase.

Either it works as for other methods, or it is refused with an error that says why.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from peft import (
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.helpers import check_if_peft_model, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.tuner.lookup import adapter_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* was active which is now deleted:UserWarning"),
]
TIED = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
FACTORED = {"freeze_when": "delay", "delay": 0, "rank": 6}
PHASES = {
    "dense": {},
    "factored": FACTORED,
    "masked": {**FACTORED, "shrink": "mask"},
    "residual": {"mode": "adapter", "rank": 6},
    "pretraining": {"mode": "pretraining"},
    "pretraining factored": {**FACTORED, "mode": "pretraining"},
}
KEEPS_BASE = [name for name in PHASES if "pretraining" not in name]
PRETRAINING = [name for name in PHASES if "pretraining" in name]
IDS = torch.tensor([[3, 7, 1, 12, 9], [5, 5, 20, 2, 8]])
TARGETS = 2 * 7

every_phase = pytest.mark.parametrize("phase", PHASES)
phases_with_a_base = pytest.mark.parametrize("phase", KEEPS_BASE)
pretraining_phases = pytest.mark.parametrize("phase", PRETRAINING)


def llama(*, dtype: torch.dtype = torch.float64, tied: bool = True) -> LlamaForCausalLM:
    """Two blocks of seven linear layers; output embedding tied to the input embedding unless told otherwise."""
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def adapted(phase: str, base: nn.Module | None = None, **fields: object) -> PeftModel:
    config = OIALRConfig(**{"mode": "replace", **PHASES[phase], **fields})
    model = get_peft_model(llama() if base is None else base, config).eval()
    if phase == "masked":
        for layer in adapter_layers(model).values():
            factors = layer.factors("default")
            layer.set_factors("default", factors.cut(factors.rank - 1), size=factors.rank)
    return model


def moved(model: nn.Module) -> nn.Module:
    """The model with everything that trains moved away from where it was."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter), alpha=0.1)
    for layer in adapter_layers(model).values():
        if not layer.is_dense("default"):
            # training keeps the zeros that a masked layer has outside its rank
            layer.set_factors("default", layer.factors("default"), size=layer.oialr_sigma["default"].shape[0])
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_kinds(model: nn.Module) -> set[str]:
    return {name.split(".")[-2] for name in trainable(model) if ".oialr_" in name}


def is_tied(model: nn.Module) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


# ---- what other methods have -----------------------------------------------------------------------------------------


@every_phase
def test_a_weighted_sum_of_adapters_is_refused_with_what_to_do_instead(phase):
    model = adapted(phase)
    with pytest.raises(NotImplementedError, match=r"no weighted sum .* `merge_and_unload.* `save_lora`"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert list(model.peft_config) == ["default"]


@every_phase
def test_a_scale_which_adapters_do_not_have_cannot_be_changed(phase):
    model = moved(adapted(phase))
    expected = logits(model)
    with (
        pytest.raises(ValueError, match="scaling is only supported for models with `LoraLayer`s"),
        rescale_adapter_scale(model, 0.5),
    ):
        pass
    assert torch.equal(logits(model), expected)


@every_phase
def test_hotswapping_is_refused_by_peft_and_by_transformers(phase, tmp_path):
    model = moved(adapted(phase))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but OIALR was passed"):
        hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(logits(model), expected)
    other = llama()
    other.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match=r"only supported for LoRA, please set `hotswap=False`"):
        other.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)
    assert_close(logits(other), expected)


@every_phase
def test_a_saved_adapter_is_recognized_as_one(phase, tmp_path):
    adapted(phase).save_pretrained(tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    assert check_if_peft_model(str(tmp_path / "adapter"))
    assert not check_if_peft_model(str(tmp_path / "base"))


# ---- status ----------------------------------------------------------------------------------------------------------


@every_phase
def test_the_status_follows_merging_and_unmerging(phase):
    model = moved(adapted(phase))
    expected = logits(model)
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]
    assert all(status.merged_adapters == ["default"] for status in get_layer_status(model))
    assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert get_model_status(model).merged_adapters == []
    assert len(get_layer_status(model)) == TARGETS
    assert_close(logits(model), expected)


@phases_with_a_base
def test_the_status_follows_disabling_and_what_trains(phase):
    model = adapted(phase)
    with model.disable_adapter():
        assert get_model_status(model).enabled is False
    assert get_model_status(model).enabled is True
    assert get_model_status(model).requires_grad == {"default": True}
    model.base_model.set_requires_grad("default", requires_grad=False)
    assert get_model_status(model).requires_grad == {"default": False}
    assert trainable(model) == set()
    model.base_model.set_requires_grad("default")
    assert trained_kinds(model) == {"oialr_weight" if phase == "dense" else "oialr_sigma"}


@every_phase
def test_the_status_of_an_injected_adapter_needs_no_peft_model(phase):
    model = inject_adapter_in_model(OIALRConfig(**{"mode": "replace", **PHASES[phase]}), llama())
    assert get_model_status(model).num_adapter_layers == TARGETS
    assert get_model_status(model).active_adapters == ["default"]


@every_phase
def test_the_printed_number_of_parameters_is_what_trains(phase, capsys):
    model = adapted(phase)
    model.print_trainable_parameters()
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"trainable params: {count:,} " in capsys.readouterr().out
    assert count > 0


# ---- adapters by transformers' own methods ---------------------------------------------------------------------------


@phases_with_a_base
def test_transformers_adds_switches_disables_and_deletes_adapters(phase):
    base = llama()
    plain = logits(base)
    base.add_adapter(OIALRConfig(init_weights=False, **{"mode": "replace", **PHASES[phase]}))
    first = logits(base)
    base.add_adapter(OIALRConfig(init_weights=False, **{"mode": "replace", **PHASES[phase]}), "second")
    assert base.active_adapters() == ["second"]
    assert {name.rpartition(".")[2] for name in trainable(base)} == {"second"}
    assert len(trainable(base)) == TARGETS
    second = logits(base)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, plain)

    base.disable_adapters()
    assert torch.equal(logits(base), plain)
    base.enable_adapters()
    assert torch.equal(logits(base), second)
    base.set_adapter("default")
    assert torch.equal(logits(base), first)
    assert {name.rpartition(".")[2] for name in trainable(base)} == {"default"}
    assert not any(".oialr_u." in name or ".oialr_vh." in name for name in trainable(base))
    base.set_adapter(["default", "second"])
    assert base.active_adapters() == ["default", "second"]
    base.set_adapter("default")

    base.delete_adapter("second")
    assert list(base.peft_config) == ["default"]
    assert torch.equal(logits(base), first)
    base.delete_adapter("default")
    assert torch.equal(logits(base), plain)


@pretraining_phases
def test_transformers_cannot_take_an_only_weight_away(phase, tmp_path):
    base = llama()
    base.add_adapter(OIALRConfig(**{"mode": "replace", **PHASES[phase]}))
    expected = logits(base)
    with pytest.raises(RuntimeError, match=r"`mode=.pretraining.` cannot be disabled: the base weights were released"):
        base.disable_adapters()
    with pytest.raises(
        RuntimeError, match=r"`model\.layers\.0\.self_attn\.q_proj` cannot be deleted: `mode=.pretraining.`"
    ):
        base.delete_adapter("default")
    with pytest.raises(ValueError, match="exactly one adapter"):
        base.add_adapter(OIALRConfig(**{"mode": "replace", **PHASES[phase]}), "second")
    assert torch.equal(logits(base), expected)
    base.save_pretrained(tmp_path)
    other = llama()
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other), expected)


@every_phase
def test_transformers_saves_what_peft_loads(phase, tmp_path):
    base = llama()
    base.add_adapter(OIALRConfig(init_weights=False, **{"mode": "replace", **PHASES[phase]}))
    moved(base)
    base.save_pretrained(tmp_path)
    assert set(base.get_adapter_state_dict()) == set(get_peft_model_state_dict(base))
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(base))


# ---- state dictionaries of an adapter --------------------------------------------------------------------------------

ALIKE = [
    *itertools.product(["dense", "factored", "masked"], repeat=2),
    ("residual", "residual"),
    *itertools.product(PRETRAINING, repeat=2),
]


@pytest.mark.parametrize("ignore", [False, True], ids=["", "ignore_mismatched_sizes"])
@pytest.mark.parametrize(("source", "target"), ALIKE, ids=[" into ".join(pair) for pair in ALIKE])
def test_the_state_of_an_adapter_is_set_in_a_model_of_any_phase_and_rank(source, target, ignore):
    trained = moved(adapted(source, **({} if source in ("dense", "pretraining") else {"rank": 3})))
    state = get_peft_model_state_dict(trained)
    before = {key: value.clone() for key, value in state.items()}
    model = adapted(target)
    result = set_peft_model_state_dict(model, state, ignore_mismatched_sizes=ignore)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if ".oialr_" in key]
    assert_close(logits(model), logits(trained))
    assert {name: layer.rank("default") for name, layer in adapter_layers(model).items()} == {
        name: layer.rank("default") for name, layer in adapter_layers(trained).items()
    }
    assert trained_kinds(model) == trained_kinds(trained)
    # the dictionary is the caller's
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in state.items())


@every_phase
def test_the_state_of_an_adapter_is_set_under_another_name_and_without_a_peft_model(phase):
    trained = moved(adapted(phase))
    state = get_peft_model_state_dict(trained)
    injected = inject_adapter_in_model(
        OIALRConfig(**{"mode": "replace", **PHASES[phase]}), llama(), adapter_name="other"
    )
    bare = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    result = set_peft_model_state_dict(injected, bare, adapter_name="other")
    assert not result.unexpected_keys
    assert_close(logits(injected.eval()), logits(trained))
    assert get_peft_model_state_dict(injected, adapter_name="other").keys() == bare.keys()


@every_phase
def test_missing_and_unexpected_keys_are_reported(phase):
    trained = moved(adapted(phase))
    state = get_peft_model_state_dict(trained)
    last = list(adapter_layers(trained))[-1]
    partial = {key: value for key, value in state.items() if f"{last}.oialr_" not in key}
    model = adapted(phase)
    before = adapter_layers(model)[last].adapter_weight("default").clone()
    result = set_peft_model_state_dict(model, {**partial, "base_model.model.nowhere.oialr_sigma": torch.ones(2, 2)})
    assert result.unexpected_keys == ["base_model.model.nowhere.oialr_sigma"]
    missing = {key for key in result.missing_keys if ".oialr_" in key}
    assert missing == {f"{key}.default" for key in state.keys() - partial.keys()}
    assert torch.equal(adapter_layers(model)[last].adapter_weight("default"), before)


# ---- tied embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@every_phase
def test_tied_embeddings_stay_tied_through_a_file(phase, low_cpu_mem_usage, tmp_path):
    model = moved(adapted(phase))
    assert is_tied(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_close(logits(loaded), logits(model))
    assert is_tied(loaded)
    assert trainable(loaded) == trainable(model)
    merged = loaded.merge_and_unload()
    assert is_tied(merged)
    assert_close(logits(merged), logits(model))


@pretraining_phases
def test_transformers_unties_what_it_loads_until_it_is_told_to_tie(phase, tmp_path):
    model = moved(adapted(phase))
    model.save_pretrained(tmp_path)
    loaded = llama()
    loaded.load_adapter(str(tmp_path), is_trainable=True)
    assert_close(logits(loaded), logits(model))
    loaded.tie_weights()
    assert is_tied(loaded)
    assert_close(logits(loaded), logits(model))


@every_phase
def test_a_tied_output_embedding_is_no_target(phase):
    with (
        pytest.warns(UserWarning, match="tie_word_embeddings=True"),
        pytest.raises(ValueError, match=r"`lm_head` shares its weight .*embed_tokens.*tie_word_embeddings=False"),
    ):
        adapted(phase, target_modules=["q_proj", "lm_head"])


@every_phase
def test_an_output_embedding_that_is_not_tied_may_be_a_target(phase):
    base = llama(tied=False)
    expected = logits(base)
    model = get_peft_model(
        base, OIALRConfig(**{"mode": "replace", **PHASES[phase], "rank": None}, target_modules=["q_proj", "lm_head"])
    )
    assert "lm_head" in adapter_layers(model)
    assert_close(logits(model), expected)


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join)
@phases_with_a_base
def test_a_tied_embedding_to_save_is_trained_apart_with_a_warning_and_kept_exactly(phase, modules, tmp_path):
    with pytest.warns(UserWarning, match="no implementation exists to tie the adapters"):
        model = adapted(phase, modules_to_save=modules)
    moved(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="no implementation exists to tie the adapters"):
        assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), expected)
    merged = model.merge_and_unload()
    assert_close(logits(merged), expected)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert_close(logits(again), expected)


@TIED
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join)
@pretraining_phases
def test_pretraining_refuses_to_train_one_end_of_tied_embeddings(phase, modules):
    base = llama()
    expected = logits(base)
    with pytest.raises(
        ValueError, match=r"`modules_to_save` names `.*`, whose weight is tied \(.*\): .* Leave it out;"
    ):
        adapted(phase, base, modules_to_save=modules)
    assert torch.equal(logits(base), expected)
    assert adapter_layers(base) == {}


@pretraining_phases
def test_pretraining_saves_an_embedding_of_its_own_as_asked(phase, tmp_path):
    model = moved(adapted(phase, llama(tied=False), modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(llama(tied=False), tmp_path)), logits(model))


def test_pretraining_refuses_single_rows_of_an_embedding_that_trains_as_a_whole():
    with pytest.raises(ValueError, match=r"`trainable_token_indices` \(\[2\]\) must be None with `mode=.pretraining.`"):
        OIALRConfig(mode="pretraining", trainable_token_indices=[2])


@phases_with_a_base
def test_token_rows_of_tied_embeddings_train_at_both_ends_and_stay_tied(phase, tmp_path):
    model = moved(adapted(phase, trainable_token_indices=[2, 3]))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    merged = model.merge_and_unload()
    assert is_tied(merged)
    assert_close(logits(merged), expected)


# ---- preparation for training ----------------------------------------------------------------------------------------


def prepared(**options: object) -> LlamaForCausalLM:
    """A half-precision model that says it is quantized, as far as `prepare_model_for_kbit_training` looks."""
    base = llama(dtype=torch.bfloat16)
    base.is_loaded_in_8bit = True
    return prepare_model_for_kbit_training(base, **options).train()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@every_phase
def test_training_works_after_prepare_model_for_kbit_training(phase, reentrant):
    base = prepared(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}
    assert not trainable(base)
    model = adapted(phase, base, update_every=2, cutoff=0.3).train()
    # what was frozen before stays frozen, with `pretraining` as well
    assert len(trainable(model)) == TARGETS
    assert trained_kinds(model) == {"oialr_weight" if phase in ("dense", "pretraining") else "oialr_sigma"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    controller = OIALRController(model, optimizer, total_steps=12)
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any(after < before for update in controller.history for before, after in update.ranks.values())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@every_phase
def test_checkpointed_gradients_are_those_of_the_whole_model(phase, reentrant):
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = moved(adapted(phase)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


@pytest.mark.parametrize("tokens", [1, 40], ids="{} rows".format)
@pytest.mark.parametrize("phase", ["factored", "masked", "residual", "pretraining factored"])
def test_what_trains_may_be_cast_alone(phase, tokens):
    model = moved(adapted(phase, llama(dtype=torch.float32)))
    ids = IDS.repeat(tokens, 1)
    expected = model(input_ids=ids).logits
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    output = model(input_ids=ids).logits
    assert_close(output.float(), expected, atol=0.3, rtol=0.1)
    output.square().mean().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    model.eval()
    assert_close(model(input_ids=ids).logits.float(), expected, atol=0.3, rtol=0.1)


# ---- options of from_pretrained --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_trainable", [False, True], ids=["", "is_trainable"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast_adapter_dtype"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
@every_phase
def test_the_options_of_from_pretrained_mean_what_they_mean_for_other_methods(
    phase, low_cpu_mem_usage, autocast, is_trainable, tmp_path
):
    model = moved(adapted(phase, llama(dtype=torch.float32)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        llama(dtype=torch.bfloat16),
        tmp_path,
        low_cpu_mem_usage=low_cpu_mem_usage,
        autocast_adapter_dtype=autocast,
        is_trainable=is_trainable,
    )
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    dtypes = {".oialr_" in name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert dtypes == {True: torch.float32 if autocast else torch.bfloat16, False: torch.bfloat16}
    assert trainable(loaded) == (trainable(model) if is_trainable else set())
    assert_close(logits(loaded.eval()).float(), logits(model), atol=0.3, rtol=0.1)


# ---- copies ----------------------------------------------------------------------------------------------------------


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch], ids=["copy", "pickle", "torch"]
)
@every_phase
def test_a_copy_is_equal_and_apart(phase, copied):
    model = moved(adapted(phase))
    expected = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), expected)
    assert trainable(twin) == trainable(model)
    assert is_tied(twin)
    moved(twin)
    assert torch.equal(logits(model), expected)
    twin.merge_adapter()
    assert get_model_status(model).merged_adapters == []


@every_phase
def test_the_whole_state_goes_through_a_file(phase):
    model = moved(adapted(phase))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = adapted(phase)
    result = other.load_state_dict(torch.load(file))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@every_phase
def test_a_model_that_changes_dtype_computes_and_trains_the_same_parameters(phase, dtype):
    model = moved(adapted(phase))
    expected, before = logits(model), trainable(model)
    model = model.half() if dtype is torch.float16 else model.to("cpu", dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert trainable(model) == before
    assert_close(logits(model).double(), expected, atol=1e-4 if dtype is torch.float32 else 0.3, rtol=1e-4)
