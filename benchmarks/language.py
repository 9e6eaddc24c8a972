r"""A language model from scratch: dense training, LoRA, GaLore and OIALR, perplexity against compute.

    python benchmarks/language.py --text summaries.json --run dense dense '{}' --run ours oialr '{"cutoff": 0.35}' \
        --run lora lora '{"r": 64, "lr": 0.002}' --run galore galore '{"rank": 64, "lr": 0.01}'

Each `--run` is a name, a method and its settings as JSON; "lr" among them is the learning rate:

dense, oialr  the settings of `OIALRConfig`, none for dense training
lora          of `LoraConfig`: the linear layers stay as they were drawn, with an adapter each; the rest trains
galore        `rank`, `update_proj_gap`, `scale`, `proj_type`; needs `pip install --no-deps galore-torch`

The model is a Llama with tied embeddings; the text is JSON (title to text) or plain, 5 % of its documents are held out, a byte
pair encoding is trained on the others. AdamW, linear warm-up, cosine decay. Printed are means and standard deviations over seeds:

perplexity    on the first `--evaluated` held-out sequences, after the last step
TFLOP         of the whole training: products of linear layers at the ranks they had, by the routes of `oialr_peft.linalg.ops`; attention;
              decompositions and what follows them in OIALR's checks, decompositions and projections of GaLore
trainable     percent of the dense model's parameters: mean over all steps, and after the last
jump          largest relative rise of the loss on one fixed batch from before a check to after it
memory        MB: peak of a step at the start and at the end
seconds       of training, checks included; runs side by side slow each other down, compare with `--jobs 1`

`--output` keeps every run as one line of JSON, with the curve: step, TFLOP, seconds, held-out perplexity.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Job, Training, jobs_of, parser, print_spreads, start, trained, training_options, tuned
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from scaling import layer_products
from text import batches, documents, evaluated, loss_on, packed, split, step_and_peak
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from oialr_peft import OIALRConfig, OIALRUpdate
from oialr_peft.linalg.ops import build_cost
from oialr_peft.tuner.layer import OIALRLinear

GALORE = {
    "rank": 64,
    "update_proj_gap": 200,
    "scale": 0.25,
    "proj_type": "std",
}  # the authors' settings, a smaller rank
END = "<|end|>"  # of a document


def tokens(args: argparse.Namespace) -> tuple[dict[str, Tensor], int]:
    """Packed sequences of both splits, and the size of the vocabulary."""
    texts = split(documents(args.text))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[0], args.vocabulary, special_tokens=[END], show_progress=False)
    end = tokenizer.token_to_id(END)
    rows = [packed(([*e.ids, end] for e in tokenizer.encode_batch(part)), args.length) for part in texts]
    return dict(zip(("training", "held out"), rows)), tokenizer.get_vocab_size()


def llama(vocabulary: int, args: argparse.Namespace) -> LlamaForCausalLM:
    """A new Llama; its inner layers are about 8/3 as wide."""
    heads = max(1, args.hidden // 64)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=args.hidden,
            intermediate_size=32 * math.ceil(args.hidden / 12),
            num_hidden_layers=args.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=args.length,
            tie_word_embeddings=True,
        )
    )


def prepared(
    model: LlamaForCausalLM, method: str, settings: dict[str, Any], lr: float, decay: float
) -> tuple[Any, torch.optim.Optimizer]:
    """The model as the method trains it, and its optimizer."""
    if method == "galore":
        return model, galore(model, settings, lr, decay)
    adapted: Any = model
    if method == "oialr":
        adapted = get_peft_model(model, OIALRConfig(mode="pretraining", **settings))
    elif method == "lora":
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", **settings))
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(".base_layer." not in name)
    return adapted, torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr, weight_decay=decay)


def galore(model: LlamaForCausalLM, settings: dict[str, Any], lr: float, decay: float) -> torch.optim.Optimizer:
    """GaLore's AdamW: the gradients of all linear layers but the head are projected."""
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise ImportError("Method 'galore' needs galore-torch: pip install --no-deps galore-torch") from error
    projected = [module.weight for module in model.model.modules() if isinstance(module, nn.Linear)]
    known = set(map(id, projected))
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in known]},
        {"params": projected, **GALORE, **settings},
    ]
    return GaLoreAdamW(groups, lr, weight_decay=decay, no_deprecation_warning=True)


