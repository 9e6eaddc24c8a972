"""How a weight is decomposed: which route for which shape, device and rank, and many weights at a time.

========== ============================================== =======================================================
route      computes                                       used for
========== ============================================== =======================================================
svd        LAPACK or cuSOLVER SVD of the taller side      all directions, on a CPU; whatever another route refuses
polar      ``W = B H`` by matrix products, eigh of H      all directions, on an accelerator, where products are fast
gram       eigh of WᵀW, then Rayleigh–Ritz                the r largest directions, r ≤ k/2
subspace   randomized subspace iteration                  r ≤ k/16 of a large weight
========== ============================================== =======================================================

Every route returns orthonormal factors; those that square the singular values hand small ones on to the SVD.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

WORKSPACE_BYTES = 256 * 2**20  # of results and scratch space held at once, unless a single weight needs more
_COPIES = 4  # of a weight that its decomposition holds: input, U, Vᵀ, scratch
_SMALL = 128  # up to this k an SVD costs less than thinking about it
_LARGE = 1024  # from this k on, few directions are found by subspace iteration
_RELIABLE = 0.01  # σ/σ_max from which the Gram matrix resolves a direction in float32
_LOWER_BOUND = 1e-7  # σ / ‖W‖ from which the polar iteration converges; less is noise in float32
_ORTHONORMAL = 1e-5  # largest entry of BᵀB − I


class SVD(NamedTuple):
    """Singular values, descending and ≥ 0, with their directions: ``u @ diag(s) @ vh``."""

    u: Tensor  # (m, r), orthonormal columns
    s: Tensor  # (r,)
    vh: Tensor  # (r, n), orthonormal rows

    @property
    def mT(self) -> SVD:
        """The SVD of the transposed matrix."""
        return SVD(self.vh.mT, self.s, self.u.mT)

    def cut(self, rank: int) -> SVD:
        """Only the `rank` largest directions."""
        return SVD(self.u[:, :rank], self.s[:rank], self.vh[:rank])


# ---- one matrix ------------------------------------------------------------------------------------------------------


def thin_svd(matrix: Tensor, name: str) -> SVD:
    """SVD of a finite (m, n) matrix in float32 or float64, all k directions.

    On non-convergence it is retried through the Gram matrix in float64, with a warning.

    Raises:
        torch.linalg.LinAlgError: the second method failed too.
    """
    if matrix.shape[0] < matrix.shape[1]:
        # LAPACK is about 1.7 times faster on the taller side
        return thin_svd(matrix.mT, name).mT
    try:
        # keeps the products of subnormal or huge entries in range
        scaled, scale = _scaled(matrix)
        found = SVD(*torch.linalg.svd(scaled, full_matrices=False))
        if _is_finite(*found):
            return found._replace(s=found.s / scale)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    warnings.warn(f"The SVD of `{name}` did not converge; retrying through its Gram matrix in float64.", stacklevel=3)
    failure = None
    try:
        found = _svd_by_gram(matrix)
        if _is_finite(*found):
            return found
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        failure = error
    raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
        f"Neither the SVD of `{name}` nor that of its Gram matrix gave finite factors. Move the model to another "
        "device, or go back to an earlier checkpoint."
    ) from failure


def leading_svd(matrix: Tensor, rank: int, name: str) -> SVD:
    """The `rank` largest directions of a finite (m, n) matrix in float32 or float64, by the cheapest sound route.

    The Gram route gives them as exactly as the SVD does, for σ ≥ .01 σ_max. Subspace iteration stops when the energy
    that it holds grows by less than .01 % per step. When either fails, all directions are computed, with a warning.
    """
    m, n = matrix.shape
    if m < n:
        return leading_svd(matrix.mT, rank, name).mT
    if n > _SMALL and 2 * rank <= n:
        scaled, scale = _scaled(matrix)
        try:
            basis = _leading_subspace(scaled, rank) if n >= _LARGE and 16 * rank <= n else None
            if basis is None:
                basis = torch.linalg.eigh(_gram_below_diagonal(scaled)).eigenvectors[:, -rank:]
            found = _rayleigh_ritz(scaled, basis).cut(rank)
            if _is_finite(*found) and bool(found.s[-1] >= _RELIABLE * found.s[0]):
                return found._replace(s=found.s / scale)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            _warn_of_slower_route(name)
    found = svd_by_polar(matrix, name) if n > _SMALL and matrix.is_cuda else thin_svd(matrix, name)
    return found.cut(rank)


def svd_by_polar(matrix: Tensor, name: str) -> SVD:
    """SVD of a finite matrix from its polar decomposition, all k directions; `thin_svd` if the iteration fails.

    ``W = B H``, ``H = V S Vᵀ``, ``U = B V``: H has the singular values of W, not their squares.
    """
    basis, deviation = polar_iteration(matrix)
    return _svd_from_polar(matrix, basis, name) if bool(deviation <= _ORTHONORMAL) else thin_svd(matrix, name)


def polar_iteration(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal polar factor ``B`` of each matrix, by matrix products alone and without a word to the host.

    Newton–Schulz with the scaling that is optimal for singular values in [ℓ, 1] (Chen & Chow, *A Stable Scaling of
    Newton-Schulz for Improving the Sign Function Computation of a Hermitian Matrix*, 2014), from ℓ = 1e-7 of an upper
    bound of the norm. Directions below that stay shorter than 1. With float32 weights of σ_min ≥ 1e-6 σ_max, Stability
    differs from that of the SVD by less than 1e-4.

    Args:
        matrices: (..., m, n) in float32 or float64, finite.

    Returns:
        (..., m, n), and the largest entry of ``|BᵀB − I|`` (B Bᵀ when m < n) of each matrix.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        basis, deviation = polar_iteration(matrices.mT)
        return basis.mT, deviation
    largest = matrices.abs().amax(dim=(-2, -1), keepdim=True)
    x = matrices / torch.where(largest > 0, largest, torch.ones_like(largest))
    with _full_precision():
        gram = x.mT @ x
        # (Σσ⁴)^¼ is the tightest bound of σ_max that costs nothing here
        bound = gram.square().sum(dim=(-2, -1), keepdim=True).pow(0.25)
        bound = torch.where(bound > 0, bound, torch.ones_like(bound))
        x, gram = x / bound, gram / bound.square()
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        for a, b in _scaled_newton_schulz(x.dtype):
            x = x @ (a * eye + b * gram)
            gram = x.mT @ x
    return x, (gram - eye).abs().amax(dim=(-2, -1))


def _scaled_newton_schulz(dtype: torch.dtype) -> Iterator[tuple[float, float]]:
    """Coefficients (a, b) of ``x ← a x + b x³`` that take [ℓ, 1] to 1 up to rounding."""
    lower = _LOWER_BOUND
    tolerance = torch.finfo(dtype).eps
    while 1 - lower > tolerance:
        # the bound keeps the image of 1 at .1 or more; closer to 0, rounding errors would be scaled up with it
        scale = min(math.sqrt(3 / (1 + lower + lower**2)), 1.6977)
        yield 1.5 * scale, -0.5 * scale**3
        lower = scale * lower * (3 - (scale * lower) ** 2) / 2


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32, which would end the iteration at an error of 1e-3."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _svd_from_polar(matrix: Tensor, basis: Tensor, name: str) -> SVD:
    if matrix.shape[0] < matrix.shape[1]:
        return _svd_from_polar(matrix.mT, basis.mT, name).mT
    with _full_precision():
        hermitian = basis.mT @ matrix
        try:
            s, v = torch.linalg.eigh((hermitian + hermitian.mT) / 2)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            _warn_of_slower_route(name)
            return thin_svd(matrix, name)
        v = v.flip(-1)
        return SVD(basis @ v, s.flip(-1).clamp_min(0), v.mT)


def _warn_of_slower_route(name: str) -> None:
    warnings.warn(
        f"The fast decomposition of `{name}` did not converge; computing its SVD instead, which takes longer.",
        stacklevel=4,
    )


def _rayleigh_ritz(matrix: Tensor, basis: Tensor) -> SVD:
    """SVD of the projection ``W V Vᵀ`` onto orthonormal columns V (n, r)."""
    q, r = torch.linalg.qr(matrix @ basis)
    p, s, qh = torch.linalg.svd(r)
    return SVD(q @ p, s, qh @ basis.mT)


def _gram_below_diagonal(matrix: Tensor, blocks: int = 4) -> Tensor:
    """``WᵀW`` (n, n) up to the blocks above the diagonal, which stay unset: 5/8 of the work, all that eigh reads."""
    n = matrix.shape[1]
    gram = matrix.new_empty(n, n)
    size = -(-n // blocks)
    for start in range(0, n, size):
        torch.mm(matrix[:, start:].mT, matrix[:, start : start + size], out=gram[start:, start : start + size])
    return gram


def _leading_subspace(matrix: Tensor, rank: int) -> Tensor | None:
    """(n, r') orthonormal columns, r' ≥ r, that hold the largest directions; `None` if that takes too long."""
    # a generator of its own: the user's random state is not touched
    generator = torch.Generator().manual_seed(rank)
    columns = rank + max(8, rank // 2)
    start = torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(start.to(matrix.device)).Q
    held = 0.0
    for _ in range(32):
        product = matrix @ basis
        energy = float(torch.linalg.svdvals(product)[:rank].square().sum())
        if energy <= held * 1.0001:
            return basis
        held = energy
        basis = torch.linalg.qr(matrix.mT @ torch.linalg.qr(product).Q).Q
    return None


def _svd_by_gram(matrix: Tensor) -> SVD:
    """SVD by eigh of AᵀA in float64, of a tall matrix; a QR of A V makes U orthonormal also where σ is tiny or zero.

    Singular values are exact to about ε·σ_max, not to ε·σ: the squares lose the small ones.
    """
    tall = matrix.to(torch.float64)
    largest = tall.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    tall = tall / largest
    _, v = torch.linalg.eigh(tall.mT @ tall)
    v = v.flip(-1)
    q, r = torch.linalg.qr(tall @ v)
    diagonal = r.diagonal()
    signs = torch.where(diagonal < 0, -1.0, 1.0)
    singular_values, order = (diagonal.abs() * largest).sort(descending=True)
    u = (q * signs)[:, order]
    return SVD(u.to(matrix.dtype), singular_values.to(matrix.dtype), v[:, order].mT.to(matrix.dtype))


def largest_entry(tensor: Tensor) -> Tensor:
    """Max |x| as a scalar, NaN if there is one; in one pass, and without a copy."""
    low, high = tensor.detach().aminmax()
    return torch.maximum(-low, high)


def _is_finite(*tensors: Tensor) -> bool:
    return all(math.isfinite(float(largest_entry(tensor))) for tensor in tensors)


def _scaled(matrix: Tensor) -> tuple[Tensor, float]:
    """The matrix times a power of two, which is exact, and that power: 1 unless the entries are far from 1."""
    largest = float(largest_entry(matrix))
    if largest == 0.0 or 1e-10 < largest < 1e10:
        return matrix, 1.0
    # float32 cannot hold 2**140, so the exponent is bounded; the result stays far from both ends of the range
    scale = 2.0 ** -max(-120, min(120, math.frexp(largest)[1]))
    return matrix * scale, scale


# ---- many matrices ---------------------------------------------------------------------------------------------------


class Decomposition:
    """One weight ``W = U S Vᵀ`` and its basis ``B = U Vᵀ``, of which only what is asked for is computed.

    Args:
        name: what messages call the weight.
        weight: (m, n).
        found: its SVD, or its orthogonal polar factor (m, n).
    """

    def __init__(self, name: str, weight: Tensor, found: SVD | Tensor) -> None:
        self.name = name
        self.shape = weight.shape
        self._weight = weight
        self._found = found

    def basis(self) -> Tensor:
        """B (m, n), in memory of its own."""
        return self._found.u @ self._found.vh if isinstance(self._found, SVD) else self._found.clone()

    def sketch(self, signs: Tensor) -> Tensor:
        """``B Z`` (m, s), or ``Bᵀ Z`` (n, s) when m < n, for the given Z (k, s)."""
        wide = self.shape[0] < self.shape[1]
        if isinstance(self._found, SVD):
            left, _, right = self._found.mT if wide else self._found
            return left @ (right @ signs)
        return (self._found.mT if wide else self._found) @ signs

    def svd(self) -> SVD:
        """All k directions."""
        if not isinstance(self._found, SVD):
            self._found = _svd_from_polar(self._weight.to(self._found.dtype), self._found, self.name)
        return self._found


def decompose(weights: Sequence[tuple[str, Tensor]]) -> Iterator[list[Decomposition]]:
    """Decompose many finite matrices in at least float32, a bounded number of them at a time.

    On a CPU several are computed side by side; on an accelerator those of one shape in one batch, with one
    synchronization for each batch.

    Args:
        weights: pairs of name and (m, n).

    Yields:
        Lists of decompositions, in an order that depends on the shapes.
    """
    for _, group in groupby(sorted(weights, key=_kind), key=_kind):
        same = list(group)
        weight = same[0][1]
        size = max(1, WORKSPACE_BYTES // (_COPIES * weight.numel() * _wide_dtype(weight).itemsize))
        if not weight.is_cuda:
            size = min(size, 2 * torch.get_num_threads())
        for start in range(0, len(same), size):
            chunk = same[start : start + size]
            yield _by_polar(chunk) if weight.is_cuda and min(weight.shape) > _SMALL else _by_svd(chunk)


def _kind(weight: tuple[str, Tensor]) -> tuple[int, int, str, str]:
    _, matrix = weight
    # the largest first; a batch is of one dtype and on one device
    return -max(matrix.shape), -min(matrix.shape), str(matrix.dtype), str(matrix.device)


def _wide_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _by_svd(weights: Sequence[tuple[str, Tensor]]) -> list[Decomposition]:
    def decomposed(item: tuple[str, Tensor]) -> SVD:
        name, weight = item
        return thin_svd(weight.to(_wide_dtype(weight)), name)

    small = min(weights[0][1].shape) <= _SMALL or weights[0][1].is_cuda
    found = map(decomposed, weights) if small else map_concurrently(decomposed, weights)
    return [Decomposition(name, weight, svd) for (name, weight), svd in zip(weights, found, strict=True)]


def _by_polar(weights: Sequence[tuple[str, Tensor]]) -> list[Decomposition]:
    wide = [weight.shape[0] < weight.shape[1] for _, weight in weights]
    tall = torch.stack([weight.mT if flip else weight for (_, weight), flip in zip(weights, wide, strict=True)])
    tall = tall.to(_wide_dtype(tall))
    bases, deviations = polar_iteration(tall)
    return [
        Decomposition(
            name,
            weight,
            (basis.mT if flip else basis) if deviation <= _ORTHONORMAL else thin_svd(weight.to(basis.dtype), name),
        )
        for (name, weight), flip, basis, deviation in zip(weights, wide, bases, deviations.tolist(), strict=True)
    ]


def map_concurrently(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """``map(function, items)`` in as many threads as PyTorch uses for one operation.

    LAPACK gains little from more than a few threads, and PyTorch releases the interpreter lock in it. Gradients are
    not recorded, since that setting belongs to a thread. Items are started in their order: put the longest first.
    """
    threads = torch.get_num_threads()
    workers = min(len(items), threads)
    if workers < 2:
        yield from map(function, items)
        return

    def start_worker() -> None:
        torch.set_num_threads(max(1, threads // workers))

    def call(item: T) -> R:
        with torch.no_grad():
            return function(item)

    try:
        with ThreadPoolExecutor(workers, initializer=start_worker) as pool:
            yield from pool.map(call, items)
    finally:
        # the number is also the default of threads that are started later
        torch.set_num_threads(threads)
