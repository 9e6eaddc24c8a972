r"""Train a forecaster from scratch with OIALR: a PatchTST that says the next half year of a weekly series.

By default the series is the carbon dioxide in the air above Mauna Loa, 1958 to 2001, which statsmodels brings:

    python examples/05_forecasting.py

Any CSV file of numbers works, one row for each point of time and one column for each series; other columns are left out:

    python examples/05_forecasting.py --dataset ETTh1.csv --context 336 --horizon 96 --season 24
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from peft import get_peft_model
from statsmodels.datasets import co2
from transformers import (
    AutoConfig,
    HfArgumentParser,
    PatchTSTConfig,
    PatchTSTForPrediction,
    TrainingArguments,
    set_seed,
)

from oialr_peft import OIALRConfig, OIALRTrainer, plot_history, rank_table, save_low_rank


@dataclass
class ExampleArguments:
    """What to forecast, and the settings of OIALR."""

    dataset: str = field(default="co2", metadata={"help": "Path or address of a CSV file, or `co2`."})
    model: str | None = field(
        default=None, metadata={"help": "Hub id or path of a PatchTST; default: a small new one."}
    )
    context: int = field(default=104, metadata={"help": "Points of time that the model sees."})
    horizon: int = field(default=26, metadata={"help": "Points of time that it forecasts."})
    season: int = field(default=52, metadata={"help": "Points of time after which the series is expected to return."})
    cutoff: float = field(default=0.2, metadata={"help": "Directions with σ < cutoff·σ_max are dropped."})
    delay: float = field(default=0.3, metadata={"help": "Before this point of the run no layer is factored."})


@dataclass
class DemoTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of this example."""

    output_dir: str = "runs/forecasting"
    num_train_epochs: float = 8
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 256
    learning_rate: float = 1e-3
    warmup_steps: float = 0.05
    logging_steps: float = 0.1
    save_strategy: str = "no"
    report_to: str = "none"


def load_series(dataset: str) -> np.ndarray:
    """(time, series) in float32; gaps are filled by straight lines."""
    table = co2.load_pandas().data if dataset == "co2" else pd.read_csv(dataset)
    return table.select_dtypes("number").interpolate().bfill().to_numpy(np.float32)


def windows(series: np.ndarray, context: int, horizon: int) -> Dataset:
    """Every stretch of the series, as what the model sees (context, series) and what follows (horizon, series)."""
    found = np.lib.stride_tricks.sliding_window_view(series, context + horizon, axis=0).transpose(0, 2, 1)
    data = Dataset.from_dict({"past_values": found[:, :context], "future_values": found[:, context:]})
    return data.with_format("torch")


def seasonal_error(test: Dataset, season: int) -> float:
    """Mean squared error of the forecast that everything is as it was one season ago."""
    past, future = (np.asarray(test[column]) for column in ("past_values", "future_values"))
    start, horizon = past.shape[1] - season, future.shape[1]
    return float(((np.concatenate([past, future], axis=1)[:, start : start + horizon] - future) ** 2).mean())


def make_model(example: ExampleArguments, series: int) -> PatchTSTForPrediction:
    sizes = {
        "num_input_channels": series,
        "context_length": example.context,
        "prediction_length": example.horizon,
    }
    if example.model is not None:
        config = AutoConfig.from_pretrained(example.model, **sizes)
        return PatchTSTForPrediction.from_pretrained(example.model, config=config, ignore_mismatched_sizes=True)
    config = PatchTSTConfig(
        **sizes,
        patch_length=8,
        patch_stride=4,
        d_model=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=256,
        loss="mse",
    )
    return PatchTSTForPrediction(config)


def main() -> None:
    example, args = HfArgumentParser((ExampleArguments, DemoTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    series = load_series(example.dataset)
    split = int(0.8 * len(series))
    series = (series - series[:split].mean(0)) / series[:split].std(0)
    train = windows(series[:split], example.context, example.horizon)
    test = windows(series[split - example.context :], example.context, example.horizon)  # forecasts begin at the split

    # a pretrained model is pruned with care: its small directions carry what it knows
    cutoff = example.cutoff if example.model is None else 0.02
    config = OIALRConfig(mode="pretraining", delay=example.delay, cutoff=cutoff)
    model = get_peft_model(make_model(example, series.shape[1]), config)
    args.label_names = ["future_values"]
    trainer = OIALRTrainer(model=model, args=args, train_dataset=train, eval_dataset=test)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    if args.process_index > 0:
        return

    output = Path(args.output_dir)
    save_low_rank(model, output / "low_rank")
    plot_history(trainer.oialr_controller.history, output / "history.png")
    print(f"\n{rank_table(model)}\n")
    print(f"trainable: {trainer.oialr_controller.history[-1].trainable_percent:.1f} % of the model's parameters")
    print(
        f"mean squared error: {before:.4f} before, {after:.4f} after; {seasonal_error(test, example.season):.4f} seasonal"
    )
    print(f"model and plot: {output}")


if __name__ == "__main__":
    main()
