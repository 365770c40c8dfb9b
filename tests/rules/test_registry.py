"""Where rules come from: this package, a user's code, a user's file, an installed package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polyak import ModelConfig, PolyakError, Transformer, rules
from polyak.errors import RuleError, UnknownNameError
from polyak.nn.cost import cost
from polyak.rules import Oracle, State, Stream, UpdateRule, choice, register, unit_interval

Register = Callable[[str, type[UpdateRule]], str]

BUILT_IN = (
    "gradient_descent",
    "adam",
    "adamw",
    "adaptive_residual_momentum",
    "heavy_ball",
    "muon",
    "nesterov",
    "ortho",
    "residual_momentum",
    "rmsprop",
    "shampoo",
    "soap",
    "spherical",
    "triple_momentum",
)

MINE = """
from polyak.rules import Stream, UpdateRule, unit_interval

class Averaged(UpdateRule):
    streams = (Stream("m"),)
    beta = unit_interval(0.5)

    def step(self, x, state, oracle):
        m = self.beta * state.m + (1 - self.beta) * oracle(x)
        return x + m, state.replace(m=m)
"""


@pytest.fixture
def my_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rule.py"
    path.write_text(MINE)
    return path


def test_the_family_is_complete_and_gradient_descent_comes_first() -> None:
    assert rules.names() == BUILT_IN


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_rule_says_what_it_is(name: str) -> None:
    rule = rules.get(name)
    assert rule.name == name
    assert rule.architecture
    assert rule.paper.startswith("arXiv:") or rule.architecture == "Spherical"  # ours
    assert "←" in rule.title()
    assert rule is rules.get(name)
    assert len(Path(sys.modules[rule.__module__].__file__ or "").read_text().splitlines()) < 60


def test_an_unknown_rule_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'heavy_ball'.*known: adam, adamw"):
        rules.get("heavyball")
    with pytest.raises(PolyakError, match="unknown rule 'zzz'"):
        rules.get("zzz")


def test_a_registered_rule_is_a_first_class_citizen(registered: Register) -> None:
    class Mine(UpdateRule):
        """x ← x + βO(x)."""

        beta = unit_interval(0.5)
        flavour = choice("sweet", "sour")

        def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
            sign = 1 if self.flavour == "sweet" else -1
            return x + sign * self.beta * oracle(x), state

    name = registered("mine", Mine)
    assert name in rules.names()
    assert rules.get(name) is Mine
    assert rules.get(name).title() == "x ← x + βO(x)."
    with pytest.raises(UnknownNameError, match="did you mean 'mine'"):
        rules.get("mien")
    config = ModelConfig(rule=name, rule_options={"beta": 0.25, "flavour": "sour"})
    model = Transformer(config)
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 256)
    assert model.scalars() == {"beta": {"attention": [0.25] * 4, "mlp": [0.25] * 4}}
    assert cost(config).parameters["rule"] == 8
    with pytest.raises(PolyakError, match="flavour='salty' of mine: use one of sweet, sour"):
        ModelConfig(rule=name, rule_options={"flavour": "salty"})


def test_registration_ends_with_the_test() -> None:
    assert "mine" not in rules.names()


def test_a_taken_or_malformed_name_is_refused(registered: Register) -> None:
    class Mine(UpdateRule):
        pass

    class Other(UpdateRule):
        pass

    registered("mine", Mine)
    with pytest.raises(RuleError, match="rule name 'mine' is taken; register Other under another"):
        registered("mine", Other)
    with pytest.raises(RuleError, match="rule name 'adam' is taken"):
        registered("adam", Other)
    for name in ("", "my rule", "a:b", "path/to"):
        with pytest.raises(RuleError, match="use letters, digits"):
            register(name)(Other)


def test_a_class_can_be_registered_again_when_its_module_is_reloaded(registered: Register) -> None:
    for _ in range(2):

        class Mine(UpdateRule):
            pass

        registered("mine", Mine)
    assert rules.get("mine") is Mine


def test_a_rule_from_a_file_works_like_any_other(my_file: Path) -> None:
    name = f"{my_file}:Averaged"
    config = ModelConfig(rule=name, stream_start="zeros")
    model = Transformer(config)
    assert model(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert rules.get(name) is rules.get(name)
    assert cost(config).total_parameters == sum(p.numel() for p in model.parameters())
    assert cost(config).elementwise_per_token > 0


def test_an_edited_file_is_read_anew(my_file: Path) -> None:
    before = rules.get(f"{my_file}:Averaged")
    my_file.write_text(MINE.replace("0.5", "0.25"))
    after = rules.get(f"{my_file}:Averaged")
    assert (before.scalars["beta"].initial, after.scalars["beta"].initial) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("text", "asked", "message"),
    [
        ("import no_such_module_at_all", "A", "does not import: ModuleNotFoundError: No module"),
        ("class A(:", "A", "does not import: SyntaxError"),
        ("1 / 0", "A", "does not import: ZeroDivisionError"),
        (MINE, "Avreaged", "does not define 'Avreaged'; did you mean 'Averaged'"),
        (MINE, "Something", r"does not define 'Something' \(it defines: Averaged\)"),
        ("x = 1", "Rule", r"does not define 'Rule' \(it defines: no rules\)"),
        ("class A: pass", "A", ":A is not a subclass of polyak.rules.UpdateRule"),
        ("A = 3", "A", ":A is not a subclass of polyak.rules.UpdateRule"),
    ],
)
def test_a_file_that_does_not_work_is_explained_in_one_line(
    text: str, asked: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(RuleError, match=message) as caught:
        ModelConfig(rule=f"{path}:{asked}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match=r"no_file.py' does not exist; give path/to/file.py:Class"):
        rules.get(f"{tmp_path}/no_file.py:Rule")
    with pytest.raises(RuleError, match=r"module 'no.such' does not import"):
        rules.get("no.such:Rule")
    path = tmp_path / "rule.txt"
    path.write_text(MINE)
    with pytest.raises(RuleError, match="is not a Python file"):
        rules.get(f"{path}:Averaged")


def test_a_rule_without_a_step_says_so() -> None:
    class Idle(UpdateRule):
        pass

    with pytest.raises(RuleError, match=r"Idle defines no step\(self, x, state, oracle\)"):
        Idle(12, 3).step(torch.zeros(1, 1, 12), (), lambda y: y)


def test_misused_declarations_are_explained() -> None:
    with pytest.raises(
        RuleError, match="stream 'v': start='one' must be one of embedding, x, zeros"
    ):
        Stream("v", start="one")
    with pytest.raises(RuleError, match=r"Bad.streams must be a tuple of Stream\(...\)"):

        class Bad(UpdateRule):
            streams = ("v",)

    rule = rules.get("heavy_ball")(12, 3)
    with pytest.raises(AttributeError, match="set beta_raw, the raw parameter behind 'beta'"):
        rule.beta = 0.3


def test_an_installed_package_offers_rules_by_name(tmp_path: Path) -> None:
    (tmp_path / "their_rules.py").write_text(MINE)
    about = tmp_path / "their_rules-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rules\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[polyak.rules]\naveraged = their_rules:Averaged\nbroken = their_rules:Missing\n"
    )
    program = (
        "import polyak.rules as rules\n"
        "from polyak import ModelConfig, PolyakError\n"
        "assert 'averaged' in rules.names()\n"
        "assert ModelConfig(rule='averaged').rule == 'averaged'\n"
        "assert rules.get('averaged').__module__ == 'their_rules'\n"
        "assert rules.get('averaged').name == 'averaged'\n"
        "try:\n    rules.get('broken')\n"
        "except PolyakError as error:\n    print(error)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "does not define 'Missing'" in done.stdout


def test_a_broken_entry_point_leaves_the_others_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "ours.py").write_text(
        "from polyak.rules import UpdateRule\nclass Fine(UpdateRule):\n"
        "    def step(self, x, state, oracle):\n        return x + oracle(x), state\n"
        "class Lost(UpdateRule):\n    def step(self, x, state, oracle):\n        return 1 // 0\n"
    )
    about = tmp_path / "ours-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[polyak.rules]\nfine = ours:Fine\nlost = ours:Lost\nbroken = theirs:Missing\n"
        "odd name = ours:Fine\nno_class = ours\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "polyak.cli.main", "rules", *words],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )

    listed = ask()
    assert listed.returncode == 0, listed.stderr
    assert "triple_momentum" in listed.stdout
    assert "\nfine\n" in listed.stdout
    for name, why in (
        ("broken", "No module named 'no_such_module_anywhere'"),
        ("lost", "its step fails"),
        ("odd name", "use letters, digits"),
        ("no_class", "does not define"),
    ):
        assert f"{name}: broken: " in listed.stdout
        assert why in listed.stdout
    asked = ask("--rules", "broken")
    assert asked.returncode == 1
    assert "No module named 'no_such_module_anywhere'" in asked.stderr
