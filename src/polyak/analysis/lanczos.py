r"""Both ends of a symmetric operator's spectrum, and Lanczos runs for quadrature.

Vectors are float64 whatever the operator computes in, and every new one is orthogonalised against
all kept ones, twice where needed. The ends come from a thick-restarted Lanczos iteration (Wu and
Simon 2000). SciPy's `eigsh` finds the same values (the tests compare both), but it keeps no vector
of what has not converged, so that no bound could be given, and works on the CPU only.

A Ritz value θ of a unit vector u is a Rayleigh quotient. By Cauchy's interlacing the i-th largest
θ is a lower bound of λ_i, and the i-th smallest an upper bound of the i-th smallest eigenvalue,
converged or not. With the residual r = ‖Hu − θu‖ some eigenvalue lies within r of θ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from polyak.analysis.hessian import Operator, dense
from polyak.checks import check_whole

Array = npt.NDArray[np.float64]
LOOK_EVERY = 5
"""Products between looks at whether the ends have converged."""


@dataclass(frozen=True, kw_only=True)
class Eigenpair:
    """One end of the spectrum, i-th from the outside."""

    value: float
    """Rayleigh quotient."""
    residual: float
    """‖Hu − θu‖ with ‖u‖ = 1, by a product of its own."""
    converged: bool
    """Whether the residual is within the tolerance; if not, `value` is a bound."""


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Both ends of the spectrum, from the outside in."""

    top: tuple[Eigenpair, ...]
    bottom: tuple[Eigenpair, ...]
    vectors: Tensor
    """(k, N): orthonormal, those of `top`, then of `bottom`."""
    images: Tensor
    """(k, N): H times each."""
    products: int
    tolerance: float
    """On the residual, in the operator's units."""


