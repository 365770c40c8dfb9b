"""The released architectures, to the last digit: weights in, logits and gradients out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from polyak import ModelConfig, Transformer, rules
from polyak.errors import ConfigError
from polyak.interop import release

FOLDER = Path(__file__).parents[1] / "conformance"
VECTORS = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
RELEASED = ("arXiv:2605.24425", "arXiv:2601.23236")
LIMITS = {torch.float64: (1e-9, 1e-6), torch.float32: (1e-4, 2e-3)}
"""Absolute error of logits and loss, and of gradients relative to each tensor's largest entry."""


class Vector:
    """One conformance file."""

    def __init__(self, name: str) -> None:
        path = FOLDER / f"{name}.safetensors"
        self.tensors: dict[str, Tensor] = load_file(path)
        with safe_open(path, "pt") as file:
            about = file.metadata()
        zeros = about["velocity_init"] == "zero"
        self.config = ModelConfig(
            rule=about["rule"],
            num_layers=int(about["n_layers"]),
            num_heads=int(about["n_heads"]),
            d_model=int(about["d_model"]),
            vocab_size=int(about["vocab_size"]),
            context_length=int(about["context_length"]),
            stream_start="zeros" if zeros else None,
        )

    def part(self, prefix: str) -> dict[str, Tensor]:
        length = len(prefix) + 1
        return {k[length:]: v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}

    def model(self, dtype: torch.dtype) -> Transformer:
        model = Transformer(self.config).to(dtype)
        release.load_state_dict(model, self.part("weights"))
        return model

    def check(self, model: Transformer, dtype: torch.dtype) -> None:
        absolute, relative = LIMITS[dtype]
        logits = model(self.tensors["input_ids"])
        loss = F.cross_entropy(logits.flatten(0, 1), self.tensors["targets"].flatten())
        loss.backward()
        assert (logits.double() - self.tensors["logits"]).abs().max() < absolute
        assert (loss.double() - self.tensors["loss"]).abs() < absolute
        gradients = self.part("grads")
        parameters = dict(model.named_parameters())
        names = release.released_names(model)
        assert set(names.values()) == set(gradients)
        for ours, released in names.items():
            expected, found = gradients[released].double(), parameters[ours].grad
            assert found is not None, released
            error = (found.double() - expected).abs().max()
            assert error <= relative * expected.abs().max(), released


def test_every_rule_of_the_release_has_a_vector() -> None:
    own = rules._registry.RULES.own_names
    released = {name for name in own if rules.get(name).paper in RELEASED}
    assert {Vector(name).config.rule for name in VECTORS} == released


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", VECTORS)
def test_logits_loss_and_gradients_are_the_released_ones(name: str, dtype: torch.dtype) -> None:
    vector = Vector(name)
    vector.check(vector.model(dtype), dtype)


@pytest.mark.parametrize("name", VECTORS)
def test_conformance_survives_our_files_and_released_names(name: str, tmp_path: Path) -> None:
    vector = Vector(name)
    first = vector.model(torch.float64)
    save_model(first, str(tmp_path / "ours.safetensors"))
    second = Transformer(vector.config).double()
    load_model(second, tmp_path / "ours.safetensors")
    save_file(release.to_state_dict(second), tmp_path / "released.safetensors")
    third = Transformer(vector.config).double()
    released = load_file(tmp_path / "released.safetensors")
    assert set(released) == set(vector.part("weights"))
    release.load_state_dict(third, released)
    for weight, again in zip(first.parameters(), third.parameters(), strict=True):
        assert torch.equal(weight, again)
    vector.check(third, torch.float64)


@pytest.mark.parametrize("name", VECTORS)
def test_parameter_count_is_the_released_one(name: str) -> None:
    index = json.loads((FOLDER / "index.json").read_text())
    count = sum(p.numel() for p in Transformer(Vector(name).config).parameters())
    assert count == index[name]["params"]


def test_a_released_checkpoint_may_list_the_tied_output() -> None:
    vector = Vector("nesterov")
    weights = vector.part("weights")
    weights["lm_head.weight"] = weights["tok_emb.weight"]
    release.load_state_dict(Transformer(vector.config), weights)


def _drop(weights: dict[str, Tensor]) -> None:
    del weights["layers.1.mu_mlp_raw"]


def _add(weights: dict[str, Tensor]) -> None:
    weights["layers.1.nu_mlp_raw"] = torch.zeros(1)


def _reshape(weights: dict[str, Tensor]) -> None:
    weights["tok_emb.weight"] = weights["tok_emb.weight"][:-1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, "missing layers.1.mu_mlp_raw"),
        (_add, "unexpected layers.1.nu_mlp_raw"),
        (_reshape, r"tok_emb.weight has shape \(30, 24\), the model needs \(31, 24\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_changes_nothing(
    damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    vector = Vector("nesterov")
    weights = vector.part("weights")
    damage(weights)
    model = Transformer(vector.config)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=message):
        release.load_state_dict(model, weights)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": True},
        {"qkv_bias": True},
        {"tie_embeddings": False},
        {"splitting": "simultaneous"},
        {"positions": "rope"},
        {"positions": "none"},
        {"attention": "linear"},
        {"positions": "sinusoidal"},
        {"norm_position": "post"},
        {"norm": "rms"},
        {"mlp": "gated"},
        {"mlp_width": 24},
        {"num_kv_heads": 1},
        {"qk_norm": True},
        {"head_dim": 6},
        {"activation": "silu"},
    ],
    ids=str,
)
def test_models_the_release_does_not_have_are_refused(
    fields: dict[str, object], tiny_config: Callable[..., ModelConfig]
) -> None:
    model = Transformer(tiny_config("nesterov", **fields))
    with pytest.raises(ConfigError, match="this model differs"):
        release.to_state_dict(model)
