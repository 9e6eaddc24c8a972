"""What does a check of the controller cost as the model grows?

For a BERT of each width, in seconds and in training steps of that model: a check of dense layers (Stability), the check
that factors all of them (with the first Σ update), and a Σ update at half of full rank. "overhead" is the time of all
checks over the time of all steps in a run of `--steps` steps at the default `update_every`, of which `--dense-checks`
check dense layers and one factors them; steps after that are factored ones.
"""

from __future__ import annotations

import argparse

import torch
from common import Timings, parser, print_table, seconds_of, start
from models import base_model
from peft import get_peft_model

from oialr_peft import OIALRConfig, OIALRController


def run_checks(args: argparse.Namespace, hidden: int, times: Timings) -> None:
    """Train with a check after each step, and time both: `repeats` checks of dense layers, then the one that factors
    them, then Σ updates. The very first check has no basis to compare with, and does not count.
    """
    middle = args.repeats + 2
    options = {"freeze_when": "delay", "delay": middle, "update_every": 1, "rank": 0.5, "cutoff": 0.0}
    if args.drop:
        options |= {"cutoff": 0.999, "max_output_loss": 0.999, "max_rank_drop": args.drop}
    if args.storage:
        options["stability_storage"] = args.storage
    base = base_model("bert", args.layers, hidden).to(args.device)
    model = get_peft_model(base, OIALRConfig(task_type="SEQ_CLS", mode="pretraining", **options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    controller = OIALRController(model, optimizer, total_steps=2 * middle)
    device = torch.device(args.device)
    tokens = torch.randint(0, 30_000, (args.batch, args.length), device=device)
    labels = torch.randint(0, 2, (args.batch,), device=device)

    def train() -> None:
        with torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
            loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    train()  # makes the optimizer's state
    for step in range(1, 2 * middle):
        phase = "dense" if step <= middle else "factored"
        in_step = seconds_of(train, device)
        in_check = seconds_of(controller.step, device)
        if step not in (1, middle + 1):  # the first step in new shapes warms up
            times.add(f"{phase} step", in_step)
        if step > 1:
            times.add("freeze" if step == middle else f"{phase} check", in_check)
    assert [bool(update.frozen) for update in controller.history].index(True) == middle - 1


def overhead(args: argparse.Namespace, times: Timings) -> float:
    """Seconds in checks over seconds in steps, of a whole run."""
    checks = round(1 / OIALRConfig(mode="replace").update_every)
    dense = (args.dense_checks + 1) / checks
    later = checks - args.dense_checks - 1
    in_checks = args.dense_checks * times.median("dense check") + times.median("freeze")
    in_checks += later * times.median("factored check")
    in_steps = args.steps * (dense * times.median("dense step") + (1 - dense) * times.median("factored step"))
    return in_checks / in_steps


def main() -> None:
    arguments = parser(__doc__, repeats=3)
    arguments.add_argument("--widths", default="256,512,768,1024", help="hidden sizes (default 256,512,768,1024)")
    arguments.add_argument("--layers", type=int, default=4, help="depth of BERT (default 4)")
    arguments.add_argument("--batch", type=int, default=8, help="sequences (default 8)")
    arguments.add_argument("--length", type=int, default=128, help="tokens per sequence (default 128)")
    arguments.add_argument("--steps", type=int, default=1000, help="length of the run for the overhead (default 1000)")
    arguments.add_argument("--dense-checks", type=int, default=5, help="of them check dense layers (default 5)")
    arguments.add_argument(
        "--freezes", type=int, default=2, help="models trained per width, one freeze each (default 2)"
    )
    arguments.add_argument("--storage", help="stability_storage of the run (default: the method's)")
    arguments.add_argument("--drop", type=float, help="share of the rank that each Σ update drops (default: none)")
    args = arguments.parse_args()
    start(args)
    rows = []
    for hidden in map(int, args.widths.split(",")):
        times = Timings()
        for _ in range(args.freezes):
            run_checks(args, hidden, times)
        row = [str(hidden), f"{1e3 * times.median('dense step'):.1f}"]
        for check in ("dense check", "freeze", "factored check"):
            seconds = times.median(check)
            row.append(f"{seconds:.4f}")
            row.append(f"{seconds / times.median('dense step'):.2f}")
        rows.append([*row, f"{100 * overhead(args, times):.2f}"])
    kinds = ("dense check", "freezing check", "Σ update")
    columns = [title for kind in kinds for title in (f"{kind} s", f"{kind} / step")]
    print_table(["width", "step ms", *columns, "overhead %"], rows)


if __name__ == "__main__":
    main()
