"""OIALR in the transformers Trainer, and by hand with Accelerate: what is logged, saved, resumed."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from trainer_runs import (
    CASES,
    SETTINGS,
    STEPS,
    Interrupt,
    Sentences,
    accelerate_run,
    adapted,
    arguments,
    assert_equal_models,
    assert_equal_optimizers,
    bert,
    trained,
)
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

from oialr_peft import OIALRCallback, OIALRConfig, OIALRTrainer, OIALRTrainerMixin
from oialr_peft.engine.state import STATE_NAME
from oialr_peft.trainer.resume import last_complete_checkpoint
from oialr_peft.tuner.lookup import adapter_layers

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def logs_without_times(trainer):
    timed = ("runtime", "per_second", "update_seconds")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in timed)}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in ("replace", "residual") else pytest.mark.slow) for case in CASES]
)
def test_resuming_at_any_checkpoint_equals_an_uninterrupted_run(case, tmp_path):
    settings = {
        "save_strategy": "steps",
        "save_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    }
    whole = trained(tmp_path / "whole", model=adapted(**CASES[case]), **settings)
    history = [{**vars(update), "seconds": 0} for update in whole.oialr_controller.history]
    for step in range(4, STEPS, 4):
        resumed = trained(
            tmp_path / "resumed",
            model=adapted(**CASES[case]),
            resume=str(tmp_path / "whole" / f"checkpoint-{step}"),
            **{**settings, "save_strategy": "no"},
        )
        assert_equal_models(whole.model, resumed.model)
        assert_equal_optimizers(whole.optimizer, resumed.optimizer)
        assert logs_without_times(whole)[:-1] == logs_without_times(resumed)[:-1]
        assert [{**vars(update), "seconds": 0} for update in resumed.oialr_controller.history] == history
    assert any(after < before for update in history for before, after in update["ranks"].values())


def test_the_cases_cover_every_moment_of_a_run(tmp_path):
    """Checkpoints before the freeze, between freezes and after prunings, as the test above needs them."""
    trainer = trained(tmp_path, save_strategy="steps", save_steps=4)
    freezing = [update.step for update in trainer.oialr_controller.history if update.frozen]
    pruning = [
        update.step
        for update in trainer.oialr_controller.history
        if any(after < before for before, after in update.ranks.values())
    ]
    assert freezing[0] > 4
    assert len(freezing) >= 2
    assert any(freezing[0] <= step < freezing[-1] for step in range(4, STEPS, 4))
    assert len(pruning) >= 2


def test_an_interrupted_run_resumes_from_its_own_directory(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    whole = trained(tmp_path / "whole", **settings)
    trained(tmp_path / "other", callbacks=[Interrupt(14)], **settings)
    resumed = trained(tmp_path / "other", resume=True, **settings)
    assert_equal_models(whole.model, resumed.model)
    assert logs_without_times(whole)[:-1] == logs_without_times(resumed)[:-1]


def test_metrics_are_logged_at_every_check(tmp_path):
    trainer = trained(tmp_path)
    logged = [entry for entry in trainer.state.log_history if "oialr/trainable_percent" in entry]
    assert [entry["step"] for entry in logged] == list(range(3, STEPS + 1, 3))
    for entry in logged:
        assert 0 < entry["oialr/trainable_percent"] <= 100
        assert entry["oialr/rank_mean"] > 0
        assert entry["oialr/update_seconds"] > 0
    assert logged[-1]["oialr/frozen_layers"] == 13
    assert "oialr/stability_mean" not in logged[0]
    assert -1 <= logged[1]["oialr/stability_mean"] <= 1
    assert logged[-1]["oialr/trainable_percent"] < logged[0]["oialr/trainable_percent"]


def test_the_callback_does_what_the_trainer_does(tmp_path):
    ours = trained(tmp_path / "trainer", save_strategy="steps", save_steps=8)
    callback = OIALRCallback()
    theirs = trained(
        tmp_path / "callback", trainer_class=Trainer, callbacks=[callback], save_strategy="steps", save_steps=8
    )
    assert_equal_models(ours.model, theirs.model)
    assert [u.step for u in callback.controller.history] == [u.step for u in ours.oialr_controller.history]
    logged = [entry for entry in theirs.state.log_history if "oialr/trainable_percent" in entry]
    assert len(logged) == STEPS // 3
    resumed_callback = OIALRCallback()
    resumed = trained(
        tmp_path / "callback",
        trainer_class=Trainer,
        callbacks=[resumed_callback],
        resume=str(tmp_path / "callback" / "checkpoint-8"),
    )
    assert_equal_models(ours.model, resumed.model)


def test_the_callback_says_where_it_looks_for_its_state(tmp_path):
    trained(tmp_path / "one", trainer_class=Trainer, callbacks=[OIALRCallback()], save_strategy="steps", save_steps=8)
    with pytest.raises(ValueError, match="checkpoint-8` does not exist.*use OIALRTrainer"):
        trained(
            tmp_path / "two",
            trainer_class=Trainer,
            callbacks=[OIALRCallback()],
            resume=str(tmp_path / "one" / "checkpoint-8"),
        )


def test_a_checkpoint_without_the_schedule_cannot_be_resumed(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=8)
    (tmp_path / "checkpoint-8" / STATE_NAME).unlink()
    with pytest.raises(ValueError, match=f"has no {STATE_NAME}"):
        trained(tmp_path, resume=str(tmp_path / "checkpoint-8"))


def test_the_mixin_goes_in_front_of_any_trainer(tmp_path):
    class CountingTrainer(Trainer):
        losses = 0

        def compute_loss(self, *args, **kwargs):
            CountingTrainer.losses += 1
            return super().compute_loss(*args, **kwargs)

    class Mixed(OIALRTrainerMixin, CountingTrainer):
        pass

    trainer = trained(tmp_path, trainer_class=Mixed)
    assert CountingTrainer.losses == STEPS
    assert_equal_models(trainer.model, trained(tmp_path).model)


def test_checks_count_optimizer_steps_not_batches(tmp_path):
    trainer = trained(tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=2)
    assert [update.step for update in trainer.oialr_controller.history] == list(range(3, STEPS + 1, 3))


def test_evaluation_does_not_count(tmp_path):
    def model():
        return get_peft_model(bert(**NO_DROPOUT), OIALRConfig(task_type="SEQ_CLS", **{"mode": "replace", **SETTINGS}))

    # without dropout, because making an evaluation data loader draws from the random state
    quiet = trained(tmp_path, model=model())
    evaluated = trained(tmp_path, model=model(), eval_strategy="steps", eval_steps=2)
    assert_equal_models(quiet.model, evaluated.model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, tmp_path):
    plain = trained(tmp_path)
    checkpointed = trained(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    for name, layer in adapter_layers(plain.model).items():
        assert_close(
            adapter_layers(checkpointed.model)[name].adapter_weight("default"), layer.adapter_weight("default")
        )


def test_bf16_autocast_keeps_float32_factors_and_learns(tmp_path):
    trainer = trained(tmp_path, bf16=True)
    for layer in adapter_layers(trainer.model).values():
        factors = layer.factors("default")
        assert {factor.dtype for factor in factors} == {torch.float32}
        assert_close(factors.u.T @ factors.u, torch.eye(factors.rank), atol=1e-5, rtol=0)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(losses[-3:]) < losses[0]


def test_a_pure_bf16_model_trains(tmp_path):
    model = get_peft_model(
        bert().to(torch.bfloat16),
        OIALRConfig(task_type="SEQ_CLS", **{"mode": "replace", **SETTINGS}),
        autocast_adapter_dtype=False,
    )
    trainer = trained(tmp_path, model=model)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert trainer.oialr_controller.history[-1].trainable_percent < 100
    for layer in adapter_layers(trainer.model).values():
        assert torch.isfinite(layer.adapter_weight("default")).all()


def test_a_skipped_step_does_not_move_the_schedule(tmp_path):
    class Overflow(TrainerCallback):
        """Pretends that the gradient scaler skipped every other step."""

        def on_step_end(self, args, state, control, **kwargs):
            kwargs["optimizer"]._is_overflow = state.global_step % 2 == 0

    trainer = OIALRTrainer(model=adapted(), args=arguments(tmp_path), train_dataset=Sentences())
    trainer.callback_handler.callbacks.insert(0, Overflow())
    trainer.train()
    assert trainer.oialr_controller.history[-1].step == STEPS // 2


def test_the_best_model_is_loaded_even_if_its_layers_were_dense(tmp_path):
    class BestIsFirst(OIALRTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_step"] = self.state.global_step
            return metrics

    trainer = trained(
        tmp_path,
        trainer_class=BestIsFirst,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_step",
        greater_is_better=False,
    )
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    best = PeftModel.from_pretrained(bert(), trainer.state.best_model_checkpoint)
    assert all(layer.is_dense("default") for layer in adapter_layers(trainer.model).values())
    assert_equal_models(trainer.model, best)


def test_early_stopping_and_epoch_saves_work(tmp_path):
    trainer = trained(
        tmp_path,
        max_steps=-1,
        num_train_epochs=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )
    assert trainer.state.best_model_checkpoint is not None
    assert (Path(trainer.state.best_model_checkpoint) / STATE_NAME).is_file()


def test_saving_only_the_model_leaves_the_schedule_out(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=8, save_only_model=True)
    assert not (tmp_path / "checkpoint-8" / STATE_NAME).exists()


def test_checkpoints_hold_what_is_needed_and_no_more(tmp_path):
    trainer = trained(tmp_path, save_strategy="steps", save_steps=STEPS)
    weights = load_file(tmp_path / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    expected = sum(
        (p.out_features + p.in_features + p.rank("default")) * p.rank("default")
        for p in adapter_layers(trainer.model).values()
    )
    classifier = sum(p.numel() for p in trainer.model.base_model.model.classifier.original_module.parameters())
    assert sum(tensor.numel() for tensor in weights.values()) == expected + classifier
    config = json.loads((tmp_path / f"checkpoint-{STEPS}" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {n: p.rank("default") for n, p in adapter_layers(trainer.model).items()}


def test_training_twice_starts_a_new_schedule(tmp_path):
    trainer = trained(tmp_path)
    first = trainer.oialr_controller
    trainer.train()
    assert trainer.oialr_controller is not first
    assert [update.step for update in trainer.oialr_controller.history] == list(range(3, STEPS + 1, 3))


def test_a_model_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no OIALR adapter.*get_peft_model"):
        trained(tmp_path, model=bert())


def test_each_check_logs_one_line(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="oialr_peft"):
        trained(tmp_path)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("oialr_peft")]
    assert len(lines) == STEPS // 3
    assert "trainable" in lines[-1]


def test_an_unmodified_trainer_without_the_callback_warns_once(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(tmp_path, trainer_class=Trainer)
    assert len([w for w in caught if "without a controller" in str(w.message)]) == 1


def test_the_trainer_does_not_warn_about_a_missing_controller(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a controller.*")
        assert trained(tmp_path).oialr_controller.history


@pytest.mark.filterwarnings("ignore:The head .* is not a target")
@pytest.mark.parametrize("save_at", [5, 9, 14, 20])
@pytest.mark.parametrize("case", ["replace", "pretraining", "residual"])
def test_an_accelerate_loop_resumes_exactly(case, save_at, tmp_path):
    config = OIALRConfig(**{"mode": "replace", **SETTINGS, **CASES[case]})
    whole = accelerate_run(STEPS, config=config)
    accelerate_run(save_at, save_at=save_at, directory=tmp_path / "state", config=config)
    resumed = accelerate_run(STEPS, resume_from=tmp_path / "state", config=config)
    assert_equal_models(whole[0], resumed[0])
    assert_equal_optimizers(whole[1], resumed[1])
    assert [vars(u) | {"seconds": 0} for u in whole[2].history] == [
        vars(u) | {"seconds": 0} for u in resumed[2].history
    ]
    shutil.rmtree(tmp_path / "state")


@pytest.mark.filterwarnings("ignore:.*not written to its end:UserWarning")
@pytest.mark.parametrize("missing", ["trainer_state.json", STATE_NAME])
def test_an_unfinished_checkpoint_is_passed_over(tmp_path, missing):
    trained(tmp_path, save_strategy="steps", save_steps=6)
    complete, unfinished = tmp_path / "checkpoint-18", tmp_path / "checkpoint-24"
    (tmp_path / "checkpoint-notes").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(unfinished)
    (unfinished / missing).unlink()
    with pytest.warns(UserWarning, match=r"checkpoint-24` was not written to its end"):
        assert last_complete_checkpoint(tmp_path) == str(complete)
    resumed = trained(tmp_path, resume=True)
    assert resumed.oialr_controller.steps == STEPS


def test_a_half_written_trainer_state_is_no_complete_checkpoint(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=12)
    state = tmp_path / "checkpoint-24" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    with pytest.warns(UserWarning, match="not written to its end"):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")


@pytest.mark.filterwarnings("ignore:.*not written to its end:UserWarning")
def test_resuming_without_any_checkpoint_fails_as_in_transformers(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trained(tmp_path, resume=True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="No complete checkpoint found"):
        trained(tmp_path, resume=True)
