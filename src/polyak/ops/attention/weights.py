"""What makes the kinds differ: how much each key of a chunk weighs for each query.

With U_j = k_j v_jᵀ and the state (S, P, Z) before a chunk of C tokens, token t of the chunk reads

    numerator_t   = Σ_s mix[t,s] (q_t·k_s) v_s + keep_t q_tᵀS + read_t q_tᵀP
    denominator_t = Σ_s norm[t,s]  (q_t·k_s)   + keep_t q_t·Z

and the chunk leaves behind

    S' = keep_C S + read_C P + Σ_s write_s U_s,   P' = decay P + Σ_s push_s U_s,
    Z' = keep_C Z + Σ_s tally_s k_s.

Counted are real tokens: a masked one writes nothing and lets nothing coast.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(NamedTuple):
    """The weights of chunks, each (N, B, H, C, …) where a size of 1 means the same for all.

    mix and norm (…, C, C), decay (…), the others (…, C).  None stands for: norm the same as mix;
    keep, write and tally 1; read, push and decay: there is no P.
    """

    mix: Tensor
    norm: Tensor | None = None
    keep: Tensor | None = None
    read: Tensor | None = None
    write: Tensor | None = None
    push: Tensor | None = None
    tally: Tensor | None = None
    decay: Tensor | None = None

    def chunks(self, start: int, stop: int) -> Weights:
        """Those of the chunks from start to stop."""
        found: Any = (w if w is None or w.shape[0] == 1 else w[start:stop] for w in self)
        return Weights(*found)

    def rows(self, lane: slice) -> Weights:
        """Those of some rows of the batch."""
        found: Any = (w if w is None or w.shape[1] == 1 else w[:, lane] for w in self)
        return Weights(*found)


class Clock(NamedTuple):
    """Which tokens of each chunk are real and which documents they are in; (N, B, 1, C) each.

    elapsed is the number of real tokens so far in the chunk, document the number of documents begun
    in it.
    """

    real: Tensor
    elapsed: Tensor
    document: Tensor

    def sees(self) -> Tensor:
        """(…, C, C): whether query t may read key s: s ≤ t, real and of the same document."""
        causal = torch.ones(self.real.shape[-1:] * 2, dtype=torch.bool, device=self.real.device)
        same = self.document[..., :, None] == self.document[..., None, :]
        return causal.tril() & same & self.real[..., None, :]


def clock(mask: Tensor | None, starts: Tensor | None, chunk: int, tokens: int) -> Clock | None:
    """The clock of (B, T) masks, T filled up to whole chunks with masked tokens; None without."""
    if mask is None and starts is None:
        return None
    given = mask if mask is not None else starts
    assert given is not None
    fill = -tokens % chunk
    none = torch.zeros_like(given, dtype=torch.bool)
    real = ~none if mask is None else mask
    starts = none if starts is None else starts
    real, starts = (
        F.pad(t, (0, fill)).reshape(len(t), -1, chunk).transpose(0, 1)[:, :, None]
        for t in (real, starts)
    )
    return Clock(real, real.cumsum(-1), starts.cumsum(-1))


def powers(mu: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """(μ⁰ … μⁿ) and (w(0) … w(n)), w(n) = 1 + μ + … + μⁿ⁻¹, along a new last dimension.

    Sums rather than (1 − μⁿ)/(1 − μ), so that nothing cancels near μ = 1.
    """
    exponents = torch.arange(number + 1, device=mu.device, dtype=mu.dtype)
    found = mu[..., None] ** exponents
    sums = found.cumsum(-1)
    return found, torch.cat((torch.zeros_like(sums[..., :1]), sums[..., :-1]), dim=-1)


def linear_weights(at: Clock | None, chunk: int, like: Tensor) -> Weights:
    """Weights of linear attention: 1 for every key seen."""
    if at is None:
        ones = torch.ones(1, 1, 1, chunk, chunk, dtype=like.dtype, device=like.device)
        return Weights(ones.tril())
    last = _survives(at).to(like.dtype)
    keep = (at.document == 0).to(like.dtype)
    return Weights(at.sees().to(like.dtype), keep=keep, write=last, tally=last)


def momentum_weights(
    mu: Tensor, gamma: Tensor, at: Clock | None, chunk: int, like: Tensor
) -> Weights:
    """Weights of momentum attention: γ w(number of real tokens from key to query, both counted).

    mu and gamma are float64, () or (H,).  P is negative as in P' = μP − γU, so read is −μw.
    """
    mu, gamma = mu.reshape(-1), gamma.reshape(-1)  # (H,) or (1,)
    power, total = powers(mu, chunk)
    step = gamma[:, None] * total  # (H, C+1): γ w(n)
    plain = linear_weights(at, chunk, like)
    if at is None:
        index = torch.arange(chunk, device=like.device)
        mix = step[:, (index[:, None] - index + 1).clamp_min(0)][None, None]
        read = -(mu[:, None] * total[:, 1:])[None, None]
        write = step[:, 1:].flip(-1)[None, None]
        push = -(gamma[:, None] * power[:, :-1]).flip(-1)[None, None]
        decay = power[None, None, :, -1]
    else:
        here, ahead = at.document == 0, _survives(at)
        gap = at.elapsed[..., :, None] - at.elapsed[..., None, :] + 1
        mix = _pick(step, gap * at.sees())
        read = -_pick(mu[:, None] * total, at.elapsed * here)
        rest = at.elapsed[..., -1:] - at.elapsed
        write = _pick(step, (rest + 1) * ahead)
        push = -_pick(gamma[:, None] * power, rest) * ahead
        decay = (_pick(power, at.elapsed[..., -1:]) * here[..., -1:])[..., 0]
    # none of these is float64 unless the inputs are: sums of a chunk need no more
    mix, read, write, push, decay = (t.to(like.dtype) for t in (mix, read, write, push, decay))
    return Weights(mix, plain.mix, plain.keep, read, write, push, plain.tally, decay)


def released_weights(mu: Tensor, gamma: Tensor, length: int) -> Tensor:
    """γ w(T − j + 1) of keys j = 1 … T, (T, H): what the release trains with instead."""
    _, total = powers(mu.reshape(-1), length)
    return (gamma.reshape(-1, 1) * total[:, 1:]).flip(-1).T


def _survives(at: Clock) -> Tensor:
    """Whether a token is real and its document goes on to the end of the chunk."""
    return at.real & (at.document == at.document[..., -1:])


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """table[h, index] for every head h, index (N, B, 1, …) → (N, B, H, …)."""
    return torch.cat([row[index] for row in table.unbind(0)], dim=2)
