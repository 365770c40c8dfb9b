"""One trial step of a rule, so that a mistake in a user's rule is told in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.errors import PolyakError, RuleError
from polyak.nn.transformer import Transformer
from polyak.rules import UpdateRule


@torch.no_grad()
def check_rule(model: Transformer) -> None:
    """Take one step of the model's rule on two sequences of one token; look at what it returns.

    Without this, the x that a user's `step` returns alone, without the state, would be taken
    apart along the batch. Random numbers that the step draws leave torch's generators as they are.

    Raises:
        RuleError: the step fails, or returns something else than x and the state as they were.
    """
    device = model.head.weight.device
    rule: Any = next(iter(model.blocks[0].rules.values()))  # type: ignore[operator]
    assert isinstance(rule, UpdateRule)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        x, state = model.start(torch.zeros(2, 1, dtype=torch.int64, device=device))
        try:
            found: Any = rule.step(x, state, torch.zeros_like)
        except PolyakError:
            raise
        except Exception as error:  # a user's step may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RuleError(f"rule {rule.name}: its step fails: {reason}") from error
    wrong = _wrong(found, x, state)
    if wrong:
        raise RuleError(f"rule {rule.name}: step must return (x, state), but {wrong}")


def _wrong(found: Any, x: Tensor, state: Any) -> str | None:
    if not isinstance(found, tuple) or len(found) != 2:
        what = f"{len(found)} values" if isinstance(found, tuple) else _kind(found)
        return f"it returns {what}"
    new_x, new_state = found
    if (problem := _differs(new_x, x)) is not None:
        return f"its x is {problem}"
    if not isinstance(new_state, type(state)):
        return f"its state is {_kind(new_state)}; return state.replace(...)"
    for name in state._fields:
        problem = _differs(getattr(new_state, name), getattr(state, name))
        if problem is not None:
            return f"its state.{name} is {problem}"
    return None


def _differs(found: Any, like: Tensor) -> str | None:
    if not isinstance(found, Tensor):
        return _kind(found)
    if found.shape != like.shape:
        return f"of shape {tuple(found.shape)} where it was given {tuple(like.shape)}"
    if found.dtype != like.dtype:
        return f"{found.dtype} where it was given {like.dtype}"
    return None


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if value is not None else "nothing"
