"""Attention with adapters: it computes what `nn.MultiheadAttention` does, and becomes one again."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from oialr_peft import OIALRConfig, OIALRController
from oialr_peft.tuner.attention import SplitAttention
from oialr_peft.tuner.lookup import adapter_layers

pytestmark = pytest.mark.usefixtures("float64")

FACTORED = {"freeze_when": "delay", "delay": 0, "rank": 3}
SIZES = {"packed": {}, "separate": {"kdim": 5, "vdim": 7}}


def attention(**settings) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(8, 2, **settings).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@settings(max_examples=150)
@given(st.data())
def test_a_split_attention_computes_the_same(data):
    draw = data.draw
    batch_first, batched = draw(st.booleans()), draw(st.booleans())
    separate = draw(st.booleans())
    module = attention(
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        batch_first=batch_first,
        **(SIZES["separate"] if separate else {}),
    )
    queries, keys = draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def tensor(length, width):
        shape = (length, width) if not batched else (3, length, width) if batch_first else (length, 3, width)
        return torch.randn(shape)

    query, key, value = tensor(queries, 8), tensor(keys, module.kdim), tensor(keys, module.vdim)
    if not separate:
        key, value = draw(st.sampled_from([(key, value), (key, key), (query, query), (query, value)]))
        keys = key.shape[1 if batched and batch_first else 0]
        if value.shape != key.shape:
            value = key
    floating = draw(st.booleans())
    masks = {}
    if draw(st.booleans()):
        shape = (6 if batched else 2, queries, keys) if draw(st.booleans()) else (queries, keys)
        mask = torch.rand(shape) > 0.6
        mask[..., 0] = False
        masks["attn_mask"] = torch.randn(shape) if floating else mask
    if draw(st.booleans()):
        shape = (3, keys) if batched else (keys,)
        mask = torch.rand(shape) > 0.6
        mask[..., 0] = False
        masks["key_padding_mask"] = torch.randn(shape) if floating else mask
    options = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans()), **masks}
    expected = module(query, key, value, **options)
    split = SplitAttention(module)
    assert_close(split(query, key, value, **options), expected)
    again = split.to_multihead()
    assert_close(again(query, key, value, **options), expected, rtol=0, atol=0)
    assert repr(again) == repr(module)


def test_a_causal_hint_needs_its_mask():
    x = torch.randn(2, 3, 8)
    module = attention(batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(3)
    split = SplitAttention(module)
    expected = module(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    assert_close(split(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0], expected)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        split(x, x, x, is_causal=True)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("config", [{}, FACTORED, {"mode": "adapter"}, {"mode": "pretraining"}], ids=str)
def test_adapters_of_an_attention_change_its_output_and_merge_into_it(sizes, config):
    model = nn.Sequential(attention(batch_first=True, **sizes))
    query, key = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    inputs = (query, key[..., :5], key[..., :7]) if sizes else (query, key, key)
    before = model[0](*inputs)[0]
    adapted = get_peft_model(
        copy.deepcopy(model), OIALRConfig(target_modules=["0"], init_weights=False, **{"mode": "replace", **config})
    )
    inner = adapted.base_model.model[0]
    assert isinstance(inner, SplitAttention)
    projections = ["q_proj", "k_proj", "v_proj"] if sizes else ["in_proj"]
    assert set(adapter_layers(adapted)) == {f"0.{name}" for name in (*projections, "out_proj")}
    after = inner(*inputs)[0]
    assert (after - before).abs().max().item() > 1e-3
    merged = adapted.merge_and_unload()
    assert type(merged[0]) is nn.MultiheadAttention
    assert list(merged.state_dict()) == list(model.state_dict())
    assert_close(merged[0](*inputs)[0], after)


def test_unloading_gives_the_attention_back_as_it_was():
    model = nn.Sequential(attention(batch_first=True))
    adapted = get_peft_model(
        copy.deepcopy(model), OIALRConfig(mode="replace", target_modules=["0"], init_weights=False)
    )
    restored = adapted.unload()
    assert type(restored[0]) is nn.MultiheadAttention
    for name, value in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3))


def test_every_linear_layer_of_a_transformer_is_chosen_by_default_and_trains(tmp_path):
    base = encoder()
    model = get_peft_model(
        copy.deepcopy(base), OIALRConfig(mode="replace", freeze_when="delay", delay=2, update_every=2, cutoff=0.4)
    )
    names = {"self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"}
    assert set(adapter_layers(model)) == {f"0.layers.{i}.{name}" for i in (0, 1) for name in names} | {"1"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = OIALRController(model, optimizer, total_steps=8)
    x, target = torch.randn(4, 5, 8), torch.randn(4, 5, 3)
    losses = []
    for _ in range(8):
        loss = (model(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    assert losses[-1] < losses[0]
    assert any(layer.rank("default") < 8 for layer in adapter_layers(model).values())
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_close(loaded(x), model(x), rtol=0, atol=1e-12)
    assert_close(model.merge_and_unload()(x), loaded(x))


@pytest.mark.parametrize("targets", [["linear1"], ["self_attn"]], ids=str)
def test_the_kernel_for_inference_does_not_go_round_the_adapters(targets):
    model = get_peft_model(encoder(), OIALRConfig(mode="replace", target_modules=targets, init_weights=False)).eval()
    x = torch.randn(4, 5, 8)
    with torch.no_grad():
        inference = model(x)
    assert_close(inference, model(x))  # with gradients, PyTorch takes the way through the modules


def test_a_projection_alone_is_skipped_with_a_warning():
    with pytest.warns(UserWarning, match=r"out_proj` is skipped: nn\.MultiheadAttention reads .* name the attention"):
        model = get_peft_model(encoder(), OIALRConfig(mode="replace", target_modules=["out_proj", "linear1"]))
    assert {name.rpartition(".")[2] for name in adapter_layers(model)} == {"linear1"}


def test_naming_the_projection_beside_its_attention_changes_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(encoder(), OIALRConfig(mode="replace", target_modules=["out_proj", "self_attn"]))
    assert {name.rpartition(".")[2] for name in adapter_layers(model)} == {"in_proj", "out_proj"}


def test_a_second_adapter_joins_the_first():
    model = get_peft_model(
        encoder(), OIALRConfig(mode="replace", target_modules=["self_attn"], init_weights=False)
    ).eval()
    model.add_adapter("other", OIALRConfig(target_modules=["self_attn"], mode="adapter", init_weights=False))
    x = torch.randn(4, 5, 8)
    first = model(x)
    model.set_adapter("other")
    assert not torch.allclose(model(x), first)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert_close(model(x), first)


def test_loading_with_low_memory_leaves_the_base_weights_where_they_are(tmp_path):
    model = get_peft_model(
        encoder(), OIALRConfig(target_modules=["self_attn"], **{"mode": "replace", **FACTORED})
    ).eval()
    model.save_pretrained(tmp_path)
    base = encoder()
    base.load_state_dict(model.merge_and_unload().state_dict())
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
