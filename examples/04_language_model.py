r"""Train a causal language model with OIALR: a small one from scratch, or a pretrained one in adapter mode.

By default nothing is downloaded: a tiny GPT-2 learns Python's language reference, which is part of every Python:

    python examples/04_language_model.py

With `--model`, a pretrained model is fine-tuned, and its weights stay as they are. The one just trained goes on to the
docstrings of installed libraries; others come by hub id or local path, as do datasets with a column `text`:

    python examples/04_language_model.py --model runs/language_model/dense --dataset docstrings --output_dir runs/tuned
    python examples/04_language_model.py --model openai-community/gpt2 --dataset Salesforce/wikitext \
        --dataset_config wikitext-2-raw-v1 --block_size 512
"""

import math
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from offline import byte_level_bpe, docstrings, language_reference
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    HfArgumentParser,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from oialr_peft import OIALRConfig, OIALRTrainer, rank_table, save_dense, save_lora, save_low_rank


@dataclass
class ExampleArguments:
    """What to train, and the settings of OIALR."""

    model: str | None = field(default=None, metadata={"help": "Hub id or path; default: a tiny GPT-2 from scratch."})
    dataset: str = field(default="reference", metadata={"help": "Hub id or path, `reference` or `docstrings`."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the Hub."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a sequence."})
    cutoff: float | None = field(default=None, metadata={"help": "Default: .2 from scratch, .02 in adapter mode."})
    rank: float = field(default=0.25, metadata={"help": "Adapter mode: rank of the correction, share of full."})


@dataclass
class DemoTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of this example."""

    output_dir: str = "runs/language_model"
    num_train_epochs: float = 3
    per_device_train_batch_size: int = 8
    learning_rate: float = 2e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    logging_steps: float = 0.1
    save_strategy: str = "no"
    report_to: str = "none"


def load_texts(example: ExampleArguments) -> DatasetDict:
    """Splits `train` and `validation` with a column `text`."""
    if example.dataset in ("reference", "docstrings"):
        texts = language_reference() if example.dataset == "reference" else list(docstrings("sklearn"))
        return to_splits(Dataset.from_dict({"text": texts}))
    data = load_dataset(example.dataset, example.dataset_config)
    return data if "validation" in data else to_splits(data["train"])


def to_splits(data: Dataset) -> DatasetDict:
    split = data.train_test_split(0.1, seed=0)
    return DatasetDict(train=split["train"], validation=split["test"])


def to_blocks(data: DatasetDict, tokenizer, block_size: int) -> DatasetDict:
    """All texts in a row, cut into blocks of equal length; the rest of fewer tokens is left out."""

    def blocks(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens = list(
            chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in tokenizer(rows["text"])["input_ids"])
        )
        cut = [tokens[start : start + block_size] for start in range(0, len(tokens) - block_size + 1, block_size)]
        return {"input_ids": cut, "labels": cut}

    return data.map(blocks, batched=True, batch_size=None, remove_columns=data["train"].column_names)


def make_model(example: ExampleArguments, texts: Dataset):
    """Model with its adapter, and tokenizer."""
    if example.model is not None:
        model, tokenizer = (kind.from_pretrained(example.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
        cutoff = 0.02 if example.cutoff is None else example.cutoff
        config = OIALRConfig(task_type="CAUSAL_LM", mode="adapter", rank=example.rank, cutoff=cutoff)
        return get_peft_model(model, config), tokenizer
    tokenizer = byte_level_bpe(texts["text"], vocab_size=2000)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=example.block_size,
        n_embd=128,
        n_layer=2,
        n_head=4,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    cutoff = 0.2 if example.cutoff is None else example.cutoff
    oialr = OIALRConfig(task_type="CAUSAL_LM", mode="pretraining", delay=0.4, cutoff=cutoff)
    return get_peft_model(AutoModelForCausalLM.from_config(config), oialr), tokenizer


def main() -> None:
    example, args = HfArgumentParser((ExampleArguments, DemoTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    texts = load_texts(example)
    model, tokenizer = make_model(example, texts["train"])
    data = to_blocks(texts, tokenizer, example.block_size)
    trainer = OIALRTrainer(
        model=model,
        args=args,
        data_collator=default_data_collator,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    if args.process_index > 0:
        return

    print(f"\n{rank_table(model)}\n")
    print(f"perplexity: {math.exp(before):.1f} before, {math.exp(after):.1f} after")
    print(f"trainable: {trainer.oialr_controller.history[-1].trainable_percent:.1f} % of the model's parameters")
    output = Path(args.output_dir)
    if example.model is None:
        save_low_rank(model, output / "low_rank")  # loads after `import oialr_peft`; see 08_serve.py
    else:
        model.save_pretrained(output / "adapter")
        save_lora(model, output / "lora")  # the same correction, for those without this package
    print(f"{save_dense(model, output / 'dense')}")  # a plain transformers model
    for directory in output.glob("*/config.json"):
        tokenizer.save_pretrained(directory.parent)
    print(f"models: {output}")


if __name__ == "__main__":
    main()
