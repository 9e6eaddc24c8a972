"""OIALR in the trainers of TRL: by the mixin or the callback, with a configuration or a `PeftModel`.

TRL makes the adapter itself (`peft_config`), switches adapters off or over while it trains, to compare with a reference
model, and may cast or freeze parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import mean
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)
from trl_models import WORDS, letters, llama, preferences, prompts, sentences, tokenizer

from oialr_peft import OIALRCallback, OIALRConfig, OIALRTrainerMixin
from oialr_peft.tuner.lookup import adapter_layers

pytest.importorskip("trl")
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    # torch, when checkpointing is reentrant and TRL computes the reference
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]

STEPS = 12
CHECKS = {"update_every": 3, "cutoff": 0.15}
PHASES = {
    "dense": {"delay": 6, "stability_threshold": 0.5, **CHECKS},
    "factored": {"freeze_when": "delay", "delay": 0, **CHECKS},
    "masked": {"freeze_when": "delay", "delay": 0, "shrink": "mask", **CHECKS},
    "residual": {"mode": "adapter", **CHECKS},
    "pretraining": {"mode": "pretraining", "delay": 6, "stability_threshold": 0.5, **CHECKS},
}
KEEPS_BASE = [phase for phase in PHASES if phase != "pretraining"]


def phases(*fast: str, of: Iterable[str] = PHASES, sentinel: str | None = None) -> pytest.MarkDecorator:
    """The phases to test; those that are not named are slow tests."""
    marks = {phase: [] if phase in fast else [pytest.mark.slow] for phase in of}
    if sentinel is not None:
        marks[sentinel].append(pytest.mark.sentinel)
    return pytest.mark.parametrize("phase", [pytest.param(phase, marks=marks[phase]) for phase in of])


class OIALRSFTTrainer(OIALRTrainerMixin, SFTTrainer):
    pass


class OIALRDPOTrainer(OIALRTrainerMixin, DPOTrainer):
    pass


class OIALRRewardTrainer(OIALRTrainerMixin, RewardTrainer):
    pass


class OIALRGRPOTrainer(OIALRTrainerMixin, GRPOTrainer):
    pass


TRAINERS = {
    OIALRSFTTrainer: (SFTConfig, sentences),
    SFTTrainer: (SFTConfig, sentences),
    OIALRDPOTrainer: (DPOConfig, preferences),
    DPOTrainer: (DPOConfig, preferences),
    OIALRRewardTrainer: (RewardConfig, preferences),
    OIALRGRPOTrainer: (GRPOConfig, prompts),
}


def trainer_of(
    kind: type, output_dir: Any, model: nn.Module, config: OIALRConfig | None = None, **settings: Any
) -> Any:
    """A trainer of TRL for a tiny model; what is not an argument of the trainer goes into its `args`."""
    config_class, dataset = TRAINERS[kind]
    given = {name: settings.pop(name) for name in ("callbacks", "reward_funcs", "train_dataset") if name in settings}
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 5,
        "dataloader_pin_memory": False,
    }
    return kind(
        model=model,
        args=config_class(output_dir=str(output_dir), **{**defaults, **settings}),
        processing_class=tokenizer(),
        peft_config=config,
        **{"train_dataset": dataset(), **given},
    )


def trained(kind: type, output_dir: Any, model: nn.Module, config: OIALRConfig | None = None, **settings: Any) -> Any:
    resume = settings.pop("resume", None)
    trainer = trainer_of(kind, output_dir, model, config, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def wrapped(phase: str, **fields: Any) -> PeftModel:
    return get_peft_model(llama(), OIALRConfig(task_type="CAUSAL_LM", **{"mode": "replace", **PHASES[phase], **fields}))


def adapter_weights(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return {key: layer.adapter_weight(name).clone() for key, layer in adapter_layers(model, name).items()}


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


def assert_trained_as_it_should(trainer: Any) -> None:
    """All layers were factored, ranks have shrunk, U and V are frozen and orthonormal, the figures were logged."""
    layers = adapter_layers(trainer.model)
    assert layers
    for layer in layers.values():
        assert not layer.is_dense("default")
        assert layer.oialr_sigma["default"].requires_grad
        assert not layer.oialr_u["default"].requires_grad
        assert not layer.oialr_vh["default"].requires_grad
        u, _, vh = layer.factors("default")
        assert_close(u.T @ u, torch.eye(u.shape[1]), atol=1e-5, rtol=0)
        assert_close(vh @ vh.T, torch.eye(u.shape[1]), atol=1e-5, rtol=0)
    history = trainer.oialr_controller.history
    assert any(after < before for update in history for before, after in update.ranks.values())
    logged = [entry for entry in trainer.state.log_history if "oialr/trainable_percent" in entry]
    assert [entry["step"] for entry in logged] == list(range(3, STEPS + 1, 3))
    assert logged[-1]["oialr/frozen_layers"] == len(layers)
    assert logged[-1]["oialr/rank_mean"] < 16


# ---- supervised fine-tuning ------------------------------------------------------------------------------------------


@phases("dense", "residual", "pretraining", sentinel="masked")
def test_sft_trains_an_adapter_that_it_makes_or_is_given(phase, tmp_path):
    made = trained(
        OIALRSFTTrainer, tmp_path, llama(), OIALRConfig(task_type="CAUSAL_LM", **{"mode": "replace", **PHASES[phase]})
    )
    assert_trained_as_it_should(made)
    assert losses(made)[-1] < losses(made)[0]
    given = trained(OIALRSFTTrainer, tmp_path, wrapped(phase))
    assert losses(given) == losses(made)
    assert_equal_states(given.model, made.model)


@phases("dense")
def test_sft_resumes_exactly(phase, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    whole = trained(OIALRSFTTrainer, tmp_path / "whole", wrapped(phase), **settings)
    for step in (4, 8):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        config = OIALRConfig(task_type="CAUSAL_LM", **{"mode": "replace", **PHASES[phase]})
        resumed = trained(OIALRSFTTrainer, tmp_path / "resumed", llama(), config, resume=checkpoint)
        assert losses(resumed) == losses(whole)
        assert_equal_states(resumed.model, whole.model)


@pytest.mark.parametrize("given", [False, True], ids=["peft_config", "PeftModel"])
def test_sft_with_the_callback_equals_sft_with_the_mixin(given, tmp_path):
    ours = trained(OIALRSFTTrainer, tmp_path, wrapped("dense"))
    callback = OIALRCallback()
    model, config = (
        (wrapped("dense"), None) if given else (llama(), OIALRConfig(**{"mode": "replace", **PHASES["dense"]}))
    )
    theirs = trained(SFTTrainer, tmp_path, model, config, callbacks=[callback])
    assert_equal_states(theirs.model, ours.model)
    assert [update.ranks for update in callback.controller.history] == [
        update.ranks for update in ours.oialr_controller.history
    ]
    assert any("oialr/rank_mean" in entry for entry in theirs.state.log_history)


def test_sft_trains_a_conversation_and_a_model_of_conv1d(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    )
    talk = [
        [{"role": "user", "content": letters(i, 3, 2)}, {"role": "assistant", "content": letters(i, 3, 3)}]
        for i in range(48)
    ]
    trainer = trained(
        OIALRSFTTrainer,
        tmp_path,
        GPT2LMHeadModel(config),
        OIALRConfig(task_type="CAUSAL_LM", **{"mode": "replace", **PHASES["dense"]}),
        train_dataset=Dataset.from_dict({"messages": talk}),
    )
    assert_trained_as_it_should(trainer)


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": None},  # TRL's own default: autocast
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": False},
        {"packing": True, "max_length": 16, "packing_strategy": "wrapped"},
    ],
    ids=str,
)
@phases("dense", of=KEEPS_BASE)
def test_sft_trains_under_the_usual_settings(phase, settings, tmp_path):
    trainer = trained(OIALRSFTTrainer, tmp_path, wrapped(phase), **settings)
    assert_trained_as_it_should(trainer)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_checkpointing_which_trl_switches_on_changes_nothing(tmp_path):
    plain = trained(OIALRSFTTrainer, tmp_path, wrapped("dense"), gradient_checkpointing=False)
    checkpointed = trained(OIALRSFTTrainer, tmp_path, wrapped("dense"))
    assert checkpointed.args.gradient_checkpointing
    assert_close(adapter_weights(checkpointed.model), adapter_weights(plain.model))


@phases("residual", of=["factored", "masked", "residual"])
def test_sft_trains_what_trl_casts_to_bfloat16_beside_a_quantized_model(phase, tmp_path):
    model = wrapped(phase)
    model.base_model.model.is_loaded_in_8bit = True  # all that TRL looks at
    trainer = trainer_of(OIALRSFTTrainer, tmp_path, model)
    for layer in adapter_layers(model).values():
        assert layer.oialr_sigma["default"].dtype == torch.bfloat16
        assert layer.oialr_u["default"].dtype == torch.float32
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    for layer in adapter_layers(model).values():
        assert not layer.oialr_u["default"].requires_grad
        u = layer.factors("default").u.float()
        assert_close(u.T @ u, torch.eye(u.shape[1]), atol=1e-2, rtol=0)


def test_trl_refuses_an_adapter_on_the_head(tmp_path):
    config = OIALRConfig(mode="replace", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        trainer_of(OIALRSFTTrainer, tmp_path, llama(), config)


# ---- preference optimization -----------------------------------------------------------------------------------------


def reference_log_probs(trainer: Any) -> tuple[Tensor, Tensor]:
    """What the trainer compares the first batch with: log-probabilities of chosen and rejected answers, (batch,) each."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    return trainer.compute_ref_log_probs(trainer.model, batch)


