"""What would OIALR cost on a cluster: a cost model of a training step and of a check, for a model of any size.

Nothing of the model is allocated: its shapes are read from a configuration on the meta device. Without more options the
constants are those of an H100 SXM data sheet times an assumed efficiency: times on paper, not measured. `--calibrate`
measures the constants on `--device` instead; `--validate` does so, then predicts small Llamas of other widths than the
one that was fitted, and compares with their measured times. The formulas are in docs/scaling.md.

    python benchmarks/scaling.py --model 7b --gpus 1,8,64 --engine fsdp
    python benchmarks/scaling.py --config path/to/config --tokens 16384 --ratio 0.25 --steps 100000
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import Timings, interleaved, parser, print_table, seconds_of, start
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from oialr_peft.linalg.basis import SKETCH_COLUMNS, is_sketched
from oialr_peft.linalg.decompositions import _scaled_newton_schulz, decompose
from oialr_peft.linalg.ops import build_cost, cheapest_route, narrow_cost, wide_cost
from oialr_peft.parallel.distributed import longest_first
from oialr_peft.tuner.quantities import rank_of

Product = tuple[int, int, int]  # (a, b) by (b, c): a·b·c multiply-adds
POLAR_STEPS = sum(1 for _ in _scaled_newton_schulz(torch.float32))
EIGH = 9  # FLOPs of a symmetric eigenproblem with vectors, over k³
ADAMW = 7  # passes over a trained tensor: parameter, gradient and two moments read, three of them written
GB = 1e9
# no powers of two, at which an SVD was up to 30 % slower than at sizes between them
SVDS = {"small": (448, 448), "large": (896, 896), "tall": (1344, 448)}
FITTED = 512  # width of the model whose dense step and Σ update are fitted
PHASES = ("dense", "factored")


def llama(hidden: int, layers: int, inner: int, heads: int, kv: int, words: int, tied: bool = False) -> LlamaConfig:
    """A Llama of these sizes."""
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=words,
        tie_word_embeddings=tied,
    )


PRESETS: dict[str, Callable[[], LlamaConfig]] = {
    "1b": lambda: llama(2048, 16, 8192, 32, 8, 128_256, tied=True),  # Llama-3.2-1B
    "7b": lambda: llama(4096, 32, 11_008, 32, 32, 32_000),  # Llama-2-7B
    "70b": lambda: llama(8192, 80, 28_672, 64, 8, 32_000),  # Llama-2-70B
}


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model. Linear layers: (m, n) = (out, in)."""

    targets: tuple[tuple[int, int], ...]  # linear layers that OIALR trains: all but the head
    head: tuple[int, int] | None  # the output layer, always dense
    rest: int  # parameters outside `targets`: embeddings, head, norms, biases
    attention: int  # heads × head size × layers

    @classmethod
    def of(cls, model: nn.Module) -> Shapes:
        """Of a transformers model; the meta device will do."""
        config: Any = model.config
        head = model.get_output_embeddings()
        linear = [
            module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
        ]
        shapes = [tuple(reversed(w.weight.shape) if isinstance(w, Conv1D) else w.weight.shape) for w in linear]
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return cls(
            tuple(shapes),
            None if head is None else tuple(head.weight.shape),
            sum(p.numel() for p in model.parameters()) - sum(m * n for m, n in shapes),
            width * config.num_hidden_layers,
        )

    @classmethod
    def of_config(cls, config: PretrainedConfig) -> Shapes:
        """Of a causal language model that is never allocated."""
        with torch.device("meta"):
            return cls.of(AutoModelForCausalLM.from_config(config))


