"""How fast is a factored model in evaluation, with Σ folded into its neighbour, against the dense one?

Forward passes of BERT-base without gradients, everything in `--dtype`. "merged" is the same adapter merged into plain
linear layers. "multiply-adds" has those of the adapted layers alone, folded over dense; attention, norms and embeddings
stay as they are. "parameters" has all that the model needs, over those of the dense model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from common import interleaved, parser, print_table, start
from models import bert_config, parameters
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertModel

from oialr_peft import OIALRConfig, rank_table
from oialr_peft.report import RankTable

RATIOS = "0.0625,0.125,0.25,0.5"


def folded_share(table: RankTable) -> float:
    """Multiply-adds of the adapted layers, folded or built, whichever is less, over those of dense ones."""
    sizes = [(row.out_features, row.in_features, row.rank) for row in table]
    return sum(min((m + n) * rank, m * n) for m, n, rank in sizes) / sum(m * n for m, n, _ in sizes)


def evaluated(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """A call that computes the model's output."""
    model.eval().requires_grad_(False)

    def call() -> None:
        with torch.no_grad():
            model(input_ids=tokens)

    return call


def main() -> None:
    arguments = parser(__doc__, repeats=9)
    arguments.add_argument("--layers", type=int, default=12, help="depth of BERT (default 12)")
    arguments.add_argument("--hidden", type=int, default=768, help="its width (default 768)")
    arguments.add_argument("--ratios", default=RATIOS, help=f"rank / min(out, in) (default {RATIOS})")
    arguments.add_argument("--batches", default="1,32", help="sequences per batch (default 1,32)")
    arguments.add_argument("--length", type=int, default=128, help="tokens per sequence (default 128)")
    args = arguments.parse_args()
    device, dtype = start(args)
    dense = BertModel(bert_config(args.layers, args.hidden)).to(device)
    total = parameters(dense, trainable=False)
    models: dict[str, nn.Module] = {"dense": dense}
    rows = []
    for share in map(float, args.ratios.split(",")):
        config = OIALRConfig(mode="replace", freeze_when="delay", delay=0, rank=share)
        models["factored"] = factored = get_peft_model(copy.deepcopy(dense).float(), config)
        models["merged"] = copy.deepcopy(factored).merge_and_unload()
        table = rank_table(factored)
        saved = sum(row.out_features * row.in_features - row.stored for row in table)
        for model in models.values():
            model.to(dtype)
        for batch in map(int, args.batches.split(",")):
            tokens = torch.randint(0, 30_000, (batch, args.length), device=device)
            calls = {name: evaluated(model, tokens) for name, model in models.items()}
            times = interleaved(calls, args.repeats, device)
            row = [f"{share:g}", str(batch), f"{1e3 * times.median('dense'):.1f}"]
            row += [f"{times.ratio(name, 'dense'):.3f}" for name in ("factored", "merged")]
            rows.append([*row, f"{folded_share(table):.3f}", f"{1 - saved / total:.3f}"])
    header = ["r/k", "batch", "dense ms", "factored / dense", "merged / dense", "multiply-adds", "parameters"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
