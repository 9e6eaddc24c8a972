"""OIALR in the transformers `Trainer`: a mixin for any Trainer class, a ready Trainer, and a callback.

The check belongs after the optimizer step, the scheduler step and `zero_grad`, before logging, evaluation and saving:
that is the Trainer's event `on_step_end`. All three run the same `OIALRCallback`; the mixin adds what a callback cannot
reach: logging at once, saving before the checkpoint is complete, resuming from any directory.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterator
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from oialr_peft.engine.controller import OIALRController
from oialr_peft.engine.state import STATE_NAME, RunState, read_state
from oialr_peft.files.card import Run, write_adapter_card
from oialr_peft.files.checkpoints import check_adapter_directory
from oialr_peft.storage.record import (
    RunRecord,
    checkpoint_step,
    finite_numbers,
    is_model_metric,
    write_record,
)
from oialr_peft.tuner.config import OIALRConfig
from oialr_peft.tuner.layer import OIALRLinear
from oialr_peft.tuner.lookup import active_adapter, adapter_layers, config_of
from oialr_peft.tuner.saved import outside_layers, saved_model, settings_for_card

# what a record says of the training: no paths, and nothing secret
RECORDED_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "bf16",
    "fp16",
    "seed",
)
RECORDED_PACKAGES = ("torch", "transformers", "peft", "accelerate")


class OIALRCallback(TrainerCallback):
    """Runs the method inside an unmodified `Trainer`, on one process.

    The figures of a check are merged into the Trainer's next log entry; trackers that were registered before the
    callback do not see them there. `OIALRTrainer` logs them at once, everywhere.

    Args:
        adapter_name: which adapter; `None` means the model's active one.

    Attributes:
        controller: the `OIALRController` of the current or last training, `None` before.

    Raises:
        ValueError: at the start of training, what `OIALRController` raises; when a resumed run has no saved state.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification, BertConfig
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        >>> model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=100, **sizes))
        >>> rules = {"freeze_when": "delay", "delay": 4, "update_every": 2}
        >>> model = get_peft_model(model, OIALRConfig(task_type="SEQ_CLS", mode="replace", **rules))
        >>> data = [{"input_ids": [number, 7, 9], "labels": number % 2} for number in range(64)]
        >>> args = TrainingArguments("run", max_steps=8, save_strategy="no", report_to="none", dataloader_pin_memory=False)
        >>> callback = OIALRCallback()
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
        >>> trainer.train()  # doctest: +ELLIPSIS
        {...}...
        >>> [update.step for update in callback.controller.history]
        [2, 4, 6, 8]
    """

    def __init__(self, adapter_name: str | None = None) -> None:
        self.adapter_name = adapter_name
        self.controller: OIALRController | None = None
        self._unlogged: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the controller, and continue its state when the training was resumed."""
        self.start(kwargs["model"], kwargs["optimizer"], state.max_steps, disable_tqdm=bool(args.disable_tqdm))
        if state.global_step > 0:
            self.load(_resumed_checkpoint(args, state))
        else:
            _fill_reference_adapter(kwargs["model"], args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the optimizer step and keep the figures of a check for the next log entry."""
        assert self.controller is not None
        if self.controller.step() is not None:
            self._unlogged = self.controller.metrics()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the figures of the last check to the log entry being written."""
        kwargs.get("logs", {}).update(self._unlogged)
        if state.log_history:
            state.log_history[-1].update(self._unlogged)
        self._unlogged = {}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the controller's state into the checkpoint that was just saved, and the record of the run."""
        directory = _checkpoint_directory(args, state)
        if not args.save_only_model and directory.is_dir():
            self.save(directory)
        self.record(args, state, directory)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the record of the run, which an evaluation after the training completes."""
        self.record(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the record of the run."""
        self.record(args, state)

    def record(self, args: TrainingArguments, state: TrainerState, checkpoint: Path | None = None) -> None:
        """Write `oialr_history.json` to `output_dir`, and to the checkpoint if there is one; see `record.RunRecord`."""
        if self.controller is None or not args.should_save:
            return
        record = _record_of(self.controller, args, state)
        write_record(record, args.output_dir or ".")
        if checkpoint is not None and checkpoint.is_dir():
            write_record(record, checkpoint)

    def start(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        disable_tqdm: bool = False,
    ) -> None:
        """Make a controller for a training of `total_steps` optimizer steps."""
        name = self.adapter_name or _active_adapter(model)
        self.controller = OIALRController(
            model, optimizer, total_steps=total_steps, adapter_name=name, disable_tqdm=disable_tqdm
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the controller's state to `directory`."""
        assert self.controller is not None
        RunState.from_dict(self.controller.state_dict()).write(Path(directory, STATE_NAME))

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Continue from the state in `directory`.

        Raises:
            ValueError: there is none.
        """
        assert self.controller is not None
        file = Path(directory, STATE_NAME)
        if not file.is_file():
            raise ValueError(
                f"The checkpoint `{directory}` has no {STATE_NAME}, so the schedule cannot be resumed. Resume from a "
                "checkpoint that OIALRTrainer or OIALRCallback saved with `save_only_model=False`."
            )
        state = read_state(file)
        try:
            self.controller.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"`{file}` does not fit this training: {error}") from error


class _TrainerDrivenCallback(OIALRCallback):
    """The callback as the mixin uses it: the Trainer itself logs, saves and resumes."""

    def __init__(self, trainer: OIALRTrainerMixin) -> None:
        super().__init__()
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start(
            self._trainer.model_wrapped, kwargs["optimizer"], state.max_steps, disable_tqdm=bool(args.disable_tqdm)
        )
        if self._trainer._resumed_from is not None:
            self.load(self._trainer._resumed_from)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.controller is not None
        if self.controller.step() is not None:
            # `Trainer.log` clears the request to log the loss of this step
            should_log = control.should_log
            self._trainer.log(self.controller.metrics())
            control.should_log = should_log

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        pass

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.record(args, state, _checkpoint_directory(args, state))

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification, BertConfig
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
        _fill_reference_adapter(self.model, self.args)
        self._resumed_from: str | None = None
        self._oialr_callback = _TrainerDrivenCallback(self)
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
            Path(_checkpoint_directory(self.args, self.state), TRAINER_STATE_NAME).unlink(missing_ok=True)
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
                model.load_adapter(resume_from_checkpoint, _active_adapter(model), is_trainable=True)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        whole = cast(torch.nn.Module, model or self.model)
        base = whole.get_base_model() if isinstance(whole, PeftModel) else whole
        for name, directory in _saved_adapters(whole, resume_from_checkpoint):
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


class OIALRTrainer(OIALRTrainerMixin, Trainer):
    """`transformers.Trainer` that runs the method: freezes bases by measured stability and prunes Σ while it trains.

    Takes the arguments of `Trainer`; the model must have an OIALR adapter. Everything else is set in `OIALRConfig` and
    `TrainingArguments`. Source of the method: arXiv 2401.08505.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification, BertConfig
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        >>> model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=100, **sizes))
        >>> rules = {"freeze_when": "delay", "delay": 4, "update_every": 2}
        >>> model = get_peft_model(model, OIALRConfig(task_type="SEQ_CLS", mode="replace", **rules))
        >>> data = [{"input_ids": [number, 7, 9], "labels": number % 2} for number in range(64)]
        >>> args = TrainingArguments("run", max_steps=8, save_strategy="no", report_to="none", dataloader_pin_memory=False)
        >>> trainer = OIALRTrainer(model, args, train_dataset=data)
        >>> trainer.train()  # doctest: +ELLIPSIS
        {...}...
        >>> [len(update.frozen) for update in trainer.oialr_controller.history]
        [0, 7, 0, 0]
    """


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The checkpoint of the most optimizer steps that was written to its end; `None` when there is none."""
    found = sorted(
        (step, path)
        for path in Path(output_dir).glob("*")
        if (step := checkpoint_step(path)) is not None and path.is_dir()
    )
    for _, directory in reversed(found):
        if _is_complete(directory):
            return str(directory)
        warnings.warn(f"`{directory}` was not written to its end, so it is passed over.", stacklevel=3)
    return None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return Path(checkpoint, STATE_NAME).is_file()


