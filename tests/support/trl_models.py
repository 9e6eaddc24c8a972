"""A tiny language model over letters for TRL's trainers: its words, its tokenizer, and data sets of each kind."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", *"abcdefghijklmnopqrstuvwxyz"]
LETTERS = WORDS[5:]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of WORDS."""
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        num_labels=1,
        id2label={0: "score"},
    )


def llama(kind: type[nn.Module] = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    return kind(llama_config())


def letters(start: int, count: int, step: int) -> str:
    return " ".join(LETTERS[(start + index * step) % 26] for index in range(count))


def sentences() -> Dataset:
    return Dataset.from_dict({"text": [letters(i, 6, 3) for i in range(48)]})


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [letters(i, 3, 5) for i in range(48)]})


def preferences() -> Dataset:
    chosen = [" " + letters(i, 2, 1) for i in range(48)]
    rejected = [" " + letters(i * 7 + 1, 2, 2) for i in range(48)]
    return Dataset.from_dict({**prompts().to_dict(), "chosen": chosen, "rejected": rejected})
