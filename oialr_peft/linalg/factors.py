"""Linear algebra of the method, on plain tensors: decomposing a weight, measuring how far its basis moved, cutting rank.

Nothing here knows about layers, optimizers or processes. Every function accepts float16, bfloat16, float32 and float64;
it computes in at least float32 and returns the dtype it was given.

Source: Coquelin et al., *Harnessing Orthogonality to Train Low-Rank Neural Networks*, arXiv 2401.08505.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oialr_peft.linalg.decompositions import SVD, largest_entry, leading_svd, map_concurrently, thin_svd

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class Factors(NamedTuple):
    """A rank-r weight ``W = u @ sigma @ vh``, of which only `sigma` is trained.

    Examples:
        >>> factors = factorize(torch.eye(3))
        >>> factors.rank
        3
        >>> bool(torch.allclose(factors.weight(), torch.eye(3)))
        True
    """

    u: Tensor  # (m, r), orthonormal columns
    sigma: Tensor  # (r, r), diagonal only just after a decomposition
    vh: Tensor  # (r, n), orthonormal rows

    @property
    def rank(self) -> int:
        """The number of directions r."""
        return self.sigma.shape[0]

    def weight(self) -> Tensor:
        """The dense (m, n) weight, multiplied in at least float32."""
        dtype = compute_dtype(self.sigma)
        product = self.u.to(dtype) @ self.sigma.to(dtype) @ self.vh.to(dtype)
        return product.to(self.sigma.dtype)

    def cut(self, rank: int) -> Factors:
        """Only the first `rank` directions."""
        return Factors(
            self.u[:, :rank].contiguous(), self.sigma[:rank, :rank].contiguous(), self.vh[:rank].contiguous()
        )


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for every narrower floating dtype."""
    return torch.promote_types(tensor.dtype, torch.float32)


def factorize(weight: Tensor, *, rank: int | None = None, name: str = "weight") -> Factors:
    """Thin SVD ``W = U Σ Vᵀ``, truncated to the `rank` largest singular values.

    Up to half of the full rank they come from the Gram matrix, which is two to four times faster, and up to a 16th of
    a large weight's from subspace iteration; see `decompositions.py`.

    Args:
        weight: (m, n), any floating dtype.
        rank: number of directions kept, 1 ≤ rank ≤ k = min(m, n); `None` keeps all k.
        name: what the error message calls the weight.

    Returns:
        u (m, rank), sigma (rank, rank) diagonal and descending, vh (rank, n), in the dtype of `weight`.

    Raises:
        TypeError: `weight` is no tensor.
        ValueError: `weight` is not a dense, non-empty floating matrix, holds NaN or Inf, has a singular value that its
            dtype cannot hold, or `rank` is out of range.
        torch.linalg.LinAlgError: neither the SVD nor the fallback converged.

    Examples:
        >>> factors = factorize(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
        >>> factors.sigma
        tensor([[3., 0.],
                [0., 2.]])
    """
    _require_finite_matrix(weight, name)
    full_rank = min(weight.shape)
    if rank is None:
        rank = full_rank
    if not isinstance(rank, Integral) or not 1 <= rank <= full_rank:
        raise ValueError(
            f"`rank` must be between 1 and min(m, n) = {full_rank} for `{name}` of shape {tuple(weight.shape)}, "
            f"but is {rank!r}. Choose a rank in that range, or None to keep all directions."
        )
    found = leading_svd(weight.to(compute_dtype(weight)), rank, name)
    require_in_range(found.s, weight.dtype, name)
    return factors_of(found, weight.dtype)


def factorize_all(weights: Sequence[tuple[str, Tensor, int]]) -> Iterator[Factors]:
    """`factorize` of many weights (name, (m, n), rank), side by side on a CPU; factors in at least float32.

    Yields:
        The factors of each weight, in their order.
    """

    def factorized(weight: tuple[str, Tensor, int]) -> Factors:
        name, matrix, rank = weight
        return factorize(matrix.to(compute_dtype(matrix)), rank=rank, name=name)

    if any(matrix.is_cuda for _, matrix, _ in weights):
        return map(factorized, weights)
    return map_concurrently(factorized, weights)


def factors_of(found: SVD, dtype: torch.dtype) -> Factors:
    """The factors of a decomposition in `dtype`; they share no memory with it."""
    return Rotation(found.u, found.s, found.vh.mT).to_factors(dtype)


