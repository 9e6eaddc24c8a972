r"""Share a trained model: as an adapter, and as a low-rank checkpoint that loads without a base model.

By default everything that would be pushed is only written, with its model cards, and nothing is downloaded:

    python examples/07_push_to_hub.py

After `hf auth login`, two repositories are made, or updated:

    python examples/07_push_to_hub.py --push_to_hub --hub_model_id user/digits
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import get_peft_model
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification, HfArgumentParser, TrainingArguments, ViTConfig, set_seed

from oialr_peft import OIALRConfig, OIALRTrainer, save_low_rank


@dataclass
class DemoTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of this example."""

    output_dir: str = "runs/push_to_hub"
    num_train_epochs: float = 15
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 256
    learning_rate: float = 1e-3
    logging_steps: float = 0.2
    save_strategy: str = "no"
    report_to: str = "none"


def load_data() -> dict[str, Dataset]:
    """scikit-learn's 8×8 digits, splits `train` and `test`."""
    digits = load_digits()
    pixels = (digits.images / 8 - 1).astype("float32")[:, None]  # (1797, 1, 8, 8), -1 … 1
    data = Dataset.from_dict({"pixel_values": pixels, "labels": digits.target}).with_format("torch")
    return data.train_test_split(0.25, seed=0)


def make_model() -> torch.nn.Module:
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=10,
    )
    model = AutoModelForImageClassification.from_config(config)
    return get_peft_model(model, OIALRConfig(mode="pretraining", delay=0.4, cutoff=0.4, stability_threshold=0.99))


@torch.no_grad()
def predictions(model: torch.nn.Module, data: Dataset) -> torch.Tensor:
    return model.cpu().eval()(pixel_values=data["pixel_values"][:]).logits


def main() -> None:
    (args,) = HfArgumentParser(DemoTrainingArguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    data = load_data()
    model = make_model()
    trainer = OIALRTrainer(model=model, args=args, train_dataset=data["train"], eval_dataset=data["test"])
    trainer.train()
    trainer.evaluate()  # its figures go onto the card

    output, described = Path(args.output_dir), {"dataset": "scikit-learn digits", "tags": ["image-classification"]}
    if args.push_to_hub:
        trainer.push_to_hub(**described)
    else:
        trainer.save_model()
        trainer.create_model_card(**described)
    if args.process_index > 0:
        return
    repository = f"{args.hub_model_id or output.name}-low-rank"
    directory = output / "low_rank"
    save_low_rank(model, directory, push_to_hub=args.push_to_hub, repo_id=repository, token=args.hub_token)

    # what others do; the first line of a script of theirs is `import oialr_peft`
    shared = AutoModelForImageClassification.from_pretrained(repository if args.push_to_hub else directory)
    difference = (predictions(shared, data["test"]) - predictions(model, data["test"])).abs().max()
    print(f"\n{ModelCard.load(output / 'README.md').text}\n")
    print(f"largest difference of an output after loading: {difference:.1e}")
    where = f"{args.hub_model_id or output.name} and {repository}" if args.push_to_hub else f"{output} and {directory}"
    print(f"{'pushed to' if args.push_to_hub else 'written to'} {where}")


if __name__ == "__main__":
    main()