@dataclass(frozen=True)
class Cluster:
    """What the machines do per second, efficiency included: FLOP/s, bytes/s; one GPU unless said otherwise."""

    flops: float = 0.7 * 989e12  # products of a training step
    flops32: float = 0.7 * 67e12  # float32 products, in decompositions
    eigh: float = 1e12  # symmetric eigenproblems, of 9 k³ FLOPs
    bandwidth: float = 0.7 * 3.35e12  # memory
    inside: float = 0.7 * 450e9  # link of a GPU within a node, each way
    between: float = 0.7 * 50e9  # link of a GPU to other nodes, each way
    node: int = 8  # GPUs in a node
    passes: float = 12.0  # over the input and output of every linear layer, besides products
    fixed: float = 2e-3  # seconds of a check for each layer, whatever its size: launches, bookkeeping
    svd: tuple[float, float, float] | None = None  # CPU: seconds = a k^p + c (max(m, n) − k) k²; None: by products

    def product(self, *sizes: int, scalar: int) -> float:
        """Seconds of one product, limited by arithmetic or by memory; `scalar` bytes per entry."""
        a, b, c = sizes
        return max(2 * a * b * c / self.flops, scalar * (a * b + b * c + a * c) / self.bandwidth)

    def link(self, gpus: int) -> float:
        """Bytes/s in and out of one GPU, over the slowest link on the way."""
        return self.inside if gpus <= self.node else self.between


@dataclass(frozen=True)
class Run:
    """How the model is trained."""

    tokens: int = 8192  # per GPU and optimizer step
    length: int = 4096  # tokens of a sequence
    ratio: float = 0.25  # r/k after the freeze
    gpus: int = 1
    sharded: bool = False  # FSDP; else DDP, everything on every GPU
    weight_bytes: int = 4  # of a parameter, its gradient and each of its moments
    compute_bytes: int = 2  # of an activation and of a weight that FSDP gathers

    def rank(self, m: int, n: int) -> int:
        """Number of directions of an (m, n) layer after the freeze."""
        return rank_of(self.ratio if self.ratio < 1 else None, min(m, n))


# ---- a training step -------------------------------------------------------------------------------------------------


def layer_products(m: int, n: int, rank: int | None, tokens: int) -> list[Product]:
    """Products of forward and backward of an (m, n) layer, dense when `rank` is None, by the cheapest route."""
    if rank is None:
        return 3 * [(tokens, n, m)]
    narrow, core = [(tokens, n, rank), (tokens, rank, m)], (tokens, rank, rank)
    build, fold = (m, n, rank), (min(m, n), rank, rank)
    route = cheapest_route(m, n, rank, tokens)
    if route == "chain":
        return 2 * [*narrow, core] + [(rank, tokens, rank)]
    if route == "folded":
        return 2 * narrow + [core, (rank, tokens, rank), fold]
    cheap = narrow_cost(m, n, rank, tokens) <= wide_cost(m, n, rank, tokens)
    gradient = [*narrow, (rank, tokens, rank)] if cheap else [(m, tokens, n), build, fold]
    return 2 * [(tokens, n, m)] + gradient + [build, fold]


def step_products(shapes: Shapes, run: Run, *, dense: bool) -> list[Product]:
    """Of all linear layers, the head included, for the tokens of one GPU."""
    layers = [p for m, n in shapes.targets for p in layer_products(m, n, None if dense else run.rank(m, n), run.tokens)]
    return layers + (layer_products(*shapes.head, None, run.tokens) if shapes.head else [])


def flops_per_token(shapes: Shapes, run: Run, *, dense: bool, attention: bool = True) -> float:
    """Forward and backward; of attention the full square, as PyTorch counts it."""
    products = 2 * sum(a * b * c for a, b, c in step_products(shapes, run, dense=dense)) / run.tokens
    return products + (12 * run.length * shapes.attention if attention else 0)


def parameters(shapes: Shapes, run: Run, *, dense: bool, trainable: bool = False) -> int:
    """Number of parameters, or of those that train; factored, Σ and all that is no target train."""
    if dense:
        return shapes.rest + sum(m * n for m, n in shapes.targets)
    ranks = [(m, n, run.rank(m, n)) for m, n in shapes.targets]
    return shapes.rest + sum(r * r if trainable else (m + n) * r + r * r for m, n, r in ranks)


def gradient_bytes(shapes: Shapes, run: Run, *, dense: bool) -> int:
    """Gradients of one step: what is reduced over all GPUs."""
    return run.weight_bytes * parameters(shapes, run, dense=dense, trainable=True)


