"""Code that comes with data runs only after a word; what this user made here needs none."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import run_config, write_corpus

from polyak import load_run, trust, usercode
from polyak.cli.main import main
from polyak.errors import RunError, TrustError
from polyak.nn.pieces import opened
from polyak.training.loop import train

RULE = """
import os
with open(os.environ["RAN"], "a") as file:
    file.write("ran ")
from polyak.rules import UpdateRule

class Mine(UpdateRule):
    def step(self, x, state, oracle):
        return x + oracle(x), state
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a rule and a run of it, made by this user."""
    home = tmp_path_factory.mktemp("made")
    os.environ["RAN"] = str(home / "ran")
    (home / "mine.py").write_text(RULE)
    train(run_config(write_corpus(home), rule=f"{home}/mine.py:Mine", steps=2), home / "run")
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it in a process that has run none of the code."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.setenv("RAN", str(tmp_path / "home" / "ran"))
    (tmp_path / "home" / "ran").write_text("")
    forget()
    yield tmp_path / "home"
    forget()


def forget() -> None:
    """As a new process: no user's code has been loaded."""
    for name in [n for n in sys.modules if n.startswith(usercode.PREFIX)]:
        del sys.modules[name]
    usercode._RUNNING.clear()
    usercode._HELD.clear()


@pytest.fixture
def stranger(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, come to another user."""
    monkeypatch.setenv("POLYAK_CONFIG", str(tmp_path / "another user"))
    return home


def ran(home: Path) -> bool:
    return (home / "ran").read_text() != ""


def test_a_run_made_here_needs_no_word_wherever_it_is_moved(home: Path) -> None:
    load_run(home / "run")
    assert ran(home)
    forget()
    (home / "run" / "model").rename(home / "a model alone")
    shutil.rmtree(home / "run")
    from polyak.training.runs.folder import read_model_config

    assert read_model_config(home / "a model alone").rule.endswith("/mine.py:Mine")


def test_a_strangers_run_needs_a_word_and_the_refusal_says_what_would_run(stranger: Path) -> None:
    with pytest.raises(TrustError) as caught:
        load_run(stranger / "run")
    said = str(caught.value)
    assert "class Mine of" in said
    assert "/mine.py" in said
    assert f"SHA-256 {usercode.sha256_of(stranger / 'mine.py')[:12]}" in said
    assert "--trust-code" in said
    assert "\n" not in said
    assert not ran(stranger)
    load_run(stranger / "run", trust_code=True)
    assert ran(stranger)
    assert not trust.is_trusted()  # the word was for that call
    forget()
    with trust.trusting():
        load_run(stranger / "run")


def test_no_flag_inside_the_folder_makes_it_ours(home: Path) -> None:
    (script,) = (home / "run" / "code").rglob("mine.py")
    script.write_text(RULE + "# and something else\n")
    with pytest.raises(TrustError, match="was not made here"):
        load_run(home / "run")
    manifest = home / "run" / "code" / "manifest.json"
    content = json.loads(manifest.read_text())
    (piece,) = content["pieces"]
    piece["sha256"] = usercode.sha256_of(script)
    piece["trusted"] = content["trusted"] = True
    for mac in (piece["mac"], "", None, "0" * 64):
        manifest.write_text(json.dumps({**content, "pieces": [{**piece, "mac": mac}]}))
        with pytest.raises(TrustError, match="was not made here"):
            load_run(home / "run")
    assert not ran(home)


def test_a_model_folder_cannot_name_a_file_anywhere_or_an_installed_module(home: Path) -> None:
    config = home / "run" / "model" / "config.json"
    content = json.loads(config.read_text())
    for name in (f"{home}/mine.py:Mine", "this_module:Mine", "polyak.rules.adam:Adam"):
        config.write_text(json.dumps({**content, "polyak": {**content["polyak"], "rule": name}}))
        with pytest.raises(TrustError, match="was not made here"):
            load_run(home / "run")
    config.write_text(json.dumps(content | {"polyak": content["polyak"] | {"rule": "../m.py:M"}}))
    with pytest.raises(RunError, match="lies outside of the folder"):
        load_run(home / "run")
    assert not ran(home)


COMMANDS = {
    "generate": ("{run}", "--prompt", "the", "--max-new-tokens", "2"),
    "evaluate": ("{run}", "--tokens", "64", "--out", "{out}"),
    "forgetting": ("{run}", "--onto", "{corpus}", "--out", "{out}"),
    "sharpness": ("{run}", "--tokens", "32", "--out", "{out}"),
    "spectrum": ("{run}", "--out", "{out}"),
    "dynamics": ("{run}", "--parts", "curve", "--out", "{out}"),
    "report": ("{run}", "--out", "{out}"),
    "study": ("landscape", "{run}", "--out", "{out}"),
    "train": ("--out", "{run}", "--resume", "--steps", "3"),
    "export": ("{run}", "{out}.pt"),
    "upgrade": ("{run}", "{out}"),
    "import": ("{run}/model", "{out}"),
}
RUNS_WITH_THE_WORD = ("generate", "report", "train", "import")
"""The others take longer, or refuse a user's rule for another reason."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_runs_asks_for_the_word(
    command: str, stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "run": str(stranger / "run"),
        "out": str(stranger / "out"),
        "corpus": str(stranger / "corpus.txt"),
    }
    words = [command, *(word.format(**places) for word in COMMANDS[command])]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "brings code of its own that was not made here: class Mine of" in error
    assert "--trust-code" in error
    assert error.count("\n") == 1
    assert not ran(stranger)
    if command in RUNS_WITH_THE_WORD:
        assert main([*words, "--trust-code"]) == 0, capsys.readouterr().err
        assert ran(stranger)