def _record_of(controller: OIALRController, args: TrainingArguments, state: TrainerState) -> RunRecord:
    saved = saved_model(controller.model, controller.adapter_name)
    arguments = {name: getattr(args, name, None) for name in RECORDED_ARGUMENTS}
    return RunRecord(
        steps=controller.steps,
        total_steps=controller.schedule.total_steps,
        adapter_name=controller.adapter_name,
        model=saved.base_class,
        settings=controller.settings.shown(),
        arguments={name: value.value if isinstance(value, Enum) else value for name, value in arguments.items()},
        layers=saved.layers,
        history=controller.history,
        log=[finite_numbers(entry) for entry in state.log_history],
        versions={name: version(name) for name in RECORDED_PACKAGES},
    )


def _fill_reference_adapter(model: Any, args: TrainingArguments) -> None:
    """Make the adapter `ref` equal to the one that trains, when a trainer of TRL has just added it.

    Given a `PeftModel`, these compare with a copy of its adapter, but copy only parameters whose names hold `.default.`;
    of this method, as of others in PEFT, they end with the adapter's name.
    """
    configs = getattr(model, "peft_config", {})
    config = configs.get("default")
    if not isinstance(config, OIALRConfig) or configs.get("ref") is not config:
        return
    # no longer the same object: a second training goes on with the reference it has
    configs["ref"] = copy.copy(config)
    state, before = (
        get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False) for name in ("default", "ref")
    )
    if before.keys() == state.keys() and all(torch.equal(tensor, before[key]) for key, tensor in state.items()):
        return
    if getattr(args, "precompute_ref_log_probs", False):
        raise ValueError(
            "`precompute_ref_log_probs=True` was computed with a reference that is not the adapter of this model: TRL adds "
            "it empty. Leave it out, or merge the adapter and pass a new one as `peft_config`."
        )
    set_peft_model_state_dict(model, state, adapter_name="ref")


def _active_adapter(model: torch.nn.Module) -> str:
    name = active_adapter(model)
    if name is None:
        raise ValueError(
            "The model has no OIALR adapter, so there is nothing to train this way. Make one with "
            "get_peft_model(model, OIALRConfig()) before the Trainer."
        )
    return name


def _saved_adapters(model: torch.nn.Module, checkpoint: str) -> Iterator[tuple[str, Path]]:
    """Each OIALR adapter of the model with the directory in the checkpoint that holds it."""
    layers = [module for module in model.modules() if isinstance(module, OIALRLinear)]
    for name in sorted({name for layer in layers for name in layer._all_available_adapter_names()}):
        directory = Path(checkpoint, name)
        yield name, directory if directory.is_dir() else Path(checkpoint)


def _checkpoint_directory(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".", f"checkpoint-{state.global_step}")


def _resumed_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer resumed from, which it does not tell callbacks: the checkpoint of this step in `output_dir`."""
    directory = _checkpoint_directory(args, state)
    if not directory.is_dir():
        raise ValueError(
            f"The training was resumed at step {state.global_step}, but `{directory}` does not exist. OIALRCallback "
            "finds its state only there; use OIALRTrainer to resume from any directory."
        )
    return directory
