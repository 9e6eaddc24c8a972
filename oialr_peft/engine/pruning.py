"""What a Σ update keeps of a layer: how many directions, and of what.

=========== ============================ ====================================================================
`prune_by`  directions                   in the order of
=========== ============================ ====================================================================
"weight"    singular, of the weight      σ, as in the paper; a bound asks what each gives to recent outputs
"outputs"   principal, of the outputs    what they give to recent outputs
=========== ============================ ====================================================================
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oialr_peft.engine.inputs import Recorded
from oialr_peft.linalg.decompositions import principal_directions
from oialr_peft.linalg.factors import Factors, Rotation, count_above, count_needed
from oialr_peft.tuner.layer import OIALRLinear

UNKNOWN = -1  # how many directions are needed, when the outputs are not finite

# energy that inputs of equal size in all directions add to that of recent ones: what these happen not to use has a price
WHITE = 1e-3


class Needed(NamedTuple):
    """How many directions of a layer to keep, and which.

    Attributes:
        number: integer scalar; `UNKNOWN` when the outputs are not finite.
        covariance: (r, r), in the coordinates of P, where P D Qᵀ is the SVD of the trained matrix; its leading eigenvectors Z
            are kept, as P Z. `None` for columns of P themselves.
    """

    number: Tensor
    covariance: Tensor | None = None


def needed_of_weight(
    singular_values: Tensor, cutoff: float, largest_loss: float | None, measured: tuple[Tensor, Tensor] | None
) -> Needed:
    """The singular directions that the cutoff keeps, or that the bound on the output loss needs if they are more.

    Args:
        singular_values: (r,), descending, of the weight or of the core.
        cutoff: β in [0, 1).
        largest_loss: bound, a share of the output energy in [0, 1); `None` for the cutoff alone.
        measured: `output_energies`; `None` when there was no input to measure them on.
    """
    above = count_above(singular_values, cutoff)
    if largest_loss is None:
        return Needed(above)
    if measured is None:
        return _all_of(singular_values)
    energies, total = measured
    needed = torch.maximum(above, count_needed(energies, total, largest_loss))
    return Needed(torch.where(torch.isfinite(total), needed, UNKNOWN))


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
        with_base: whether the base layer's output counts as well, as in residual mode.
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


def needed_of_outputs(
    name: str,
    rotation: Rotation,
    cutoff: float,
    largest_loss: float | None,
    recorded: Recorded | None,
    *,
    of_outputs: bool,
) -> Needed:
    """The principal directions of the outputs that the cutoff keeps, or the bound needs if they are more.

    Of all approximations of y = W x of rank r, A Aᵀ W loses the least of E‖y‖², where A holds the r principal directions of
    the outputs (the idea of SVD-LLM, arXiv 2403.07378, which finds them by whitening the inputs). Each output counts as if
    its length were 1: a few large ones would decide alone otherwise, such as those of the first token in language models.
    So the bound is one of the mean relative error, and the cutoff compares root mean squares along the directions.

    How many are needed is measured on one half of the recent inputs, with directions of the other: measured where they were
    found, they seem to lose less than they do, and nothing at all when there are fewer positions than directions. What is kept
    are directions of both halves.

    Args:
        name: what messages call the layer.
        rotation: SVD of the dense weight, or of the core.
        cutoff: β in [0, 1).
        largest_loss: bound on E[‖Δy‖² / ‖y‖²], in [0, 1); `None` for the cutoff alone.
        recorded: of recent inputs; `None` when there were none.
        of_outputs: whether that is of the outputs of the trained matrix, not of its inputs.
    """
    if recorded is None:
        return _all_of(rotation.singular_values)
    # the trained matrix takes Q to P D, so in the coordinates of P:
    sides = rotation.p if of_outputs else rotation.q * rotation.singular_values
    sides = (sides.double() * torch.exp2(recorded.exponent.double())).to(sides.dtype)
    size = len(sides)  # less than recorded when masked directions came with it, which give zero
    first, second = sides.mT @ recorded.covariances[:, :size, :size].to(sides.dtype) @ sides
    energy = first.trace() + second.trace()
    is_finite = torch.isfinite(energy)
    first, second = (torch.where(is_finite, half, 0.0) for half in (first, second))
    white = rotation.singular_values.double().square()
    white = (WHITE * white / white.sum().clamp_min(torch.finfo(white.dtype).tiny)).to(sides.dtype)

    first, second, both = (half + torch.diag(half.trace() * white) for half in (first, second, first + second))
    unseen = principal_directions(first, name)  # by the second half
    energies = (unseen * (second @ unseen)).sum(0).double().clamp_min(0)
    largest_from_here = energies.flip(0).cummax(0).values.flip(0)  # of the other half they need not fall
    needed = count_above(largest_from_here.sqrt(), cutoff)
    if largest_loss is not None:
        needed = torch.maximum(needed, count_needed(energies, recorded.positions[1], largest_loss))
    # a core of zeros has lost nothing yet
    needed = torch.where((energy > 0) & (recorded.positions[1] > 0), needed, rotation.rank)
    return Needed(torch.where(is_finite, needed, UNKNOWN), both)


def _all_of(singular_values: Tensor) -> Needed:
    """Every direction: nobody knows what a layer that was not called, or for an empty batch, contributes."""
    return Needed(torch.tensor(singular_values.numel(), device=singular_values.device))
