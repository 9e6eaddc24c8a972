r"""Train an image classifier twice with the same budget, dense and with OIALR, and compare the two.

By default a small vision transformer learns scikit-learn's 8×8 digits (1,797 images, nothing to download) from scratch:

    python examples/01_image_classification.py

Other data and pretrained models go by hub id or local path, and every option of `TrainingArguments` works:

    python examples/01_image_classification.py --dataset uoft-cs/cifar10 --image_column img \
        --model google/vit-base-patch16-224-in21k --cutoff 0.02 --num_train_epochs 3 --learning_rate 5e-5
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# what other packages say about themselves: torchao, where it is installed, and PEFT, which asks for a deprecated attribute
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from peft import get_peft_model
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessorPil,
    set_seed,
)

from oialr_peft import OIALRConfig, OIALRTrainer, plot_history, rank_table


@dataclass
class ExampleArguments:
    """What to train, and the settings of OIALR; its steps are fractions of the run."""

    model: str | None = field(default=None, metadata={"help": "Hub id or path; default: a small ViT from scratch."})
    dataset: str = field(default="digits", metadata={"help": "Hub id or path of a dataset, or `digits`."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the class labels."})
    cutoff: float = field(default=0.35, metadata={"help": "Directions with σ < cutoff·σ_max are dropped."})
    delay: float = field(default=0.4, metadata={"help": "Before this point of the run no layer is factored."})
    update_every: float = field(default=0.04, metadata={"help": "Distance of two checks."})
    stability_threshold: float = field(default=0.99, metadata={"help": "Stability at which a layer is factored."})


@dataclass
class DemoTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of this example; both runs use the same."""

    output_dir: str = "runs/image_classification"
    num_train_epochs: float = 60
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 256
    learning_rate: float = 5e-4
    warmup_steps: float = 0.05
    weight_decay: float = 1.0
    logging_steps: float = 0.1
    save_strategy: str = "no"
    report_to: str = "none"
    dataloader_pin_memory: bool = False  # the images are tiny, and without a GPU torch warns


def load_data(example: ExampleArguments) -> DatasetDict:
    """Splits `train` and `validation` with columns `image` and `label`; the validation images do not depend on seeds."""
    if example.dataset == "digits":
        digits = load_digits()  # brightness 0 … 16
        images = [PILImage.fromarray(image) for image in (digits.images * (255 / 16)).astype(np.uint8)]
        features = Features(image=Image(), label=ClassLabel(names=[str(digit) for digit in range(10)]))
        rows = {"image": images, "label": digits.target.tolist()}
        data = DatasetDict(train=Dataset.from_dict(rows, features=features))
    else:
        data = load_dataset(example.dataset)
        columns = {example.image_column: "image", example.label_column: "label"}
        data = data.rename_columns({old: new for old, new in columns.items() if old != new})
    if "validation" not in data:
        split = data["train"].train_test_split(test_size=0.25, stratify_by_column="label", seed=0)
        data = DatasetDict(train=split["train"], validation=split["test"])
    return data


def image_transform(example: ExampleArguments) -> Callable[[dict[str, list]], dict[str, list]]:
    """What turns a batch of images into the model's inputs."""
    if example.model is None:
        processor, mode = ViTImageProcessorPil(do_resize=False, image_mean=[0.5], image_std=[0.5]), "L"
    else:
        processor, mode = AutoImageProcessor.from_pretrained(example.model), "RGB"

    def transform(batch: dict[str, list]) -> dict[str, list]:
        pixels = processor([image.convert(mode) for image in batch["image"]], return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch["label"]}

    return transform


def make_model(example: ExampleArguments, labels: dict[str, Any]) -> PreTrainedModel:
    if example.model is not None:
        return AutoModelForImageClassification.from_pretrained(example.model, ignore_mismatched_sizes=True, **labels)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        hidden_dropout_prob=0.1,
        **labels,
    )
    return AutoModelForImageClassification.from_config(config)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}


def weights_megabytes(directory: str) -> float:
    return sum(file.stat().st_size for file in Path(directory).glob("*.safetensors")) / 1e6


def main() -> None:
    example, args = HfArgumentParser((ExampleArguments, DemoTrainingArguments)).parse_args_into_dataclasses()
    data = load_data(example)
    names = data["train"].features["label"].names
    columns = data["train"].column_names
    data = data.map(image_transform(example), batched=True, remove_columns=columns, desc="Reading images")
    data = data.with_format("torch")
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}

    trainers, rows = {}, []
    for name, trainer_class in (("dense", Trainer), ("OIALR", OIALRTrainer)):
        set_seed(args.seed)
        model = make_model(example, labels)
        parameters = model.num_parameters()
        if name == "OIALR":
            config = OIALRConfig(
                mode="pretraining",  # as in the dense run, everything trains
                cutoff=example.cutoff,
                delay=example.delay,
                update_every=example.update_every,
                stability_threshold=example.stability_threshold,
            )
            model = get_peft_model(model, config)
        trainer = trainers[name] = trainer_class(
            model=model,
            args=replace(args, output_dir=str(Path(args.output_dir, name.lower()))),
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            compute_metrics=accuracy,
        )
        print(f"\n{name}: {len(data['train']):,} images to train on, {len(data['validation']):,} to validate with")
        seconds = trainer.train().metrics["train_runtime"] / trainer.state.global_step
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
        trainable = model.num_parameters(only_trainable=True)
        validation = trainer.evaluate()["eval_accuracy"]
        share = trainable / parameters
        rows.append(
            f"{name:<6}{validation:>9.2%}{trainable:>12,}{share:>9.1%}{seconds:>9.4f}{weights_megabytes(trainer.args.output_dir):>9.2f}"
        )
    if args.process_index > 0:
        return
    controller = trainers["OIALR"].oialr_controller
    plot = Path(args.output_dir, "history.png")
    plot_history(controller.history, plot)

    print(f"\n{rank_table(trainers['OIALR'].model)}\n")
    print(f"{'run':<6}{'accuracy':>9}{'trainable':>12}{'share':>9}{'s/step':>9}{'MB':>9}")
    print("\n".join(rows))
    print(f"\nStability and ranks over time: {plot}; more of it: oialr report {trainers['OIALR'].args.output_dir}")


if __name__ == "__main__":
    main()
