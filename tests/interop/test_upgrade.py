"""Upgrading gradient descent: the same function to the last bit, and able to learn momentum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_runs import SETTINGS, run_config, write_corpus
from torch import Tensor

from polyak import ModelConfig, Transformer, load_run, rules
from polyak.cli.main import main
from polyak.errors import ConfigError, RuleError
from polyak.interop.upgrade import fit, upgrade
from polyak.nn.rule_text import parse_rule
from polyak.training.loop import train

Build = Callable[..., Transformer]
REDUCIBLE = [name for name in rules.names() if rules.get(name).descent is not None]
VELOCITY = [name for name in REDUCIBLE if rules.get(name).norms]
"""Those with a norm and a velocity that may start from tables of its own."""
OTHERS = [n for n in rules.names() if n not in REDUCIBLE and n != "gradient_descent"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAK_CACHE", str(tmp_path_factory.getbasetemp() / "interop-cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gradient_descent run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", str(tmp_path_factory.getbasetemp() / "interop-cache"))
        folder = tmp_path_factory.mktemp("runs")
        corpus = write_corpus(folder)
        train(run_config(corpus, steps=30, num_layers=2), folder / "gd")
    return folder / "gd"


def ids(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randint(11, (batch, length))


def no_text() -> Tensor:
    raise AssertionError("nothing is to be fitted")


def test_the_three_momentum_rules_have_a_point_of_descent() -> None:
    assert set(REDUCIBLE) >= {"heavy_ball", "nesterov", "triple_momentum"}


@pytest.mark.parametrize("splitting", ["lie_trotter", "simultaneous"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "text", [*REDUCIBLE, *(f"{rule}[stream_start=zeros]" for rule in VELOCITY)]
)
def test_the_upgraded_model_is_the_same_function_bit_for_bit(
    text: str, bias: bool, splitting: str, tiny_model: Build
) -> None:
    fields: dict[str, Any] = {"splitting": splitting, "bias": bias, "tie_embeddings": not bias}
    source = tiny_model("gradient_descent", dtype=torch.float32, **fields)
    made = upgrade(source, parse_rule(text), no_text)
    assert made.exact
    assert made.model.rule.name == text.partition("[")[0]
    # and its coefficients can learn to leave
    assert all(parameter.requires_grad for parameter in made.model.parameters())


@pytest.mark.parametrize(
    "text",
    [
        "residual_momentum@attention+gradient_descent@mlp",
        "triple_momentum[stream_start=zeros]@1+residual_momentum[coefficients=unconstrained]@2",
        "nesterov@mlp+heavy_ball[state_norm=none,stream_start=zeros]",
    ],
)
def test_several_rules_that_all_descend_are_the_same_function(text: str, tiny_model: Build) -> None:
    source = tiny_model("gradient_descent", dtype=torch.float32)
    made = upgrade(source, parse_rule(text), no_text)
    assert made.exact
    input_ids = ids()
    assert torch.equal(made.model(input_ids), source(input_ids))
    again = ModelConfig.from_dict(json.loads(json.dumps(made.model.config.to_dict())))
    assert again == made.model.config
    assert "mu=0.0" in again.rule
    assert made.misses == ()
    input_ids = ids()
    assert torch.equal(made.model(input_ids), source(input_ids))


@pytest.mark.parametrize("rule", VELOCITY)
@pytest.mark.parametrize("start", [None, "zeros"])
def test_momentum_has_a_gradient_at_step_0_wherever_a_velocity_has_come_in(
    rule: str, start: str | None, tiny_model: Build
) -> None:
    source = tiny_model("gradient_descent", dtype=torch.float32)
    text = f"{rule}[stream_start={start}]" if start else rule
    model = upgrade(source, parse_rule(text), no_text).model
    input_ids = ids()
    loss = F.cross_entropy(model(input_ids).flatten(0, 1), input_ids.roll(-1, 1).flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("_raw"):
            continue
        first = name.startswith("blocks.0.rules.attention.")
        still = first and start == "zeros" and ("beta" in name or "mu" in name)
        assert parameter.grad is not None
        # v = 0 before the very first substep: its β and μ multiply nothing, ever
        assert bool(parameter.grad.abs().max() > 0) != still, name
    for stream in model.streams.parameters():  # behind β = μ = 0, until these have moved
        assert stream.grad is not None
        assert stream.grad.abs().max() == 0


def miss(source: Transformer, model: Transformer, input_ids: Tensor) -> float:
    return float((model(input_ids) - source(input_ids)).detach().norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "text",
    [f"{rule}[state_norm=layer]" for rule in VELOCITY]
    + [f"{rule}[coefficients=constrained]" for rule in VELOCITY]
    + OTHERS
    + ["adam@1.attention+triple_momentum[state_norm=layer]@2+gradient_descent"],
)
def test_what_is_not_exact_is_fitted_and_says_so(text: str, bias: bool, tiny_model: Build) -> None:
    source = tiny_model("gradient_descent", dtype=torch.float32, bias=bias, num_layers=3)
    wanted, input_ids = parse_rule(text), ids(16)
    unfitted = Transformer(upgrade(source, wanted, lambda: input_ids).model.config).eval()
    unfitted.load_state_dict(source.state_dict(), strict=False)
    made = upgrade(source, wanted, lambda: input_ids)
    assert not made.exact
    assert len(made.misses) == 6
    assert miss(source, made.model, input_ids) < miss(source, unfitted, input_ids)


@pytest.mark.parametrize("rule", VELOCITY)
def test_an_option_of_the_users_stays_and_gamma_makes_up_for_it(
    rule: str, tiny_model: Build
) -> None:
    source = tiny_model("gradient_descent", dtype=torch.float32, num_layers=1)
    made = upgrade(source, parse_rule(f"{rule}[beta=0.3]"), ids)
    assert not made.exact
    values = made.model.scalars()
    assert values["beta"]["mlp"] == pytest.approx([0.3])
    assert values["gamma"]["mlp"] != [1.0]


def test_the_fitted_gain_is_the_least_squares_one(tiny_model: Build) -> None:
    source = tiny_model("gradient_descent", num_layers=1)
    model = upgrade(
        tiny_model("gradient_descent", num_layers=1, dtype=torch.float32),
        parse_rule("triple_momentum[state_norm=layer]"),
        ids,
    ).model.double()
    model.load_state_dict(source.state_dict(), strict=False)
    input_ids = ids(8)
    fit(source, model, input_ids)
    # the best of the first substep by hand: x* − x = O(x) against its normalised form
    x, _ = model.start(input_ids)
    g = source.blocks[0].attention(x).flatten(0, -2)
    u = F.layer_norm(g, (12,), eps=1e-5)
    columns = [torch.linalg.lstsq(u[:, i : i + 1], g[:, i : i + 1]).solution for i in range(12)]
    found = model.blocks[0].rules["attention"].norm.weight
    assert (found - torch.cat(columns).flatten()).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("triple_momentum[num_layers=3]", ConfigError, "num_layers belongs to the model"),
        ("adam[update_norm=none,beta1=2]", ConfigError, "beta1=2"),
        ("shampoo[stream_start=zeros]", ConfigError, "no stream that starts"),
    ],
)
def test_an_upgrade_that_cannot_be_is_refused(
    text: str, error: type[Exception], message: str, tiny_model: Build
) -> None:
    with pytest.raises(error, match=message):
        upgrade(tiny_model("gradient_descent", dtype=torch.float32), parse_rule(text), ids)


def test_only_plain_gradient_descent_can_be_upgraded(tiny_model: Build) -> None:
    for rule, options in (("heavy_ball", {}), ("gradient_descent", {"update_norm": "layer"})):
        model = tiny_model(rule, dtype=torch.float32, rule_options=options)
        with pytest.raises(ConfigError, match="only models of rule gradient_descent"):
            upgrade(model, parse_rule("triple_momentum"), ids)


def test_a_fitted_gamma_outside_its_domain_is_an_error(tiny_model: Build) -> None:
    source = tiny_model("gradient_descent", dtype=torch.float32)
    with torch.no_grad():  # nothing to follow but the opposite of the oracle
        for block in source.blocks:
            block.attention.out.weight.zero_()
    wanted = parse_rule("heavy_ball[coefficients=constrained]")
    with pytest.raises(RuleError, match="coefficients=unconstrained"):
        upgrade(source, wanted, ids)


def test_a_run_is_upgraded_trained_on_and_resumed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "up"
    words = ["--rule", "triple_momentum", "--tokens", "256"]
    assert main(["upgrade", str(run), str(out), *words]) == 0
    printed = capsys.readouterr().out
    assert "Exact" in printed
    assert "(+0.0000)" in printed
    (old, _), (new, _) = load_run(run), load_run(out)
    input_ids = torch.randint(256, (2, 16))
    assert torch.equal(old(input_ids), new(input_ids))
    about = json.loads((out / "run.json").read_text())["settings"]["upgrade"]
    assert about["exact"] is True
    assert about["loss_before"] == about["loss_after"]
    assert len(about["weights"]) == 64
    assert main(["upgrade", str(run), str(out), *words]) == 1
    assert "holds a run already" in capsys.readouterr().err

    # go on from there: once in one go, once stopped in the middle and resumed
    sizes = [w for w in SETTINGS if "model." not in w]
    sizes = [word for word in sizes if word != "--set"]
    more = ["--init", str(out), "--device", "cpu", "--set", "threads=1"]
    more += [word for size in sizes for word in ("--set", size)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *more, "--steps", "6", "--out", str(whole)]) == 0
    every = ["--set", "training.checkpoint_every=3"]
    assert main(["train", *more, "--steps", "3", *every, "--out", str(parts)]) == 0
    first = json.loads((parts / "run.json").read_text())
    assert first["settings"]["init"] == {"weights": _sha(out)}
    trained = load_file(whole / "model/model.safetensors")
    start = load_file(out / "model/model.safetensors")
    moved = {name for name in start if not torch.equal(start[name], trained[name])}
    assert {name for name in start if name.endswith("beta_raw")} <= moved

    again = tmp_path / "again"
    assert main(["train", *more, "--steps", "6", *every, "--out", str(again)]) == 0
    (again / "result.json").unlink()
    newest = max((again / "checkpoints").iterdir())
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert main(["train", "--out", str(again), "--resume"]) == 0
    resumed = load_file(again / "model/model.safetensors")
    assert all(torch.equal(resumed[name], trained[name]) for name in trained)
    capsys.readouterr()

    # weights that changed since are not what the run began with
    weights = out / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    assert main(["train", "--out", str(again), "--resume", "--steps", "8"]) == 1
    assert "init" in capsys.readouterr().err
    weights.unlink()
    assert main(["train", "--out", str(again), "--resume", "--steps", "8"]) == 1
    assert "is missing; name the folder of a finished run" in capsys.readouterr().err


def _sha(run: Path) -> str:
    from polyak.files import sha256_of

    return sha256_of(run / "model/model.safetensors")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule", "adam"], "polyak upgrade"),
        (["--set", "model.num_layers=3"], "model.num_layers=3 differs from 2 of init="),
        (["--set", "model.num_heads=4"], "model.num_heads=4 differs from 2"),
        (["--tokenizer", "bpe-290", "--set", "model.vocab_size=290"], "vocab_size=290 differs"),
        (["--resume"], "run.json is missing; leave out --resume"),
    ],
)
def test_training_from_weights_of_another_model_is_one_line(
    words: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--init", str(run), "--device", "cpu", "--set", "training.eval_tokens=256"]
    try:
        code = main(["train", *more, "--steps", "2", "--out", str(tmp_path / "out"), *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert len(error.splitlines()) == 1
    assert message in error


def test_the_initial_weights_are_the_runs_and_dropout_may_differ(run: Path, tmp_path: Path) -> None:
    words = ["--init", str(run), "--steps", "1", "--out", str(tmp_path / "out"), "--device", "cpu"]
    words += ["--set", "training.eval_tokens=256", "--set", "model.dropout=0.1"]
    words += ["--set", "training.warmup=1.0"]  # the first step's rate is 0
    assert main(["train", *words]) == 0
    before, after = (load_file(f / "model/model.safetensors") for f in (run, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_softmax_attention_is_upgraded(tiny_model: Build) -> None:
    source = tiny_model("gradient_descent", attention="linear")
    with pytest.raises(ConfigError, match=r"softmax attention .* has attention=linear"):
        upgrade(source, parse_rule("heavy_ball"), no_text)
