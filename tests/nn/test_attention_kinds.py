"""What every kind of attention keeps inside a model, whatever its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor

from polyak import ModelConfig, Transformer, ops, rules
from polyak.analysis.groups import parameter_groups as analysed_groups
from polyak.errors import AttentionError, ConfigError, PolyakError, RuleError
from polyak.nn import attention
from polyak.nn.attention import Attention
from polyak.nn.attention_registry import KINDS
from polyak.nn.cache import KeyValueCache
from polyak.nn.cost import cost
from polyak.nn.presets import preset_fields
from polyak.nn.probe import probe
from polyak.training.optimizers import parameter_groups

Build = Callable[..., Transformer]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "linear": ("linear", {}),
    "linear, plain sums": ("linear", {"normalize": False, "scale": "head_dim", "chunk_size": 2}),
    "momentum": ("momentum", {"mu": 0.6, "gamma": 0.8, "chunk_size": 3}),
    "momentum, an average": ("momentum", {"mu": 0.9, "weighted_normalizer": True}),
    "momentum, learned": (
        "momentum",
        {"mu_learned": "head", "gamma_learned": "layer", "feature_map": "softplus"},
    ),
    "momentum, one for all": ("momentum", {"mu_learned": "model", "recompute": True}),
    "adaptive_momentum": ("adaptive_momentum", {"gamma": 0.7, "chunk_size": 3}),
    "adaptive_momentum, learned": (
        "adaptive_momentum",
        {"gamma_learned": "head", "first_step": "gamma", "feature_map": "relu"},
    ),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
GROUPED = {"num_heads": 4, "num_kv_heads": 2, "d_model": 16, "qk_norm": True, "positions": "rope"}


def fields_of(variant: str) -> dict[str, Any]:
    kind, options = VARIANTS[variant]
    return {"attention": kind, "attention_options": options}


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(11, (batch, length))


def decoded(model: Transformer, input_ids: Tensor, sizes: list[int]) -> Tensor:
    cache = KeyValueCache(model.config.context_length)
    with torch.no_grad():
        return torch.cat([model(piece, cache=cache) for piece in input_ids.split(sizes, 1)], 1)


def test_every_kind_is_tried() -> None:
    assert {kind for kind, _ in VARIANTS.values()} == set(attention.names())


@every_variant
@pytest.mark.parametrize("backbone", [{}, GROUPED], ids=["paper", "grouped"])
@torch.no_grad()
def test_the_past_is_all_that_counts_cached_or_not(
    variant: str, backbone: dict[str, Any], tiny_model: Build
) -> None:
    model, input_ids = tiny_model("nesterov", **fields_of(variant), **backbone), ids(3, 7)
    logits = model(input_ids)
    changed = input_ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 11
    assert (model(changed) - logits)[:, :4].abs().max() == 0
    assert (model(changed) - logits)[:, 4:].abs().max() > 1e-6
    assert (model(input_ids[:, :5]) - logits[:, :5]).abs().max() < 1e-12
    order = torch.tensor([2, 0, 1])
    assert (model(input_ids[order]) - logits[order]).abs().max() < 1e-12
    for sizes in ([1] * 7, [4, 1, 2]):
        assert (decoded(model, input_ids, sizes) - logits).abs().max() < 1e-10


@every_variant
def test_chunks_are_the_quadratic_form_in_value_and_gradient(
    variant: str, tiny_model: Build
) -> None:
    model, input_ids = tiny_model("nesterov", **fields_of(variant), **GROUPED), ids(2, 7)

    def found() -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(input_ids)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"logits": logits.detach(), **grads}

    fast = found()
    with ops.reference_forms():
        plain = found()
    assert fast.keys() == plain.keys() >= {name for name, _ in model.named_parameters()}
    for name, value in fast.items():
        scale = float(plain[name].abs().max())
        assert (value - plain[name]).abs().max() <= 1e-9 * max(scale, 1e-3), name


@every_variant
@pytest.mark.parametrize("side", ["left", "right", "holes"])
@torch.no_grad()
def test_padding_does_not_change_real_positions(variant: str, side: str, tiny_model: Build) -> None:
    model, input_ids = tiny_model("nesterov", **fields_of(variant)), ids(3, 7)
    real = {
        "left": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0] * 7]),
        "right": torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7, [0] * 7]),
        "holes": torch.tensor([[1, 0, 1, 1, 0, 0, 1], [1] * 7, [0] * 7]),
    }[side].bool()
    logits = model(input_ids, attention_mask=real)
    assert logits.isfinite().all()  # the last row is nothing but padding
    for row in range(2):
        alone = model(input_ids[row, real[row]][None])
        assert (logits[row, real[row]] - alone[0]).abs().max() < 1e-10
    other = torch.where(real, input_ids, (input_ids + 3) % 11)
    assert (model(other, attention_mask=real) - logits)[real].abs().max() < 1e-12
    cache, pieces = KeyValueCache(7), []
    for start, end in ((0, 3), (3, 4), (4, 7)):
        piece = input_ids[:, start:end]
        pieces.append(model(piece, attention_mask=real[:, :end], cache=cache))
    assert (torch.cat(pieces, 1) - logits)[real].abs().max() < 1e-10


@every_variant
@torch.no_grad()
def test_a_cache_follows_a_choice_of_rows(variant: str, tiny_model: Build) -> None:
    model, input_ids = tiny_model("heavy_ball", **fields_of(variant)), ids(3, 7)
    cache = KeyValueCache(7)
    model(input_ids[:, :5], cache=cache)
    held = [tuple(t.clone() for t in state if t is not None) for state in cache.states]
    kept = cache.states
    rows = torch.tensor([2, 0, 0, 1])
    cache.select(rows)
    found = model(input_ids[rows, 5:], cache=cache)
    assert (found - model(input_ids[rows])[:, 5:]).abs().max() < 1e-10
    for state, before in zip(kept, held, strict=True):  # nothing was written into
        for tensor, value in zip((t for t in state if t is not None), before, strict=True):
            assert torch.equal(tensor, value)


RECURRENT = [v for v in VARIANTS if not v.startswith("softmax")]


@pytest.mark.parametrize("variant", RECURRENT)
@torch.no_grad()
def test_a_state_takes_the_same_memory_however_long_the_text(
    variant: str, tiny_model: Build
) -> None:
    model = tiny_model("nesterov", **fields_of(variant), **GROUPED)
    input_ids, cache = ids(2, 40), KeyValueCache(1)
    logits = model(input_ids)  # rotary positions have no end: nor has the sequence
    sizes = []
    for piece in input_ids.split([13, 1, 1, 25], 1):
        found = model(piece, cache=cache)
        sizes.append(cache.nbytes)
    assert (found - logits[:, -25:]).abs().max() < 1e-10
    assert len(set(sizes)) == 1
    assert cache.get_seq_length() == 40
    with pytest.raises(ConfigError, match=r"crop\(3\): states of 40 tokens cannot forget"):
        cache.crop(3)
    with pytest.raises(ConfigError, match="the cache holds 2 sequences, not 3"):
        model(ids(3, 1), cache=cache)
    with torch.enable_grad(), pytest.raises(ConfigError, match="decode under torch"):
        model(ids(2, 1), cache=cache)
    learned = tiny_model("nesterov", **fields_of(variant))
    with pytest.raises(ConfigError, match="8 tokens is longer than context_length=7; shorten it"):
        learned(ids(1, 8))


def test_a_cache_of_keys_only_and_a_mask_of_pairs_are_refused(tiny_model: Build) -> None:
    model = tiny_model("nesterov", attention="momentum")

    class KeysOnly:
        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0

        def update(self, *arguments: Any) -> Any:
            raise AssertionError

    with pytest.raises(ConfigError, match="cache: a KeysOnly keeps keys and values, and this"):
        model(ids(1, 3), cache=KeysOnly())
    with pytest.raises(ConfigError, match="attention=momentum can leave out tokens, not pairs"):
        model(ids(1, 3), attention_mask=torch.ones(1, 1, 3, 3))


@pytest.mark.parametrize("options", [{}, {"bidirectional": "read_after_write"}])
@pytest.mark.parametrize("kind", ["linear", "momentum"])
@torch.no_grad()
def test_padding_does_not_change_what_encoders_read(
    kind: str, options: dict[str, Any], tiny_model: Build
) -> None:
    options = {} if kind == "linear" else options
    given = {"attention": kind, "attention_options": options, "causal": False}
    model, input_ids = tiny_model("nesterov", **given), ids(2, 7)
    logits = model(input_ids)
    moved = input_ids.clone()
    moved[:, 6] = (moved[:, 6] + 1) % 11
    assert (model(moved) - logits)[:, 0].abs().max() > 1e-9
    alone = model(input_ids[:1, :4])
    for place in (slice(0, 4), slice(3, 7), torch.tensor([0, 2, 3, 6])):
        real, padded = torch.zeros(2, 7, dtype=torch.bool), input_ids.clone()
        real[0, place], padded[0, place] = True, input_ids[0, :4]
        real[1] = True
        found = model(padded, attention_mask=real)
        assert (found[0, place] - alone[0]).abs().max() < 1e-10


@torch.no_grad()
def test_the_released_form_is_what_its_release_trains_with(tiny_model: Build) -> None:
    given = {"attention": "momentum", "attention_options": {"mu": 0.6, "form": "released"}}
    model, input_ids = tiny_model("gradient_descent", num_layers=1, **given), ids(2, 7)
    exact = tiny_model("gradient_descent", num_layers=1, attention="momentum")
    exact.load_state_dict(model.state_dict())
    # equal in the last row only; see SPEC: earlier rows read what depends on the length
    assert (model(input_ids) - exact(input_ids))[:, -1].abs().max() < 1e-12
    assert (model(input_ids) - exact(input_ids))[:, 0].abs().max() > 1e-3
    assert (model(input_ids[:, :5]) - model(input_ids)[:, :5]).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="form='released' cannot decode token by token"):
        model(input_ids, cache=KeyValueCache(7))
    probe(dataclasses.replace(model.config, context_length=40))


def test_learned_coefficients_are_scalars(tiny_config: Callable[..., ModelConfig]) -> None:
    options = {"mu": 0.25, "gamma": 2.0, "mu_learned": "head", "gamma_learned": "model"}
    config = tiny_config("nesterov", attention="momentum", attention_options=options)
    model = Transformer(config)
    found = model.scalars()
    assert found["attention.mu"] == {"attention": pytest.approx([0.25, 0.25])}
    assert found["attention.mu.std"] == {"attention": pytest.approx([0.0, 0.0])}
    assert found["attention.gamma"] == {"attention": pytest.approx([2.0, 2.0])}
    scalars = parameter_groups(model)["scalars"]
    assert any(p is model.attention_scalars["gamma_raw"] for p in scalars)
    assert any(p is model.blocks[1].attention.mu_raw for p in scalars)
    names = analysed_groups(model)["scalars"]
    assert {"attention_scalars.gamma_raw", "blocks.0.attention.mu_raw"} <= set(names)
    assert model.blocks[1].attention.mu_raw.shape == (3,)
    assert "attention.mu" not in Transformer(tiny_config("nesterov")).scalars()
    with pytest.raises(AttentionError, match=r"gamma is the model's: pass Transformer\.context"):
        model.blocks[0](*model.start(ids(1, 3)))


@every_variant
def test_a_saved_model_loads_exactly(variant: str, tiny_model: Build, tmp_path: Path) -> None:
    model, input_ids = tiny_model("adam", **fields_of(variant)).float(), ids(2, 7)
    save_model(model, str(tmp_path / "model.safetensors"))
    again = Transformer(ModelConfig.from_dict(model.config.to_dict())).eval()
    load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(again(input_ids), model(input_ids))


def test_a_model_saved_before_attention_was_an_option_loads() -> None:
    values = ModelConfig(rule="nesterov").to_dict()
    del values["attention"], values["attention_options"]
    assert ModelConfig.from_dict(values) == ModelConfig(rule="nesterov")


@every_variant
def test_states_are_float32_under_autocast(variant: str, tiny_model: Build) -> None:
    model, input_ids = tiny_model("nesterov", **fields_of(variant)).float(), ids(2, 7)
    cache = KeyValueCache(7)
    with torch.no_grad():
        expected = model(input_ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = [model(piece, cache=cache) for piece in input_ids.split([4, 1, 2], 1)]
    for state in cache.states:
        assert all(t is None or t.dtype in (torch.float32, torch.int64) for t in state)
    assert (torch.cat(found, 1) - expected).abs().max() < 0.15 * expected.abs().max()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"attention": "momentm"}, "unknown attention 'momentm'; did you mean 'momentum'"),
    (
        {"attention": "momentum", "attention_options": {"mv": 0.1}},
        "unknown option of attention momentum 'mv'; did you mean 'mu'",
    ),
    (
        {"attention": "linear", "attention_options": {"mu": 0.1}},
        r"unknown option of attention linear 'mu' \(known: bidirectional",
    ),
    ({"attention_options": {"mu": 0.1}}, "option mu=0.1: attention softmax has no options"),
    (
        {"attention": "momentum", "attention_options": {"mu": 1.0}},
        r"attention option mu=1.0 of momentum must be a number in \[0, 1\)",
    ),
    (
        {"attention": "momentum", "attention_options": {"mu": -0.1}},
        r"attention option mu=-0.1 of momentum must be a number in \[0, 1\)",
    ),
    (
        {"attention": "adaptive_momentum", "attention_options": {"gamma": 0}},
        "attention option gamma=0 of adaptive_momentum must be a number above 0",
    ),
    (
        {"attention": "momentum", "attention_options": {"mu": 0, "mu_learned": "layer"}},
        "option mu=0 with mu_learned: a learned mu starts above 0",
    ),
    (
        {"attention": "momentum", "attention_options": {"mu_learned": "heads"}},
        "unknown mu_learned of attention momentum 'heads'; did you mean 'head'",
    ),
    (
        {"attention": "linear", "attention_options": {"feature_map": "elu"}},
        "unknown feature_map of attention linear 'elu'; did you mean 'relu'",
    ),
    (
        {"attention": "linear", "attention_options": {"bidirectional": "lra"}},
        "bidirectional='lra' needs causal=false, and this model has causal=true; leave it out",
    ),
    (
        {"attention": "momentum", "causal": False, "attention_options": {"form": "exact"}},
        "form='exact' needs causal=true, and this model has causal=false; leave it out",
    ),
    (
        {"attention": "adaptive_momentum", "causal": False},
        "attention='adaptive_momentum' is causal, and this model has causal=false",
    ),
    (
        {"attention": "linear", "attention_options": {"scale": "sqrt_length"}},
        "scale='sqrt_length' needs causal=false: a causal model does not know the length",
    ),
    (
        {"attention": "linear", "attention_options": {"normalize": False, "eps": 0.1}},
        "eps=0.1 has no effect with normalize=False; leave one of them out",
    ),
    (
        {
            "attention": "momentum",
            "causal": False,
            "attention_options": {"bidirectional": "lra", "scale": "head_dim"},
        },
        "scale='head_dim' has no effect with bidirectional='lra'",
    ),
    (
        {
            "attention": "momentum",
            "attention_options": {"form": "released", "weighted_normalizer": True},
        },
        "weighted_normalizer=True has no effect with form='released'",
    ),
    (
        {"attention": "linear", "attention_options": {"chunk_size": 0}},
        "chunk_size=0 of linear must be a whole number of at least 1",
    ),
    ({"attention": "linear", "attention_options": 3}, "attention_options=3 must map option names"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:60])
def test_options_that_cannot_work_are_refused_in_one_line(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig(**fields)
    assert "\n" not in str(caught.value)


@pytest.fixture
def registered_kind() -> Any:
    before = dict(KINDS._registered)

    def add(name: str, kind: type[Attention]) -> str:
        attention.register(name)(kind)
        return name

    yield add
    KINDS._registered.clear()
    KINDS._registered.update(before)


class Mean(Attention):
    """Every query reads the mean of the values so far."""

    peek = attention.flag(False, about="see one token more")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Any, dropout: float) -> Tensor:
        count = torch.arange(1, v.shape[2] + 1, dtype=v.dtype)
        y = v.cumsum(2) / count[:, None]
        return torch.roll(y, -1, dims=2) if self.peek else y


class Priced(Mean):
    """The same, and says what it costs."""

    @classmethod
    def flops(cls, config: ModelConfig, tokens: int) -> tuple[int, int] | None:
        """A price that no counter would find."""
        return 1000 * tokens, 3000 * tokens

    @classmethod
    def decoding_flops(cls, config: ModelConfig, tokens: int) -> int | None:
        """The same."""
        return 500


def test_a_users_kind_costs_what_it_declares_or_what_is_measured(
    registered_kind: Any, tiny_config: Callable[..., ModelConfig]
) -> None:
    found = [
        cost(tiny_config("gradient_descent", num_layers=1, attention=registered_kind(name, kind)))
        for name, kind in (("mean", Mean), ("priced", Priced))
    ]
    for field, more in (("forward", 1000), ("backward", 3000), ("decoding", 500)):
        free, priced = (getattr(one, f"{field}_flops_per_token") for one in found)
        assert priced - free == more  # Mean multiplies no matrices


def test_a_users_kind_is_probed_and_blamed(registered_kind: Any) -> None:
    name = registered_kind("mean", Mean)
    probe(ModelConfig(rule="nesterov", attention=name, context_length=40))
    leaking = {"attention": name, "attention_options": {"peek": True}, "context_length": 40}
    with pytest.raises(AttentionError, match=r"^attention mean sees later tokens: the logits at"):
        probe(ModelConfig(**leaking))
    assert issubclass(AttentionError, PolyakError)
    assert not issubclass(RuleError, AttentionError)


@pytest.mark.slow
@pytest.mark.parametrize("variant", RECURRENT)
@pytest.mark.parametrize("rule", rules.names())
@torch.no_grad()
def test_every_kind_goes_with_every_rule(rule: str, variant: str, tiny_model: Build) -> None:
    for splitting in ("lie_trotter", "simultaneous"):
        model = tiny_model(rule, splitting=splitting, **fields_of(variant))
        input_ids = ids(2, 7)
        logits = model(input_ids)
        changed = input_ids.clone()
        changed[:, 4:] = (changed[:, 4:] + 1) % 11
        assert (model(changed) - logits)[:, :4].abs().max() == 0
        assert (decoded(model, input_ids, [3, 1, 1, 2]) - logits).abs().max() < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gradient_descent", "triple_momentum"])
@pytest.mark.parametrize("preset", ["gpt2", "llama", "momentum_transformer"])
@every_variant
def test_every_kind_goes_with_every_preset(
    variant: str, preset: str, rule: str, tiny_model: Build
) -> None:
    shape = {"num_heads": 4, "d_model": 16, **preset_fields(preset, 4)}
    model, input_ids = tiny_model(rule, **{**shape, **fields_of(variant)}), ids(2, 7)
    logits = model(input_ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert (decoded(model, input_ids, [3, 1, 1, 2]) - logits).abs().max() < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gradient_descent", "triple_momentum", "adam"])
@pytest.mark.parametrize("variant", ["momentum, learned", "adaptive_momentum"])
def test_a_compiled_block_is_the_same_function(variant: str, rule: str, tiny_model: Build) -> None:
    """One rule of each number of streams."""
    model = tiny_model(rule, **fields_of(variant))
    block, (x, state) = model.blocks[0], model.start(ids(2, 7))
    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager")

    def run(call: Any) -> list[Tensor]:
        model.zero_grad()
        y, after = call(x.detach(), model.rule.State(*(s.detach() for s in state)))
        sum(t.square().sum() for t in (y, *after)).backward()
        grads = [p.grad.clone() for p in block.parameters() if p.grad is not None]
        return [y.detach(), *(t.detach() for t in after), *grads]

    eager, fast = run(block), run(compiled)
    assert len(eager) == len(fast) > 3
    for one, other in zip(eager, fast, strict=True):
        assert (one - other).abs().max() <= 1e-9 * max(1.0, float(one.abs().max()))
