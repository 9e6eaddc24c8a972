"""`OIALRCallback`: the engine inside an unmodified `Trainer`.

The check belongs after the optimizer step, the scheduler step and `zero_grad`, before logging, evaluation and saving: that is the
Trainer's event `on_step_end`.
"""

from __future__ import annotations

import os
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from oialr_peft.engine.controller import OIALRController
from oialr_peft.engine.state import STATE_NAME, RunState, read_state
from oialr_peft.storage.record import (
    RunRecord,
    finite_numbers,
    write_record,
)
from oialr_peft.trainer.reference import fill_reference_adapter
from oialr_peft.trainer.resume import checkpoint_directory, resumed_checkpoint
from oialr_peft.tuner.lookup import active_adapter
from oialr_peft.tuner.saved import saved_model

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
        >>> from oialr_peft import OIALRCallback, OIALRConfig
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments
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
            self.load(resumed_checkpoint(args, state))
        else:
            fill_reference_adapter(kwargs["model"], args)

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
        directory = checkpoint_directory(args, state)
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
        name = self.adapter_name or adapter_to_train(model)
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


def adapter_to_train(model: torch.nn.Module) -> str:
    """The adapter that is active in the model."""
    name = active_adapter(model)
    if name is None:
        raise ValueError(
            "The model has no OIALR adapter, so there is nothing to train this way. Make one with "
            "get_peft_model(model, OIALRConfig()) before the Trainer."
        )
    return name
