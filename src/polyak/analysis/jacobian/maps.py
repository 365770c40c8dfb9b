r"""The maps of a model whose Jacobians are looked at, and the states they work on.

A state of T tokens is z (T, c): x and, after it, the vector and matrix streams of every token. A
matrix stream starts from the identity and stays symmetric, so a token's R has D(D + 1)/2
coordinates: its diagonal, and √2 times what is above it (lengths are those of R).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

from polyak.analysis._common import check_model, math_attention
from polyak.analysis.jacobian.chain import Chain
from polyak.analysis.jacobian.cut import Piece, cut
from polyak.analysis.jacobian.linear import Free, Linear
from polyak.analysis.jacobian.matrix_attention import show
from polyak.analysis.jacobian.states import States
from polyak.analysis.jacobian.zeros import Moved, Zeros, constant_zeros, norm_zeros, streams_moved
from polyak.errors import ConfigError, DataError
from polyak.nn.context import Context
from polyak.nn.placement import step
from polyak.nn.splitting import oracle_of
from polyak.nn.transformer import Transformer

MapFunction = Callable[[Tensor], Tensor]
MOST_BYTES = 4 << 30
AGREE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""How closely the pieces must reproduce a derivative of the block itself, relative."""


@dataclass(eq=False)
class Map:
    """A causal map between states of T tokens, at a point.

    Attributes:
        name: for messages.
        function: (T, c) → (T, c').
        point: (T, c).
        entering: gives a basis of what the input can be, (T, c, n); None for all of it.
        find_zeros: what the Jacobian loses by its structure.
        d: width of attention; None for that of the point.
        most_bytes: pieces larger than this are not made; products only, then, and no solves.
    """

    name: str
    function: MapFunction
    point: Tensor
    entering: Callable[[], Tensor | None] = field(default=lambda: None)
    find_zeros: Callable[[Linear], Zeros] = field(default=lambda _: Zeros())
    d: int | None = None
    most_bytes: int = MOST_BYTES

    @cached_property
    def pieces(self) -> list[Piece]:
        """The derivative in pieces, compared once with a derivative of the function itself.

        Raises:
            ConfigError: they disagree, so tokens see each other outside of attention.
        """
        pieces = cut(self.function, self.point)
        _compare(self.name, Chain(pieces), self.function, self.point)
        return pieces

    @cached_property
    def whole(self) -> Linear:
        """The Jacobian J."""
        if "pieces" not in self.__dict__ and self.bytes() > self.most_bytes:
            return Free(self.function, self.point)
        return Chain(self.pieces)

    @cached_property
    def zeros(self) -> Zeros:
        """The directions J loses by its structure."""
        return self.find_zeros(self.whole)

    @cached_property
    def restricted(self) -> Linear:
        """Q_outᵀ J Q_in: without what is lost by structure, and where the input can be."""
        enter = self.entering() if self.zeros.enter is None else self.zeros.enter
        return self.whole.with_bases(enter, self.zeros.leave)

    def release(self) -> None:
        """Let go of the pieces; what is lost stays known."""
        for name in ("pieces", "whole", "restricted"):
            self.__dict__.pop(name, None)

    def bytes(self) -> int:
        """What its pieces will hold, by formula, before anything is traced."""
        with torch.no_grad():
            width = self.function(self.point).shape[1]
        tokens, own = self.point.shape
        d = self.d or own
        per_token = width * own + 3 * d * (own + width) + (own + d) * (width + 3 * d)
        return tokens * per_token * self.point.element_size()


def product(maps: list[Map], name: str) -> Map:
    """Every map after the one before it: its pieces are theirs."""

    def composed(z: Tensor) -> Tensor:
        for one in maps:
            z = one.function(z)
        return z

    made = Map(name, composed, maps[0].point, maps[0].entering)
    if all(isinstance(one.whole, Chain) for one in maps):
        made.__dict__["pieces"] = [piece for one in maps for piece in one.pieces]
    else:
        made.most_bytes = 0
    last = maps[-1].zeros
    made.__dict__["zeros"] = Zeros(leave=last.leave, exact=last.exact, near=last.near)
    return made


def _compare(name: str, chain: Chain, function: MapFunction, point: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    direction = chain.random(point.shape[1], 1, generator)[..., 0]
    with torch.no_grad(), math_attention():
        expected = jvp(function, (point,), (direction,))[1]
    found = chain.times(direction[..., None])[..., 0]
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-300))
    if not error <= AGREE[point.dtype]:
        raise ConfigError(
            f"{name}: tokens see each other outside of scaled_dot_product_attention, so its "
            f"Jacobian cannot be taken apart (a derivative differs by {error:.0e}); load "
            "Hugging Face models with attn_implementation='sdpa'"
        )


@dataclass(eq=False)
class BlockMaps:
    """One block's maps: (a) frozen, (b) full and (c) oracle. Pieces are made when asked for."""

    index: int
    frozen: Map
    full: Map
    oracle: Map
    streams: bool
    """Whether there are streams beside x, that is, whether (a) and (b) differ."""


