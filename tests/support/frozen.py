"""The frozen checkpoints in `tests/data`: what they are of, and how they were made.

``python tests/support/frozen.py`` adds those of the present format, in a directory of their own. From the first release on, files
that are there are never made again: they stand for what users have on their disks.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments

from oialr_peft import OIALRConfig, OIALRController, OIALRTrainer, save_low_rank
from oialr_peft.tuner.config import FORMAT_VERSION

DATA = Path(__file__).parents[1] / "data"
STEPS, SAVED_AT = 12, 6
CUT = {"update_every": 2, "cutoff": 0.4, "layers_per_update": 0.5}
FACTORED = {"freeze_when": "delay", "delay": 2, **CUT}

# settings of the adapters of a `Network`
ADAPTERS: dict[str, dict[str, Any]] = {
    "dense": {"target_modules": ["up", "down"], "delay": 12, "update_every": 2},
    "replace": {"target_modules": ["up", "down"], "modules_to_save": ["head"], "bias": "oialr_only", **FACTORED},
    "residual": {"target_modules": ["up", "down"], "mode": "adapter", "rank": 4, **CUT},
    "pretraining": {"target_modules": ["up", "down"], "mode": "pretraining", **FACTORED},
    "mask": {"target_modules": ["up", "down"], "shrink": "mask", **FACTORED},
    "convolution": {"target_modules": ["convolution"], **FACTORED},
    "attention": {"target_modules": ["attention"], **FACTORED},
}
BERT = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 8,
    "num_labels": 3,
}
# of the training whose checkpoint is kept: some layers are factored then, others have a basis to compare with
TRAINING = {"update_every": 2, "delay": 4, "stability_threshold": 0.992, "cutoff": 0.1}


class Network(nn.Module):
    """A convolution, attention, two linear layers and a head, for (batch, 3, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.Linear(8, 12)
        self.norm = nn.BatchNorm1d(12)
        self.down = nn.Linear(12, 6, bias=False)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 6) → (batch, 2)."""
        x = torch.tanh(self.convolution(x)).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return self.head(torch.tanh(self.down(torch.tanh(self.norm(self.up(x.mean(dim=1)))))))


class Sentences(torch.utils.data.Dataset[dict[str, Any]]):
    """16 sequences of tokens whose first decides the label."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.arange(index, index + 5) % 20, "labels": index % 3}


class StopWhenSaved(TrainerCallback):
    """Ends a training at the step whose checkpoint is kept."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= SAVED_AT


def bert() -> BertForSequenceClassification:
    """The model of the standalone checkpoint and of the training."""
    return BertForSequenceClassification(BertConfig(**BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def trainer(model: nn.Module, directory: Path, **settings: Any) -> OIALRTrainer:
    """The training whose checkpoint is kept."""
    arguments = TrainingArguments(
        str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return OIALRTrainer(model, arguments, train_dataset=Sentences())


def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the model answers in evaluation mode."""
    with torch.no_grad():
        found = model.eval()(**inputs)
    return found if isinstance(found, Tensor) else found.logits


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(10).reshape(2, 5)}


def base_of(directory: Path, model: nn.Module) -> nn.Module:
    """The model with the weights of the base model that is kept beside a checkpoint."""
    model.load_state_dict(load_file(directory / "base.safetensors"))
    return model


def expected(directory: Path) -> dict[str, Tensor]:
    """Inputs, and the `output` that they gave when the checkpoint was made."""
    return load_file(directory / "expected.safetensors")


def _keep(directory: Path, base: Mapping[str, Tensor], model: nn.Module, inputs: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({key: value.clone() for key, value in base.items()}, directory / "base.safetensors")
    save_file({**inputs, "output": outputs(model, inputs)}, directory / "expected.safetensors")


def _make_adapter(directory: Path, settings: dict[str, Any]) -> None:
    network = Network()
    base = {key: value.clone() for key, value in network.state_dict().items()}
    model = get_peft_model(network, OIALRConfig(**{"mode": "replace", **settings}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    controller = OIALRController(model, optimizer, total_steps=STEPS)
    inputs = {"x": torch.randn(8, 3, 6)}
    model.train()
    if settings.get("mode") != "pretraining":
        network.norm.eval()  # its statistics are no part of such an adapter
    for _ in range(SAVED_AT):
        model(**inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    _keep(directory, base, model, inputs)
    model.save_pretrained(directory / "checkpoint")


def _make_standalone(directory: Path) -> None:
    base = bert()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    settings = {"freeze_when": "delay", "delay": 0, "rank": 3}
    model = get_peft_model(base, OIALRConfig(task_type="SEQ_CLS", **{"mode": "replace", **settings}))
    _keep(directory, before, model, tokens())
    save_low_rank(model, directory / "checkpoint")


def _make_training(directory: Path) -> None:
    base = bert()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with tempfile.TemporaryDirectory() as run:
        training = trainer(
            get_peft_model(base, OIALRConfig(task_type="SEQ_CLS", **{"mode": "replace", **TRAINING})),
            Path(run),
            save_strategy="steps",
            save_steps=SAVED_AT,
            logging_steps=2,
        )
        training.add_callback(StopWhenSaved())
        training.train()
        shutil.copytree(Path(run, f"checkpoint-{SAVED_AT}"), directory / f"checkpoint-{SAVED_AT}")
    _keep(directory, before, training.model, tokens())


def main() -> None:
    """Make what is not there."""
    root = DATA / f"format-{FORMAT_VERSION}"
    torch.manual_seed(0)
    for name, settings in ADAPTERS.items():
        if not (root / name).exists():
            _make_adapter(root / name, settings)
    if not (root / "standalone").exists():
        _make_standalone(root / "standalone")
    if not (root / "training").exists():
        _make_training(root / "training")
    # cards, and what belongs to torch and transformers: their formats, and pickles
    for pattern in ("README.md", "*.pt", "*.pth", "*.bin", "generation_config.json"):
        for file in root.rglob(pattern):
            file.unlink()


if __name__ == "__main__":
    main()