# ---- compute ---------------------------------------------------------------------------------------------------------


def svd_flops(m: int, n: int) -> int:
    """Of a thin SVD with vectors, by way of a QR decomposition (Golub and Van Loan, Matrix Computations, fig. 8.6.1)."""
    return 6 * max(m, n) * min(m, n) ** 2 + 20 * min(m, n) ** 3


class Flops:
    """Floating-point operations of a training so far, from shapes, ranks and the number of tokens.

    Args:
        training: of the model that is counted.
        batch: sequences in a step.
        length: tokens of a sequence.

    Attributes:
        total: of all steps that were counted.
    """

    def __init__(self, training: Training, batch: int, length: int) -> None:
        self.training, self.tokens, self.length = training, batch * length, length
        self.total = self.counted = 0
        self.projected = [group for group in training.optimizer.param_groups if "rank" in group]
        controller = training.controller
        self.dense = set() if controller is None else {k for k, v in controller.layers.items() if v.is_dense("default")}
        self.step = self._of_step()

    def count(self, update: OIALRUpdate | None) -> None:
        """Count the step that was just taken, and its check."""
        self.total += self.step + sum(self._of_projection(group) for group in self.projected)
        self.counted += 1
        if update is not None:
            self.total += self._of_check(update)
            self.step = self._of_step()

    def _of_step(self) -> int:
        model = self.training.model
        products: list[tuple[int, int, int]] = []
        inside: set[nn.Module] = set()  # of adapter layers
        for module in model.modules():
            if module in inside:
                continue
            if isinstance(module, OIALRLinear):
                m, n = module.out_features, module.in_features
                rank = None if module.is_dense("default") else module.rank("default")
                products += layer_products(m, n, rank, self.tokens)
            elif isinstance(module, LoraLayer):
                m, n = module.out_features, module.in_features
                rank = module.r["default"]
                products += 2 * [(self.tokens, n, m)] + 3 * [(self.tokens, n, rank), (self.tokens, rank, m)]
            elif isinstance(module, nn.Linear):
                products += layer_products(module.out_features, module.in_features, None, self.tokens)
            if isinstance(module, (OIALRLinear, LoraLayer)):
                inside.update(module.modules())
        config: Any = model.config
        attention = 12 * self.length * config.hidden_size * config.num_hidden_layers * self.tokens
        return 2 * sum(a * b * c for a, b, c in products) + attention

    def _of_projection(self, group: dict[str, Any]) -> int:
        """There and back, after a decomposition every so many steps."""
        shapes = [p.shape for p in group["params"]]
        found = sum(4 * m * n * min(group["rank"], m, n) for m, n in shapes)
        return found + (sum(svd_flops(*s) for s in shapes) if self.counted % group["update_proj_gap"] == 0 else 0)

    def _of_check(self, update: OIALRUpdate) -> int:
        """The basis U Vᵀ of dense layers; U P, Qᵀ Vᵀ and two moments of those whose ranks were looked at."""
        found = 0
        assert self.training.controller is not None
        for name, layer in self.training.controller.layers.items():
            m, n = layer.out_features, layer.in_features
            k = min(m, n)
            if name in self.dense:
                found += svd_flops(m, n) + 2 * m * n * k
            if name in update.frozen:
                found += 4 * build_cost(m, n, k)  # moments of the weight become those of Σ
                self.dense.remove(name)
            elif name in update.ranks:
                rank = update.ranks[name][0]
                found += svd_flops(rank, rank) + 2 * (m + n) * rank**2 + 8 * rank**3
        return found


