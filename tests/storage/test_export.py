"""Standalone low-rank checkpoints: the same outputs, no dense weights, training on, dense again."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, save_as_lora
from PIL import Image
from safetensors import safe_open
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTImageProcessorPil,
    WhisperConfig,
    WhisperForConditionalGeneration,
    pipeline,
)
from transformers.pytorch_utils import Conv1D

from oialr_peft import OIALRConfig, save_dense, save_lora, save_low_rank, to_dense
from oialr_peft.storage.low_rank import LowRankConfig, LowRankLinear
from oialr_peft.tuner.attention import SplitAttention
from oialr_peft.tuner.lookup import adapter_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:The head .* is not a target:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:The factors of the .* layers hold:UserWarning"),  # of tiny layers
]

CLASSES = {
    "bert": AutoModelForSequenceClassification,
    "gpt2": AutoModelForCausalLM,
    "vit": AutoModelForImageClassification,
    "t5": AutoModelForSeq2SeqLM,
}


def factored(model, **settings):
    """Factored at half of full rank, with a Σ that is not diagonal."""
    settings = {"freeze_when": "delay", "delay": 0, "rank": 0.5, "init_weights": False, **settings}
    return get_peft_model(model, OIALRConfig(**{"mode": "replace", **settings})).eval()


def files_of(directory):
    return sorted(directory.glob("*.safetensors"))


@pytest.fixture(params=CLASSES)
def kind(request):
    return request.param


def test_a_standalone_model_computes_what_the_adapted_one_does(kind, tmp_path, make_model, make_inputs, outputs_of):
    model = factored(make_model(kind))
    save_low_rank(model, tmp_path)
    loaded = CLASSES[kind].from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(outputs_of(loaded, make_inputs(kind)), outputs_of(model, make_inputs(kind)), rtol=0, atol=1e-12)
    low_rank = [module for module in loaded.modules() if isinstance(module, LowRankLinear)]
    assert len(low_rank) == len(adapter_layers(model))
    assert type(loaded) is type(model.get_base_model())


def test_the_file_holds_the_factors_and_nothing_dense(kind, tmp_path, make_model):
    model = factored(make_model(kind))
    save_low_rank(model, tmp_path)
    layers = adapter_layers(model)
    with safe_open(files_of(tmp_path)[0], "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    # some architectures have other names on disk than in the model
    stored = sorted(shape for key, shape in shapes.items() if key.endswith((".u", ".sigma", ".vh")))
    sizes = [(layer.out_features, layer.in_features, layer.rank("default")) for layer in layers.values()]
    assert stored == sorted(shape for m, n, rank in sizes for shape in ((m, rank), (rank, rank), (rank, n)))
    dense = {f"{name}.weight" for name in layers}
    assert not dense & set(shapes)
    assert not [key for key in shapes if "base_layer" in key or "oialr_" in key]
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["ranks"] == {name: layer.rank("default") for name, layer in layers.items()}


def test_the_file_is_as_large_as_its_factors(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    model = factored(LlamaForCausalLM(config), rank=0.25)
    save_low_rank(model, tmp_path)
    layers = adapter_layers(model).values()
    factors = sum((a.out_features + a.in_features) * a.rank("default") + a.rank("default") ** 2 for a in layers)
    dense = sum(a.out_features * a.in_features for a in layers)
    others = sum(p.numel() for p in LlamaForCausalLM(config).parameters()) - dense
    assert files_of(tmp_path)[0].stat().st_size <= 1.01 * 4 * (factors + others) + 4096


def test_ranks_that_save_no_space_give_a_warning(tmp_path, make_model):
    model = factored(make_model("bert"), rank=7)
    with pytest.warns(UserWarning, match=r"the ranks are too high to save space\. `save_dense` writes the smaller"):
        save_low_rank(model, tmp_path)


def test_dense_layers_and_trained_heads_are_stored_as_they_are(tmp_path, bert, make_inputs, outputs_of):
    model = factored(bert, rank_pattern=None, modules_to_save=["classifier"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(3)
    first = next(iter(adapter_layers(model).values()))
    first.set_dense("default", torch.randn(first.out_features, first.in_features, dtype=torch.float64))
    save_low_rank(model, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded.get_submodule(first.name)) is nn.Linear
    assert_close(outputs_of(loaded, make_inputs("bert")), outputs_of(model, make_inputs("bert")), rtol=0, atol=1e-12)


def test_loading_allocates_no_dense_weight(tmp_path, monkeypatch, make_model):
    save_low_rank(factored(make_model("bert")), tmp_path)
    made = []
    original = nn.Linear.__init__

    def recording(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(self.weight.device.type)

    monkeypatch.setattr(nn.Linear, "__init__", recording)
    AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert set(made) == {"meta"}


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}, {"dtype": "auto"}],
    ids=str,
)
def test_the_usual_options_of_from_pretrained_work(tmp_path, make_model, make_inputs, outputs_of, options):
    model = factored(make_model("gpt2", torch.float32))
    save_low_rank(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    module = next(module for module in loaded.modules() if isinstance(module, LowRankLinear))
    dtype = options.get("dtype", torch.float32)
    assert module.u.dtype == (torch.float32 if dtype == "auto" else dtype)
    tolerance = 0.2 if dtype == torch.bfloat16 else 1e-5
    ours, theirs = outputs_of(loaded, make_inputs("gpt2")).float(), outputs_of(model, make_inputs("gpt2"))
    assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    tokens = loaded.generate(make_inputs("gpt2")["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] == make_inputs("gpt2")["input_ids"].shape[1] + 3


def test_a_pipeline_runs_a_standalone_model(tmp_path, make_model):
    model = factored(make_model("vit", torch.float32))
    save_low_rank(model, tmp_path)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    image = Image.fromarray(torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy())
    classify = pipeline("image-classification", model=str(tmp_path), image_processor=processor)
    found = {entry["label"]: entry["score"] for entry in classify(image)}
    with torch.no_grad():
        scores = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    for label, score in enumerate(scores):
        assert found[f"LABEL_{label}"] == pytest.approx(score.item(), abs=1e-5)


def test_large_models_are_sharded(tmp_path, make_model, make_inputs, outputs_of):
    model = factored(make_model("bert"))
    save_low_rank(model, tmp_path, max_shard_size=4000)
    assert len(files_of(tmp_path)) > 1
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(outputs_of(loaded, make_inputs("bert")), outputs_of(model, make_inputs("bert")), rtol=0, atol=1e-12)


def test_the_base_model_of_a_checkpoint_with_a_head_loads(tmp_path, make_model):
    model = factored(make_model("bert"))
    save_low_rank(model, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert sum(isinstance(module, LowRankLinear) for module in loaded.modules()) == len(adapter_layers(model))


def test_a_standalone_model_trains_its_cores_and_is_saved_again(tmp_path, make_model, make_inputs, outputs_of):
    save_low_rank(factored(make_model("bert")), tmp_path / "first")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first", dtype=torch.float64)
    module = next(module for module in model.modules() if isinstance(module, LowRankLinear))
    u, sigma = module.u.detach().clone(), module.sigma.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**make_inputs("bert")).logits.square().mean().backward()
    optimizer.step()
    assert torch.equal(module.u, u)
    assert not torch.equal(module.sigma, sigma)
    model.save_pretrained(tmp_path / "second")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second", dtype=torch.float64)
    assert torch.equal(outputs_of(again.eval(), make_inputs("bert")), outputs_of(model.eval(), make_inputs("bert")))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "gpt2" else pytest.mark.slow) for kind in CLASSES]
)
def test_a_dense_model_loads_in_plain_transformers(kind, tmp_path, make_model, make_inputs, outputs_of):
    model = factored(make_model(kind))
    save_low_rank(model, tmp_path / "low")
    dense = CLASSES[kind].from_pretrained(tmp_path / "low", dtype=torch.float64).dequantize()
    assert not any(isinstance(module, LowRankLinear) for module in dense.modules())
    assert any(isinstance(module, (nn.Linear, Conv1D)) for module in dense.modules())
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    program = (
        "import sys, torch, transformers\n"
        f"model = transformers.{CLASSES[kind].__name__}.from_pretrained({str(tmp_path / 'dense')!r}, dtype=torch.float64)\n"
        f"inputs = torch.load({str(tmp_path / 'inputs.pt')!r})\n"
        f"torch.save(model(**inputs).logits, {str(tmp_path / 'logits.pt')!r})\n"
        "assert 'oialr_peft' not in sys.modules\n"
    )
    torch.save(make_inputs(kind), tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, capture_output=True)
    logits = torch.load(tmp_path / "logits.pt")
    assert_close(logits, outputs_of(model, make_inputs(kind)), rtol=0, atol=1e-10)


def test_what_cannot_be_stored_by_its_factors_is_refused(tmp_path, mlp, make_model):
    with pytest.raises(ValueError, match="must be a transformers model"):
        save_low_rank(factored(mlp), tmp_path)
    with pytest.raises(ValueError, match="has no OIALR adapter"):
        save_low_rank(make_model("bert"), tmp_path)
    with pytest.raises(ValueError, match="is a correction, merged, or on top"):
        save_low_rank(get_peft_model(make_model("bert"), OIALRConfig(mode="adapter")), tmp_path)
    merged = factored(make_model("bert"))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="is a correction, merged, or on top"):
        save_low_rank(merged, tmp_path)
    mixed = factored(make_model("bert"), target_modules=["query"])
    inject_adapter_in_model(LoraConfig(target_modules=["value"]), mixed.get_base_model(), "other")
    with pytest.raises(ValueError, match="has an adapter of another kind"):
        save_low_rank(mixed, tmp_path)
    with pytest.raises(ValueError, match="has no adapter `missing`"):
        save_low_rank(factored(make_model("bert")), tmp_path, adapter_name="missing")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_a_later_format_or_another_model_is_refused(tmp_path, make_model):
    with pytest.raises(ValueError, match="has format 99; this release reads up to 1. Upgrade"):
        LowRankConfig({}, format_version=99)
    with pytest.raises(ValueError, match="must hold positive integers, but has 0 for `a`"):
        LowRankConfig({"a": 0})
    save_low_rank(factored(make_model("bert")), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    ranks = config["quantization_config"]["ranks"]
    first = next(iter(ranks))
    for wrong, message in (
        ({first: 1000}, "is of rank 4, but the configuration beside it says rank 1000"),
        ({"bert.embeddings.LayerNorm": 1}, "hold the factors of 13 layers, but config.json has ranks for 1"),
        (dict.fromkeys([*list(ranks)[1:], "bert.embeddings.LayerNorm"], 4), "but is a LayerNorm, which has none"),
        ({f"other.{name}": 4 for name in ranks}, "None of the 13 factored layers"),
    ):
        config["quantization_config"]["ranks"] = wrong
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_residual_adapter_becomes_a_lora_adapter_exactly(name, tmp_path, make_model, make_inputs, outputs_of):
    model = factored(make_model(name), mode="adapter", delay=None, freeze_when="stable", rank=3)
    save_as_lora(tmp_path, model, rank=3)
    loaded = PeftModel.from_pretrained(make_model(name), tmp_path, autocast_adapter_dtype=False).eval()
    assert loaded.peft_config["default"].peft_type.value == "LORA"
    base = outputs_of(make_model(name), make_inputs(name))
    ours, theirs = outputs_of(model, make_inputs(name)), outputs_of(loaded, make_inputs(name))
    assert float((ours - base).abs().max()) > 1e-3
    assert_close(theirs, ours, rtol=0, atol=1e-6 * float(base.abs().max()))


# ---- convolutions and attention --------------------------------------------------------------------------------------


def resnet() -> nn.Module:
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3, downsample_in_first_stage=True
    )  # fmt: skip
    torch.manual_seed(1)
    return ResNetForImageClassification(config).double().eval()


def siglip() -> nn.Module:
    """Has an `nn.MultiheadAttention` in its pooling head."""
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(1)
    return SiglipVisionModel(config).double().eval()


OTHERS = {
    "resnet": (resnet, AutoModelForImageClassification, r".*convolution|.*classifier\.1", 8),
    "siglip": (siglip, SiglipVisionModel, r".*attention|.*fc\d|.*(q|k|v|out)_proj", 8),
}


@pytest.mark.parametrize("low_rank", [True, False], ids=["low-rank", "dense"])
@pytest.mark.parametrize("name", OTHERS)
def test_convolutions_and_attention_are_stored_and_loaded(name, low_rank, tmp_path):
    make, cls, targets, size = OTHERS[name]
    model = factored(make(), target_modules=targets, rank=3)
    pixels = {"pixel_values": torch.randn(2, 3, size, size, dtype=torch.float64)}
    if low_rank:
        save_low_rank(model, tmp_path)
    else:
        compared = save_dense(model, tmp_path, example_inputs=pixels)
        assert compared.difference < 1e-12 < 0.01 < compared.scale
    loaded = cls.from_pretrained(tmp_path, dtype=torch.float64).eval()
    layers = adapter_layers(model)
    made = [module for module in loaded.modules() if isinstance(module, LowRankLinear)]
    assert len(made) == (len(layers) if low_rank else 0)
    assert any(isinstance(module, SplitAttention) for module in loaded.modules()) == (low_rank and name == "siglip")
    with torch.no_grad():
        assert_close(loaded(**pixels)[0], model(**pixels)[0], rtol=0, atol=1e-12)
    if low_rank:
        dense = to_dense(loaded)
        assert not any(isinstance(module, (LowRankLinear, SplitAttention)) for module in dense.modules())
        assert list(dense.state_dict()) == list(make().state_dict())
        with torch.no_grad():
            assert_close(dense(**pixels)[0], model(**pixels)[0], rtol=0, atol=1e-10)


# ---- dense -----------------------------------------------------------------------------------------------------------


MODES = {
    "dense": {"freeze_when": "stable", "delay": 2, "rank": None},
    "factored": {},
    "residual": {"mode": "adapter", "freeze_when": "stable", "delay": None},
    "pretraining": {"mode": "pretraining"},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_dense_export_computes_the_same_and_leaves_the_model_alone(
    kind, mode, tmp_path, make_model, make_inputs, outputs_of
):
    model = factored(make_model(kind), **MODES[mode])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compared = save_dense(model, tmp_path)
    assert 0 <= compared.difference < 1e-10 < 0.01 < compared.scale
    assert str(compared).startswith("largest difference of an output: ")
    loaded = CLASSES[kind].from_pretrained(tmp_path, dtype=torch.float64)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert type(loaded) is type(model.get_base_model())
    assert list(loaded.state_dict()) == list(make_model(kind).state_dict())
    assert_close(outputs_of(loaded, make_inputs(kind)), outputs_of(model, make_inputs(kind)), rtol=0, atol=1e-10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_reported_difference_is_that_of_the_files(tmp_path, make_model):
    model = factored(make_model("bert"))
    exact = save_dense(model, tmp_path / "a")
    model.to(torch.float32)
    rounded = save_dense(model, tmp_path / "b")
    assert exact.difference < 1e-12 < 1e-9 < rounded.difference < 1e-4


def test_a_low_rank_checkpoint_becomes_a_dense_one(tmp_path, make_model, make_inputs, outputs_of):
    model = factored(make_model("bert"))
    save_low_rank(model, tmp_path / "low")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "low", dtype=torch.float64)
    assert save_dense(loaded, tmp_path / "dense").difference < 1e-10
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", dtype=torch.float64)
    assert not any(isinstance(module, LowRankLinear) for module in dense.modules())
    assert_close(outputs_of(dense, make_inputs("bert")), outputs_of(model, make_inputs("bert")), rtol=0, atol=1e-10)


def test_making_a_model_dense_in_place(tmp_path, make_model, make_inputs, outputs_of):
    model = factored(make_model("bert"))
    save_low_rank(model, tmp_path)
    expected = outputs_of(model, make_inputs("bert"))
    for other in (AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64), model):
        dense = to_dense(other)
        assert list(dense.state_dict()) == list(make_model("bert").state_dict())
        assert_close(outputs_of(dense, make_inputs("bert")), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"must be a PeftModel or be loaded .* A dense model needs nothing"):
        to_dense(dense)


@pytest.mark.parametrize("save", [save_low_rank, save_dense, save_lora], ids=lambda save: save.__name__)
def test_nothing_that_is_not_finite_is_written(save, tmp_path, make_model):
    mode = {"mode": "adapter", "freeze_when": "stable", "delay": None} if save is save_lora else {}
    model = factored(make_model("bert"), **mode)
    with torch.no_grad():
        next(iter(adapter_layers(model).values())).trained_parameter("default")[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"query\..*` holds NaN or Inf, so nothing is written"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inputs_that_cannot_be_made_are_asked_for(tmp_path):
    config = WhisperConfig(
        d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=12, decoder_ffn_dim=12, num_mel_bins=4, max_source_positions=8, max_target_positions=8,
        vocab_size=30, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = factored(WhisperForConditionalGeneration(config))
    with pytest.raises(ValueError, match="takes `input_features`, which cannot be made here. Pass `example_inputs`"):
        save_dense(model, tmp_path)
    inputs = {"input_features": torch.randn(1, 4, 16), "decoder_input_ids": torch.ones(1, 3, dtype=torch.int64)}
    assert save_dense(model, tmp_path, example_inputs=inputs).difference < 1e-4


# ---- LoRA ------------------------------------------------------------------------------------------------------------


RESIDUAL = {"mode": "adapter", "freeze_when": "stable", "delay": None, "rank": 3}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("settings", [{}, {"bias": "oialr_only"}, {"shrink": "mask"}], ids=str)
def test_a_residual_adapter_is_written_as_a_lora_adapter_without_loss(
    kind, settings, tmp_path, make_model, make_inputs, outputs_of
):
    model = factored(make_model(kind), **RESIDUAL, **settings)
    first = next(iter(adapter_layers(model).values()))
    first.set_factors("default", first.factors("default").cut(2))  # ranks differ
    if settings.get("bias"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") and parameter.requires_grad:
                    parameter.add_(1)
    save_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(make_model(kind), tmp_path, autocast_adapter_dtype=False).eval()
    assert loaded.peft_config["default"].peft_type.value == "LORA"
    assert loaded.peft_config["default"].rank_pattern[first.name] == 2
    ours, theirs = outputs_of(model, make_inputs(kind)), outputs_of(loaded, make_inputs(kind))
    assert (ours - outputs_of(make_model(kind), make_inputs(kind))).abs().max() > 1e-3
    assert_close(theirs, ours, rtol=0, atol=1e-11 * float(ours.abs().max()))


def test_convolutions_become_lora_convolutions(tmp_path):
    model = factored(resnet(), target_modules=r".*convolution", **RESIDUAL)
    save_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(resnet(), tmp_path, autocast_adapter_dtype=False).eval()
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert (model(pixels).logits - resnet()(pixels).logits).abs().max() > 1e-3
        assert_close(loaded(pixels).logits, model(pixels).logits, rtol=0, atol=1e-11)


def test_a_trained_head_goes_with_the_lora_adapter(tmp_path, make_model, make_inputs, outputs_of):
    model = factored(make_model("bert"), modules_to_save=["classifier"], **RESIDUAL)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(3)
    save_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path, autocast_adapter_dtype=False).eval()
    assert_close(outputs_of(loaded, make_inputs("bert")), outputs_of(model, make_inputs("bert")))


def test_what_has_no_lora_counterpart_is_refused(tmp_path, make_model):
    with pytest.raises(ValueError, match="Only adapters with `mode=.adapter.` are low-rank corrections"):
        save_lora(factored(make_model("bert")), tmp_path)
    with pytest.raises(ValueError, match=r"attention\.in_proj` has no counterpart among PEFT's LoRA layers"):
        save_lora(factored(siglip(), target_modules=r".*head\.attention", **RESIDUAL), tmp_path)
    for options in ({"dilation": 2}, {"padding_mode": "circular"}):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, **options))
        with pytest.raises(ValueError, match="`0` has no counterpart"):
            save_lora(factored(model, target_modules=["0"], **RESIDUAL), tmp_path)
    with pytest.raises(ValueError, match="`model` must be a PeftModel, but is a BertForSequenceClassification"):
        save_lora(make_model("bert"), tmp_path)
    assert not list(tmp_path.iterdir())
