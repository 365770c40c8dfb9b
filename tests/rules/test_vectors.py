"""Coefficients that are vectors: one for each channel, head, or dimension of a head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import run_config, write_corpus
from torch import Tensor, nn

from polyak import ModelConfig, Transformer, load_run
from polyak.errors import ConfigError, RuleError
from polyak.evaluation.generation import complete
from polyak.evaluation.sampling_config import SamplingConfig
from polyak.nn.cost import cost
from polyak.nn.probe import probe
from polyak.ops import axpby, axpy, axpy_through, reference_forms
from polyak.rules import (
    Oracle,
    State,
    Stream,
    UpdateRule,
    positive,
    state_norm,
    unconstrained,
    unit_interval,
)
from polyak.training.loop import train
from polyak.training.optimizers import Optimizers, parameter_groups

Register = Callable[[str, type[UpdateRule]], str]
SIZE = {"num_layers": 2, "num_heads": 2, "d_model": 12, "vocab_size": 11, "context_length": 8}


class Vectors(UpdateRule):
    """One of each shape and domain, through the norm's fused form too."""

    streams = (Stream("v"),)
    beta = unit_interval(0.25, shape="d_model")
    gamma = positive(0.5, shape="d_model")
    nu = unconstrained(1.0, shape="heads")
    rho = positive(2.0, shape="head_dim")
    scale = unit_interval(0.5)
    norm = state_norm()

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        ahead, v = axpy_through(self.beta, state.v, x)
        v = self.norm.combine(self.beta, v, self.gamma, oracle(ahead))
        heads = v.unflatten(-1, (self.num_heads, -1))
        moved = (heads * self.nu[:, None] * self.rho).flatten(-2)
        return axpy(self.scale, axpby(self.beta, moved, self.gamma, v), x), state.replace(v=v)


@pytest.fixture
def name(registered: Register) -> str:
    return registered("vectors", Vectors)


def test_a_number_fills_a_vector(name: str) -> None:
    model = Transformer(ModelConfig(rule=name, rule_options={"beta": 0.9}, **SIZE))
    rule: Any = model.blocks[0].rules["mlp"]  # type: ignore[operator,index,union-attr]
    for found, shape, value in (
        (rule.beta, (12,), 0.9),
        (rule.gamma, (12,), 0.5),
        (rule.nu, (2,), 1.0),
        (rule.rho, (6,), 2.0),
        (rule.scale, (1,), 0.5),
    ):
        assert found.shape == shape
        assert torch.allclose(found, torch.full(shape, value))
    assert model.scalars()["beta"]["mlp"] == pytest.approx([0.9, 0.9])
    with torch.no_grad():
        rule.nu_raw.copy_(torch.tensor([1.0, 3.0]))
    assert model.scalars()["nu"]["mlp"] == [2.0, 1.0]
    assert model.scalars()["nu.std"]["mlp"] == [1.0, 0.0]
    assert "scale.std" not in model.scalars()


def test_fast_forms_equal_reference_forms(name: str) -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(rule=name, **SIZE)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.randint(11, (2, 7))

    def gradients() -> list[Tensor]:
        loss = model(ids).square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    fast = gradients()
    with reference_forms():
        for one, other in zip(fast, gradients(), strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_a_vector_passes_the_probes_and_its_cost_is_counted(name: str) -> None:
    config = ModelConfig(rule=name, **SIZE)
    probe(config)
    assert cost(config).total_parameters == sum(p.numel() for p in Transformer(config).parameters())


def test_vectors_learn_at_the_scalars_rate_unless_they_are_frozen(name: str) -> None:
    model = Transformer(ModelConfig(rule=name, rule_options={"frozen": ("rho",)}, **SIZE))
    learned = {id(p): n for n, p in model.named_parameters()}
    scalars = {learned[id(p)].rpartition(".")[2] for p in parameter_groups(model)["scalars"]}
    assert scalars == {"beta_raw", "gamma_raw", "nu_raw", "scale_raw"}


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(RuleError, match="shape='width' must be one of d_model, heads, head_dim"):
        unit_interval(0.5, shape="width")
    with pytest.raises(ConfigError, match="beta=2: its initial value must be a number in"):
        Vectors.resolve({"beta": 2})


def test_a_run_logs_decodes_and_reports_vectors(name: str, tmp_path: Path) -> None:
    from polyak.study.runs.page import report

    config = run_config(write_corpus(tmp_path), rule=name)
    train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    (last,) = [row for row in rows if row["kind"] == "validation"][-1:]
    assert last["scalars"].keys() == {
        *("beta", "beta.std", "gamma", "gamma.std", "nu", "nu.std", "rho", "rho.std", "scale")
    }
    assert last["scalars"]["beta.std"]["mlp"][0] > 0  # it learned
    results = report([tmp_path / "run"], tmp_path / "page", command="")
    assert "beta.std" in json.dumps(results)
    model, tokenizer = load_run(tmp_path / "run")
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=8)
    (made,) = complete(model, tokenizer, ["the q"], sampling)
    ids = torch.from_numpy(tokenizer.encode("the q"))[None].long()
    for _ in range(8):  # one token at a time, as with the whole sequence anew
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), 1)
    assert list(made.tokens) == ids[0, -8:].tolist()


class Gated(UpdateRule):
    """Parameters of its own: a matrix, a vector, a map."""

    def __init__(self, d_model: int, num_heads: int, **given: Any) -> None:
        super().__init__(d_model, num_heads, **given)
        self.gate = nn.Parameter(torch.ones(num_heads, d_model // num_heads))
        self.shift = nn.Parameter(torch.zeros(d_model))
        self.mix = nn.Linear(d_model, d_model, bias=False)

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        g = self.mix(oracle(x)).unflatten(-1, self.gate.shape) * self.gate
        return x + g.flatten(-2) + self.shift, state


def test_what_a_rule_learns_goes_to_muon_only_if_it_says_so(registered: Register) -> None:
    config = run_config(Path("unused")).training

    def muon(rule: type[UpdateRule]) -> set[str]:
        model = Transformer(ModelConfig(rule=registered("gated", rule), **SIZE))
        names = {id(p): n for n, p in model.named_parameters()}
        optimizers = Optimizers(model, config)
        assert optimizers.muon is not None
        found = [names[id(p)] for group in optimizers.muon.param_groups for p in group["params"]]
        return {n.rpartition("rules.mlp.")[2] for n in found if ".rules.mlp." in n}

    assert muon(Gated) == set()

    class Gated2(Gated):
        muon_parameters = ("mix",)

    Gated2.__qualname__ = "Gated"
    assert muon(Gated2) == {"mix.weight"}
    for wrong in ("shift", "nothing"):
        Gated2.muon_parameters = (wrong,)
        with pytest.raises(RuleError, match=f"muon_parameters names '{wrong}', and it has no"):
            muon(Gated2)
