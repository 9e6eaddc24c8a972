r"""Supervised fine-tuning with TRL: the mixin in front of `SFTTrainer` is all that OIALR needs.

By default nothing is downloaded: a tiny Llama, made here, learns what the functions of scikit-learn do, from their names:

    python examples/06_sft.py

A pretrained model is fine-tuned in adapter mode; datasets of every form that TRL knows work, with chat templates too:

    python examples/06_sft.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --learning_rate 2e-4
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from offline import byte_level_bpe, docstrings
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, set_seed
from trl import SFTConfig, SFTTrainer

from oialr_peft import OIALRConfig, OIALRTrainerMixin, rank_table


class OIALRSFTTrainer(OIALRTrainerMixin, SFTTrainer):
    """`SFTTrainer` with the schedule of OIALR; DPO, reward and GRPO trainers are made in the same way."""


@dataclass
class ExampleArguments:
    """What to train, and the settings of OIALR."""

    model: str | None = field(default=None, metadata={"help": "Hub id or path; default: a tiny Llama from scratch."})
    dataset: str = field(default="docstrings", metadata={"help": "Hub id or path, or `docstrings`."})
    rank: float = field(default=0.25, metadata={"help": "Adapter mode: rank of the correction, share of full."})
    cutoff: float | None = field(default=None, metadata={"help": "Default: .2 from scratch, .02 in adapter mode."})


@dataclass
class DemoSFTConfig(SFTConfig):
    """`SFTConfig` with the defaults of this example."""

    output_dir: str = "runs/sft"
    num_train_epochs: float = 3
    per_device_train_batch_size: int = 16
    learning_rate: float = 2e-3
    warmup_steps: float = 0.05
    max_length: int = 96
    logging_steps: float = 0.1
    save_strategy: str = "no"
    report_to: str = "none"
    bf16: bool = False


def load_data(dataset: str) -> DatasetDict:
    """Splits `train` and `test`; the loss is that of the completions."""
    if dataset != "docstrings":
        data = load_dataset(dataset)
        return data if "test" in data else data["train"].train_test_split(0.1, seed=0)
    rows = [{"prompt": f"What does `{name}` do?\n", "completion": text} for text, name in docstrings("sklearn").items()]
    return Dataset.from_list(rows).train_test_split(0.1, seed=0)


def make_model(name: str | None, data: Dataset):
    """Model and tokenizer."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    texts = (row["prompt"] + row["completion"] for row in data)
    tokenizer = byte_level_bpe(texts, vocab_size=2000)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return AutoModelForCausalLM.from_config(config), tokenizer


def make_config(example: ExampleArguments) -> OIALRConfig:
    if example.model is None:
        cutoff = 0.2 if example.cutoff is None else example.cutoff
        return OIALRConfig(task_type="CAUSAL_LM", mode="pretraining", delay=0.4, cutoff=cutoff)
    cutoff = 0.02 if example.cutoff is None else example.cutoff
    return OIALRConfig(task_type="CAUSAL_LM", mode="adapter", rank=example.rank, cutoff=cutoff)


def main() -> None:
    example, args = HfArgumentParser((ExampleArguments, DemoSFTConfig)).parse_args_into_dataclasses()
    set_seed(args.seed)
    data = load_data(example.dataset)
    model, tokenizer = make_model(example.model, data["train"])
    trainer = OIALRSFTTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        peft_config=make_config(example),  # the trainer puts the adapter into the model
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if args.process_index > 0:
        return

    model = trainer.accelerator.unwrap_model(trainer.model)
    print(f"\n{rank_table(model)}\n")
    print(f"loss of the completions: {before:.3f} before, {after:.3f} after")
    print(f"trainable: {trainer.oialr_controller.history[-1].trainable_percent:.1f} % of the model's parameters")
    if example.dataset == "docstrings":
        prompt = data["test"][0]["prompt"]
        tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
        answer = model.eval().generate(**tokens, max_new_tokens=24, do_sample=False)
        print(f"{prompt}→ {tokenizer.decode(answer[0, tokens['input_ids'].shape[1] :], skip_special_tokens=True)}")
    print(f"adapter: {Path(args.output_dir)}")


if __name__ == "__main__":
    main()
