r"""Coefficients of nonlinear conjugate gradients, one for each token.

With g = −(gradient), g₋ the one before, e = g − g₋, v the last direction's negative, and norms and
products over a token's channels (arXiv:2208.00579):

- `nc`: (1 − √(|e|/|v|))²;
- `fr` (Fletcher–Reeves): |g|²/|g₋|²;
- `pr` (Polak–Ribière): g·e/|g₋|²;
- `hs` (Hestenes–Stiefel): g·e/v·e;
- `dy` (Dai–Yuan): |g|²/v·e,

brought into [0, 1−δ].
"""

from __future__ import annotations

from math import inf

from torch import Tensor

KINDS = ("nc", "fr", "pr", "hs", "dy")
DELTA = 1e-4
"""δ of the release."""


def coefficient(kind: str, g: Tensor, before: Tensor, v: Tensor) -> Tensor:
    """μ of every token, (B, T, 1), from g, g₋ and v (B, T, d).

    Finite in value and derivatives where the release is not, each token by itself. With v = 0 it is
    0. With e = 0 `nc` is 1−δ, of slope 0. Where a ratio's denominator is 0, it passes no gradient:
    `hs` and `dy` are 0, and `fr` and `pr` at their limit, 1−δ (`pr` is 0 if g = 0, too).
    """
    e, speed = g - before, _dot(v, v)
    match kind:
        case "nc":
            ratio = _ratio(_dot(e, e), speed)
            still = ratio == 0  # the root's slope there is infinite
            mu = ((1 - ratio.masked_fill(still, 1) ** 0.25) ** 2).masked_fill(still, 1)
        case "fr":
            mu = _ratio(_dot(g, g), _dot(before, before), beyond=inf, both=inf)
        case "pr":
            mu = _ratio(_dot(g, e), _dot(before, before), beyond=inf)
        case "hs":
            mu = _ratio(_dot(g, e), _dot(v, e))
        case _:
            mu = _ratio(_dot(g, g), _dot(v, e))
    return mu.clamp(0, 1 - DELTA).masked_fill(speed == 0, 0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _ratio(a: Tensor, b: Tensor, beyond: float = 0.0, both: float = 0.0) -> Tensor:
    """a/b; where b = 0, without a gradient, `beyond`, or `both` if a = 0 too."""
    zero = b == 0
    ratio = a / b.masked_fill(zero, 1)
    return ratio.masked_fill(zero, beyond).masked_fill(zero & (a == 0), both)
