"""Parameters by kind: the groups whose curvature is measured on its own."""

from __future__ import annotations

import re

from torch import nn

from polyak.nn.attention import Attention
from polyak.nn.transformer import Block
from polyak.rules import UpdateRule

GROUPS = ("embeddings", "streams", "attention", "mlp", "norms", "scalars", "output", "other")
"""In the order they are shown. `embeddings`: token and position tables (and the output matrix, if
it is tied to them); `streams`: tables of auxiliary streams; `attention` and `mlp`: their matrices
and biases; `norms`: gains and biases of every norm, the rules' included; `scalars`: the rules'
and attention's; `output`: an untied output matrix; `other`: what no name tells."""

_ATTENTION = re.compile(r"(^|[._])(self_)?att(n|ention)([._]|$)")
_MLP = re.compile(r"(^|[._])(mlp|ffn|feed_forward|fc\d?|dense_h_to_4h|dense_4h_to_h)([._]|$)")
_NORM = re.compile(r"(^|[._])(ln|norm|layernorm|rmsnorm|ln_\w+)([._]|$)|norm", re.IGNORECASE)


def parameter_groups(model: nn.Module) -> dict[str, list[str]]:
    """Names of the trained parameters in each group that has any, each exactly once.

    A model of ours is told apart by its modules; any other by its modules' types (embeddings and
    norms) and names (attention, MLP, output).
    """
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():  # tied weights appear once, where first used
        if parameter.requires_grad:
            found[_group(model, name)].append(name)
    return {group: names for group, names in found.items() if names}


def _group(model: nn.Module, name: str) -> str:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    coefficients = isinstance(owner, UpdateRule | Attention | Block) or path == "attention_scalars"
    if coefficients and leaf.endswith("_raw"):
        return "scalars"
    if isinstance(owner, nn.Embedding):
        return "streams" if name.startswith("streams.") else "embeddings"
    if _NORM.search(type(owner).__name__) or _NORM.search(path.rpartition(".")[2]):
        return "norms"
    if re.search(r"(^|\.)(lm_head|head|embed_out|output)$", path):
        return "output"
    if _ATTENTION.search(path):
        return "attention"
    if _MLP.search(path):
        return "mlp"
    return "other"
