"""Fine-tune a language model for classification with OIALR in adapter mode: the base weights stay as they are.

By default nothing is downloaded. The texts are docstrings of installed libraries. A tiny BERT first learns, with all its
weights, which of four libraries a docstring comes from; then it is fine-tuned to name the part of SciPy:

    python examples/03_finetune_adapter.py

A pretrained model, and a dataset with columns `text` and `label`, by hub id or local path:

    python examples/03_finetune_adapter.py --model google-bert/bert-base-uncased --dataset fancyzhx/ag_news
"""

from dataclasses import dataclass, field
from pathlib import Path

import evaluate
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from offline import docstrings
from peft import get_peft_model
from tokenizers import BertWordPieceTokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from oialr_peft import OIALRConfig, OIALRTrainer, rank_table

# dependencies of the examples
LIBRARIES = ["matplotlib", "pandas", "scipy", "sklearn"]
NEW_LIBRARIES = ["networkx", "numpy", "sympy"]
METRICS = Path(__file__).with_name("metrics")


@dataclass
class ExampleArguments:
    """What to train, and the settings of OIALR."""

    model: str | None = field(default=None, metadata={"help": "Hub id or path; default: a tiny BERT made here."})
    dataset: str = field(default="docstrings", metadata={"help": "Hub id or path, or `docstrings`."})
    metric: str = field(default=str(METRICS / "accuracy"), metadata={"help": "Name on the Hub, or path, of a metric."})
    rank: float = field(default=0.5, metadata={"help": "Rank of the correction, as a share of full rank."})
    cutoff: float = field(default=0.02, metadata={"help": "Directions with σ < cutoff·σ_max are dropped."})


@dataclass
class DemoTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of this example."""

    output_dir: str = "runs/finetune_adapter"
    num_train_epochs: float = 3
    per_device_train_batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: float = 0.05
    logging_steps: float = 0.1
    save_strategy: str = "no"
    report_to: str = "none"


def docstring_data(libraries: list[str]) -> DatasetDict:
    """As many docstrings of each library; the test texts are the same for every seed."""
    texts = [list(docstrings(library)) for library in libraries]
    features = Features(text=Value("string"), label=ClassLabel(names=libraries))
    size = min(len(found) for found in texts)
    rows = [
        {"text": text, "label": label}
        for label, found in enumerate(texts)
        for text in found[:: len(found) // size][:size]
    ]
    return Dataset.from_list(rows, features=features).train_test_split(0.2, stratify_by_column="label", seed=0)


def load_data(dataset: str) -> DatasetDict:
    if dataset == "docstrings":
        return docstring_data(NEW_LIBRARIES)
    data = load_dataset(dataset)
    return data if "test" in data else data["train"].train_test_split(0.2, seed=0)


def make_trainer(trainer_class, model, tokenizer, data: DatasetDict, args: TrainingArguments, metric) -> Trainer:
    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions.argmax(axis=-1), references=prediction.label_ids)

    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=32), batched=True)
    return trainer_class(
        model=model,
        args=args,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=compute_metrics,
    )


def make_base_model(directory: Path, args: TrainingArguments, metric) -> Path:
    """Train a tokenizer, and a tiny BERT from scratch, on the docstrings of four libraries; save both."""
    data = docstring_data(LIBRARIES)
    words = BertWordPieceTokenizer()
    words.train_from_iterator(data["train"]["text"], vocab_size=4000, show_progress=False)
    tokenizer = BertTokenizer(vocab=words.get_vocab())
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=32,
        num_labels=len(LIBRARIES),
    )
    model = AutoModelForSequenceClassification.from_config(config)
    trainer = make_trainer(Trainer, model, tokenizer, data, args, metric)
    trainer.train()
    print(f"base model: accuracy {trainer.evaluate()['eval_accuracy']:.2%} on {', '.join(LIBRARIES)}")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def main() -> None:
    example, args = HfArgumentParser((ExampleArguments, DemoTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    output = Path(args.output_dir)
    metric = evaluate.load(example.metric)
    base = example.model or make_base_model(output / "base", args, metric)
    data = load_data(example.dataset)
    names = data["train"].features["label"].names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    model = AutoModelForSequenceClassification.from_pretrained(base, ignore_mismatched_sizes=True, **labels)
    # the task type makes the new head train beside the adapter
    config = OIALRConfig(task_type="SEQ_CLS", mode="adapter", rank=example.rank, cutoff=example.cutoff)
    model = get_peft_model(model, config)
    trainer = make_trainer(OIALRTrainer, model, AutoTokenizer.from_pretrained(base), data, args, metric)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    model.save_pretrained(output / "adapter")

    print(f"\n{rank_table(model)}\n")
    print(f"accuracy: {before:.2%} before, {after:.2%} after; {1 / len(names):.2%} by chance")
    print(f"trainable: {trainer.oialr_controller.history[-1].trainable_percent:.2f} % of the base model's parameters")
    model.merge_and_unload(safe_merge=True).save_pretrained(output / "merged")  # a plain transformers model
    AutoTokenizer.from_pretrained(base).save_pretrained(output / "merged")
    print(f"adapter and merged model: {output}")


if __name__ == "__main__":
    main()
