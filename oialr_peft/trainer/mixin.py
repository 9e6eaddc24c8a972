"""`OIALRTrainerMixin`: what a callback cannot reach.

Logging at once, saving before a checkpoint is complete, resuming from any directory, and cards of what was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from oialr_peft.engine.controller import OIALRController
from oialr_peft.engine.state import STATE_NAME, read_state
from oialr_peft.files.card import write_adapter_card
from oialr_peft.files.checkpoints import check_adapter_directory
from oialr_peft.files.described import Run
from oialr_peft.storage.record import is_model_metric
from oialr_peft.trainer.callback import OIALRCallback, adapter_to_train
from oialr_peft.trainer.reference import fill_reference_adapter
from oialr_peft.trainer.resume import checkpoint_directory, last_complete_checkpoint, saved_adapters
from oialr_peft.tuner.config import OIALRConfig
from oialr_peft.tuner.lookup import adapter_layers, config_of
from oialr_peft.tuner.saved import outside_layers, saved_model, settings_for_card


class TrainerDrivenCallback(OIALRCallback):
    """The callback as the mixin uses it: the Trainer itself logs, saves and resumes."""

    def __init__(self, trainer: OIALRTrainerMixin) -> None:
        super().__init__()
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the controller for the wrapped model, and continue from where the Trainer resumed."""
        self.start(
            self._trainer.model_wrapped, kwargs["optimizer"], state.max_steps, disable_tqdm=bool(args.disable_tqdm)
        )
        if self._trainer._resumed_from is not None:
            self.load(self._trainer._resumed_from)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the optimizer step and log the figures of a check at once."""
        assert self.controller is not None
        if self.controller.step() is not None:
            # `Trainer.log` clears the request to log the loss of this step
            should_log = control.should_log
            self._trainer.log(self.controller.metrics())
            control.should_log = should_log

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nothing: the figures are logged already."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the record into the checkpoint as well; the Trainer has saved the state."""
        self.record(args, state, checkpoint_directory(args, state))

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the card."""
        # pushes during training take weights from the checkpoint, but no card
        self._trainer._write_oialr_card()


if TYPE_CHECKING:
    _MixinBase = Trainer
else:
    _MixinBase = object


class OIALRTrainerMixin(_MixinBase):
    """Put in front of any Trainer class: ``class MyTrainer(OIALRTrainerMixin, SFTTrainer): ...``.

    Needs a model with an OIALR adapter when training starts. Logs `oialr/trainable_percent`, `oialr/stability_mean`,
    `oialr/rank_mean`, `oialr/frozen_layers` and `oialr/update_seconds` at every check, and saves the state of the
    schedule with every checkpoint, so that a resumed run equals an uninterrupted one.

    Examples:
        >>> class SmoothedTrainer(OIALRTrainerMixin, Trainer):  # a Trainer of your own
        ...     def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        ...         outputs = model(input_ids=inputs["input_ids"])
        ...         loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=0.1)
        ...         return (loss, outputs) if return_outputs else loss
        >>> from oialr_peft import OIALRConfig, OIALRTrainerMixin
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        >>> model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=100, **sizes))
        >>> rules = {"freeze_when": "delay", "delay": 4, "update_every": 2}
        >>> model = get_peft_model(model, OIALRConfig(task_type="SEQ_CLS", mode="replace", **rules))
        >>> data = [{"input_ids": [number, 7, 9], "labels": number % 2} for number in range(64)]
        >>> args = TrainingArguments("run", max_steps=8, save_strategy="no", report_to="none", dataloader_pin_memory=False)
        >>> trainer = SmoothedTrainer(model, args, train_dataset=data)
        >>> trainer.train()  # doctest: +ELLIPSIS
        {...}...
        >>> sorted(name for name in trainer.state.log_history[0] if name.startswith("oialr/"))
        ['oialr/frozen_layers', 'oialr/rank_mean', 'oialr/trainable_percent', 'oialr/update_seconds']
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fill_reference_adapter(self.model, self.args)
        self._resumed_from: str | None = None
        self._oialr_callback = TrainerDrivenCallback(self)
        self.add_callback(self._oialr_callback)

    @property
    def oialr_controller(self) -> OIALRController | None:
        """The controller of the current or last training; its `history` holds every check."""
        return self._oialr_callback.controller

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see `Trainer.train`.

        Args:
            resume_from_checkpoint: a directory, or `True` for the last complete checkpoint in `output_dir`: one that a
                killed process left unfinished is passed over, with a warning.
            *args: of `Trainer.train`.
            **kwargs: of `Trainer.train`.
        """
        if resume_from_checkpoint is True and self.args.output_dir is not None:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir) or True
            if resume_from_checkpoint is True and get_last_checkpoint(self.args.output_dir) is not None:
                raise ValueError(
                    f"No complete checkpoint found in `{self.args.output_dir}`. Start anew with "
                    "`resume_from_checkpoint=None`."
                )
        self._forget_evaluation()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _forget_evaluation(self) -> None:
        """Let Accelerate wrap a model that was evaluated before training: that marked it as prepared, though it is bare."""
        if self.accelerator.num_processes > 1 and not self.is_fsdp_enabled and self.model_wrapped is self.model:
            self.model.__dict__.pop("_is_accelerate_prepared", None)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.args.should_save:
            # an earlier run's checkpoint of this step, written over in part, must not pass for a complete one
            Path(checkpoint_directory(self.args, self.state), TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # `trainer_state.json` is written next: when it is there, every process has written all that it had to
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.oialr_controller is not None:
            self._oialr_callback.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._resumed_from = checkpoint

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        self._resumed_from = None
        if self.is_fsdp_enabled:
            if self.args.load_best_model_at_end:
                raise ValueError(
                    "`load_best_model_at_end` cannot bring back the ranks of the best checkpoint into sharded "
                    "parameters. Leave it out, and load the best checkpoint with PeftModel.from_pretrained."
                )
            if resume_from_checkpoint is not None:
                # while parameters are whole: shards are made of the checkpoint's ranks
                model = cast(PeftModel, self.model)
                model.load_adapter(resume_from_checkpoint, adapter_to_train(model), is_trainable=True)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        whole = cast(torch.nn.Module, model or self.model)
        base = whole.get_base_model() if isinstance(whole, PeftModel) else whole
        for name, directory in saved_adapters(whole, resume_from_checkpoint):
            shapes = {key: (layer.form.m, layer.form.n) for key, layer in adapter_layers(whole, name).items()}
            check_adapter_directory(directory, shapes, outside_layers(base, config_of(whole, name), shapes))
        if Path(resume_from_checkpoint, STATE_NAME).is_file():
            read_state(Path(resume_from_checkpoint, STATE_NAME))
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card; see `Trainer.create_model_card`. Ranks, schedule and figures of the run are added."""
        super().create_model_card(*args, **kwargs)
        self._write_oialr_card()

    def _write_oialr_card(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_world_process_zero() or not isinstance(model, PeftModel):
            return
        config = model.peft_config[model.active_adapter]
        if isinstance(config, OIALRConfig):
            directory = Path(self.args.output_dir or ".")
            directory.mkdir(parents=True, exist_ok=True)
            saved = saved_model(model, model.active_adapter)
            write_adapter_card(
                directory, settings_for_card(config), saved, repo_id=self.hub_model_id, run=self._oialr_run()
            )

    def _oialr_run(self) -> Run | None:
        if self.oialr_controller is None:
            return None
        evaluations = [entry for entry in self.state.log_history if any(key.startswith("eval_") for key in entry)]
        last = evaluations[-1] if evaluations else {}
        metrics = {
            key: float(value) for key, value in last.items() if is_model_metric(key) and isinstance(value, (int, float))
        }
        return Run(self.state.global_step, self.oialr_controller.history, metrics)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter; see `Trainer.save_model`. With FSDP, whole tensors are saved with either kind of state."""
        super().save_model(output_dir, _internal_call)
        if self.is_fsdp_enabled and "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            state_dict = self.accelerator.get_state_dict(self.model)
            if self.args.should_save:
                self._save(output_dir, state_dict=state_dict)
