"""How exact is Stability with each `stability_storage`, and how much does that keep?

Two checks of a BERT in its dense phase, with noise added to the weights in between (`--distances`, in standard deviations
of each weight). Errors are those of single layers against bases from the SVD in float64: the largest, the mean of their
absolute values ("typical"), and their mean ("bias"). Memory is that of the bases that the controller keeps, over that
of the model. Layers of k ≤ 128 are kept in full by `sketch` too.
"""

from __future__ import annotations

import copy
from statistics import mean
from typing import get_args

import torch
from common import parser, print_table, start
from models import base_model
from peft import PeftModel, get_peft_model
from torch import Tensor

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.tuner.lookup import adapter_layers
from oialr_peft.tuner.settings import StabilityStorage

DISTANCES = "0.2,1"


def exact_bases(model: PeftModel) -> dict[str, Tensor]:
    """U Vᵀ of every layer, from the SVD in float64."""
    found = {}
    for name, layer in adapter_layers(model).items():
        u, _, vh = torch.linalg.svd(layer.oialr_weight["default"].detach().double(), full_matrices=False)
        found[name] = u @ vh
    return found


def trained(model: PeftModel) -> dict[str, Tensor]:
    """The dense weights that train."""
    return {name: layer.oialr_weight["default"] for name, layer in adapter_layers(model).items()}


def main() -> None:
    arguments = parser(__doc__, repeats=1)
    arguments.add_argument("--layers", type=int, default=2, help="depth of BERT (default 2)")
    arguments.add_argument("--hidden", type=int, default=768, help="its width (default 768)")
    arguments.add_argument("--distances", default=DISTANCES, help=f"noise between the checks (default {DISTANCES})")
    args = arguments.parse_args()
    device, dtype = start(args)
    config = OIALRConfig(task_type="SEQ_CLS", mode="pretraining", freeze_when="delay", delay=3, update_every=1)
    before = get_peft_model(base_model("bert", args.layers, args.hidden).to(device, dtype), config)
    first = exact_bases(before)
    size = sum(parameter.numel() * parameter.element_size() for parameter in before.parameters())
    rows = []
    for distance in map(float, args.distances.split(",")):
        errors: dict[str, list[float]] = {}
        values: list[float] = []
        kept: dict[str, int] = {}
        for _ in range(args.repeats):
            noise = {name: distance * w.std() * torch.randn_like(w) for name, w in trained(before).items()}
            exact: dict[str, float] = {}
            for storage in get_args(StabilityStorage):
                model = copy.deepcopy(before)
                model.peft_config["default"].stability_storage = storage
                controller = OIALRController(model, torch.optim.SGD(model.parameters(), lr=0.0), total_steps=10)
                controller.step()
                bases = controller.state_dict()["bases"].values()
                kept[storage] = sum(basis.numel() * basis.element_size() for basis in bases)
                for name, weight in trained(model).items():
                    weight.data += noise[name]
                update = controller.step()
                assert update is not None
                if not exact:
                    now = exact_bases(model)
                    exact = {name: float((now[name] * b).sum()) / min(b.shape) for name, b in first.items()}
                    values += exact.values()
                errors.setdefault(storage, []).extend(update.stability[name] - exact[name] for name in exact)
        for storage, found in errors.items():
            figures = [max(map(abs, found)), mean(map(abs, found)), mean(found)]
            shown = [f"{figure:.1e}" for figure in figures]
            rows.append([storage, f"{mean(values):.3f}", *shown, f"{100 * kept[storage] / size:.2f}"])
    print_table(["storage", "mean Stability", "largest error", "typical error", "bias", "% of the model"], rows)


if __name__ == "__main__":
    main()