def state_bytes(shapes: Shapes, run: Run, *, dense: bool, sketches: bool = True) -> float:
    """On each GPU: weights, gradients, AdamW's two moments, and in the dense phase the sketches; no activations."""
    trained = 3 * gradient_bytes(shapes, run, dense=dense)
    kept = sum(sketch_bytes(m, n) for m, n in shapes.targets) if dense and sketches else 0
    total = run.weight_bytes * parameters(shapes, run, dense=dense) + trained + kept
    return total / run.gpus if run.sharded else total


def step_seconds(shapes: Shapes, run: Run, cluster: Cluster, *, dense: bool) -> float:
    """One step of one GPU. Communication runs beside the computation; the longer of the two counts."""
    scalar = run.compute_bytes
    compute = sum(cluster.product(*p, scalar=scalar) for p in step_products(shapes, run, dense=dense))
    compute += 12 * run.length * shapes.attention * run.tokens / cluster.flops
    widths = sum(map(sum, [*shapes.targets, *([shapes.head] if shapes.head else [])]))
    compute += cluster.passes * run.tokens * widths * scalar / cluster.bandwidth
    gradients = gradient_bytes(shapes, run, dense=dense)
    # an all-reduce is a reduce-scatter and an all-gather; FSDP gathers weights instead, forward and backward
    gathered = 2 * scalar * parameters(shapes, run, dense=dense) if run.sharded else gradients
    communicate = (gradients + gathered) * (run.gpus - 1) / run.gpus / cluster.link(run.gpus)
    return max(compute, communicate) + ADAMW * gradients / (run.gpus if run.sharded else 1) / cluster.bandwidth


# ---- a check ---------------------------------------------------------------------------------------------------------


def polar_flops(m: int, n: int) -> int:
    """Of `decompositions.polar_iteration`: a Gram matrix, then two products a step."""
    return 2 * (1 + 2 * POLAR_STEPS) * max(m, n) * min(m, n) ** 2


def sketch_bytes(m: int, n: int) -> int:
    """What is kept of a basis, in float32."""
    return 4 * (max(m, n) * SKETCH_COLUMNS if is_sketched((m, n), "sketch") else m * n)


def decomposition_seconds(m: int, n: int, cluster: Cluster, *, factors: bool) -> float:
    """The basis of an (m, n) weight, or its factors as well: the polar factor first, or on a CPU the SVD."""
    k, long = min(m, n), max(m, n)
    if cluster.svd is not None:
        scale, power, tall = cluster.svd
        return scale * k**power + tall * (long - k) * k * k
    more = 4 * long * k * k / cluster.flops32 + EIGH * k**3 / cluster.eigh
    return polar_flops(m, n) / cluster.flops32 + (more if factors else 0)


def layer_check_seconds(kind: str, m: int, n: int, rank: int, cluster: Cluster) -> float:
    """One layer's part of a check on the process that decomposes it; `kind`: "dense", "freeze" or "update"."""
    sketch = 2 * m * n * SKETCH_COLUMNS / cluster.flops32
    if kind == "dense":
        return decomposition_seconds(m, n, cluster, factors=False) + sketch + cluster.fixed
    # U P and V Q, made orthonormal again, and Pᵀ M Q of two moments
    rotation = 2 * (3 * (m + n) * rank**2 + 4 * rank**3) / cluster.flops32
    rotation += cluster.fixed
    if kind == "update":
        return decomposition_seconds(rank, rank, cluster, factors=True) + rotation
    moments = 2 * 2 * build_cost(m, n, rank) / cluster.flops32
    return decomposition_seconds(m, n, cluster, factors=True) + sketch + moments + rotation


def sent_bytes(kind: str, m: int, n: int, run: Run) -> int:
    """What one layer's process sends to all others: a sketch, or U, Σ, Vᵀ and two moments."""
    r = run.rank(m, n)
    return sketch_bytes(m, n) if kind == "dense" else run.weight_bytes * ((m + n) * r + 3 * r * r)