def test_hugging_faces_classes_ask_for_theirs(stranger: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    import polyak.interop.huggingface  # noqa: F401  # registers

    folder = stranger / "run" / "model"
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # data, and runs nothing
    assert config.rule in str(config)
    for use in (config.model_config, lambda: config.num_hidden_layers):
        with pytest.raises(TrustError, match="trust_remote_code=True"):
            use()
    for word in (False, None):
        with pytest.raises(TrustError, match="trust_remote_code=True"):
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=word)
    content = json.loads((folder / "config.json").read_text())
    sneaky = {**content, "_from_data": False, "_own_names": True, "rule": content["polyak"]["rule"]}
    (folder / "config.json").write_text(json.dumps(sneaky))
    with pytest.raises(TrustError):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(content))
    assert not ran(stranger)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert ran(stranger)
    forget()
    model.save_pretrained(stranger / "saved")  # carries the copy, and is this user's now
    assert (stranger / "saved" / "weights.json").exists()
    saved = json.loads((stranger / "saved" / "config.json").read_text())
    assert saved["polyak"]["rule"] == content["polyak"]["rule"]
    forget()
    again = AutoModelForCausalLM.from_pretrained(stranger / "saved")
    ids = torch.arange(6)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_line_that_began_a_run_goes_on_with_the_copy(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = home / "run" / "code" / "manifest.json"
    origin = Path(json.loads(manifest.read_text())["pieces"][0]["origin"])
    line = ["train", "--out", str(home / "run"), "--resume", "--rule", f"{origin}:Mine", "--steps"]
    assert main([*line, "3"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().err == ""
    try:
        origin.write_text(RULE.replace("oracle(x), state", "2 * oracle(x), state"))
        forget()
        with pytest.warns(UserWarning, match=r"mine.py has changed since it was copied into"):
            assert main([*line, "4"]) == 0, capsys.readouterr().err
        origin.unlink()
        forget()
        assert main([*line, "5"]) == 0, capsys.readouterr().err
    finally:
        origin.write_text(RULE)
    other = home / "mine.py"
    other.write_text(RULE.replace("oracle(x), state", "3 * oracle(x), state"))
    forget()
    assert main([*line[:5], f"{other}:Mine", "--steps", "6"]) == 1
    assert "rule_source: the rule's file is not what it was" in capsys.readouterr().err


def test_hugging_faces_door_says_that_a_file_has_changed(home: Path) -> None:
    pytest.importorskip("transformers")
    from polyak.interop.huggingface import PolyakForCausalLM

    manifest = home / "run" / "code" / "manifest.json"
    origin = Path(json.loads(manifest.read_text())["pieces"][0]["origin"])
    before = origin.read_text()
    try:
        origin.write_text(before + "# changed\n")
        with pytest.warns(UserWarning, match=r"mine.py has changed since it was copied into"):
            PolyakForCausalLM.from_pretrained(home / "run" / "model")
    finally:
        origin.write_text(before)


def test_weights_that_are_not_those_that_were_written_are_refused(home: Path) -> None:
    file = home / "run" / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # a number, and still a whole file
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"model.safetensors is not the file that was written here"):
        load_run(home / "run")
    pytest.importorskip("transformers")
    from polyak.interop.huggingface import PolyakForCausalLM

    with pytest.raises(RunError, match=r"model.safetensors is not the file that was written here"):
        PolyakForCausalLM.from_pretrained(home / "run" / "model")


def test_a_checkpoint_of_another_run_is_refused(home: Path, tmp_path: Path) -> None:
    config = run_config(home / "corpus.txt", steps=2)
    for name in ("one", "other"):
        train(config, tmp_path / name, last_checkpoint=True)
    shutil.rmtree(tmp_path / "one" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "one" / "checkpoints")
    longer = run_config(home / "corpus.txt", steps=3)
    with pytest.raises(RunError, match="step-000002 belongs to another run") as caught:
        train(longer, tmp_path / "one", resume=True)
    assert "\n" not in str(caught.value)
    assert train(longer, tmp_path / "other", resume=True)["steps"] == 3


# The key


def test_the_key_is_drawn_once_and_for_its_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYAK_CONFIG", str(tmp_path / "config"))
    first = trust.sign("a", "b")
    assert trust.sign("a", "b") == first
    assert trust.is_ours(first, "a", "b")
    assert not trust.is_ours(first, "a", "c")
    assert not trust.is_ours(first, "ab")
    assert not trust.is_ours(None, "a", "b")
    key = tmp_path / "config" / "key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.unlink()
    assert not trust.is_ours(first, "a", "b")
    assert trust.sign("a", "b") != first
    monkeypatch.delenv("POLYAK_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert trust.config_folder() == tmp_path / "xdg" / "polyak"


def test_a_home_that_cannot_be_written_is_said_once_and_fails_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("POLYAK_CONFIG", str(tmp_path / "a file" / "config"))
    config = run_config(home / "corpus.txt", rule=f"{home}/mine.py:Mine", steps=2)
    with pytest.warns(UserWarning, match="no key can be kept in .* will need --trust-code") as said:
        train(config, tmp_path / "run")
    assert len([w for w in said if "no key" in str(w.message)]) == 1
    forget()
    with pytest.raises(TrustError):
        load_run(tmp_path / "run")


def test_names_of_this_package_need_no_word(tmp_path: Path) -> None:
    assert opened(tmp_path, {"rule": "adam"}) == {"rule": "adam"}


# Permissions


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_their_folders_usual_permissions(home: Path, tmp_path: Path, mask: int) -> None:
    program = (
        "import os, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        f"os.umask({mask})\n"
        "from tiny_runs import run_config; from polyak.training.loop import train\n"
        "config = run_config(Path(sys.argv[2], 'corpus.txt'), rule=sys.argv[2] + '/mine.py:Mine',"
        " steps=2)\n"
        "train(config, Path(sys.argv[3]), last_checkpoint=True)\n"
        "try:\n    from polyak.interop.huggingface import PolyakForCausalLM, share\n"
        "except ImportError:\n    sys.exit()\n"
        "share(sys.argv[3], sys.argv[3] + '/shared')\n"
        "model = PolyakForCausalLM.from_pretrained(sys.argv[3] + '/shared')\n"
        "model.save_pretrained(sys.argv[3] + '/saved')\n"
    )
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent), str(home), str(run)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    wrong = {
        str(path.relative_to(run)): oct(stat.S_IMODE(path.stat().st_mode))
        for path in run.rglob("*")
        if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert wrong == {}
    assert len(list(run.rglob("*.safetensors"))) >= 3
