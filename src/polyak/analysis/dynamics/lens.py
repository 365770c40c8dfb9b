r"""An affine lens: where depth will take x, guessed from x alone.

    A_s, b_s = argmin Σ ‖A x_s + b − x_S‖² + ρ (tr Σ xxᵀ / d) ‖A‖²

over the tokens of other text, in closed form (the shortcut of Din et al., arXiv:2303.09435). The
lens is fitted to the last x, not to the loss: it tells what is linearly there, and no more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.analysis.dynamics.trajectory import Watched
from polyak.errors import DataError

RIDGE = 1e-6


class Lens:
    """A_s and b_s of every point but the last, whose lens is the identity.

    Args:
        watched: the model.
        ids: (N, T+1) token ids of other text.

    Raises:
        DataError: fewer tokens than numbers to fit for each output.
    """

    def __init__(self, watched: Watched, ids: Tensor) -> None:
        grams: list[Tensor] = []
        sums: list[Tensor] = []
        for _, made in watched.passes(ids):
            last = made.xs[-1].flatten(0, 1).double()
            for place, x in enumerate(made.xs[:-1]):
                rows = _with_one(x.flatten(0, 1).double())
                if place == len(grams):
                    grams.append(torch.zeros_like(rows[:1]).T @ rows[:1])
                    sums.append(torch.zeros_like(rows[:1]).T @ last[:1])
                grams[place] += rows.T @ rows
                sums[place] += rows.T @ last
        width = len(grams[0])
        if ids[:, 1:].numel() < 2 * width:
            raise DataError(
                f"lens_tokens: {ids[:, 1:].numel()} tokens do not fit a lens of {width} numbers "
                f"for each output; give at least {2 * width}"
            )
        self.maps = [_solved(gram, right) for gram, right in zip(grams, sums, strict=True)]

    def __call__(self, place: int, x: Tensor) -> Tensor:
        """What the lens of point `place` makes of x (B, T, d)."""
        if place == len(self.maps):
            return x
        return (_with_one(x.double()) @ self.maps[place]).to(x)


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    d = len(gram) - 1
    ridge = torch.full((d + 1,), RIDGE * float(gram.diagonal()[:d].mean())).to(gram)
    ridge[d] = 0.0  # the constant costs nothing
    found: Tensor = torch.linalg.lstsq(gram + torch.diag(ridge), right).solution
    return found
