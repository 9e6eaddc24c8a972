r"""Parts of the engine taken away, one at a time, on the images of pretraining.py.

    python benchmarks/ablation.py --data cifar10-train.parquet \
        --run default oialr '{}' --run reset oialr '{"moments": "reset"}' --run muon oialr '{"optimizer": "muon"}'

Options and columns are those of pretraining.py. The JSON of a run may also hold what is no setting of `OIALRConfig`:

"moments"      what becomes of Adam's moments when a parameter changes its basis: "transport" (as in the package), "reset" (they
               and the step count are lost), or "slice" (the first rows and columns are kept, not rotated)
"sigma_decay"  false: no weight decay on Σ; dense weights keep theirs
"optimizer"    "muon": `torch.optim.Muon` for the weights of the target layers and their Σ, AdamW for everything else
"sigma_lr"     "spectral": as `"norm"`, but a step of random signs keeps its spectral norm instead of its Frobenius norm
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from common import Job
from pretraining import AfterStep, adamw, compare, described, train
from torch import Size, Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from oialr_peft.engine import check, learning_rate
from oialr_peft.linalg.moments import is_moment, transport_state
from oialr_peft.tuner.layer import OIALRLinear

Found = dict[str, Any] | None


def reset(*_: Any) -> Found:
    """No state, as before the first step."""
    return None


def sliced(state: Mapping[str, Any], shape: Size, p: Tensor, q: Tensor) -> Found:
    """Moments cut to the new shape in the old basis."""
    rows, columns = p.shape[1], q.shape[1]
    return {name: value[:rows, :columns].clone() if is_moment(value) else value for name, value in state.items()}


MOMENTS = {"transport": transport_state, "reset": reset, "slice": sliced}


def spectral_scale(m: int, n: int, r: int) -> float:
    """(√m + √n) / (2 √r): an (m, n) matrix of random signs has a spectral norm close to √m + √n."""
    return (math.sqrt(m) + math.sqrt(n)) / (2 * math.sqrt(r))


SIGMA_LR = {"norm": learning_rate.norm_scale, "spectral": spectral_scale}


def target_layers(model: nn.Module) -> list[OIALRLinear]:
    return [module for module in model.modules() if isinstance(module, OIALRLinear)]


def without_sigma_decay(
    model: nn.Module, lr: float, args: argparse.Namespace
) -> tuple[torch.optim.Optimizer, AfterStep | None]:
    """AdamW that decays everything but Σ: the optimizer decays what is no target, and a hook the dense targets."""
    layers = target_layers(model)
    targets = {id(layer.trained_parameter("default")) for layer in layers}
    trained = [p for p in model.parameters() if p.requires_grad]
    own = {"params": [p for p in trained if id(p) in targets], "weight_decay": 0.0}
    others = {"params": [p for p in trained if id(p) not in targets], "weight_decay": args.decay}
    optimizer = torch.optim.AdamW([own, others], lr)

    @torch.no_grad()
    def decay(*_: Any) -> None:
        for layer in layers:
            if layer.is_dense("default"):
                layer.trained_parameter("default").mul_(1 - optimizer.param_groups[0]["lr"] * args.decay)

    optimizer.register_step_pre_hook(decay)
    return optimizer, None


def muon(model: nn.Module, lr: float, args: argparse.Namespace) -> tuple[torch.optim.Optimizer, AfterStep | None]:
    """Muon for the weights of the target layers, which the controller sees, and AdamW for the rest, stepped after it."""
    weights = [layer.trained_parameter("default") for layer in target_layers(model)] or [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "classifier"
    ]
    chosen = {id(weight) for weight in weights}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    rest = torch.optim.AdamW(others, lr, weight_decay=args.decay)
    schedule = get_cosine_schedule_with_warmup(rest, args.steps // 20, args.steps)

    def step_rest(_: int) -> None:
        rest.step()
        schedule.step()
        rest.zero_grad()

    matched = torch.optim.Muon(weights, lr, weight_decay=args.decay, adjust_lr_fn="match_rms_adamw")
    return matched, step_rest


def one(job: Job) -> dict[str, Any]:
    """What is kept of a run."""
    _, method, settings, seed, args = job
    settings = dict(settings)
    transport = MOMENTS[settings.pop("moments", "transport")]
    decays, optimizer = settings.pop("sigma_decay", True), settings.pop("optimizer", "adamw")
    scale = SIGMA_LR[settings.pop("sigma_lr", "norm")]
    optimizer_of = muon if optimizer == "muon" else adamw if decays else without_sigma_decay
    with (
        mock.patch.object(check, "transport_state", transport),
        mock.patch.object(learning_rate, "norm_scale", scale),
    ):
        return {**described(job), **train(method, settings, seed, args, optimizer_of)}


def main() -> None:
    compare(__doc__, one)


if __name__ == "__main__":
    main()