def block_maps(
    model: nn.Module,
    ids: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    most_bytes: int = MOST_BYTES,
) -> list[BlockMaps]:
    """The maps of every block of a causal model on one sequence.

    Where attention has a state without a closed form (`matrix_attention`), maps are products only.

    Args:
        model: a `Transformer`, or a Hugging Face causal language model that attends through
            `scaled_dot_product_attention`; in eval mode. It is copied, not changed.
        ids: (T,) or (1, T) token ids.
        dtype: of the computation, float64 or float32.
        most_bytes: memory that one map may take; larger ones get their top end and bounds only.

    Raises:
        ConfigError: dropout is on, the model draws random numbers or is not causal, or it has no
            list of blocks.
        DataError: no tokens, or ids the model does not know.
    """
    ids = ids.reshape(1, -1) if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise DataError(f"a Jacobian is of one sequence: ids of shape (T,), not {tuple(ids.shape)}")
    if dtype not in AGREE:
        raise ConfigError(f"dtype={dtype} must be float64 or float32")
    check_model(model, torch.cat([ids, ids[:, :1]], dim=1))  # whose last column is a target
    model = copy.deepcopy(model).to(dtype).requires_grad_(False)
    with torch.no_grad():
        found: Any = _blocks if isinstance(model, Transformer) else _plain_blocks
        if isinstance(model, Transformer) and not show(model):
            most_bytes = 0  # no pieces
        blocks = list(found(model, ids))
    for maps in blocks:
        for one in (maps.frozen, maps.full, maps.oracle):
            one.most_bytes = most_bytes
    return blocks


def _blocks(model: Transformer, ids: Tensor) -> Iterator[BlockMaps]:
    x, state = model.start(ids)
    states = States(x, state)
    before: BlockMaps | None = None
    context = model.context(ids) if len(model.attention_scalars) else None
    for index, block in enumerate(model.blocks):
        z = states.pack(x, state)
        maps = _block(block, states, z, x, state, index, before, context)
        yield maps
        before = maps
        x, state = block(x, state, context)
        for name, matrix in states.matrices.items():
            value = getattr(state, name)
            if matrix and not torch.allclose(value, value.transpose(-2, -1)):
                raise ConfigError(
                    f"stream {name!r} of rule {model.placement.name} does not stay symmetric, so "
                    "its Jacobian has no meaning here"
                )


def _leaving(before: Map | None) -> Callable[[], Tensor | None]:
    """A basis of what can go into a map: what comes out of the same of the block before."""
    return lambda: None if before is None else before.zeros.leave  # the first starts anywhere


def _block(
    block: Any,
    states: States,
    z: Tensor,
    x: Tensor,
    state: Any,
    index: int,
    before: BlockMaps | None,
    context: Context | None,
) -> BlockMaps:
    """`before` is the full map of the block before; the first block's streams start anywhere."""

    def frozen(own: Tensor) -> Tensor:
        moved: Tensor = block(own[None], state, context)[0][0]
        return moved

    def full(own: Tensor) -> Tensor:
        return states.pack(*block(*states.unpack(own), context))

    def oracle(own: Tensor) -> Tensor:
        y = own[None]
        attended = block.attention(y, context)
        y = y + attended
        found: Tensor = (attended + block.mlp(block.attention.norm(y) if post else y))[0]
        return found

    name, post = f"block {index}", block.post_norm
    moved, after = block(x, state, context)
    # which rule moved a stream last; none, where it passes through unchanged
    movers = {s.name: rule for rule in block.rules.values() for s in rule.streams}
    point = _lookahead(block, x, state)
    passed = [Moved("x", slice(0, states.d), moved[0], (block.mlp.norm,))] if post else []
    parts = [*passed, *streams_moved(states, after, movers)]
    return BlockMaps(
        index,
        Map(
            f"{name} (a)",
            frozen,
            x[0],
            _leaving(None if before is None else before.frozen),
            lambda linear: norm_zeros(linear, passed),
        ),
        Map(
            f"{name} (b)",
            full,
            z,
            _leaving(None if before is None else before.full),
            lambda linear: norm_zeros(linear, parts, None if before is None else before.full.zeros),
            d=states.d,
        ),
        Map(f"{name} (c)", oracle, point, find_zeros=constant_zeros),
        bool(states.names),
    )


class _Found(Exception):
    """Carries the point at which a rule's step first asks its oracle."""


def _lookahead(block: Any, x: Tensor, state: Any) -> Tensor:
    """Where the block first asks an oracle: x, or a point ahead of it; (T, d)."""

    def ask(point: Tensor) -> Tensor:
        raise _Found(point)

    first, x = next(iter(block.rules.values())), block.reinjected(x, state)
    try:
        step(first, x, state, oracle_of("attention", ask, ask))  # type: ignore[arg-type]
    except _Found as found:
        point: Tensor = found.args[0][0]
        return point
    return x[0]  # a rule that asks no oracle


def _plain_blocks(model: nn.Module, ids: Tensor) -> Iterator[BlockMaps]:
    """Blocks of a Hugging Face model, x → x, called as the model itself calls them."""
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} has no list of num_hidden_layers blocks; the spectrum is for "
            "polyak's models and Hugging Face causal language models"
        )
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((block, args, kwargs))

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in lists[0]]
    try:
        with math_attention():
            model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for index, (block, args, kwargs) in enumerate(calls):
        moved = _plain_block(block, args, kwargs)
        given = [*args, *([kwargs["hidden_states"]] if not args else [])]
        point = given[0][0]

        def oracle(own: Tensor, moved: MapFunction = moved) -> Tensor:
            return moved(own) - own

        name = f"block {index}"
        frozen = Map(f"{name} (a)", moved, point)
        residual = Map(f"{name} (c)", oracle, point, find_zeros=constant_zeros)
        yield BlockMaps(index, frozen, frozen, residual, False)


def _plain_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MapFunction:
    def moved(own: Tensor) -> Tensor:
        if args:
            out = block(own[None], *args[1:], **kwargs)
        else:
            out = block(**{**kwargs, "hidden_states": own[None]})
        found: Tensor = (out[0] if isinstance(out, tuple) else out)[0]
        return found

    return moved