def check_seconds(kind: str, shapes: Shapes, run: Run, cluster: Cluster) -> float:
    """A check of all layers: the busiest process, then the results to all. FSDP gathers each layer before that."""
    costs = [layer_check_seconds(kind, m, n, run.rank(m, n), cluster) for m, n in shapes.targets]
    costs.sort(reverse=True)
    busy = [0.0] * run.gpus
    for owner, cost in zip(longest_first(costs, run.gpus), costs):
        busy[owner] += cost
    busiest = max(busy)
    moved = float(sum(sent_bytes(kind, m, n, run) for m, n in shapes.targets))
    if run.sharded:
        dense = run.weight_bytes * sum(m * n for m, n in shapes.targets)
        # each weight is gathered by all processes; in a freeze its two moments as well
        moved += {"dense": dense, "freeze": 3 * dense, "update": moved}[kind]
    return busiest + moved * (run.gpus - 1) / run.gpus / cluster.link(run.gpus)


def overhead(shapes: Shapes, run: Run, cluster: Cluster, steps: int, update_every: float, dense_checks: int) -> float:
    """Seconds in all checks over seconds in all steps: `dense_checks`, one that freezes, then Σ updates of all layers."""
    checks = round(1 / update_every)
    dense = (dense_checks + 1) / checks
    dense_step, step = (step_seconds(shapes, run, cluster, dense=phase) for phase in (True, False))
    number = {"dense": dense_checks, "freeze": 1, "update": checks - dense_checks - 1}
    inside = sum(count * check_seconds(kind, shapes, run, cluster) for kind, count in number.items())
    return inside / (steps * (dense * dense_step + (1 - dense) * step))


# ---- measured constants ----------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Timings:
    """Products, copies, decompositions of fixed sizes, and the training of small Llamas, twice in turn."""
    a, wide = (torch.randn(1024, 1024, device=device, dtype=kind) for kind in (dtype, torch.float32))
    large, other = (torch.randn(2**25, device=device) for _ in range(2))
    calls: dict[str, Callable[[], Any]] = {"flops": lambda: a @ a, "flops32": lambda: wide @ wide}
    calls["bandwidth"] = lambda: other.copy_(large)
    if device.type == "cpu":
        for name, (m, n) in SVDS.items():
            # as many as the controller decomposes side by side
            weights = [(str(i), torch.randn(m, n)) for i in range(2 * torch.get_num_threads())]
            calls[name] = lambda weights=weights: list(decompose(weights))
    else:
        calls["eigh"] = lambda: torch.linalg.eigh(wide + wide.mT)
    times = Timings()
    for _ in range(2):  # a model freezes once
        for name, seconds in interleaved(calls, args.repeats, device).items():
            times.setdefault(name, []).extend(seconds)
        train(args, device, dtype, times)
    return times


def calibrate(args: argparse.Namespace, times: Timings, device: torch.device, dtype: torch.dtype) -> Cluster:
    """The constants that `measure` found; of the models, only the one of width `FITTED` enters."""
    rates = {name: 2 * 1024**3 / times.median(name) for name in ("flops", "flops32")}
    rates["bandwidth"] = 2 * 4 * 2**25 / times.median("bandwidth")
    svd = None
    if device.type == "cpu":
        small, big, tall = (times.median(name) / (2 * torch.get_num_threads()) for name in SVDS)
        (k, _), (long, _) = SVDS["small"], SVDS["tall"]
        power = math.log2(big / small)
        svd = small / k**power, power, max(0.0, tall - small) / ((long - k) * k * k)
    else:
        rates["eigh"] = EIGH * 1024**3 / times.median("eigh")
    cluster = replace(Cluster(**rates), svd=svd, passes=0.0, fixed=0.0)
    # what a step takes beyond products and optimizer is laid to passes over activations; of a Σ update, to the layers
    shapes, run = Shapes.of_config(small_llama(FITTED)), small_run(args, dtype)
    without = step_seconds(shapes, run, cluster, dense=True)
    one = step_seconds(shapes, run, replace(cluster, passes=1.0), dense=True) - without
    beyond = times.median(f"{FITTED} Σ update") - check_seconds("update", shapes, run, cluster)
    passes = max(0.0, (times.median(f"{FITTED} dense step") - without) / one)
    return replace(cluster, passes=passes, fixed=max(0.0, beyond / len(shapes.targets)))


