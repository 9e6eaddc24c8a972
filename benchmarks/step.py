"""How long is a training step, and how much memory does it take, under each method?

A step is forward, backward, optimizer.step, zero_grad and what the method does besides (AdaLoRA's budget, OIALR's
controller). Peak memory holds parameters, gradients, optimizer state and activations of the model alone: on a CPU every
tensor that is alive, counted exactly in an extra step; on a GPU what the allocator reports. Models are made from
configurations: `bert` (BERT-base, 2 classes), `gpt2` (GPT-2 small), `gemma-270m` (Gemma-3 270M), `llama-1b` (Llama-3.2-1B).

All methods adapt all linear layers but the head. OIALR is factored from the start at a quarter of full rank; OSF trains
a quarter of its directions. The rows "still dense" have OIALR's first phase, without the stored bases, whose size
`stability_storage.py` shows; "r/k=1" is what a pretrained model comes to that needs all of its directions. No check of
OIALR falls into the steps that are timed; `checks.py` has their cost. Weights are in float32; another `--dtype` is that of autocast.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, parser, print_table, start
from memory import peak_bytes
from models import base_model, parameters
from peft import AdaLoraConfig, LoraConfig, OSFConfig, PeftConfig, PsoftConfig, TaskType, get_peft_model
from torch import Tensor, nn

from oialr_peft import OIALRConfig, OIALRController

TOTAL_STEPS = 1_000_000  # of the pretended run: more than are timed, so that no check falls into them
FACTORED = {"freeze_when": "delay", "delay": 0, "rank": 0.25}
CONFIGS: dict[str, Callable[..., PeftConfig] | None] = {
    "dense AdamW": None,
    "LoRA r=16": lambda **options: LoraConfig(r=16, **options),
    "AdaLoRA r=24 to 16": lambda **options: AdaLoraConfig(
        init_r=24, target_r=16, deltaT=10, total_step=TOTAL_STEPS, **options
    ),
    "OSF 1/4 trained": lambda fan_in_fan_out, **options: OSFConfig(effective_rank=0.75, **options),
    "PSOFT r=64": lambda **options: PsoftConfig(r=64, psoft_svd="lowrank", **options),
    "OIALR r/k=1/4": lambda fan_in_fan_out, **options: OIALRConfig(**{"mode": "replace", **FACTORED, **options}),
    "OIALR r/k=1": lambda fan_in_fan_out, **options: OIALRConfig(
        freeze_when="delay", delay=0, **{"mode": "replace", **options}
    ),
    "OIALR still dense": lambda fan_in_fan_out, **options: OIALRConfig(**{"mode": "replace", **options}),
    "OIALR residual r/k=1/4": lambda fan_in_fan_out, **options: OIALRConfig(mode="adapter", rank=0.25, **options),
    "OIALR r/k=1/4, pretraining": lambda fan_in_fan_out, **options: OIALRConfig(
        **FACTORED, mode="pretraining", **options
    ),
    "OIALR still dense, pretraining": lambda fan_in_fan_out, **options: OIALRConfig(mode="pretraining", **options),
}


class Run:
    """A model in training under one method; a call is one step.

    Raises:
        ValueError: the method adapted no layer.
    """

    def __init__(self, model: nn.Module, config: PeftConfig | None, batch: dict[str, Tensor], args: Any) -> None:
        self.model = (model if config is None else get_peft_model(model, config)).train()
        self.batch, self.args, self.steps = batch, args, 0
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if config is not None and not adapted(self.model):
            raise ValueError("it adapts none of the layers of this model")
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=args.fused)
        self.controller = (
            OIALRController(self.model, self.optimizer, total_steps=TOTAL_STEPS)
            if isinstance(config, OIALRConfig)
            else None
        )
        self.allocate = self.model.base_model.update_and_allocate if isinstance(config, AdaLoraConfig) else None

    def __call__(self) -> None:
        """One training step."""
        device, dtype = torch.device(self.args.device).type, getattr(torch, self.args.dtype)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        if self.allocate:
            self.allocate(self.steps)
        self.optimizer.zero_grad()
        if self.controller:
            self.controller.step()

    def resident(self) -> list[Tensor]:
        """Everything that is kept between steps."""
        state = [t for entry in self.optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *state, *self.batch.values()]


def adapted(model: Any) -> bool:
    """Whether some parameter of the PEFT method trains; methods skip kinds of layers without a word."""
    prefix = model.base_model.prefix
    return any(prefix in name and parameter.requires_grad for name, parameter in model.named_parameters())


def main() -> None:
    arguments = parser(__doc__, repeats=15)
    arguments.add_argument(
        "--model", choices=["bert", "gpt2", "gemma-270m", "llama-1b"], default="bert", help="default bert"
    )
    arguments.add_argument("--layers", type=int, help="depth (default: the model's)")
    arguments.add_argument("--hidden", type=int, help="width (default: the model's)")
    arguments.add_argument("--batch", type=int, default=8, help="sequences (default 8)")
    arguments.add_argument("--length", type=int, default=128, help="tokens per sequence (default 128)")
    arguments.add_argument("--methods", help=f"some of: {', '.join(CONFIGS)}; separated by ';' (default all)")
    arguments.add_argument("--no-fused", dest="fused", action="store_false", help="AdamW with fused=False")
    args = arguments.parse_args()
    device, _ = start(args)
    warnings.simplefilter("ignore")  # what peers say about settings is not what is measured

    tokens = torch.randint(0, 30_000, (args.batch, args.length), device=device)
    labels = torch.randint(0, 2, (args.batch,), device=device) if args.model == "bert" else tokens
    task = TaskType.SEQ_CLS if args.model == "bert" else TaskType.CAUSAL_LM
    options = {"task_type": task, "target_modules": "all-linear", "fan_in_fan_out": args.model == "gpt2"}
    runs: dict[str, Run] = {}
    failures: dict[str, str] = {}
    methods = args.methods.split(";") if args.methods else list(CONFIGS)
    if unknown := set(methods) - set(CONFIGS):
        arguments.error(f"--methods must name methods of the table, but has {sorted(unknown)}")
    for method in methods:
        make = CONFIGS[method]
        try:
            model = base_model(args.model, args.layers, args.hidden).to(device)
            run = Run(model, make(**options) if make else None, {"input_ids": tokens, "labels": labels}, args)
            run()
            runs[method] = run
        except Exception as error:  # whatever keeps a peer from running is its result
            failures[method] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    times = interleaved(runs, args.repeats, device)
    peaks = {method: peak_bytes(run, run.resident(), device) for method, run in runs.items()}
    first = next(iter(runs))
    rows = []
    for method in [*runs, *failures]:
        if method in failures:
            rows.append([method, *["-"] * 5])
            continue
        rows.append(
            [
                method,
                f"{parameters(runs[method].model, trainable=True):,}",
                f"{1e3 * times.median(method):.1f}",
                f"{times.ratio(method, first):.3f}",
                f"{peaks[method] / 2**20:.1f}",
                f"{peaks[method] / peaks[first]:.3f}",
            ]
        )
    print_table(["method", "trainable", "step ms", "time ratio", "peak MiB", "memory ratio"], rows)
    for method, reason in failures.items():
        print(f"{method} does not run on this model: {reason}")


if __name__ == "__main__":
    main()
