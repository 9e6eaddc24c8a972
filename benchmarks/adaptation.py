r"""A pretrained language model on new text: full fine-tuning, PEFT's methods and OIALR with the same budget.

    python benchmarks/adaptation.py --model MODEL --text summaries.json --other other.txt --run full full '{"lr": 2e-5}' \
        --run lora lora '{"r": 16, "target_modules": "all-linear"}' --run ours oialr '{"mode": "adapter", "rank": 64}'

Each `--run` is a name, a method (`full`, `oialr`, or a method of PEFT by its name) and the settings of its configuration as
JSON; "lr" among them is the learning rate. The texts are JSON (title to text) or plain; 5 % of the documents are held out.
Sequences start with the token that the model starts every text with, if it has one. Printed are means and standard deviations
over seeds:

perplexity    on held-out sequences of `--text`, after the last step; before the first it is the same in every run
forgetting    loss on held-out sequences of `--other`, after minus before
trainable     percent of the dense model's parameters: mean over all steps, and after the last
jump          largest relative rise of the loss on one fixed batch from before a check to after it
s/step        seconds per step, checks included
memory        MB: peak of a step at the start and at the end
checkpoint    MB of what `save_pretrained` writes

`--output` keeps every run as one line of JSON.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import (
    METHODS,
    Job,
    Training,
    adapted,
    jobs_of,
    parser,
    print_spreads,
    start,
    trained,
    training_options,
    tuned,
)
from peft import TaskType
from text import batches, documents, evaluated, loss_on, packed, split, step_and_peak
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def tokens(args: argparse.Namespace) -> dict[str, Tensor]:
    """Packed sequences: of both splits of the text, and the held-out ones of the other."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf_file)

    def rows(texts: list[str]) -> Tensor:
        encoded = tokenizer([f"{text}\n\n" for text in texts], add_special_tokens=False)["input_ids"]
        return packed(encoded, args.length, tokenizer.bos_token_id)

    training, held_out = map(rows, split(documents(args.text)))
    found = {"training": training, "held out": held_out[: args.evaluated]}
    return {**found, "other": rows(split(documents(args.other))[1])[: args.evaluated]} if args.other else found


def pretrained(args: argparse.Namespace) -> PreTrainedModel:
    """The model in float32; one from a GGUF file no longer counts as quantized, which it is not."""
    model = AutoModelForCausalLM.from_pretrained(args.model, gguf_file=args.gguf_file, dtype=torch.float32)
    if args.gguf_file:
        model.hf_quantizer = model.quantization_method = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


def saved_bytes(model: Any) -> int:
    """Size of what `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return sum(file.stat().st_size for file in Path(directory).rglob("*.safetensors"))


def train(method: str, settings: dict[str, Any], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run, and what is reported of it."""
    torch.set_num_threads(args.threads or 1)
    device = torch.device(args.device)
    rows = {name: part.to(device) for name, part in torch.load(args.tokens).items()}
    settings = dict(settings)
    lr = settings.pop("lr", args.lr)
    base = pretrained(args).to(device)
    total = sum(p.numel() for p in base.parameters())
    torch.manual_seed(seed)
    model = adapted(base, method, settings, TaskType.CAUSAL_LM, args.steps).train()
    training = Training(
        model,
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=args.decay),
        args.steps,
        total=total,
        adaptive=method == "oialr",
        probe=lambda: evaluated(model, rows["training"][: args.batch], args.batch),
        after_step=model.base_model.update_and_allocate if method == "adalora" else None,
    )

    def losses() -> dict[str, float]:
        return {name: evaluated(model, part, args.batch) for name, part in rows.items() if name != "training"}

    before, memory = losses(), {}
    for step, batch in zip(range(1, args.steps + 1), batches(rows["training"], args.batch, seed)):
        if step in (2, args.steps - 1):  # the optimizer's state is there, and no check among those of usual settings
            _, memory[step] = step_and_peak(training, lambda batch=batch: loss_on(model, batch), device)
        else:
            training.step(lambda batch=batch: loss_on(model, batch))
    after = losses()
    return {
        "perplexity": round(math.exp(after["held out"]), 3),
        "perplexity_before": round(math.exp(before["held out"]), 3),
        "forgetting": round(after.get("other", math.nan) - before.get("other", math.nan), 4),
        "losses": [round(loss, 4) for loss in training.losses],
        "lr": lr,
        "seconds_per_step": round(training.seconds / args.steps, 4),
        "memory_start": round(memory[2] / 1e6, 1),
        "memory_end": round(memory[args.steps - 1] / 1e6, 1),
        "checkpoint": round(saved_bytes(model) / 1e6, 2),
        **training.summary(),
    }


def one(job: Job) -> dict[str, Any]:
    """What is kept of a run."""
    name, method, settings, seed, args = job
    keys = ("steps", "batch", "length", "decay", "evaluated")
    described = {"method": method, "settings": settings, "seed": seed, **{key: getattr(args, key) for key in keys}}
    return {"run": name, **described, **train(method, settings, seed, args)}


def main() -> None:
    options = parser(__doc__, repeats=1)
    options.add_argument("--model", required=True, help="path or hub id of a pretrained causal language model")
    options.add_argument("--gguf-file", help="name of the file in that path, for a model stored as GGUF")
    options.add_argument("--text", required=True, help="text to train on: JSON (title to text) or plain")
    options.add_argument("--other", help="text to measure forgetting on; not trained on")
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--batch", type=int, default=4, help="sequences in a step")
    options.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    options.add_argument("--evaluated", type=int, default=32, help="held-out sequences of each text")
    options.add_argument("--lr", type=float, default=1e-4)
    options.add_argument("--decay", type=float, default=0.01, help="weight decay")
    training_options(options)
    args = options.parse_args()
    start(args)
    jobs = tuned(one, jobs_of(args, METHODS), args, "perplexity", "minimize")
    with tempfile.TemporaryDirectory() as directory:
        args.tokens = str(Path(directory, "tokens.pt"))
        torch.save(tokens(args), args.tokens)
        found = trained(one, jobs, args)
    columns = {
        "perplexity": ("perplexity", 2),
        "before": ("perplexity_before", 2),
        "forgetting": ("forgetting", 3),
        "trainable %, mean": ("trainable_mean", 2),
        "at the end": ("trainable_end", 2),
        "jump": ("jump", 3),
        "s/step": ("seconds_per_step", 3),
        "memory, start": ("memory_start", 0),
        "memory, end": ("memory_end", 0),
        "checkpoint, MB": ("checkpoint", 2),
    }
    if not args.other:
        del columns["forgetting"]
    print_spreads(found, [name for name, *_ in args.run], columns)


if __name__ == "__main__":
    main()
