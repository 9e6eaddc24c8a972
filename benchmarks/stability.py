r"""How the bases of a network settle in ordinary training: a vision transformer on CIFAR-10, trained dense.

    python benchmarks/stability.py --data cifar10-train.parquet --plot stability.svg --output stability.json
    python benchmarks/stability.py --data cifar10-train.parquet --paper --device cuda --steps 60000 --images 45000

Every `--every` of the training, each linear layer but the head is compared with itself one such interval before:

Stability     of its basis U Vᵀ
similarity    of R, which mixes the basis W = Q R: inner product over norms, 1 for an R that kept its direction
distance      of R: Frobenius norm of the change over that of the R before

R has a positive diagonal, and is of Wᵀ where W is wide, so it is unique. `--paper` is the mini vision transformer of the paper with
its optimizer settings (patch 8, depth 6, 6 heads, width 768, learning rate 3e-4, weight decay .01); other options override them.

Printed are the means over layers, and the layers in the order in which they settle: a layer has settled at the first comparison
from which on the movement of its basis, 1 − Stability, stays at or below a tenth of its largest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common import Training, parser, print_table, start
from pretraining import accuracy, images, loss_of_batch, model_options, vit
from torch import Tensor, nn

from oialr_peft import polar_factor, stability

PAPER = {"patch": 8, "layers": 6, "heads": 6, "hidden": 768, "lr": 3e-4, "decay": 0.01}
SETTLED = 0.1  # of a layer's largest movement


def mixing(weight: Tensor) -> Tensor:
    """R (k, k) of the QR decomposition of an (m, n) weight or, if that is wide, of its transpose; positive diagonal."""
    r = torch.linalg.qr(weight if weight.shape[0] >= weight.shape[1] else weight.mT, mode="r").R
    return r * torch.where(r.diagonal() < 0, -1, 1)[:, None]


class Observer:
    """Bases and mixings of all linear layers but the head, each compared with the one before.

    Attributes:
        stability, similarity, distance: by layer, of each comparison.
    """

    def __init__(self, model: nn.Module) -> None:
        head: Any = model.classifier
        self.layers = {
            name.removeprefix("vit."): module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        self.stability: dict[str, list[float]] = {name: [] for name in self.layers}
        self.similarity: dict[str, list[float]] = {name: [] for name in self.layers}
        self.distance: dict[str, list[float]] = {name: [] for name in self.layers}
        self._before = self._now()

    def _now(self) -> dict[str, tuple[Tensor, Tensor]]:
        weights = {name: layer.weight.detach() for name, layer in self.layers.items()}
        return {name: (polar_factor(weight), mixing(weight)) for name, weight in weights.items()}

    def compare(self) -> None:
        """Compare with the last time."""
        now = self._now()
        for name, (basis, r) in now.items():
            basis_before, r_before = self._before[name]
            self.stability[name].append(stability(basis, basis_before))
            self.similarity[name].append(float((r * r_before).sum() / (r.norm() * r_before.norm())))
            self.distance[name].append(float((r - r_before).norm() / r_before.norm()))
        self._before = now


def settled(values: Sequence[float]) -> int:
    """Index of the first comparison from which on a layer's basis moves little; their number if it still moves."""
    moved = [1 - value for value in values]
    return 1 + max((i for i, movement in enumerate(moved) if movement > SETTLED * max(moved)), default=-1)


def plot(found: dict[str, Any], path: str) -> None:
    """Heatmaps of Stability and of the similarity of R, layers by steps, and the mean curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 0.16 * len(found["layers"]) + 2.5), layout="constrained")
    axes = figure.subplots(1, 3)
    steps = found["steps"]
    for axis, key, title in zip(axes, ("stability", "similarity"), ("Stability of the basis", "Similarity of R")):
        image = axis.imshow(found[key], aspect="auto", interpolation="nearest", vmax=1, extent=(0, steps[-1], 0, 1))
        rows = len(found["layers"])
        axis.set_yticks(
            [1 - (i + 0.5) / rows for i in range(rows)], found["layers"] if axis is axes[0] else [], fontsize=6
        )
        axis.set(title=title, xlabel="optimizer step")
        figure.colorbar(image, ax=axis)
    for key, label in (("stability", "Stability"), ("similarity", "similarity of R")):
        axes[2].plot(steps, torch.tensor(found[key]).mean(0), marker=".", label=label)
    axes[2].set(title="Mean over layers", xlabel="optimizer step", xlim=(0, steps[-1]))
    axes[2].grid(alpha=0.3)
    axes[2].legend()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and return what was seen on the way."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    (x, y), validation = (
        tuple(part.to(device) for part in parts) for parts in images(args.data, args.images, args.validation)
    )
    model = vit(args).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.decay)
    total = sum(p.numel() for p in model.parameters())
    training = Training(model, optimizer, args.steps, total=total, adaptive=False)
    observer, every = Observer(model), max(1, round(args.every * args.steps))
    steps, correct = [], []
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(1, args.steps + 1):
        training.step(lambda: loss_of_batch(model, x, y, args.batch, generator))
        if step % every == 0:
            observer.compare()
            steps.append(step)
            correct.append(accuracy(model, *validation))
    return {
        "arguments": {key: value for key, value in vars(args).items() if key not in ("data", "plot", "output")},
        "parameters": total,
        "seconds": round(training.seconds, 1),
        "steps": steps,
        "accuracy": correct,
        "loss": [round(mean(training.losses[step - every : step]), 4) for step in steps],
        "layers": list(observer.layers),
        **{
            key: [[round(value, 5) for value in values] for values in getattr(observer, key).values()]
            for key in ("stability", "similarity", "distance")
        },
    }


def print_found(found: dict[str, Any]) -> None:
    """The mean curve, then the layers in the order in which they settle."""
    steps, last = found["steps"], found["arguments"]["steps"]
    rows = []
    for index, step in enumerate(steps):
        figures = [[values[index] for values in found[key]] for key in ("stability", "similarity", "distance")]
        shown = [f"{number:.4f}" for number in (mean(figures[0]), min(figures[0]), *map(mean, figures[1:]))]
        rows.append([f"{100 * step / last:.0f}", str(step), *shown, f"{found['accuracy'][index]:.4f}"])
    print_table(["% of training", "step", "Stability", "least", "similarity of R", "distance of R", "accuracy"], rows)
    order = sorted(zip(found["stability"], found["layers"]), key=lambda pair: (settled(pair[0]), min(pair[0])))
    print_table(
        ["layer", "least Stability", "at step", "last", "settled at step"],
        [
            [name, f"{min(s):.4f}", str(steps[s.index(min(s))]), f"{s[-1]:.4f}", str([*steps, "-"][settled(s)])]
            for s, name in order
        ],
    )


def main() -> None:
    options = parser(__doc__, repeats=1)
    model_options(options)
    options.set_defaults(patch=8)
    options.add_argument("--paper", action="store_true", help="the paper's mini vision transformer")
    options.add_argument("--every", type=float, default=0.04, help="share of the training between two comparisons")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--plot", help="file of the figure; SVG, PNG or PDF by its ending")
    options.add_argument("--output", help="file of all numbers as JSON")
    if options.parse_args().paper:
        options.set_defaults(**PAPER)
    args = options.parse_args()
    start(args)
    found = train(args)
    print_found(found)
    if args.output:
        Path(args.output).write_text(json.dumps(found) + "\n", encoding="utf-8")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
