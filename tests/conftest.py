"""Fixtures of all tests: fixed seeds, float64, and tiny models made from configurations, without a network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from processes import ProcessPool
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

torch.set_num_threads(1)  # for models this small, threads only wait for each other

# the same examples in every run, and none that fails because the machine is busy
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

CLASSES = 3
VOCABULARY = 30


class MLP(nn.Module):
    """Two tall-and-wide linear layers and a head; no transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 5, bias=False)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def _bert() -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )
    return BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def _vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def _t5() -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5ForConditionalGeneration(config)


_MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": MLP, "bert": _bert, "gpt2": _gpt2, "vit": _vit, "t5": _t5}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sentinels begin first: they are the longest, and no process shall wait for one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("sentinel") is None)


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Every test starts from the same random state and leaves the outer one as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield 0


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of its own, for tests that watch the global one."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def float64() -> Iterator[torch.dtype]:
    """New tensors are float64 during the test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    """Makes a tiny model by name ("mlp", "bert", "gpt2", "vit", "t5"): float64, in eval mode, equal for every call."""

    def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = _MODELS[name]().to(dtype).eval()
            # transformers starts biases at zero and weights tiny; a test must see both
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return model

    return make


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., dict[str, Tensor]]:
    """Makes a batch for a tiny model, as keyword arguments of its `forward`."""

    def make(name: str, dtype: torch.dtype = torch.float64, batch: int = 3) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(2)
        if name == "mlp":
            return {"x": torch.randn(batch, 6, generator=generator, dtype=torch.float64).to(dtype)}
        if name == "vit":
            return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)}
        tokens = torch.randint(2, VOCABULARY, (batch, 5), generator=generator)
        return {"input_ids": tokens, "labels": tokens} if name == "t5" else {"input_ids": tokens}

    return make


@pytest.fixture(scope="session")
def outputs_of() -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """Runs a model without gradient and returns its output or logits."""

    def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            output = model(**inputs)
        return output if isinstance(output, Tensor) else output.logits

    return run


@pytest.fixture
def mlp(make_model: Callable[..., nn.Module]) -> nn.Module:
    return make_model("mlp")


@pytest.fixture
def bert(make_model: Callable[..., nn.Module]) -> nn.Module:
    """A BERT classifier: nn.Linear, a pooler, a head."""
    return make_model("bert")


@pytest.fixture
def gpt2(make_model: Callable[..., nn.Module]) -> nn.Module:
    """A GPT-2 language model: Conv1D, output embedding tied to the input embedding."""
    return make_model("gpt2")


@pytest.fixture
def vit(make_model: Callable[..., nn.Module]) -> nn.Module:
    """A ViT classifier: a convolution in front, a head."""
    return make_model("vit")


@pytest.fixture
def t5(make_model: Callable[..., nn.Module]) -> nn.Module:
    """A T5: encoder, decoder and output share one embedding."""
    return make_model("t5")


@pytest.fixture(scope="session")
def two() -> Iterator[ProcessPool]:
    """Two processes in one process group, which run what a test gives them."""
    pool = ProcessPool(2)
    yield pool
    pool.stop()