@phases("dense", "residual", of=KEEPS_BASE)
def test_dpo_starts_from_the_base_model_as_its_own_reference(phase, tmp_path):
    config = OIALRConfig(task_type="CAUSAL_LM", **{"mode": "replace", **PHASES[phase]})
    trainer = trainer_of(OIALRDPOTrainer, tmp_path, llama(), config)
    expected = reference_log_probs(trainer_of(DPOTrainer, tmp_path, llama(), None, precompute_ref_log_probs=True))
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert_trained_as_it_should(trainer)
    assert list(trainer.model.peft_config) == ["default"]
    # after training as well
    assert_close(reference_log_probs(trainer), expected)


@pytest.mark.parametrize("loaded", [False, True], ids=["trained here", "loaded"])
@phases("dense", "residual", of=KEEPS_BASE)
def test_dpo_compares_a_trained_adapter_with_itself_at_the_start(phase, loaded, tmp_path):
    model = wrapped(phase, init_weights=False)
    if loaded:
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(llama(), tmp_path / "adapter", is_trainable=True)
    at_the_start = adapter_weights(model)
    trainer = trained(OIALRDPOTrainer, tmp_path, model)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert list(model.peft_config) == ["default", "ref"]
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".ref"))
    assert_close(adapter_weights(model, "ref"), at_the_start, rtol=0, atol=0)
    assert not any(torch.equal(now, at_the_start[key]) for key, now in adapter_weights(model).items())
    assert_trained_as_it_should(trainer)


