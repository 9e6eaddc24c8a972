r"""Forecasting from scratch: Autoformer on ETTh2 or ETTm2, dense training against OIALR with the same budget.

    python benchmarks/forecasting.py --data ETTh2-train-val.csv --horizon 192 \
        --run dense dense '{"lr": 0.002}' --run stable oialr '{"cutoff": 0.35}'

Each `--run` is a name, a method (`dense` or `oialr`) and the settings of `OIALRConfig` as JSON; "lr" among them is the learning
rate. Each is trained with every seed of `--seeds`. All series at once, standardized with mean and standard deviation of
the training months; the first 12 months train, the next 4 validate, as usual (months of 30 days).

The model is the one of transformers without its probabilistic head: the forecast is the sum of the seasonal and the trend part
of the decoder's output, the loss its mean squared error, as in Autoformer's paper. No lags, no rescaling of each window. From
the original differ: values are embedded by a linear layer, not by a convolution, and time features by the same; where the decoder
is longer than the encoder, transformers' cross-correlation sees only the first steps of the queries.

Every epoch takes other `--windows` of the training months at random, validation every `--stride`-th window. Printed are means and
standard deviations over seeds; the MSE of every epoch, with the percentage that trains, is in the lines of JSON:

MSE, MAE      on the validation months: of the best epoch, and MSE of the last
trainable     percent of the dense model's parameters: mean over all steps, after the best epoch, and after the last step
seconds       of training, checks included; runs side by side slow each other down, compare with `--jobs 1`

`--output` keeps every run as one line of JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from common import Job, Training, jobs_of, parser, print_spreads, start, trained, training_options, tuned
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoformerConfig, AutoformerModel

from oialr_peft import OIALRConfig

MONTHS = (12, 4)  # of 30 days each: training, validation
CONTEXT = 96  # steps that the encoder sees
LABEL = 48  # of these, those that the decoder sees


@dataclass(frozen=True)
class Series:
    """Standardized values (time, series), the clock (time, features) in [-.5, .5], and where validation starts."""

    values: Tensor
    clock: Tensor
    border: int

    @classmethod
    def read(cls, path: str, per_hour: int | None) -> Series:
        """From a table whose first column is the date; without `per_hour`, the rows per hour follow from it."""
        table = pd.read_csv(path, parse_dates=[0])
        dates = table.iloc[:, 0].dt
        per_hour = per_hour or round(pd.Timedelta(hours=1) / table.iloc[:, 0].diff().median())
        training, validation = (months * 30 * 24 * per_hour for months in MONTHS)
        if len(table) < training + validation:
            raise ValueError(
                f"`--data` must hold {training + validation} rows, 16 months with {per_hour} rows an hour, but {path} "
                f"holds {len(table)}. Give the whole file, or `--per-hour` if the rows are not that far apart."
            )
        values = torch.tensor(table.iloc[: training + validation, 1:].to_numpy(), dtype=torch.float32)
        values = (values - values[:training].mean(0)) / values[:training].std(0, correction=0)
        parts = [(dates.hour, 23), (dates.day_of_week, 6), (dates.day - 1, 30), (dates.day_of_year - 1, 365)]
        if per_hour > 1:
            parts.append((dates.minute, 59))
        clock = torch.stack(
            [torch.tensor(part.to_numpy(), dtype=torch.float32) / last - 0.5 for part, last in parts], 1
        )
        return cls(values, clock[: training + validation], training)

    def training_starts(self, horizon: int) -> Tensor:
        """First rows of all windows that end in the training months."""
        return torch.arange(self.border - CONTEXT - horizon + 1)

    def validation_starts(self, horizon: int, stride: int) -> Tensor:
        """First rows of windows whose forecast lies in the validation months."""
        return torch.arange(self.border - CONTEXT, len(self.values) - CONTEXT - horizon + 1, stride)


def autoformer(series: Series, args: argparse.Namespace) -> AutoformerModel:
    """An Autoformer that predicts all series at once."""
    return AutoformerModel(
        AutoformerConfig(
            prediction_length=args.horizon,
            context_length=CONTEXT,
            label_length=LABEL,
            input_size=series.values.shape[1],
            num_time_features=series.clock.shape[1],
            lags_sequence=[0],
            scaling=False,
            d_model=args.hidden,
            encoder_layers=args.layers,
            decoder_layers=1,
            encoder_attention_heads=8,
            decoder_attention_heads=8,
            encoder_ffn_dim=4 * args.hidden,
            decoder_ffn_dim=4 * args.hidden,
            dropout=args.dropout,
            attention_dropout=args.dropout,
            activation_dropout=args.dropout,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
        )
    )


def forecast(model: nn.Module, series: Series, starts: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Forecast and truth, (windows, horizon, series) both."""
    rows = starts[:, None] + torch.arange(CONTEXT + horizon)
    values, clock = series.values[rows], series.clock[rows]
    past, future = values[:, :CONTEXT], values[:, CONTEXT:]
    output = model(
        past_values=past,
        past_time_features=clock[:, :CONTEXT],
        past_observed_mask=torch.ones_like(past),
        future_values=torch.zeros_like(future),  # the model takes only their shape
        future_time_features=clock[:, CONTEXT:],
        use_cache=False,
    )
    # the first channels are the series, the others features
    predicted = output.last_hidden_state + output.trend
    return predicted[:, -horizon:, : values.shape[-1]], future


