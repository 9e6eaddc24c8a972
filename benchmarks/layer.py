"""Is a factored layer faster than `nn.Linear`, and does the cost model choose the fastest route?

One forward and backward of an inner layer (the input needs a gradient) by each route of `oialr_peft.linalg.ops`, as a ratio to
`F.linear` with a trained weight:

chain          x V Σᵀ Uᵀ
folded         Σ multiplied into the smaller of its neighbours once
built/narrow   W built once, the gradient of Σ from the narrow activations
built/wide     W built once, the gradient of Σ from the gradient of W
floor          multiply-adds of the cheapest route over those of the dense layer

"agrees" says whether the route that the cost model chooses is the fastest measured one, or within 5 % of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import interleaved, parser, print_table, start
from torch import Tensor

from oialr_peft.linalg import ops
from oialr_peft.linalg.factors import Factors

SHAPES = "768x768,3072x768,4096x4096,11008x4096"
RATIOS = "0.0625,0.125,0.25,0.5,0.75,1"
TOLERANCE = 1.05  # of the fastest route, for agreement
ROUTES = ("chain", "folded", "built/narrow", "built/wide")


def training_step(output: Callable[[Tensor], Tensor], x: Tensor, trained: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward of one layer, gradients thrown away."""

    def step() -> None:
        output(x).backward(grad)
        x.grad = trained.grad = None

    return step


def built_step(side: str, x: Tensor, factors: Factors, grad: Tensor) -> Callable[[], None]:
    """As `training_step`, with W built in each step and the gradient of Σ taken from one `side`."""
    step = training_step(lambda x: ops.built_linear(x, factors, ops.build(factors)), x, factors.sigma, grad)
    cost = 0 if side == "narrow" else 1 << 62

    def on_this_side() -> None:
        # `built_linear` takes the cheaper side by these counts
        count, ops.narrow_cost = ops.narrow_cost, lambda *_: cost
        try:
            step()
        finally:
            ops.narrow_cost = count

    return on_this_side


def chosen_route(m: int, n: int, rank: int, tokens: int) -> str:
    """What the cost model takes."""
    route = ops.cheapest_route(m, n, rank, tokens)
    if route != "built":
        return route
    narrow = ops.narrow_cost(m, n, rank, tokens) <= ops.wide_cost(m, n, rank, tokens)
    return "built/narrow" if narrow else "built/wide"


def floor_of(m: int, n: int, rank: int, tokens: int) -> float:
    """Multiply-adds of the cheapest route over those of a dense layer."""
    costs = (ops.chain_cost, ops.folded_cost, ops.built_cost)
    return min(cost(m, n, rank, tokens) for cost in costs) / (3 * tokens * m * n)


def measure(
    m: int, n: int, tokens: int, share: float, repeats: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[str], bool]:
    """One row of the table, and whether the choice agrees with it."""
    rank = max(1, round(share * min(m, n)))
    x = torch.randn(tokens, n, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, m, device=device, dtype=dtype)
    made = [torch.randn(a, b, device=device) / b**0.5 for a, b in ((m, n), (m, rank), (rank, rank), (rank, n))]
    weight, u, sigma, vh = (matrix.to(dtype) for matrix in made)
    weight.requires_grad_()
    factors = Factors(u, sigma.requires_grad_(), vh)
    steps = {
        "dense": training_step(lambda x: F.linear(x, weight), x, weight, grad),
        "chain": training_step(lambda x: ops.factored_linear(x, factors), x, factors.sigma, grad),
        "folded": training_step(lambda x: ops.folded_linear(x, factors, ops.fold(factors)), x, factors.sigma, grad),
        "built/narrow": built_step("narrow", x, factors, grad),
        "built/wide": built_step("wide", x, factors, grad),
    }
    times = interleaved(steps, repeats, device)
    ratios = {route: times.ratio(route, "dense") for route in ROUTES}
    chosen, floor = chosen_route(m, n, rank, tokens), floor_of(m, n, rank, tokens)
    fastest = min(ratios, key=ratios.__getitem__)
    agrees = ratios[chosen] <= TOLERANCE * ratios[fastest]
    row = [f"{m}×{n}", str(tokens), f"{share:g}", f"{1e3 * times.median('dense'):.2f}"]
    row += [f"{ratios[route]:.3f}" for route in ROUTES]
    row += [f"{floor:.3f}", f"{ratios[chosen] / floor:.2f}", chosen, fastest, "yes" if agrees else "no"]
    return row, agrees


def main() -> None:
    arguments = parser(__doc__, repeats=7)
    arguments.add_argument("--shapes", default=SHAPES, help=f"out x in of the weights (default {SHAPES})")
    arguments.add_argument("--ratios", default=RATIOS, help=f"rank / min(out, in) (default {RATIOS})")
    arguments.add_argument("--tokens", default="512,4096", help="rows of the input (default 512,4096)")
    arguments.add_argument(
        "--max-gflop", type=float, help="skip cells whose dense step takes more (default: 200 on a CPU, none on a GPU)"
    )
    args = arguments.parse_args()
    device, dtype = start(args)
    limit = args.max_gflop or (200 if device.type == "cpu" else float("inf"))
    rows, agreements, skipped = [], [], []
    for shape in args.shapes.split(","):
        m, n = map(int, shape.split("x"))
        for tokens in map(int, args.tokens.split(",")):
            if 6 * tokens * m * n > limit * 1e9:
                skipped.append(f"{m}×{n} with {tokens} tokens")
                continue
            for share in map(float, args.ratios.split(",")):
                row, agrees = measure(m, n, tokens, share, args.repeats, device, dtype)
                rows.append(row)
                agreements.append(agrees)
    head = ["layer", "tokens", "r/k", "dense ms", *ROUTES, "floor", "chosen / floor", "chosen", "fastest", "agrees"]
    print_table(head, rows)
    percent = 100 * sum(agreements) / max(1, len(agreements))
    print(f"The choice agrees in {sum(agreements)} of {len(agreements)} cells ({percent:.0f} %).")
    for cell in skipped:
        print(f"Skipped: {cell} (see --max-gflop).")


if __name__ == "__main__":
    main()