def test_dpo_with_the_callback_compares_a_trained_adapter_with_itself_too(tmp_path):
    theirs = trained(DPOTrainer, tmp_path, wrapped("residual", init_weights=False), callbacks=[OIALRCallback()])
    torch.manual_seed(0)
    ours = trained(OIALRDPOTrainer, tmp_path, wrapped("residual", init_weights=False))
    assert losses(theirs)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(theirs) == losses(ours)


def test_a_second_training_keeps_the_reference(tmp_path):
    trainer = trained(OIALRDPOTrainer, tmp_path, wrapped("residual"))
    reference = adapter_weights(trainer.model, "ref")
    trainer.train()
    assert losses(trainer)[0] < 0.99 * math.log(2)
    assert_close(adapter_weights(trainer.model, "ref"), reference, rtol=0, atol=0)


@pytest.mark.parametrize("given", [False, True], ids=["peft_config", "PeftModel"])
@phases("residual", of=KEEPS_BASE)
def test_dpo_resumes_exactly(phase, given, tmp_path):
    def start() -> tuple[Any, OIALRConfig | None]:
        torch.manual_seed(0)
        if given:
            return wrapped(phase, init_weights=False), None
        return llama(), OIALRConfig(task_type="CAUSAL_LM", **{"mode": "replace", **PHASES[phase]})

    settings = {"save_strategy": "steps", "save_steps": 8}
    whole = trained(OIALRDPOTrainer, tmp_path / "whole", *start(), **settings)
    checkpoint = str(tmp_path / "whole" / "checkpoint-8")
    resumed = trained(OIALRDPOTrainer, tmp_path / "resumed", *start(), resume=checkpoint)
    assert losses(resumed) == losses(whole)
    assert_equal_states(resumed.model, whole.model)


