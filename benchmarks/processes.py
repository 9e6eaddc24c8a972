"""How does the time of a check fall with the number of processes?

For each number of processes, each with one thread, over gloo: a check of dense layers, the check that factors all of
them, and a Σ update, of a BERT with `--layers` layers of `--hidden`. "busy" is the largest CPU time that a process spends,
which is the time of the check when every process has a processor of its own; "wall" is what passed here, where more
processes than processors wait for each other. Work and bytes are counted by process.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from common import parser, print_table, start
from models import base_model
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel

from oialr_peft import OIALRConfig, OIALRController

KINDS = ("dense check", "freezing check", "Σ update")


def train(index: int, args: argparse.Namespace, count: int, port: int, output: str) -> None:
    """Run in one process: a check after each step, timed, and written to a file of this process."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=index, world_size=count)
    base = base_model("bert", args.layers, args.hidden)
    middle = args.repeats + 2
    schedule = {"freeze_when": "delay", "delay": middle, "update_every": 1, "rank": 0.5, "cutoff": 0.0}
    model = get_peft_model(base, OIALRConfig(task_type="SEQ_CLS", mode="pretraining", **schedule))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    controller = OIALRController(wrapped, optimizer, total_steps=2 * middle)
    tokens = torch.randint(0, 30_000, (1, 16))
    samples: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for step in range(1, 2 * middle):
        wrapped(input_ids=tokens, labels=torch.zeros(1, dtype=torch.long)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        wall, busy = time.perf_counter(), time.process_time()
        controller.step()
        busy = time.process_time() - busy
        dist.barrier()
        wall = time.perf_counter() - wall
        if step > 1:
            samples[KINDS[0] if step < middle else KINDS[1] if step == middle else KINDS[2]].append((wall, busy))
    torch.save(samples, Path(output, f"{index}.pt"))
    dist.destroy_process_group()


def measure(args: argparse.Namespace, count: int) -> dict[str, tuple[float, float]]:
    """By kind of check, the median wall seconds and the median over checks of the busiest process's CPU seconds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as output:
        multiprocessing.spawn(train, (args, count, port, output), nprocs=count)
        found = [torch.load(Path(output, f"{index}.pt")) for index in range(count)]
    return {
        kind: (
            median(wall for wall, _ in found[0][kind]),
            median(max(sample[1] for sample in samples) for samples in zip(*(f[kind] for f in found))),
        )
        for kind in KINDS
    }


def main() -> None:
    arguments = parser(__doc__, repeats=3)
    arguments.add_argument("--processes", default="1,2,4", help="numbers of processes (default 1,2,4)")
    arguments.add_argument("--layers", type=int, default=2, help="depth of BERT (default 2)")
    arguments.add_argument("--hidden", type=int, default=768, help="width of BERT (default 768)")
    args = arguments.parse_args()
    start(args)
    counts = [int(count) for count in args.processes.split(",")]
    measured = {count: measure(args, count) for count in counts}
    first = measured[counts[0]]
    rows = [
        [kind, str(count), f"{wall:.3f}", f"{busy:.3f}", f"{busy / first[kind][1]:.3f}"]
        for kind in KINDS
        for count in counts
        for wall, busy in [measured[count][kind]]
    ]
    print_table(["check", "processes", "wall s", "busy s", f"busy / {counts[0]}"], rows)


if __name__ == "__main__":
    main()
