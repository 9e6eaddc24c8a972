"""The commands and their options. What they do is in `oialr_peft`, which each imports when it runs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

EXPECTED = (ValueError, OSError, ImportError)  # their messages say what to do; OSError: those of the Hub as well


class _Commands(TyperGroup):
    """Turns errors into one line on stderr and exit code 1, unless `--debug` asks for the traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except (typer.TyperException, typer.Exit, typer.Abort):  # wrong usage, and ends that a command asked for
            raise
        except Exception as error:
            if ctx.params["debug"]:
                raise
            text = " ".join(str(error).split())
            if not (text and isinstance(error, EXPECTED)):
                text = f"{type(error).__name__}: {text} (`oialr --debug` shows the traceback)"
            _fail(text)


def _fail(message: str) -> None:
    typer.echo(f"oialr: {message}", err=True)
    raise typer.Exit(1)


app = typer.Typer(
    cls=_Commands,
    name="oialr",
    help="Look into, estimate, convert and compare OIALR models and their training runs.",
    epilog="Exit codes: 0 done, 1 error in the input, 2 wrong usage. `oialr COMMAND --help` shows examples.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


class Target(StrEnum):
    """Forms that `export` writes."""

    LOW_RANK = "low-rank"
    DENSE = "dense"
    LORA = "lora"


class Mode(StrEnum):
    """Of an adapter, as in `OIALRConfig`."""

    ADAPTER = "adapter"
    REPLACE = "replace"
    PRETRAINING = "pretraining"


class Precision(StrEnum):
    """Of parameters, gradients and moments."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and what other packages log.")] = False,
) -> None:
    """Look into, estimate, convert and compare OIALR models and their training runs."""


@app.command(
    epilog="Examples:  oialr inspect my-adapter  |  oialr inspect runs/vit --layers  |  oialr inspect user/model --json"
)
def inspect(
    checkpoint: Annotated[
        str, typer.Argument(help="Directory of an adapter, a low-rank checkpoint or a run; or a Hub id.")
    ],
    layers: Annotated[bool, typer.Option("--layers", help="One row for each layer, not for each kind.")] = False,
    json: Json = False,
) -> None:
    """Show ranks, sizes, compression and settings of a checkpoint. Reads headers of files, no tensors."""
    from oialr_cli.output import inspection_text, print_json
    from oialr_peft.storage.inspection import inspect_checkpoint

    found = inspect_checkpoint(checkpoint)
    print_json(found.to_dict()) if json else typer.echo(inspection_text(found, every_layer=layers))


@app.command(
    epilog="Examples:  oialr estimate path/to/config --rank 64  |  oialr estimate user/model --mode pretraining --rank 0.25"
)
def estimate(
    model: Annotated[str, typer.Argument(help="Directory with a config.json, or a Hub id. No weights are read.")],
    rank: Annotated[float, typer.Option(help="After the freeze: a count ≥ 1, or a fraction of full rank.")] = 0.25,
    mode: Annotated[Mode, typer.Option(help="Of the configuration.")] = Mode.ADAPTER,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in an optimizer step.")] = 8192,
    dtype: Annotated[Precision, typer.Option(help="Of parameters, gradients and moments.")] = Precision.FLOAT32,
    json: Json = False,
) -> None:
    """Estimate parameters, memory, FLOPs and crossover ranks before training, from a configuration alone."""
    if rank <= 0 or (rank >= 1 and rank != int(rank)):
        raise typer.BadParameter(
            f"must be a whole number ≥ 1 or a fraction in (0, 1), but is {rank:g}.", param_hint="--rank"
        )
    import torch

    from oialr_cli.output import estimate_text, print_json
    from oialr_peft.report import estimate as estimation

    count = int(rank) if rank >= 1 else rank
    found = estimation.estimate(model, rank=count, mode=mode.value, tokens=tokens, dtype=getattr(torch, dtype.value))
    print_json(found.to_dict()) if json else typer.echo(estimate_text(found))


@app.command(
    epilog="Examples:  oialr export my-adapter --to low-rank --output my-model  |  oialr export runs/vit --to dense --base user/base --output dense"
)
def export(
    checkpoint: Annotated[str, typer.Argument(help="Directory or Hub id of an adapter or a low-rank checkpoint.")],
    to: Annotated[Target, typer.Option(help="Form to write.")],
    output: Annotated[Path, typer.Option(help="Directory to write to.")],
    base: Annotated[
        str | None, typer.Option(help="Base model, if the adapter does not name it or it has moved.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a checkpoint as a low-rank model, a dense model, or a LoRA adapter (adapters that are corrections only)."""
    from oialr_cli.output import print_json
    from oialr_peft.storage.conversion import convert

    difference = convert(checkpoint, to.value, output, base=base)
    if json:
        measured = None if difference is None else difference._asdict()
        print_json({"output": str(output), "form": to.value, "difference": measured})
    else:
        typer.echo(f"Wrote {output}" + (f"; {difference}" if difference else ""))


@app.command(epilog="Examples:  oialr report runs/vit  |  oialr report runs/vit --output vit.html")
def report(
    run: Annotated[
        Path, typer.Argument(help="`output_dir` of a training with OIALRTrainer, or one of its checkpoints.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="File to write; by default report.html in the run's directory.")
    ] = None,
    spectra: Annotated[bool, typer.Option(help="Read the saved Σ for their singular values.")] = True,
    json: Json = False,
) -> None:
    """Write one HTML page about a run: key figures, plots, layers, checks, configuration. It loads nothing."""
    from oialr_cli.output import print_json, write_text
    from oialr_peft.report.run import run_report

    file = run / "report.html" if output is None else output
    write_text(file, run_report(run, spectra=spectra))
    print_json({"output": str(file)}) if json else typer.echo(f"Wrote {file}")


@app.command(epilog="Examples:  oialr compare runs/a runs/b  |  oialr compare runs/a runs/b --html both.html")
def compare(
    run_a: Annotated[Path, typer.Argument(help="`output_dir` of a training.")],
    run_b: Annotated[Path, typer.Argument(help="`output_dir` of another one.")],
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page to this file.")] = None,
    json: Json = False,
) -> None:
    """Compare two runs: last metrics, trainable share, time, ranks, and the settings that differ."""
    from oialr_cli.output import comparison_text, print_json, write_text
    from oialr_peft.report.comparison import Comparison

    found = Comparison.of(run_a, run_b)
    if html is not None:
        write_text(html, found.to_html())
    print_json(found.to_dict()) if json else typer.echo(comparison_text(found))


def main() -> None:
    """Run the command line; what other packages log while they are imported is kept quiet without `--debug`."""
    if "--debug" not in sys.argv:
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of transformers as well
    app()