@phases("residual", of=KEEPS_BASE)
def test_reference_log_probs_may_be_computed_before(phase, tmp_path):
    config = OIALRConfig(task_type="CAUSAL_LM", **{"mode": "replace", **PHASES[phase]})
    expected = trained(OIALRDPOTrainer, tmp_path, llama(), config)
    for model, fresh in (
        (llama(), OIALRConfig(task_type="CAUSAL_LM", **{"mode": "replace", **PHASES[phase]})),
        (wrapped(phase), None),
    ):
        trainer = trained(OIALRDPOTrainer, tmp_path, model, fresh, precompute_ref_log_probs=True)
        assert losses(trainer) == pytest.approx(losses(expected), abs=1e-5)


def test_reference_log_probs_of_an_adapter_that_trl_left_empty_are_refused(tmp_path):
    model = wrapped("residual", init_weights=False)
    with pytest.raises(ValueError, match=r"`precompute_ref_log_probs=True` was computed with a reference that is not"):
        trainer_of(OIALRDPOTrainer, tmp_path, model, None, precompute_ref_log_probs=True)


def test_without_base_weights_there_is_no_reference(tmp_path):
    config = OIALRConfig(task_type="CAUSAL_LM", **{"mode": "replace", **PHASES["pretraining"]})
    with pytest.raises(RuntimeError, match=r"`mode=.pretraining.` cannot be disabled: the base weights were released"):
        trained(OIALRDPOTrainer, tmp_path, llama(), config)
    with pytest.raises(ValueError, match=r"exactly one adapter, but \['default', 'ref'\] were asked for"):
        trainer_of(OIALRDPOTrainer, tmp_path, wrapped("pretraining"))


# ---- rewards ---------------------------------------------------------------------------------------------------------


@phases("dense", of=["dense", "residual"])
def test_a_reward_model_trains_with_its_head(phase, tmp_path):
    config = OIALRConfig(task_type="SEQ_CLS", **{"mode": "replace", **PHASES[phase]})
    trainer = trained(OIALRRewardTrainer, tmp_path, llama(LlamaForSequenceClassification), config)
    assert_trained_as_it_should(trainer)
    half = len(losses(trainer)) // 2
    assert mean(losses(trainer)[half:]) < mean(losses(trainer)[:half])
    assert any(".score.modules_to_save." in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def variety(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


@pytest.mark.parametrize("given", [False, True], ids=["peft_config", "PeftModel"])
@phases("residual", of=["dense", "residual"])
def test_grpo_stays_near_its_reference(phase, given, tmp_path):
    start = (
        (wrapped(phase, init_weights=False),)
        if given
        else (llama(), OIALRConfig(**{"mode": "replace", **PHASES[phase]}))
    )
    trainer = trained(
        OIALRGRPOTrainer,
        tmp_path,
        *start,
        reward_funcs=variety,
        num_generations=4,
        max_completion_length=4,
        beta=0.1,
    )
    divergence = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergence[0] == pytest.approx(0, abs=1e-6)
    assert divergence[-1] > 1e-6
    assert_trained_as_it_should(trainer)
