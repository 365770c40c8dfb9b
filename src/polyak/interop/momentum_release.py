r"""Weights named as in the code of arXiv:2208.00579, whose encoder is fast-transformers'.

Our name                         released name
`embedding.tokens`               `value_embedding` (and the buffer `pos_embedding.pe`)
`blocks.0.attention.qkv`         `transformer.layers.0.attention.query_projection`, `key_…`,
                                 `value_…`
`blocks.0.attention.out`         `transformer.layers.0.attention.out_projection`
`blocks.0.attention.norm`        `transformer.layers.0.norm1`
`blocks.0.mlp.up`, `.down`       `transformer.layers.0.linear1`, `linear2`
`blocks.0.mlp.norm`              `transformer.layers.0.norm2`
`norm`, `head`                   `transformer.norm`, `predictor`

An encoder's state alone, without `transformer.` in front, is read too. Nothing of the rule or of
attention's coefficients is in these files: they are fixed, and the model's configuration has them.

The release's output has a bias b, ours has none. With W the output matrix, δ = W⁺b gives Wδ = b
wherever there are no more classes than dimensions (and W has full rank), so that
W(LN x) + b = W(LN x + δ): δ is added to the final norm's bias.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polyak.errors import ConfigError
from polyak.nn.sinusoidal import sinusoids
from polyak.nn.transformer import Transformer

_SAME = {
    "norm_position": "post",
    "norm": "layer",
    "mlp": "plain",
    "bias": True,
    "qk_norm": False,
    "tie_embeddings": False,
    "embedding_reinjection": False,
}
_LAYER = {
    "attention.out": "attention.out_projection",
    "attention.norm": "norm1",
    "mlp.up": "linear1",
    "mlp.down": "linear2",
    "mlp.norm": "norm2",
}
_QKV = tuple(f"attention.{name}_projection" for name in ("query", "key", "value"))
_POSITIONS, _OUTPUT_BIAS = "pos_embedding.pe", "predictor.bias"
CLOSE = 1e-5
"""How closely tables of positions, and a folded bias, must agree."""


def load_state_dict(model: Transformer, state: Mapping[str, Tensor]) -> None:
    """Load weights of the release into `model`, in place: of a whole model, or of its encoder.

    Raises:
        ConfigError: the model's backbone is not the release's, a weight is missing, left over or of
            another shape, or the output's bias cannot be had. The first is named, and nothing is
            changed.
    """
    whole = "value_embedding.weight" in state
    _check_backbone(model, whole)
    wanted = _sources(model, whole)
    known = {name for names in wanted.values() for name in names}
    known |= {_POSITIONS, _OUTPUT_BIAS} if whole else set()
    missing = [n for names in wanted.values() for n in names if n not in state]
    extra = sorted(set(state) - known)
    if missing or extra:
        words = [f"missing {missing[0]}"] if missing else []
        words += [f"unexpected {extra[0]}"] if extra else []
        raise ConfigError(f"not weights of this model in the release: {', '.join(words)}")
    parameters = dict(model.named_parameters())
    found = {ours: torch.cat([state[n] for n in names]) for ours, names in wanted.items()}
    for ours, value in found.items():
        if value.shape != parameters[ours].shape:
            raise ConfigError(
                f"{wanted[ours][0]}: {ours} would have shape {tuple(value.shape)}, and the model "
                f"needs {tuple(parameters[ours].shape)}"
            )
    if whole:
        _check_positions(model, state)
        found["norm.bias"] = found["norm.bias"] + _folded(state)
    with torch.no_grad():
        for ours, value in found.items():
            parameters[ours].copy_(value)


def _check_backbone(model: Transformer, whole: bool) -> None:
    config = model.config
    same = dict(_SAME)
    if whole:
        same |= {"positions": "sinusoidal", "position_mix": "concatenated"}
        same |= {"embedding_norm": "none"}
    for name, value in same.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"the Momentum Transformer's release has {name}={value!r}; this model differs, "
                f"with {name}={getattr(config, name)!r}"
            )
    if config.kv_heads != config.num_heads or config.qkv_bias is False:
        raise ConfigError(
            "the Momentum Transformer's release has as many key as query heads, all with biases; "
            f"this model has num_kv_heads={config.num_kv_heads} and qkv_bias={config.qkv_bias}"
        )


def _sources(model: Transformer, whole: bool) -> dict[str, list[str]]:
    """Our parameter → the released ones that are stacked in it."""
    before = "transformer." if whole else ""
    names: dict[str, list[str]] = {}
    for kind in ("weight", "bias"):
        for layer in range(model.config.num_layers):
            ours, theirs = f"blocks.{layer}", f"{before}layers.{layer}"
            names[f"{ours}.attention.qkv.{kind}"] = [f"{theirs}.{part}.{kind}" for part in _QKV]
            for own, part in _LAYER.items():
                names[f"{ours}.{own}.{kind}"] = [f"{theirs}.{part}.{kind}"]
        names[f"norm.{kind}"] = [f"{before}norm.{kind}"]
    if whole:
        names["embedding.tokens.weight"] = ["value_embedding.weight"]
        names["head.weight"] = ["predictor.weight"]
    return names


def _check_positions(model: Transformer, state: Mapping[str, Tensor]) -> None:
    table = state.get(_POSITIONS)
    if table is None:
        return
    rows = table.reshape(-1, table.shape[-1]).double()
    width = model.embedding.sinusoid_width
    own = sinusoids(torch.arange(len(rows)), width, torch.float64)
    # the release computes its table in float32, where late positions' angles are rounded
    if rows.shape != own.shape or float((rows - own).abs().max()) > CLOSE * max(100, len(rows)):
        raise ConfigError(
            f"{_POSITIONS} holds other positions than sines and cosines of width {width}"
        )


def _folded(state: Mapping[str, Tensor]) -> Tensor:
    """δ of the module's docstring."""
    weight, bias = state["predictor.weight"].double(), state.get(_OUTPUT_BIAS)
    if bias is None:
        return weight.new_zeros(weight.shape[1])
    bias = bias.double()
    shift: Tensor = torch.linalg.pinv(weight) @ bias
    off = float((weight @ shift - bias).abs().max())
    if off > CLOSE * float(bias.abs().max()):
        raise ConfigError(
            f"{_OUTPUT_BIAS} cannot be had: {len(bias)} classes of {weight.shape[1]} dimensions "
            "leave no place for it in the final norm; make it zero, or load the encoder alone"
        )
    return shift
