"""How long does `get_peft_model` take when the method decomposes the weights, and how good is what it keeps?

Times are ratios to PEFT's exact PiSSA initialisation of the same layers at the same rank. The second table compares the
rank-r product that is kept with the best one there is: error = ‖W − kept‖ / ‖W‖, and by how much that of each method
exceeds the smallest possible (the singular values beyond r, in float64). OSF and LoRA keep W as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Timings, parser, print_table, seconds_of, start
from models import bert_config
from peft import LoraConfig, OSFConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertModel

from oialr_peft import OIALRConfig

PISSA = "LoRA, PiSSA"
ALL = {"target_modules": "all-linear"}
CONFIGS: dict[str, Callable[[int], PeftConfig]] = {
    PISSA: lambda rank: LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="pissa", **ALL),
    "LoRA, PiSSA with 4 iterations": lambda rank: LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="pissa_niter_4", **ALL
    ),
    "OSF": lambda rank: OSFConfig(effective_rank=rank, **ALL),
    "LoRA": lambda rank: LoraConfig(r=rank, lora_alpha=rank, **ALL),
    "OIALR": lambda rank: OIALRConfig(freeze_when="delay", delay=0, rank=rank, **{"mode": "replace", **ALL}),
}
KEPT: dict[str, Callable[[Any], Tensor]] = {
    PISSA: lambda layer: layer.get_delta_weight("default"),
    "LoRA, PiSSA with 4 iterations": lambda layer: layer.get_delta_weight("default"),
    "OIALR": lambda layer: layer.adapter_weight("default"),
}
COMPARED = ("encoder.layer.0.attention.self.query", "encoder.layer.0.intermediate.dense")


def give_spectrum(model: nn.Module, decay: float) -> None:
    """Give every linear weight the singular values i^-decay: those of a new model hardly fall at all."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            m, n = module.weight.shape
            left, right = (torch.linalg.qr(torch.randn(size, min(m, n))).Q for size in (m, n))
            module.weight.data = (left * torch.arange(1, min(m, n) + 1) ** -decay) @ right.T


def time_creation(
    base: nn.Module, rank: int, repeats: int, device: torch.device
) -> tuple[Timings, dict[str, PeftModel]]:
    """Seconds by method, and the last model of each method in `KEPT`."""
    get_peft_model(copy.deepcopy(base), CONFIGS["LoRA"](rank))  # warms up what is loaded at first use
    times, made, names = Timings(), {}, list(CONFIGS)
    for _ in range(repeats):
        for name in names:
            made.pop(name, None)
            create = partial(get_peft_model, copy.deepcopy(base), CONFIGS[name](rank))
            times.add(name, seconds_of(lambda name=name, create=create: made.update({name: create()}), device))
            if name not in KEPT:
                del made[name]
        names.append(names.pop(0))
    return times, made


def main() -> None:
    arguments = parser(__doc__, repeats=3)
    arguments.add_argument("--layers", type=int, default=12, help="depth of BERT (default 12)")
    arguments.add_argument("--hidden", type=int, default=768, help="its width (default 768)")
    arguments.add_argument("--rank", type=int, help="rank that is kept (default: a quarter of the width)")
    arguments.add_argument("--decay", type=float, default=0.5, help="singular values i^-decay (default 0.5)")
    args = arguments.parse_args()
    device, dtype = start(args)
    rank = args.rank or args.hidden // 4
    base = BertModel(bert_config(args.layers, args.hidden))
    give_spectrum(base, args.decay)
    base.to(device, dtype)

    times, made = time_creation(base, rank, args.repeats, device)
    rows = [[name, f"{times.median(name):.3f}", f"{times.ratio(name, PISSA):.3f}"] for name in CONFIGS]
    print_table([f"method, rank {rank}", "seconds", "ratio to PiSSA"], rows)

    rows = []
    for place in COMPARED:
        weight = base.get_submodule(place).weight.detach().double()
        best = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()
        row = [place, f"{best / weight.norm():.6f}"]
        for name, kept in KEPT.items():
            product = kept(made[name].base_model.model.get_submodule(place)).detach().double()
            row.append(f"{(weight - product).norm() / best - 1:.1e}")
        rows.append(row)
    print_table(["layer", "best error", *(f"{name}: excess" for name in KEPT)], rows)


if __name__ == "__main__":
    main()
