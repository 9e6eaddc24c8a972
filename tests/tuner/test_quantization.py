"""Adapters beside quantized base weights: bitsandbytes in 8 and 4 bits, torchao in int8 and int4, on a CPU."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from oialr_peft import OIALRConfig, OIALRController, factorize, save_dense, save_lora
from oialr_peft.tuner.lookup import adapter_layers
from oialr_peft.tuner.quantization import dequantized_dtype, dequantized_weight, is_quantized

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Merge .* module to 8-bit linear:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Register_constant.*:UserWarning"),
]

KINDS = {
    "bnb-8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bnb-4bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao-int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao-int4": lambda: TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
}
RESIDUAL = {"mode": "adapter", "rank": 8, "cutoff": 0.02}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(params=KINDS)
def make(request, saved):
    def load():
        return AutoModelForCausalLM.from_pretrained(
            saved, quantization_config=KINDS[request.param](), dtype=torch.float32, device_map="cpu"
        )

    load.kind = request.param
    return load


@pytest.fixture
def tokens():
    return torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))


def test_the_dequantized_weight_is_close_to_the_one_before(make, saved):
    dense = LlamaForCausalLM.from_pretrained(saved)
    model = make()
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"):
        module, expected = model.get_submodule(name), dense.get_submodule(name).weight
        assert is_quantized(module)
        found = dequantized_weight(module)
        assert found.dtype == dequantized_dtype(module)
        assert found.is_floating_point()
        error = (found - expected).norm() / expected.norm()
        assert 0 < error < (0.02 if "8" in make.kind else 0.2)
    assert not is_quantized(dense.model.layers[0].mlp.up_proj)


def test_bases_are_those_of_the_dequantized_weight_and_the_start_changes_nothing(make, tokens):
    model = make()
    before = model(tokens).logits.detach()
    model = get_peft_model(model, OIALRConfig(**{"mode": "replace", **RESIDUAL}))
    layer = next(iter(adapter_layers(model).values()))
    expected = factorize(dequantized_weight(layer.get_base_layer()).float(), rank=8)
    found = layer.factors("default")
    assert_close(found.u @ found.u.mT, expected.u @ expected.u.mT, rtol=1e-3, atol=1e-3)
    assert not found.sigma.any()
    assert found.u.dtype == torch.float32
    # a first product may differ from a second one, see `quantization._is_repacked`
    assert_close(model(tokens).logits, before, rtol=0, atol=0.01 * float(before.abs().max()))


def test_it_trains_prunes_saves_and_loads_and_the_base_keeps_its_integers(make, tokens, tmp_path):
    base = prepare_model_for_kbit_training(make(), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, OIALRConfig(**{"mode": "replace", **RESIDUAL}, update_every=2))
    layer = next(iter(adapter_layers(model).values()))
    integers = dequantized_weight(layer.get_base_layer())
    kind = type(layer.get_base_layer().weight)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    controller = OIALRController(model, optimizer, total_steps=6)
    losses = []
    model.train()
    for _ in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    assert losses[-1] < losses[0]
    assert any(layer.rank("default") < 8 for layer in adapter_layers(model).values())
    assert type(layer.get_base_layer().weight) is kind
    assert torch.equal(dequantized_weight(layer.get_base_layer()), integers)
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    with torch.no_grad():
        assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


def test_it_becomes_a_lora_adapter_of_the_same_quantized_model(make, tokens, tmp_path):
    model = get_peft_model(make(), OIALRConfig(**{"mode": "replace", **RESIDUAL}, init_weights=False)).eval()
    save_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    with torch.no_grad():
        ours, theirs, base = model(tokens).logits, loaded(tokens).logits, make()(tokens).logits
    effect = float((ours - base).abs().max())
    assert effect > 0.01
    # bitsandbytes' products in 4 bits on a CPU differ from call to call
    assert_close(theirs, ours, rtol=0, atol=effect / 50)


def test_nothing_is_merged_into_integers(make, tmp_path):
    model = get_peft_model(make(), OIALRConfig(**{"mode": "replace", **RESIDUAL}))
    message = r"q_proj` is quantized; merging would round the adapter away with it\. Keep the adapter beside it"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter()
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload()
    with pytest.raises(ValueError, match=message):
        save_dense(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{}, {"freeze_when": "delay", "delay": 0}, {"mode": "pretraining"}], ids=str)
def test_replacing_a_quantized_weight_is_refused(make, settings):
    model = make()
    with pytest.raises(ValueError, match=r"q_proj` is quantized, so only a correction .* Set `mode=.adapter.`"):
        get_peft_model(model, OIALRConfig(**{"mode": "replace", **settings}))
    assert not adapter_layers(model)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_that_a_forward_pass_has_repacked_is_still_the_same(nested, dtype, saved, tokens):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=config, dtype=dtype, device_map="cpu")
    module = model.model.layers[0].mlp.up_proj
    before = dequantized_weight(module)
    with torch.no_grad():
        model(tokens)
    after = dequantized_weight(module)
    assert after.dtype == before.dtype == dequantized_dtype(module)
    # the kernel multiplies in bfloat16
    assert_close(after, before, rtol=0, atol=0.01 * float(before.abs().max()))
