"""The models of the benchmarks, made from configurations: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)


def bert_config(layers: int, hidden: int, **options: Any) -> BertConfig:
    """BERT-base's proportions: heads of 64, an inner width of 4 times `hidden`."""
    heads = max(1, hidden // 64)
    return BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden, **options
    )


def parameters(model: nn.Module, *, trainable: bool) -> int:
    """Number of parameters, or of those that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def base_model(name: str, layers: int | None, hidden: int | None) -> PreTrainedModel:
    """A new model; the same weights at every call."""
    torch.manual_seed(0)
    if name == "bert":
        return BertForSequenceClassification(bert_config(layers or 12, hidden or 768))
    if name == "gpt2":
        width = hidden or 768
        return GPT2LMHeadModel(GPT2Config(n_layer=layers or 12, n_embd=width, n_head=max(1, width // 64)))
    if name == "gemma-270m":
        width = hidden or 640
        return Gemma3ForCausalLM(
            Gemma3TextConfig(
                vocab_size=262_144,
                hidden_size=width,
                intermediate_size=16 * width // 5,
                num_hidden_layers=layers or 18,
                num_attention_heads=4,
                num_key_value_heads=1,
                head_dim=256,
            )
        )
    width = hidden or 2048
    heads = max(1, width // 64)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128_256,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers or 16,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            tie_word_embeddings=True,
        )
    )
