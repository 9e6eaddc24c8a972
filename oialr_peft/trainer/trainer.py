"""`OIALRTrainer`: transformers' `Trainer` with the engine in it."""

from __future__ import annotations

from transformers import Trainer

from oialr_peft.trainer.mixin import OIALRTrainerMixin


class OIALRTrainer(OIALRTrainerMixin, Trainer):
    """`transformers.Trainer` that runs the method: freezes bases by measured stability and prunes Σ while it trains.

    Takes the arguments of `Trainer`; the model must have an OIALR adapter. Everything else is set in `OIALRConfig` and
    `TrainingArguments`. Source of the method: arXiv 2401.08505.

    Examples:
        >>> from oialr_peft import OIALRConfig, OIALRTrainer
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments
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
