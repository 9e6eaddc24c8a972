"""Is a factored convolution faster than a dense one, and is the cheaper of its two ways taken?

One forward and backward of an inner layer (the input needs a gradient), as a ratio to the convolution with a trained weight:

chain    three convolutions: the filters Vᵀ, then Σ and U with kernel size 1
built    W = U Σ Vᵀ multiplied, then one convolution; the gradient of Σ from that of W
floor    multiply-adds of the chain over those of the dense convolution

"agrees" says whether the way that the layer takes is the faster one, or within 5 % of it.
"""

from __future__ import annotations

from typing import Any

import torch
from common import interleaved, parser, print_table, start
from torch import Tensor, nn

from oialr_peft.linalg.factors import Factors, factorize
from oialr_peft.linalg.ops import build, chain_cost
from oialr_peft.tuner.matricization import Convolution

SHAPES = "64x64x3@56,256x64x1@56,256x256x3@14,512x512x3@7"  # of a ResNet-50: out × in × kernel @ image size
RATIOS = "0.0625,0.25,0.5,1"
TOLERANCE = 1.05


def rows_of(shape: str, ratios: list[float], batch: int, repeats: int, made: dict[str, Any]) -> list[list[str]]:
    """One row of the table for each rank."""
    sizes, _, side = shape.partition("@")
    m, channels, kernel = map(int, sizes.split("x"))
    module = nn.Conv2d(channels, m, kernel, padding=kernel // 2, bias=False, **made)
    form = Convolution(module)
    x = torch.randn(batch, channels, int(side), int(side), **made, requires_grad=True)
    grad = torch.randn_like(module(x))
    whole = factorize(form.matrix(module.weight.detach()))

    def step(output: Tensor, trained: Tensor) -> None:
        output.backward(grad)
        x.grad = trained.grad = None

    rows = []
    for rank in (max(1, round(ratio * whole.rank)) for ratio in ratios):
        factors = Factors(*(factor.contiguous() for factor in whole.cut(rank)))
        sigma = factors.sigma.requires_grad_()
        calls = {
            "dense": lambda: step(module(x), module.weight),
            "chain": lambda factors=factors, sigma=sigma: step(form.chain(x, factors, None), sigma),
            "built": lambda factors=factors, sigma=sigma: step(form.built(x, factors, build(factors), None), sigma),
        }
        times = interleaved(calls, repeats, x.device)
        ways = {way: times.ratio(way, "dense") for way in ("chain", "built")}
        taken = form.route(rank, x)
        agrees = ways[taken] <= TOLERANCE * min(ways.values())
        floor = chain_cost(form.m, form.n, rank, 1) / (3 * form.m * form.n)
        figures = [f"{times.median('dense') * 1e3:.1f}", *(f"{ratio:.2f}" for ratio in ways.values()), f"{floor:.2f}"]
        rows.append([shape, f"{rank}", *figures, taken, "yes" if agrees else "no"])
    return rows


def main() -> None:
    options = parser(__doc__, repeats=9)
    options.add_argument("--shapes", default=SHAPES, help=f"out×in×kernel@size (default {SHAPES})")
    options.add_argument("--ratios", default=RATIOS, help=f"ranks as fractions of k (default {RATIOS})")
    options.add_argument("--batch", type=int, default=8, help="images (default 8)")
    args = options.parse_args()
    device, dtype = start(args)
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    made = {"device": device, "dtype": dtype}
    rows = [row for shape in args.shapes.split(",") for row in rows_of(shape, ratios, args.batch, args.repeats, made)]
    print_table(["shape", "r", "dense, ms", "chain", "built", "floor", "taken", "agrees"], rows)


if __name__ == "__main__":
    main()
