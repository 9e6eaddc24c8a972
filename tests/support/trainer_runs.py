"""A tiny BERT that is trained by the Trainer or in a loop of one's own, and what two runs must have in common."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments

from oialr_peft import OIALRConfig, OIALRController, OIALRTrainer

STEPS = 24
SETTINGS = {"update_every": 3, "delay": 6, "stability_threshold": 0.93, "cutoff": 0.15}
CASES = {
    "replace": {},
    "sketch": {"stability_storage": "sketch"},
    "delay": {"freeze_when": "delay", "delay": 7},
    "residual": {"mode": "adapter", "delay": 0, "rank": 6},
    "pretraining": {"mode": "pretraining"},
    "mask": {"shrink": "mask"},
    "last layers first": {"layers_per_update": 0.2},
}


class Sentences(torch.utils.data.Dataset):
    """64 sequences whose first token decides the label."""

    def __init__(self, size=64):
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(4, 60, (size, 8), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids[0] > 30)}


def bert(**overrides):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        **overrides,
    )
    return BertForSequenceClassification(config)


def adapted(**settings):
    settings = {"task_type": "SEQ_CLS", **SETTINGS, **settings}
    return get_peft_model(bert(), OIALRConfig(**{"mode": "replace", **settings}))


def arguments(output_dir, **settings):
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(output_dir), **{**defaults, **settings})


def trained(tmp_path, *, model=None, trainer_class=OIALRTrainer, resume=None, callbacks=None, **settings):
    trainer = trainer_class(
        model=adapted() if model is None else model,
        args=arguments(tmp_path, **settings),
        train_dataset=Sentences(),
        eval_dataset=Sentences(16),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def accelerate_run(steps, *, save_at=None, directory=None, resume_from=None, config):
    """A training loop of one's own, with everything registered for checkpointing."""
    accelerator = Accelerator(cpu=True)
    model = get_peft_model(bert(), copy.deepcopy(config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)
    loader = torch.utils.data.DataLoader(Sentences(), batch_size=8)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    accelerator.register_for_checkpointing(controller)
    batches = [batch for _ in range(STEPS // len(loader) + 1) for batch in loader]
    done = 0
    if resume_from is not None:
        accelerator.load_state(str(resume_from))
        done = controller.steps
    model.train()
    for step in range(done, steps):
        accelerator.backward(model(**batches[step]).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        controller.step()
        if step + 1 == save_at:
            accelerator.save_state(str(directory))
    return model, optimizer, controller


def assert_equal_models(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


def assert_equal_optimizers(one, other):
    ours, theirs = one.state_dict()["state"], other.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, state in ours.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[index][key])), (index, key)