# ---- runs ------------------------------------------------------------------------------------------------------------


def train(method: str, settings: dict[str, Any], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run, and what is reported of it."""
    torch.set_num_threads(args.threads or 1)
    device = torch.device(args.device)
    rows, vocabulary = torch.load(args.tokens)
    rows = {name: part.to(device) for name, part in rows.items()}
    held_out, fixed = rows["held out"][: args.evaluated], rows["training"][: args.batch]
    settings = dict(settings)
    lr = settings.pop("lr", args.lr)
    torch.manual_seed(seed)
    model: Any = llama(vocabulary, args).to(device)
    total = sum(p.numel() for p in model.parameters())
    model, optimizer = prepared(model, method, settings, lr, args.decay)
    model.train()
    training = Training(
        model,
        optimizer,
        args.steps,
        total=total,
        adaptive=method == "oialr",
        probe=lambda: evaluated(model, fixed, args.batch),
    )
    flops = Flops(training, args.batch, args.length)
    curve, memory = [], {}
    for step, batch in zip(range(1, args.steps + 1), batches(rows["training"], args.batch, seed)):
        if step in (2, args.steps - 1):  # the optimizer's state is there, and no check among those of usual settings
            update, memory[step] = step_and_peak(training, lambda batch=batch: loss_on(model, batch), device)
        else:
            update = training.step(lambda batch=batch: loss_on(model, batch))
        flops.count(update)
        if step % max(1, args.steps // 10) == 0 or step == args.steps:
            perplexity = math.exp(evaluated(model, held_out, args.batch))
            curve.append((step, float(f"{flops.total / 1e12:.4g}"), round(training.seconds, 1), round(perplexity, 3)))
    return {
        "perplexity": curve[-1][3],
        "curve": curve,
        "tflop": curve[-1][1],
        "lr": lr,
        "parameters": total,
        "tokens": {
            "seen": args.steps * args.batch * args.length,
            **{name: part.numel() for name, part in rows.items()},
        },
        "memory_start": round(memory[2] / 1e6, 1),
        "memory_end": round(memory[args.steps - 1] / 1e6, 1),
        **training.summary(),
    }


def one(job: Job) -> dict[str, Any]:
    """What is kept of a run."""
    name, method, settings, seed, args = job
    keys = ("steps", "batch", "length", "decay", "hidden", "layers", "vocabulary", "evaluated")
    described = {"method": method, "settings": settings, "seed": seed, **{key: getattr(args, key) for key in keys}}
    return {"run": name, **described, **train(method, settings, seed, args)}


def main() -> None:
    options = parser(__doc__, repeats=1)
    options.add_argument("--text", required=True, help="JSON (title to text) or plain text")
    options.add_argument("--hidden", type=int, default=256)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--vocabulary", type=int, default=4096)
    options.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    options.add_argument("--batch", type=int, default=16, help="sequences in a step")
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--evaluated", type=int, default=128, help="held-out sequences")
    options.add_argument("--lr", type=float, default=2e-3)
    options.add_argument("--decay", type=float, default=0.01, help="weight decay")
    training_options(options)
    args = options.parse_args()
    start(args)
    jobs = tuned(one, jobs_of(args, ("dense", "oialr", "lora", "galore")), args, "perplexity", "minimize")
    with tempfile.TemporaryDirectory() as directory:
        args.tokens = str(Path(directory, "tokens.pt"))
        torch.save(tokens(args), args.tokens)
        found = trained(one, jobs, args)
    columns = {
        "perplexity": ("perplexity", 2),
        "TFLOP": ("tflop", 2),
        "trainable %, mean": ("trainable_mean", 1),
        "at the end": ("trainable_end", 1),
        "jump": ("jump", 3),
        "memory, start": ("memory_start", 0),
        "memory, end": ("memory_end", 0),
        "seconds": ("seconds", 0),
    }
    print_spreads(found, [name for name, *_ in args.run], columns)


if __name__ == "__main__":
    main()
