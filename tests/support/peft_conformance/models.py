"""Tiny models with random weights, in the place of those that PEFT's suites get from the hub.

Each is saved in a directory called like its id on the hub. transformers looks for such a directory, relative to the
working directory, before it asks the hub; so a suite that runs in that of `make_models` needs no network and no other ids.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from fetch_peft_tests import CACHE
from transformers import AutoConfig, PretrainedConfig

LAYERS = 2
WIDTH = 16
VOCABULARY = 64
# large enough that a changed weight changes the output by more than the tolerances of the suites
SCALE = 0.2


class TinyModel(NamedTuple):
    """What a model is called on the hub, and how it is made: settings by the names that its type has for them."""

    hub_id: str
    architecture: str
    model_type: str
    settings: dict[str, Any]

    def config(self) -> PretrainedConfig:
        """The configuration of the model."""
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        return AutoConfig.for_model(self.model_type, vocab_size=VOCABULARY, **{**special, **self.settings})


GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 64, "initializer_range": SCALE}
TRANSFORMER = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 64,
    "initializer_range": SCALE,
}
GROUPED_QUERIES = {**TRANSFORMER, "num_key_value_heads": 1}
DEBERTA = {**TRANSFORMER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
OPT = {
    "hidden_size": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "ffn_dim": 2 * WIDTH,
    "max_position_embeddings": 64,
    "init_std": SCALE,
}
T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 2 * WIDTH, "num_layers": LAYERS, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "max_position_embeddings": 64,
    "init_std": SCALE,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
GEMMA = {**GROUPED_QUERIES, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}

# those of the suites, and three more architectures: GPT-NeoX, mT5, and CLIP's text model
MODELS = {
    "OPT": TinyModel("peft-internal-testing/tiny-random-OPTForCausalLM", "OPTForCausalLM", "opt", OPT),
    "GPT2": TinyModel("peft-internal-testing/tiny-random-GPT2LMHeadModel", "GPT2LMHeadModel", "gpt2", GPT),
    "GPTJ": TinyModel(
        "peft-internal-testing/tiny-random-GPTJForCausalLM", "GPTJForCausalLM", "gptj", {**GPT, "rotary_dim": 4}
    ),
    "GPTNeoX": TinyModel(
        "hf-internal-testing/tiny-random-GPTNeoXForCausalLM", "GPTNeoXForCausalLM", "gpt_neox", TRANSFORMER
    ),
    "Llama": TinyModel(
        "trl-internal-testing/tiny-random-LlamaForCausalLM", "LlamaForCausalLM", "llama", GROUPED_QUERIES
    ),
    "Qwen2": TinyModel("peft-internal-testing/tiny-dummy-qwen2", "Qwen2ForCausalLM", "qwen2", GROUPED_QUERIES),
    "Gemma3": TinyModel("hf-internal-testing/tiny-random-Gemma3ForCausalLM", "Gemma3ForCausalLM", "gemma3_text", GEMMA),
    "T5": TinyModel(
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
        "T5ForConditionalGeneration",
        "t5",
        T5,
    ),
    "mT5": TinyModel(
        "hf-internal-testing/tiny-random-MT5ForConditionalGeneration", "MT5ForConditionalGeneration", "mt5", T5
    ),
    "BART": TinyModel(
        "peft-internal-testing/tiny-random-BartForConditionalGeneration", "BartForConditionalGeneration", "bart", BART
    ),
    "BERT": TinyModel("peft-internal-testing/tiny-random-BertModel", "BertModel", "bert", TRANSFORMER),
    "RoBERTa": TinyModel("peft-internal-testing/tiny-random-RobertaModel", "RobertaModel", "roberta", TRANSFORMER),
    "DeBERTa": TinyModel("peft-internal-testing/tiny-random-DebertaModel", "DebertaModel", "deberta", DEBERTA),
    "DeBERTa-v2": TinyModel(
        "peft-internal-testing/tiny-random-DebertaV2Model", "DebertaV2Model", "deberta-v2", DEBERTA
    ),
    "CLIP": TinyModel("hf-internal-testing/tiny-random-CLIPTextModel", "CLIPTextModel", "clip_text_model", TRANSFORMER),
    "BERT classifier": TinyModel(
        "peft-internal-testing/tiny-random-BertForSequenceClassification",
        "BertForSequenceClassification",
        "bert",
        TRANSFORMER,
    ),
    "RoBERTa classifier": TinyModel(
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification",
        "RobertaForSequenceClassification",
        "roberta",
        TRANSFORMER,
    ),
    "Llama classifier": TinyModel(
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",
        "LlamaForSequenceClassification",
        "llama",
        {**GROUPED_QUERIES, "num_labels": 1},
    ),
}


def make_models() -> Path:
    """Make the models unless they are there, and return the directory in which their ids are directories."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    destination = CACHE / f"tiny-models-{recipe}-transformers-{transformers.__version__}"
    if destination.exists():
        return destination
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary, torch.random.fork_rng():
        models = Path(temporary) / "models"
        for tiny in MODELS.values():
            torch.manual_seed(0)
            getattr(transformers, tiny.architecture)(tiny.config()).save_pretrained(models / tiny.hub_id)
        try:
            models.rename(destination)  # last, so that what exists is complete
        except OSError:  # another process was faster
            if not destination.exists():
                raise
    return destination