def polar_factor(weight: Tensor, *, name: str = "weight") -> Tensor:
    """The orthogonal basis ``B = U Vᵀ`` of a weight ``W = U Σ Vᵀ``: its orthogonal polar factor.

    Args:
        weight: (m, n), any floating dtype.
        name: what the error message calls the weight.

    Returns:
        (m, n) with orthonormal columns (m ≥ n) or rows (m < n), in the dtype of `weight`. For a rank-deficient weight
        the part of the basis that belongs to σ = 0 is not unique; the decomposition's own choice is returned.

    Raises:
        ValueError, torch.linalg.LinAlgError: as `factorize`.

    Examples:
        >>> polar_factor(torch.diag(torch.tensor([2.0, -5.0])))
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    _require_finite_matrix(weight, name)
    u, _, vh = thin_svd(weight.to(compute_dtype(weight)), name)
    # `+ 0` turns the -0.0 of sign-flipped pairs into 0.0
    return (u @ vh + 0).to(weight.dtype)


def stability(basis: Tensor, previous: Tensor) -> float:
    """Stability ``S = ⟨basis, previous⟩_F / k`` of a basis, in [-1, 1]; 1 means that it did not move.

    Args:
        basis: (m, n) orthogonal polar factor of a weight, k = min(m, n).
        previous: that of the same weight earlier.

    Raises:
        ValueError: the shapes differ, or one of them is not a non-empty matrix of finite numbers.

    Examples:
        >>> basis = polar_factor(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        >>> stability(basis, basis), stability(basis, -basis)
        (1.0, -1.0)
    """
    if basis.shape != previous.shape:
        raise ValueError(
            f"`basis` and `previous` must have one shape, but have {tuple(basis.shape)} and {tuple(previous.shape)}. "
            "Compare two bases of the same weight."
        )
    _require_finite_matrix(basis, "basis")
    _require_finite_matrix(previous, "previous")
    dtype = compute_dtype(basis)
    inner = (basis.to(dtype) * previous.to(device=basis.device, dtype=dtype)).sum(dtype=torch.float64)
    return min(1.0, max(-1.0, inner.item() / min(basis.shape)))


def rediagonalize(factors: Factors, *, name: str = "sigma") -> Factors:
    """Rotate the basis so that Σ is diagonal and descending again; the weight stays the same.

    ``Σ = P D Qᵀ``;  ``U ← U P``,  ``Vᵀ ← Qᵀ Vᵀ``,  ``Σ ← D``. The SVD is of the (r, r) Σ alone.

    Args:
        factors: u (m, r), sigma (r, r), vh (r, n).
        name: what the error message calls sigma.

    Raises:
        ValueError: the shapes do not fit, sigma holds NaN or Inf, or has a singular value that its dtype cannot hold.
        torch.linalg.LinAlgError: as `factorize`.

    Examples:
        >>> factors = Factors(torch.eye(2), torch.tensor([[0.0, 1.0], [4.0, 0.0]]), torch.eye(2))
        >>> rediagonalize(factors).sigma
        tensor([[4., 0.],
                [0., 1.]])
    """
    _require_fitting(factors)
    rotation = rotation_of(factors.sigma, name=name)
    require_in_range(rotation.singular_values, factors.sigma.dtype, name)
    return rotate(factors, rotation)


class Rotation(NamedTuple):
    """The SVD ``Σ = P D Qᵀ`` of a core, kept so that optimizer state can follow the same rotation."""

    p: Tensor  # (r, r'), orthonormal columns
    singular_values: Tensor  # (r',), descending, ≥ 0
    q: Tensor  # (r, r'), orthonormal columns

    @property
    def rank(self) -> int:
        """The number of directions r'."""
        return self.singular_values.numel()

    def cut(self, rank: int) -> Rotation:
        """Only the `rank` largest directions."""
        return Rotation(self.p[:, :rank], self.singular_values[:rank], self.q[:, :rank])

    def to_factors(self, dtype: torch.dtype) -> Factors:
        """The factors that take the place of a dense weight, in `dtype`; they share no memory with the rotation."""
        contiguous: dict[str, Any] = {"copy": True, "memory_format": torch.contiguous_format}
        return Factors(
            self.p.to(dtype, **contiguous),
            torch.diag(self.singular_values).to(dtype),
            self.q.mT.to(dtype, **contiguous),
        )


def rotation_of(sigma: Tensor, *, name: str = "sigma") -> Rotation:
    """SVD of a core `sigma` (r, r) in at least float32, with the checks of `factorize`."""
    _require_finite_matrix(sigma, name)
    found = thin_svd(sigma.to(compute_dtype(sigma)), name)
    return Rotation(found.u, found.s, found.vh.mT)


def rotate(factors: Factors, rotation: Rotation) -> Factors:
    """``U ← U P``, ``Vᵀ ← Qᵀ Vᵀ``, ``Σ ← D``; a rotation that was `cut` truncates at the same time.

    The rounding errors of many rotations would add up, to 8e-4 in float32 after 1,000 of them, so U and V are made
    orthonormal again each time.
    """
    dtype = rotation.p.dtype
    u = orthonormalized(factors.u.to(dtype) @ rotation.p)
    v = orthonormalized(factors.vh.mT.to(dtype) @ rotation.q)
    return Factors(
        u.to(factors.u.dtype).contiguous(),
        torch.diag(rotation.singular_values).to(factors.sigma.dtype),
        v.mT.to(factors.vh.dtype).contiguous(),
    )


def orthonormalized(columns: Tensor) -> Tensor:
    """The nearest orthonormal columns to (m, r) nearly orthonormal ones: one Newton–Schulz step squares the error."""
    eye = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
    return columns @ (1.5 * eye - 0.5 * (columns.mT @ columns))


def rank_to_keep(singular_values: Tensor, *, cutoff: float, max_rank_drop: float = 0.5, min_rank: int = 1) -> int:
    """``max(#{σ ≥ β·σ_max}, r − ⌊max_rank_drop·r⌋, min_rank)``, at most r.

    Args:
        singular_values: (r,), descending.
        cutoff: β in [0, 1).
        max_rank_drop: largest share of r lost at once, in [0, 1].
        min_rank: floor, a number of directions.

    Examples:
        >>> rank_to_keep(torch.tensor([10.0, 2.0, 0.5, 0.1]), cutoff=0.1)
        2
        >>> rank_to_keep(torch.tensor([10.0, 2.0, 0.5, 0.1]), cutoff=0.1, max_rank_drop=0.25)
        3
    """
    above = int(count_above(singular_values, cutoff))
    return bounded_rank(above, singular_values.numel(), max_rank_drop=max_rank_drop, min_rank=min_rank)


def count_above(singular_values: Tensor, cutoff: float) -> Tensor:
    """#{σ ≥ β·σ_max} of (r,) descending singular values, as an integer scalar on their device."""
    # in a narrow dtype the product of subnormal numbers would be zero, which all reach
    values = singular_values.double()
    # an all-zero core has lost nothing yet: 0 ≥ β·0 keeps every direction
    return (values >= cutoff * values[0]).sum()


def count_needed(energies: Tensor, total: Tensor, largest_loss: float) -> Tensor:
    """How many leading directions to keep so that the others have at most a share `largest_loss` of the output energy.

    Args:
        energies: (r,) output energy of each direction, σᵢ² E[(vᵢᵀ x)²], in descending order of σ.
        total: scalar, output energy of the layer.
        largest_loss: share in [0, 1).

    Returns:
        An integer scalar in [0, r] on their device.

    Examples:
        >>> count_needed(torch.tensor([9.0, 0.9, 0.09, 0.01]), torch.tensor(10.0), 0.02)
        tensor(2)
    """
    lost = energies.flip(0).cumsum(0).flip(0)  # by keeping only the directions before
    return (lost > largest_loss * total).sum()


def bounded_rank(above: int, rank: int, *, max_rank_drop: float, min_rank: int) -> int:
    """The rank kept of `rank` when `above` directions pass the cutoff; see `rank_to_keep`."""
    return min(rank, max(above, rank - math.floor(max_rank_drop * rank), min_rank))


def truncate(factors: Factors, *, cutoff: float, max_rank_drop: float = 0.5, min_rank: int = 1) -> Factors:
    """Drop the directions with ``σ < cutoff·σ_max``, for good.

    The rank kept is ``max(#{σ ≥ β·σ_max}, r − ⌊max_rank_drop·r⌋, min_rank)``, at most r.

    Args:
        factors: with a diagonal, descending sigma, as `factorize` and `rediagonalize` return it.
        cutoff: β in [0, 1); 0 drops nothing.
        max_rank_drop: largest share of the rank lost in one call, in [0, 1].
        min_rank: floor, a number of directions ≥ 1.

    Raises:
        ValueError: an argument is out of range, the shapes do not fit, or sigma is not diagonal.

    Examples:
        >>> factors = factorize(torch.diag(torch.tensor([10.0, 5.0, 0.5, 0.1])))
        >>> truncate(factors, cutoff=0.1).rank
        2
    """
    if not isinstance(cutoff, Real) or not 0 <= cutoff < 1:
        raise ValueError(f"`cutoff` must be in [0, 1), but is {cutoff!r}. 0.1 drops σ below a tenth of the largest.")
    if not isinstance(max_rank_drop, Real) or not 0 <= max_rank_drop <= 1:
        raise ValueError(f"`max_rank_drop` must be in [0, 1], but is {max_rank_drop!r}. 0.5 at most halves the rank.")
    if not isinstance(min_rank, Integral) or min_rank < 1:
        raise ValueError(f"`min_rank` must be at least 1, but is {min_rank!r}. A layer keeps at least one direction.")
    _require_fitting(factors)
    _require_finite_matrix(factors.sigma, "sigma")
    singular_values = factors.sigma.diagonal()
    if not torch.equal(factors.sigma, torch.diag(singular_values)) or bool((singular_values.diff() > 0).any()):
        raise ValueError("`factors.sigma` must be diagonal and descending. Call `rediagonalize` first.")
    kept = rank_to_keep(singular_values, cutoff=cutoff, max_rank_drop=max_rank_drop, min_rank=min_rank)
    return factors.cut(kept)


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError that names the first tensor with NaN or Inf; waits for the device once, however many."""
    name = first_not_finite(tensors)
    if name is not None:
        raise not_finite_error(name)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with NaN or Inf; waits for the device once, however many there are."""
    return next(iter(not_finite(tensors)), None)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors with NaN or Inf; waits for the device once, however many there are."""
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel() > 0}
    if not tensors:
        return []
    finite = [torch.isfinite(largest_entry(tensor)) for tensor in tensors.values()]
    on_host = torch.stack([each.to(finite[0].device) for each in finite]).tolist()
    return [name for name, each in zip(tensors, on_host, strict=True) if not each]


def not_finite_error(name: str) -> ValueError:
    """The error for a weight with NaN or Inf."""
    return ValueError(
        f"`{name}` holds NaN or Inf, so it has no basis. Training has diverged, or a checkpoint is damaged: lower the "
        "learning rate, clip gradients, or go back to an earlier checkpoint."
    )


def require_in_range(singular_values: Tensor, dtype: torch.dtype, name: str) -> None:
    """Raise a ValueError when the largest of the (r,) singular values of `name` would be Inf in `dtype`."""
    largest = float(singular_values.detach().max())
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"The largest singular value of `{name}` is {largest:.3g}, too large for {dtype}. Convert the weight to "
            "float32 or bfloat16 first."
        )


def _require_fitting(factors: Factors) -> None:
    shapes = [tuple(factor.shape) for factor in factors]
    if {len(shape) for shape in shapes} != {2} or len({shapes[0][1], *shapes[1], shapes[2][0]}) != 1:
        raise ValueError(
            f"`factors` must be u (m, r), sigma (r, r) and vh (r, n), but have the shapes {shapes}. Take all three from "
            "one decomposition."
        )


def _require_finite_matrix(matrix: Tensor, name: str) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(
            f"`{name}` must be a torch.Tensor, but is of type {type(matrix).__name__}. Convert it with torch.as_tensor."
        )
    if matrix.ndim != 2 or matrix.numel() == 0 or matrix.dtype not in DTYPES or matrix.layout != torch.strided:
        raise ValueError(
            f"`{name}` must be a non-empty floating-point matrix, dense and of at least 16 bits, but has shape "
            f"{tuple(matrix.shape)}, dtype {matrix.dtype} and layout {matrix.layout}. Reshape it to (out, in), make it "
            "dense, or dequantize it first."
        )
    if matrix.is_meta:
        raise ValueError(
            f"`{name}` is on the meta device, so it holds no values. Load the weights before they are decomposed."
        )
    if not bool(torch.isfinite(largest_entry(matrix))):
        raise not_finite_error(name)
