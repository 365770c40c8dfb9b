"""A user's file is its content and that of its helpers: read once, copied, and known anywhere."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch

from polyak import ModelConfig, Transformer, rules, usercode
from polyak.errors import RuleError, RunError
from polyak.files import sha256_of
from polyak.nn.pieces import keep, known, opened, portable, portable_values

RULE = """
from scale import SCALE
import kit.deep.power as power
from kit import ONE
from polyak.rules import UpdateRule

class Scaled(UpdateRule):
    def step(self, x, state, oracle):
        import late
        return x + SCALE * ONE * power.TWO * late.HALF * oracle(x), state
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A rule with a helper, a package, and a helper that is imported in a step only."""
    folder = tmp_path / "home"
    (folder / "kit" / "deep").mkdir(parents=True)
    (folder / "rule.py").write_text(RULE)
    (folder / "scale.py").write_text("SCALE = 1.0\n")
    (folder / "late.py").write_text("HALF = 0.5\n")
    (folder / "kit" / "__init__.py").write_text("from .one import ONE\n")
    (folder / "kit" / "one.py").write_text("import scale\nONE = scale.SCALE\n")
    (folder / "kit" / "deep" / "power.py").write_text("from ..one import ONE\nTWO = 2 * ONE\n")
    (folder / "json.py").write_text("raise ImportError('happens to lie here')\n")
    (folder / "unused.py").write_text("raise ImportError('never imported')\n")
    return folder


def read(path: Path) -> usercode.UserCode:
    return usercode.read(path, error=RunError)


def function(config: ModelConfig) -> torch.Tensor:
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # so that a scale is seen
        logits: torch.Tensor = model(torch.arange(5)[None])
    return logits


def small(rule: str) -> ModelConfig:
    return ModelConfig(rule=rule, num_layers=1, num_heads=1, d_model=8, context_length=8)


def test_what_a_file_imports_from_its_own_folder_belongs_to_it(home: Path) -> None:
    code = read(home / "rule.py")
    assert set(code.files) == {
        *("rule.py", "scale.py", "late.py"),
        *("kit/__init__.py", "kit/one.py", "kit/deep/power.py"),
    }
    (home / "alone.py").write_text("import json, torch, no_such_module\n")
    assert read(home / "alone.py").sha256 == sha256_of(home / "alone.py")


def test_identity_is_content_and_not_place(home: Path, tmp_path: Path) -> None:
    before = read(home / "rule.py").sha256
    there = home.rename(tmp_path / "moved")
    (there / "rule.py").rename(there / "renamed.py")
    assert read(there / "renamed.py").sha256 == before
    assert rules.get(f"{there}/renamed.py:Scaled") is rules.get(f"{there}/renamed.py:Scaled")
    (there / "kit" / "one.py").write_text("ONE = 3.0\n")
    assert read(there / "renamed.py").sha256 != before


def test_two_versions_of_a_helper_live_side_by_side(home: Path) -> None:
    config = small(f"{home}/rule.py:Scaled")
    first = function(config)
    torch.manual_seed(0)
    model = Transformer(config)
    (home / "scale.py").write_text("SCALE = 3.0\n")
    second = function(config)
    assert not torch.allclose(first, second)
    (home / "scale.py").write_text("SCALE = 1.0\n")
    assert torch.equal(function(config), first)
    # a live model keeps its class, and helpers that are imported in a step are those of then
    (home / "late.py").write_text("raise ImportError('edited')\n")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
        assert torch.equal(model(torch.arange(5)[None]), first)
    assert "scale" not in sys.modules


def test_a_file_that_is_gone_is_as_it_was_read(home: Path) -> None:
    config = small(f"{home}/rule.py:Scaled")
    first = function(config)
    (home / "rule.py").rename(home / "elsewhere.py")
    assert torch.equal(function(config), first)
    assert "SCALE * ONE" in inspect.getsource(rules.get(config.rule))


def test_a_helper_that_fails_is_told_in_one_line(home: Path) -> None:
    (home / "scale.py").write_text("1 / 0\n")
    with pytest.raises(RuleError, match=r"rule.py' does not import: ZeroDivisionError") as caught:
        rules.get(f"{home}/rule.py:Scaled")
    assert "\n" not in str(caught.value)
    (home / "scale.py").write_text("SCALE = 1.0\n")
    assert rules.get(f"{home}/rule.py:Scaled").name == "Scaled"


def test_a_folder_full_of_code_is_refused(home: Path) -> None:
    (home / "kit" / "big.py").write_bytes(b"#" * 2**24)
    with pytest.raises(RunError, match="imports more than 1000 files, or 16 MiB"):
        read(home / "rule.py")
    (home / "kit" / "big.py").unlink()
    read(home / "rule.py")
    for n in range(1001):
        (home / "kit" / f"m{n}.py").write_text("")
    with pytest.raises(RunError, match="imports more than 1000 files, or 16 MiB"):
        read(home / "rule.py")


def test_a_copy_is_the_same_code_and_the_same_name_everywhere(home: Path, tmp_path: Path) -> None:
    config = small(f"{home}/rule.py:Scaled")
    kept = keep(tmp_path / "run", config)
    assert kept.rule.startswith(f"{tmp_path}/run/code/")
    assert (tmp_path / "run" / portable(config.rule).rpartition(":")[0]).is_file()
    assert portable_values(kept) == portable_values(config)
    assert torch.equal(function(kept), function(config))
    again = keep(tmp_path / "comparison", kept)
    assert portable(again.rule) == portable(config.rule)
    assert keep(tmp_path / "run", kept) == kept


def test_a_changed_original_is_said_and_a_lost_one_costs_nothing(
    home: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    name = f"{home}/rule.py:Scaled"
    first, second = tmp_path / "run", tmp_path / "copy of the run"
    kept = keep(first, small(name))
    keep(second, kept)  # a copy of a copy knows the file that it all began with
    values = portable_values(kept)
    for folder in (first, second):
        assert opened(folder, values)["rule"].startswith(f"{folder}/code/")
        assert known(folder, name) == f"{folder}/{values['rule']}"
    assert not recwarn.list
    (home / "late.py").write_text("HALF = 0.25\n")
    for folder in (first, second):
        for look in (lambda at: opened(at, values), lambda at: known(at, name)):
            with pytest.warns(UserWarning, match=r"rule.py has changed since it was copied into"):
                look(folder)
    (home / "rule.py").unlink()
    assert opened(first, values)["rule"] == known(first, name)


def test_code_of_a_folder_lies_in_the_folder(home: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("../home/rule.py:Scaled", "rule.py:Scaled", "code/../../home/rule.py:Scaled"):
        with pytest.raises(RunError, match="lies outside of the folder's code/"):
            opened(tmp_path / "run", {"rule": name})