@torch.no_grad()
def errors(model: nn.Module, series: Series, args: argparse.Namespace) -> tuple[float, float]:
    """MSE and MAE on the validation months."""
    model.eval()
    squared = absolute = count = 0.0
    for starts in series.validation_starts(args.horizon, args.stride).split(args.batch):
        predicted, future = forecast(model, series, starts, args.horizon)
        squared += (predicted - future).square().sum().item()
        absolute += (predicted - future).abs().sum().item()
        count += future.numel()
    model.train()
    return squared / count, absolute / count


def epochs(series: Series, args: argparse.Namespace, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """The batches of each epoch: first rows of windows drawn without replacement within it."""
    generator = torch.Generator().manual_seed(seed)
    starts = series.training_starts(args.horizon)
    for _ in range(args.epochs):
        drawn = starts[torch.randperm(len(starts), generator=generator)[: args.windows]]
        yield tuple(part for part in drawn.split(args.batch) if len(part) == args.batch)


def train(method: str, settings: dict[str, Any], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run, and what is reported of it."""
    settings = dict(settings)
    lr = settings.pop("lr", args.lr)
    torch.set_num_threads(args.threads or 1)
    series = Series.read(args.data, args.per_hour)
    torch.manual_seed(seed)
    model: Any = autoformer(series, args)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)  # the positions are fixed
    if method == "oialr":
        model = get_peft_model(model, OIALRConfig(mode="pretraining", **settings))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=args.decay)
    steps = args.epochs * (min(args.windows, len(series.training_starts(args.horizon))) // args.batch)
    fixed = series.training_starts(args.horizon)[:: max(1, series.border // args.batch)][: args.batch]

    def loss_on(starts: Tensor) -> Tensor:
        return nn.functional.mse_loss(*forecast(model, series, starts, args.horizon))

    @torch.no_grad()
    def probe() -> float:
        model.eval()
        loss = loss_on(fixed).item()
        model.train()
        return loss

    training = Training(model, optimizer, steps, total=total, adaptive=method == "oialr", probe=probe)
    curve = []
    for batches in epochs(series, args, seed):
        for starts in batches:
            training.step(lambda starts=starts: loss_on(starts))
        mse, mae = errors(model, series, args)
        train_mse = sum(training.losses[-len(batches) :]) / len(batches)
        curve.append([round(value, 4) for value in (mse, mae, training.percent, train_mse)])
    best = min(curve)
    return {
        "mse": best[0],
        "mae": best[1],
        "trainable_best": best[2],
        "best_epoch": 1 + curve.index(best),
        "last_mse": curve[-1][0],
        "curve": curve,
        "lr": lr,
        "parameters": total,
        **training.summary(),
    }


def one(job: Job) -> dict[str, Any]:
    """What is kept of a run; `curve` is MSE, MAE, % trainable and training MSE of each epoch."""
    name, method, settings, seed, args = job
    keys = ("horizon", "windows", "epochs", "batch", "decay", "dropout", "hidden", "layers", "stride")
    sizes = {key: getattr(args, key) for key in keys}
    described = {"method": method, "settings": settings, "seed": seed, **sizes}
    return {"run": name, **described, **train(method, settings, seed, args)}


def main() -> None:
    options = parser(__doc__, repeats=1)
    options.add_argument("--data", required=True, help="ETTh2 or ETTm2 as CSV: date and series; 16 months or more")
    options.add_argument("--per-hour", type=int, help="rows per hour (default: as the dates say)")
    options.add_argument("--horizon", type=int, default=96, help="steps to forecast: 96 (default), 192, 336 or 720")
    options.add_argument("--windows", type=int, default=1024, help="windows per epoch")
    options.add_argument("--stride", type=int, default=8, help="of the validation windows")
    options.add_argument("--epochs", type=int, default=8)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--decay", type=float, default=0.01, help="weight decay")
    options.add_argument("--dropout", type=float, default=0.05)
    options.add_argument("--hidden", type=int, default=64)
    options.add_argument("--layers", type=int, default=2, help="of the encoder; the decoder has one")
    training_options(options)
    args = options.parse_args()
    start(args)
    jobs = tuned(one, jobs_of(args, ("dense", "oialr")), args, "mse", "minimize")
    columns = {
        "MSE, best": ("mse", 4),
        "MAE": ("mae", 4),
        "MSE, last": ("last_mse", 4),
        "trainable %, mean": ("trainable_mean", 1),
        "at the best": ("trainable_best", 1),
        "at the end": ("trainable_end", 1),
        "jump": ("jump", 3),
        "seconds": ("seconds", 0),
    }
    print_spreads(trained(one, jobs, args), [name for name, *_ in args.run], columns)


if __name__ == "__main__":
    main()