def extremes(
    operator: Operator,
    size: int,
    *,
    count: int,
    bottom: bool = True,
    tolerance: float = 1e-4,
    max_products: int = 400,
    seed: int = 0,
    device: torch.device | None = None,
    basis: int | None = None,
) -> Ends:
    """The `count` largest and `count` smallest eigenvalues, signed, with residuals.

    Operators of at most `basis` rows are formed whole and decomposed, which is exact.

    Args:
        operator: symmetric, on float64 vectors of length `size`.
        size: N.
        count: eigenvalues at each end, at most N.
        bottom: whether the smaller end is wanted (of a semi-definite operator it is 0).
        tolerance: largest residual of a value, relative to max|λ|.
        max_products: products after which what has not converged is left as a bound.
        seed: of the starting vector.
        device: of the vectors.
        basis: Lanczos vectors kept at once; None for 20 more than four times the values wanted.

    Raises:
        ConfigError: `count` below 1.
    """
    check_whole("top_k", count)
    count = min(count, size)
    wanted = count * (2 if bottom else 1)
    basis = min(size, basis or 4 * wanted + 20)
    if size <= max(basis, 64):
        return _whole(operator, size, count, bottom, tolerance, device)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator, dtype=torch.float64).to(device)
    rows = torch.zeros(basis + 1, size, dtype=torch.float64, device=device)
    rows[0] = start / start.norm()
    small = np.zeros((basis, basis))
    done, products = 0, 0
    while True:
        # looked at every few products, so that none is made after the ends have converged
        full = False
        while not full:
            for _ in range(min(LOOK_EVERY, basis - done)):
                image = operator(rows[done])
                products += 1
                coefficients, rest, coupling = _orthogonalised(image, rows[: done + 1], generator)
                small[: done + 1, done] = small[done, : done + 1] = coefficients
                done += 1
                rows[done] = rest
            full = done == basis
            values, inner = np.linalg.eigh(small[:done, :done])
            chosen = [*range(done - count, done)] + ([*range(count)] if bottom else [])
            estimates = coupling * np.abs(inner[-1, chosen])
            close = estimates.max() <= 0.5 * tolerance * float(np.abs(values).max())
            stop = done >= 2 * wanted and (close or products + wanted >= max_products)
            full = full or stop
        if stop:
            break
        # keep the wanted Ritz vectors and as many again beside them: they speed the next cycle
        extra = max(1, (basis - wanted) // 4)
        keep = [*range(basis - count - extra, basis)] + ([*range(count + extra)] if bottom else [])
        keep = sorted(set(keep))[: basis - 1]
        turn = torch.from_numpy(inner[:, keep].T.copy()).to(rows.device)
        last = rows[basis].clone()
        rows[: len(keep)] = turn @ rows[:basis]
        done = len(keep)
        rows[done] = last
        small[:] = 0.0
        small[range(done), range(done)] = values[keep]
    order = [*reversed(range(done - count, done))] + ([*range(count)] if bottom else [])
    vectors = torch.from_numpy(inner[:, order].T.copy()).to(rows.device) @ rows[:done]
    del rows
    images = torch.stack([operator(vector) for vector in vectors])
    return _ends(vectors, images, count, tolerance, products + len(order))


def _whole(
    operator: Operator,
    size: int,
    count: int,
    bottom: bool,
    tolerance: float,
    device: torch.device | None,
) -> Ends:
    """The ends of a small operator, from all of it."""
    matrix = dense(operator, size, device)
    _, inner = torch.linalg.eigh((matrix + matrix.T) / 2)
    order = [*reversed(range(size - count, size))] + ([*range(count)] if bottom else [])
    vectors = inner.T[order].contiguous()
    return _ends(vectors, vectors @ matrix.T, count, tolerance, size)


def _ends(vectors: Tensor, images: Tensor, count: int, tolerance: float, products: int) -> Ends:
    values = (vectors * images).sum(1)
    residuals = (images - values[:, None] * vectors).norm(dim=1)
    limit = tolerance * float(values.abs().max())
    pairs = [
        Eigenpair(value=value, residual=residual, converged=residual <= limit)
        for value, residual in zip(values.tolist(), residuals.tolist(), strict=True)
    ]
    return Ends(
        top=tuple(sorted(pairs[:count], key=lambda pair: -pair.value)),
        bottom=tuple(sorted(pairs[count:], key=lambda pair: pair.value)),
        vectors=vectors,
        images=images,
        products=products,
        tolerance=limit,
    )


def _orthogonalised(
    vector: Tensor, rows: Tensor, generator: torch.Generator
) -> tuple[Array, Tensor, float]:
    """`vector` without its part in the span of orthonormal `rows`.

    Returns the coefficients, the unit rest, and the rest's norm; where the rest is nothing but
    rounding, the rows span an invariant space: the norm is then 0 and the rest a fresh direction.
    """
    before = float(vector.norm())
    coefficients = rows @ vector
    vector = vector - rows.T @ coefficients
    after = float(vector.norm())
    if after < 0.7 * before:  # cancellation: once more is enough (Kahan, Parlett)
        correction = rows @ vector
        vector = vector - rows.T @ correction
        coefficients = coefficients + correction
        after = float(vector.norm())
    found = coefficients.cpu().numpy()
    if after > 1e-13 * before:
        return found, vector / after, after
    if rows.shape[0] == rows.shape[1]:
        return found, torch.zeros_like(vector), 0.0
    fresh = torch.randn(len(vector), generator=generator, dtype=torch.float64).to(vector.device)
    for _ in range(3):
        fresh = fresh - rows.T @ (rows @ fresh)
        fresh = fresh / fresh.norm()
    return found, fresh, 0.0


def quadrature(operator: Operator, start: Tensor, steps: int) -> tuple[Array, Array]:
    r"""Gauss quadrature of the spectral measure of `start`, by Lanczos.

    With u = start/‖start‖, Σ_j w_j f(θ_j) ≈ uᵀ f(H) u, exact for polynomials of degree 2·steps − 1.

    Returns:
        Nodes θ and weights w (which add up to 1), fewer than `steps` where the Krylov space of the
        start is smaller.
    """
    steps = min(steps, len(start))
    rows = torch.zeros(steps, len(start), dtype=torch.float64, device=start.device)
    current = start.double() / start.double().norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        rows[step] = current
        image = operator(current)
        coefficients, current, norm = _orthogonalised(
            image, rows[: step + 1], torch.Generator().manual_seed(0)
        )
        diagonal.append(float(coefficients[-1]))
        beside.append(norm)
        if norm == 0.0:
            break
    nodes, inner = eigh_tridiagonal(np.array(diagonal), np.array(beside[: len(diagonal) - 1]))
    return nodes, inner[0] ** 2