def small_llama(hidden: int) -> LlamaConfig:
    """Two layers of a Llama with hardly any words."""
    return llama(hidden, 2, 8 * hidden // 3 // 64 * 64, hidden // 64, hidden // 64, 1024)


def small_run(args: argparse.Namespace, dtype: torch.dtype) -> Run:
    """How `measure` trains."""
    return Run(tokens=args.batch * 128, length=128, ratio=args.ratio, compute_bytes=dtype.itemsize)


def train(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, times: Timings) -> None:
    """Train Llamas of all widths in turn, a check after each step: dense ones, one that factors all, Σ updates."""
    from peft import get_peft_model

    from oialr_peft import OIALRConfig, OIALRController

    middle = args.repeats + 2
    options = {"freeze_when": "delay", "delay": middle, "update_every": 1, "rank": args.ratio, "cutoff": 0.0}
    tokens = torch.randint(0, 1024, (args.batch, 128), device=device)
    steps: dict[int, Callable[[], None]] = {}
    controllers: dict[int, OIALRController] = {}
    for hidden in [FITTED, *map(int, args.widths.split(","))]:
        base = AutoModelForCausalLM.from_config(small_llama(hidden)).to(device)
        model = get_peft_model(base, OIALRConfig(task_type="CAUSAL_LM", mode="pretraining", **options))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        controllers[hidden] = OIALRController(model, optimizer, total_steps=2 * middle)

        def step(model: Any = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # makes the optimizer's state
        steps[hidden] = step
    for number in range(1, 2 * middle):
        dense = number <= middle
        for hidden, step in steps.items():
            in_step, in_check = seconds_of(step, device), seconds_of(controllers[hidden].step, device)
            if number not in (1, middle + 1):  # the first in new shapes warms up
                times.add(f"{hidden} {'dense' if dense else 'factored'} step", in_step)
                check = "freezing check" if number == middle else "dense check" if dense else "Σ update"
                times.add(f"{hidden} {check}", in_check)


def validate(args: argparse.Namespace, times: Timings, cluster: Cluster, dtype: torch.dtype) -> None:
    """Predict all widths and compare; only the dense step and the Σ update of `FITTED` were fitted."""
    run, rows = small_run(args, dtype), []
    for hidden in [FITTED, *map(int, args.widths.split(","))]:
        shapes = Shapes.of_config(small_llama(hidden))
        predicted = {f"{phase} step": step_seconds(shapes, run, cluster, dense=phase == "dense") for phase in PHASES}
        kinds = {"dense check": "dense", "freezing check": "freeze", "Σ update": "update"}
        predicted |= {name: check_seconds(kind, shapes, run, cluster) for name, kind in kinds.items()}
        for name, seconds in predicted.items():
            measured = times.median(f"{hidden} {name}")
            rows.append([f"{hidden}, {name}", f"{seconds:.4f}", f"{measured:.4f}", f"{seconds / measured:.2f}"])
    print_table(["width, what", "predicted s", "measured s", "predicted / measured"], rows)


def table(shapes: Shapes, runs: Sequence[Run], cluster: Cluster, args: argparse.Namespace) -> None:
    """One row for each number of GPUs."""
    pairs = [(name, f"{name}, factored") for name in ("step s", "GFLOP/token", "reduced GB", "state GB")]
    checks = ["dense check s", "freezing check s", "Σ update s", "checks %"]
    columns = ["GPUs", *[column for pair in pairs for column in pair], *checks]
    rows = []
    for run in runs:
        row = [str(run.gpus)]
        row += [f"{step_seconds(shapes, run, cluster, dense=phase == 'dense'):.3g}" for phase in PHASES]
        row += [f"{flops_per_token(shapes, run, dense=phase == 'dense') / 1e9:.4g}" for phase in PHASES]
        reduced = [gradient_bytes(shapes, run, dense=phase == "dense") / GB for phase in PHASES]
        row += [f"{size:.3g}" if run.gpus > 1 else "-" for size in reduced]
        row += [f"{state_bytes(shapes, run, dense=phase == 'dense') / GB:.1f}" for phase in PHASES]
        row += [f"{check_seconds(kind, shapes, run, cluster):.3g}" for kind in ("dense", "freeze", "update")]
        share = overhead(shapes, run, cluster, args.steps, args.update_every, args.dense_checks)
        rows.append([*row, f"{100 * share:.2f}"])
    print_table(columns, rows)


def cluster_of(args: argparse.Namespace) -> Cluster:
    """The data sheet's numbers times the efficiency; the rate of eigenproblems is assumed as it is."""
    peaks = {"flops": 1e12 * args.tflops, "flops32": 1e12 * args.tflops32, "bandwidth": GB * args.bandwidth}
    peaks |= {"inside": GB * args.inside, "between": GB * args.between}
    rates = {name: args.efficiency * peak for name, peak in peaks.items()}
    return Cluster(**rates, eigh=1e12 * args.eigh, node=args.node, passes=args.passes)


def main() -> None:
    arguments = parser(__doc__, repeats=5)
    option = arguments.add_argument
    option("--model", choices=PRESETS, default="7b", help="a Llama (default 7b)")
    option("--config", help="directory or name of any transformers causal language model, instead of --model")
    option("--gpus", default="1,8,64", help="numbers of GPUs (default 1,8,64)")
    option("--engine", choices=["ddp", "fsdp"], default="ddp", help="default ddp")
    option("--tokens", type=int, default=8192, help="per GPU and optimizer step (default 8192)")
    option("--length", type=int, default=4096, help="tokens of a sequence (default 4096)")
    option("--ratio", type=float, default=0.25, help="r/k after the freeze (default .25)")
    option("--steps", type=int, default=50_000, help="of the whole run, for the share of the checks (default 50000)")
    option("--update-every", type=float, default=0.04, help="fraction of the steps between checks (default .04)")
    option("--dense-checks", type=int, default=5, help="checks before the one that factors all layers (default 5)")
    option("--weight-bytes", type=int, default=4, help="of a parameter, its gradient, each moment (default 4)")
    option("--tflops", type=float, default=989, help="products of a step, TFLOP/s (default 989, H100 SXM bfloat16)")
    option("--tflops32", type=float, default=67, help="float32 products, TFLOP/s (default 67, H100 SXM)")
    option("--eigh", type=float, default=1, help="symmetric eigenproblems, TFLOP/s of 9 k³ (default 1, assumed)")
    option("--bandwidth", type=float, default=3350, help="memory, GB/s (default 3350, H100 SXM)")
    option("--inside", type=float, default=450, help="GB/s of a GPU in its node (default 450, NVLink, each way)")
    option("--between", type=float, default=50, help="GB/s of a GPU to other nodes (default 50: 400 Gbit/s)")
    option("--node", type=int, default=8, help="GPUs in a node (default 8)")
    option("--efficiency", type=float, default=0.7, help="share of these rates that is reached (default .7, assumed)")
    option("--passes", type=float, default=12, help="over inputs and outputs of linear layers (default 12, a CPU fit)")
    option("--calibrate", action="store_true", help="measure the constants on --device, in --dtype")
    option("--validate", action="store_true", help="calibrate, then compare small models with the prediction")
    option("--widths", default="768", help="of the models that are predicted and measured (default 768)")
    option("--batch", type=int, default=8, help="sequences of 128 tokens in what is measured (default 8)")
    args = arguments.parse_args()
    device, dtype = start(args)
    warnings.simplefilter("ignore")  # of transformers, about its own settings
    cluster = cluster_of(args)
    if args.calibrate or args.validate:
        times = measure(args, device, dtype)
        measured = calibrate(args, times, device, dtype)
        cluster = replace(measured, inside=cluster.inside, between=cluster.between, node=cluster.node)
        print(f"Measured on this device, links aside: {cluster}\n")
    else:
        print("On paper: times follow from data-sheet rates and an assumed efficiency. Nothing was measured.\n")
    if args.validate:
        return validate(args, times, cluster, dtype)
    shapes = Shapes.of_config(AutoConfig.from_pretrained(args.config) if args.config else PRESETS[args.model]())
    common = Run(tokens=args.tokens, length=args.length, ratio=args.ratio, weight_bytes=args.weight_bytes)
    runs = [replace(common, gpus=int(gpus), sharded=args.engine == "fsdp") for gpus in args.gpus.split(",")]
    count = shapes.rest + sum(m * n for m, n in shapes.targets)
    print(f"{args.config or args.model}, {count:,} parameters, {args.engine}, r/k = {args.ratio:g}\n")
    table(shapes, runs, cluster, args)


if __name__ == "__main__":
    main()
