r"""Images from scratch: dense training against OIALR with the same budget, on CIFAR-10.

    python benchmarks/pretraining.py --data cifar10-train.parquet \
        --run dense dense '{"lr": 0.002}' --run stable oialr '{"cutoff": 0.35}'

Each `--run` is a name, a method (`dense` or `oialr`) and the settings of `OIALRConfig` as JSON; "lr" among them is the learning
rate. Each is trained with every seed of `--seeds`. The model is a vision transformer, AdamW with a linear warm-up and a cosine
decay; validation images are split off the training file. Printed are means and standard deviations over seeds:

accuracy      of the last evaluation
trainable     percent of the dense model's parameters: mean over all steps, and after the last
jump          largest relative rise of the loss on one fixed batch from before a check to after it
seconds       of training, checks included; runs side by side slow each other down, compare with `--jobs 1`

`--output` keeps every run as one line of JSON.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import Job, Training, jobs_of, parser, print_spreads, start, trained, training_options, tuned
from datasets import load_dataset
from peft import get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from oialr_peft import OIALRConfig

AfterStep = Callable[[int], Any]
OptimizerOf = Callable[[nn.Module, float, argparse.Namespace], tuple[torch.optim.Optimizer, AfterStep | None]]

PROBE = 256  # images of the fixed batch on which jumps are measured


def images(path: str, count: int, validation: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and validation images (N, 3, 32, 32) in [-1, 1] with their labels, by a fixed shuffle of the file."""
    rows = load_dataset("parquet", data_files=path, split="train").shuffle(seed=0).select(range(count + validation))
    picture = next(name for name in rows.column_names if "im" in name)
    label = next(name for name in rows.column_names if name != picture)

    def pixels(entry: Any) -> np.ndarray:
        return np.asarray(entry if isinstance(entry, Image.Image) else Image.open(io.BytesIO(entry["bytes"])))

    x = torch.from_numpy(np.stack([pixels(entry) for entry in rows[picture]])).movedim(-1, 1).float() / 127.5 - 1
    y = torch.tensor(rows[label])
    return (x[:count], y[:count]), (x[count:], y[count:])


def vit(args: argparse.Namespace) -> ViTForImageClassification:
    """A vision transformer for images of 32×32."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads or max(1, args.hidden // 32),
            intermediate_size=4 * args.hidden,
            image_size=32,
            patch_size=args.patch,
            num_labels=10,
        )
    )


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random shifts by up to 4 pixels and mirroring."""
    x = x if torch.rand((), generator=generator) < 0.5 else x.flip(-1)
    down, right = torch.randint(9, (2,), generator=generator).tolist()
    return nn.functional.pad(x, (4, 4, 4, 4))[..., down : down + 32, right : right + 32]


def loss_of_batch(model: nn.Module, x: Tensor, y: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Loss of a random batch of augmented images."""
    batch = torch.randint(len(x), (size,), generator=generator)
    return nn.functional.cross_entropy(model(augmented(x[batch], generator)).logits, y[batch])


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    correct = sum(
        (model(part).logits.argmax(-1) == labels).sum().item() for part, labels in zip(x.split(500), y.split(500))
    )
    model.train()
    return correct / len(y)


def adamw(model: nn.Module, lr: float, args: argparse.Namespace) -> tuple[torch.optim.Optimizer, AfterStep | None]:
    """The optimizer of all that trains; nothing else happens after its steps."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=args.decay), None


def train(
    method: str, settings: dict[str, Any], seed: int, args: argparse.Namespace, optimizer_of: OptimizerOf = adamw
) -> dict[str, Any]:
    """One run, and what is reported of it.

    Args:
        method: `dense` or `oialr`.
        settings: of `OIALRConfig`, and "lr".
        seed: of everything random.
        args: of the command line.
        optimizer_of: makes the optimizer from the model, the learning rate and `args`, with what is called after its steps.
    """
    settings = dict(settings)
    lr = settings.pop("lr", args.lr)
    torch.set_num_threads(args.threads or 1)
    torch.manual_seed(seed)
    (x, y), validation = images(args.data, args.images, args.validation)
    model: Any = vit(args)
    if method == "oialr":
        model = get_peft_model(model, OIALRConfig(mode="pretraining", **settings))
    model.train()
    total = sum(p.numel() for p in model.parameters())
    optimizer, after_step = optimizer_of(model, lr, args)
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def probe() -> float:
        return nn.functional.cross_entropy(model(x[:PROBE]).logits, y[:PROBE]).item()

    training = Training(
        model, optimizer, args.steps, total=total, adaptive=method == "oialr", probe=probe, after_step=after_step
    )
    curve = []
    for step in range(1, args.steps + 1):
        training.step(lambda: loss_of_batch(model, x, y, args.batch, generator))
        if step % max(1, args.steps // 10) == 0:
            curve.append(round(accuracy(model, *validation), 4))
    return {"accuracy": curve[-1], "curve": curve, "lr": lr, "parameters": total, **training.summary()}


def one(job: Job) -> dict[str, Any]:
    """What is kept of a run."""
    _, method, settings, seed, args = job
    return {**described(job), **train(method, settings, seed, args)}


def described(job: Job) -> dict[str, Any]:
    """What was run."""
    name, method, settings, seed, args = job
    sizes = {key: getattr(args, key) for key in ("images", "steps", "batch", "decay", "hidden", "layers", "patch")}
    return {"run": name, "method": method, "settings": settings, "seed": seed, **sizes}


def model_options(options: argparse.ArgumentParser) -> None:
    """Options of the images, of the model, and of how it is trained."""
    options.add_argument("--data", required=True, help="parquet file with images and labels")
    options.add_argument("--images", type=int, default=8000)
    options.add_argument("--validation", type=int, default=2000)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--decay", type=float, default=0.05, help="weight decay")
    options.add_argument("--hidden", type=int, default=128)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--heads", type=int, help="(default: of 32 each)")
    options.add_argument("--patch", type=int, default=4)


def compare(description: str | None, one: Callable[[Job], dict[str, Any]]) -> None:
    """Read the command line, train what it asks for by `one`, and print the table."""
    options = parser(description, repeats=1)
    model_options(options)
    training_options(options)
    args = options.parse_args()
    start(args)
    images(args.data, args.images, args.validation)  # so that the cache is there
    jobs = tuned(one, jobs_of(args, ("dense", "oialr")), args, "accuracy", "maximize")
    columns = {
        "accuracy": ("accuracy", 4),
        "trainable %, mean": ("trainable_mean", 1),
        "at the end": ("trainable_end", 1),
        "jump": ("jump", 3),
        "seconds": ("seconds", 0),
    }
    print_spreads(trained(one, jobs, args), [name for name, *_ in args.run], columns)


def main() -> None:
    compare(__doc__, one)


if __name__ == "__main__":
    main()
