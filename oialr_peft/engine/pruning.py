"""What a Σ update keeps of a layer: how many of its singular directions.

The paper goes by σ alone; a bound asks what each direction gives to recent outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oialr_peft.linalg.factors import Factors, Rotation, count_above, count_needed
from oialr_peft.tuner.layer import OIALRLinear

UNKNOWN = -1  # how many directions are needed, when the outputs are not finite


def directions_needed(
    singular_values: Tensor, cutoff: float, largest_loss: float | None, measured: tuple[Tensor, Tensor] | None
) -> Tensor:
    """How many singular directions the cutoff keeps, or the bound on the output loss needs if they are more.

    Args:
        singular_values: (r,), descending, of the weight or of the core.
        cutoff: β in [0, 1).
        largest_loss: bound, a share of the output energy in [0, 1); `None` for the cutoff alone.
        measured: `output_energies`; `None` when there was no input to measure them on.

    Returns:
        An integer scalar; `UNKNOWN` when the outputs are not finite.
    """
    above = count_above(singular_values, cutoff)
    if largest_loss is None:
        return above
    if measured is None:
        # nobody knows what a layer that was not called, or for an empty batch, contributes
        return torch.full_like(above, singular_values.numel())
    energies, total = measured
    needed = torch.maximum(above, count_needed(energies, total, largest_loss))
    return torch.where(torch.isfinite(total), needed, UNKNOWN)


def output_energies(
    layer: OIALRLinear, rotation: Rotation, factors: Factors | None, sample: Tensor, *, with_base: bool
) -> tuple[Tensor, Tensor]:
    """Mean energy σᵢ² (vᵢᵀ x)² of each direction (r,) on a sample of inputs x, and that of the whole layer without its bias.

    Squares are float64: those of numbers above 1e19 or below 1e-23 leave the range of float32.

    Args:
        layer: what was given the sample.
        rotation: SVD of the dense weight, or of the core of `factors`.
        factors: of the layer; `None` while it is dense.
        sample: inputs, as `RecentInputs` keeps them.
        with_base: whether the base layer's output counts as well, as in adapter mode.
    """
    form, sigma, sample = layer.form, rotation.singular_values.double(), sample.to(rotation.q.dtype)
    if factors is None:
        narrow = form.rows(form.apply(sample, rotation.q.mT)).double()
    else:
        factors = Factors(*(factor.to(sample.dtype) for factor in factors))
        narrow = (form.rows(form.apply(sample, factors.vh)) @ rotation.q).double()
    energies = sigma**2 * narrow.square().mean(0)
    if factors is None or not with_base:
        return energies, energies.sum()
    output = layer.base_output(sample) + form.chain(sample, factors, None)
    return energies, form.rows(output).double().square().mean(0).sum()
