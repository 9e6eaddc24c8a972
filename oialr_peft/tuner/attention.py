"""`SplitAttention`: `nn.MultiheadAttention` with its projections as modules, so that they can carry adapters.

`nn.MultiheadAttention` reads the weights of its projections without calling them; an adapter around one would have no
effect. Here each is a linear module that is called.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

SEPARATE = ("q_proj", "k_proj", "v_proj")


class SplitAttention(nn.Module):
    """Computes what the `nn.MultiheadAttention` that it is made of computes, with the same parameters.

    The query, key and value projections are one module `in_proj` of 3E×E where they were stored as one matrix, and
    `q_proj`, `k_proj`, `v_proj` where key and value have sizes of their own; then `out_proj`.

    Args:
        attention: what to replace; its parameters are shared.
    """

    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.kdim, self.vdim = attention.kdim, attention.vdim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        self.packed = attention.in_proj_weight is not None
        weight: Any = attention.in_proj_weight
        bias = attention.in_proj_bias
        if self.packed:
            self.in_proj = _linear(weight, bias)
        else:
            biases = (None,) * 3 if bias is None else _thirds(bias)
            for name, third in zip(SEPARATE, biases, strict=True):
                setattr(self, name, _linear(getattr(attention, f"{name}_weight"), third))
        out: Any = attention.out_proj
        self.out_proj = _linear(out.weight, out.bias)
        _put(self, bias_k=attention.bias_k, bias_v=attention.bias_v)
        self.train(attention.training)

    # nn.TransformerEncoderLayer looks at this before it goes round the module with a kernel of its own
    _qkv_same_embed_dim = False

    @property
    def in_proj_weight(self) -> Tensor | None:
        """What transformers looks at when it initializes a model: the weight of the module `in_proj`."""
        return self.in_proj.weight if self.packed else None

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The bias of the module `in_proj`."""
        return self.in_proj.bias if self.packed else None

    def to_multihead(self) -> nn.MultiheadAttention:
        """The `nn.MultiheadAttention` again, with the weights that the projections have now."""
        merged = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=self.out_proj.bias is not None,
            add_bias_kv=self.bias_k is not None,
            add_zero_attn=self.add_zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        if self.packed:
            _put(merged, in_proj_weight=self.in_proj.weight, in_proj_bias=self.in_proj.bias)
        else:
            modules = [self.get_submodule(name) for name in SEPARATE]
            _put(merged, **{f"{name}_weight": each.weight for name, each in zip(SEPARATE, modules, strict=True)})
            if modules[0].bias is not None:
                biases = [cast(nn.Parameter, module.bias) for module in modules]
                joined = torch.cat([bias.detach() for bias in biases])
                _put(merged, in_proj_bias=nn.Parameter(joined, requires_grad=biases[0].requires_grad))
        _put(merged.out_proj, weight=self.out_proj.weight, bias=self.out_proj.bias)
        _put(merged, bias_k=self.bias_k, bias_v=self.bias_v)
        return merged.train(self.training)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts in the place of this module when it unloads the adapters."""
        for name, projection in self.named_children():
            if isinstance(projection, BaseTunerLayer):
                if merge:
                    projection.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                setattr(self, name, projection.get_base_layer())
        return self.to_multihead()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention.forward`, whose arguments and results these are."""
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. Make one with "
                "`nn.Transformer.generate_square_subsequent_mask`."
            )
        projected = self._project(query, key, value)
        batched = query.dim() == 3
        if not batched:
            projected = [each.unsqueeze(0) for each in projected]
        elif not self.batch_first:
            projected = [each.transpose(0, 1) for each in projected]
        q, k, v = self._with_extra_keys(*projected)
        mask = self._additive_mask(attn_mask, key_padding_mask, q, k)
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
        output, weights = self._attend(q, k, v, mask, need_weights=need_weights)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if not self.packed:
            inputs = zip(SEPARATE, (query, key, value), strict=True)
            return [self.get_submodule(name)(x) for name, x in inputs]
        if query is key is value:
            return list(self.in_proj(query).chunk(3, dim=-1))
        q = self.in_proj(query).chunk(3, dim=-1)[0]
        k, v = self.in_proj(key).chunk(3, dim=-1)[1:]
        return [q, k, v if value is key else self.in_proj(value).chunk(3, dim=-1)[2]]

    def _with_extra_keys(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append the trained key and value and the zero ones, if there are any, to (batch, length, width)."""
        size = k.shape[0], 1, self.embed_dim
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(size)], dim=1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(size)], dim=1)
        if self.add_zero_attn:
            k, v = (torch.cat([each, each.new_zeros(size)], dim=1) for each in (k, v))
        return q, k, v

    def _additive_mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """Both masks as one summand of the scores, (batch or 1, heads or 1, queries, keys)."""
        batch, length = q.shape[:2]
        masks = []
        if attn_mask is not None:
            mask = _as_summand(attn_mask, q.dtype)
            masks.append(mask.view(batch, self.num_heads, length, -1) if mask.dim() == 3 else mask[None, None])
        if key_padding_mask is not None:
            masks.append(_as_summand(key_padding_mask, q.dtype).view(batch, 1, 1, -1))
        if not masks:
            return None
        mask = sum(masks[1:], masks[0])
        return F.pad(mask, (0, k.shape[1] - mask.shape[-1]))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT
        weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), dropout)
        return weights @ v, weights

    def extra_repr(self) -> str:
        """Sizes."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


ATTENTION = (nn.MultiheadAttention, SplitAttention)


def projections_of(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The projections of an attention module with their full names; any other module, itself."""
    if not isinstance(module, ATTENTION):
        yield name, module
        return
    split = module if isinstance(module, SplitAttention) else SplitAttention(module)
    for child, projection in split.named_children():
        yield f"{name}.{child}", projection


def avoid_fast_path(parent: nn.Module) -> None:
    """Keep `nn.TransformerEncoderLayer` from its kernel for inference, which reads weights and calls no module."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    _put(linear, weight=weight, bias=bias)
    return linear


def _put(module: nn.Module, **parameters: Any) -> None:
    """Set parameters that exist already, past PEFT's `init_empty_weights`, which sends new ones to the meta device."""
    module._parameters.update(parameters)


def _thirds(bias: nn.Parameter) -> list[nn.Parameter]:
    return [nn.Parameter(part.detach().clone(), requires_grad=bias.requires_grad) for part in bias.chunk(3)]


def _as_summand(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask whose True entries are not to be attended to, as numbers to add."""
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
