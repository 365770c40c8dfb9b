"""Released checkpoint files in and out, and everything else that such a file may turn out to be."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interop.vectors import FOLDER, VECTORS, about, weights
from safetensors.torch import load_file, save_file
from tiny_runs import polyak, write_corpus
from torch import Tensor

from polyak import Transformer, load_run, rules
from polyak.cli.main import main
from polyak.data.tokenizers import BPETokenizer
from polyak.errors import ConfigError, PolyakError, RunError
from polyak.evaluation.subjects import load_subject, token_set
from polyak.interop import release
from polyak.interop.detect import detect
from polyak.interop.released_files import build, read, write
from polyak.nn.rule_text import parse_rule
from polyak.rules import UpdateRule

every_vector = pytest.mark.parametrize("name", VECTORS)
PREFIXES = ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAK_CACHE", str(tmp_path_factory.getbasetemp() / "interop-cache"))


def saved(folder: Path, state: Any, name: str = "best.pt") -> Path:
    torch.save(state, folder / name)
    return folder / name


def training(state: dict[str, Tensor]) -> dict[str, Any]:
    """The release's other format, with optimizers' states as torch writes them."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    adam = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    adam.step()
    optimizers = {"muon_optimizer": adam.state_dict(), "optimizer": adam.state_dict()}
    return {"model": state, "step": 9900, "val_loss": 2.9342, **optimizers}


@every_vector
@pytest.mark.parametrize("prefix", PREFIXES)
def test_rule_and_shape_are_detected_whatever_the_prefix(
    name: str, prefix: str, tmp_path: Path
) -> None:
    state = {prefix + key: value for key, value in weights(name).items()}
    config = build(read(saved(tmp_path, state)), num_heads=3).config
    expected = about(name)
    assert config.rule == expected["rule"]
    assert config.num_layers == int(expected["n_layers"])
    assert config.d_model == int(expected["d_model"])
    assert config.vocab_size == int(expected["vocab_size"])
    assert config.context_length == int(expected["context_length"])
    assert config.stream_start == ("zeros" if expected["velocity_init"] == "zero" else None)
    assert config.rule_options == {}


@every_vector
@pytest.mark.parametrize("form", ["bare", "training"])
def test_import_and_export_keep_every_bit(
    name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = weights(name)
    tokenizer = BPETokenizer.train(["some text to train on " * 9], 257)
    for key in state:
        if key.endswith("tok_emb.weight"):
            state[key] = torch.randn(300, 24)  # 257 tokens, padded
    tokenizer.save(tmp_path / "tokenizer")
    file = saved(tmp_path, training(state) if form == "training" else state)
    run, words = tmp_path / "run", ["--num-heads", "3"]
    words += ["--tokenizer", str(tmp_path / "tokenizer")]
    assert main(["import", str(file), str(run), *words]) == 0
    out = capsys.readouterr().out
    assert about(name)["rule"] in out
    assert ("2.9342" in out) == (form == "training")
    model, loaded = load_run(run)
    assert loaded.fingerprint == tokenizer.fingerprint
    original = Transformer(model.config).eval()
    release.load_state_dict(original, state)
    ids = torch.randint(257, (2, 10))
    assert torch.equal(model(ids), original(ids))
    result = json.loads((run / "result.json").read_text())
    assert result["loss"] == (2.9342 if form == "training" else None)
    assert result["steps"] == (9900 if form == "training" else None)
    recorded = json.loads((run / "run.json").read_text())
    assert recorded["settings"]["imported"]["num_heads"] == "given"
    assert recorded["config"] is None
    again = tmp_path / "again.pt"
    assert main(["export", str(run), str(again), "--format", form]) == 0
    content = torch.load(again, weights_only=True)
    found = content["model"] if form == "training" else content
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(found[key], value), key
    # once more through what was written: with its own record, heads need not be given
    reread = build(read(again), num_heads=None if form == "training" else 3)
    assert torch.equal(reread(ids), original(ids))


@pytest.mark.parametrize("rule", rules.names())
def test_every_rule_survives_export_and_import(
    rule: str, tiny_model: Callable[..., Transformer], tmp_path: Path
) -> None:
    model = tiny_model(rule, dtype=torch.float32)
    for form in ("bare", "training"):
        write(model, tmp_path / form, form)  # type: ignore[arg-type]
        again = build(read(tmp_path / form), num_heads=3)
        assert again.config == model.config
        ids = torch.randint(11, (2, 7))
        assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("rule", [name for name in rules.names() if rules.get(name).norms])
def test_a_norm_left_out_is_detected_where_nothing_usual_fits(
    rule: str, tiny_model: Callable[..., Transformer]
) -> None:
    kind = rules.get(rule)
    option = next(iter(kind.norms.values())).option
    other = "layer" if kind.resolve({})[option] == "none" else "none"
    model = tiny_model(rule, dtype=torch.float32, rule_options={option: other})
    state = release.to_state_dict(model)
    given = detect(state, parse_rule(f"{rule}[{option}={other}]"), 3)
    assert given == model.config
    try:
        assert detect(state, parse_rule(rule), 3) == model.config
    except ConfigError as error:  # only by name: e.g. ortho without its norm has nothing else
        pytest.fail(str(error))


@pytest.mark.slow
def test_imported_runs_serve_where_runs_do(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    state = weights("triple_momentum")
    state["tok_emb.weight"] = 0.02 * torch.randn(256, 24)
    state["vel_tok_emb.weight"] = 0.02 * torch.randn(256, 24)
    file = saved(tmp_path, state)
    words = ["--num-heads", "3", "--corpus", corpus, "--tokens", "200"]
    found = polyak("import", file, "run", *words, cwd=tmp_path, cache=tmp_path / "cache")
    assert found.returncode == 0, found.stderr
    assert "Validation loss" in found.stdout
    subject = load_subject(tmp_path / "run")
    measured = token_set(subject, tokens=200)
    with torch.no_grad():
        logits = subject.model(measured.ids[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), measured.ids[:, 1:].flatten())
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert float(loss) == pytest.approx(result["loss"], abs=1e-5)
    assert measured.fingerprint == subject.settings["validation"]["fingerprint"]
    more = polyak(
        *("train", "--init", "run", "--steps", "2", "--out", "more", "--device", "cpu"),
        *("--set", "training.eval_tokens=200", "--set", "training.batch_size=2"),
        cwd=tmp_path,
        cache=tmp_path / "cache",
    )
    assert more.returncode == 0, more.stderr
    resumed = polyak("train", "--out", "run", "--resume", cwd=tmp_path, cache=tmp_path / "cache")
    assert resumed.returncode == 1
    assert len(resumed.stderr.splitlines()) == 1


class Evil:
    """What runs when a careless loader unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("way", ["torch", "legacy", "pickle", "inside"])
def test_a_malicious_file_is_refused_and_never_run(way: str, tmp_path: Path) -> None:
    mark, file = tmp_path / "owned", tmp_path / "best.pt"
    evil = Evil(mark)
    if way == "pickle":
        file.write_bytes(pickle.dumps(evil))
    elif way == "inside":
        torch.save({"model": weights("adam"), "step": evil}, file)
    else:
        torch.save(evil, file, _use_new_zipfile_serialization=way == "torch")
    found = polyak("import", file, "run", cwd=tmp_path, cache=tmp_path)
    assert found.returncode == 1
    assert len(found.stderr.splitlines()) == 1
    assert "holds more than weights" in found.stderr
    if way != "pickle":  # there torch stops even before the name
        assert "mkdir" in found.stderr
    assert not mark.exists()
    assert not (tmp_path / "run").exists()
    # the file does bite where it is trusted: the test can fail
    with contextlib.suppress(RuntimeError, pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert mark.exists()


def _truncated(folder: Path) -> Path:
    file = saved(folder, weights("adam"))
    file.write_bytes(file.read_bytes()[:-5000])
    return file


def _text(folder: Path) -> Path:
    (folder / "best.pt").write_text("these are not weights\n" * 50)
    return folder / "best.pt"


def _empty(folder: Path) -> Path:
    (folder / "best.pt").write_bytes(b"")
    return folder / "best.pt"


def _safetensors(folder: Path) -> Path:
    save_file(weights("adam"), folder / "model.safetensors")
    return folder / "model.safetensors"


def _changed(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        state: dict[str, Any] = weights(name)
        change(state)
        return saved(folder, state)

    return make


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (_truncated, "is damaged, or not a file of torch.save"),
    "text": (_text, "not a file of torch.save"),
    "empty": (_empty, "is damaged, or not a file of torch.save"),
    "safetensors": (_safetensors, "name the folder"),
    "a tensor": (lambda folder: saved(folder, torch.zeros(3)), "it holds a Tensor, not weights"),
    "empty dict": (lambda folder: saved(folder, {}), "it holds a empty dict, not weights"),
    "another model": (
        lambda folder: saved(folder, torch.nn.Linear(2, 2).state_dict()),
        "it has no token table tok_emb.weight",
    ),
    "not finite": (
        _changed("adam", lambda s: s["layers.0.ln_mlp.weight"].fill_(float("nan"))),
        "weight 'layers.0.ln_mlp.weight' is not finite",
    ),
    "integers": (
        _changed("adam", lambda s: s.update({"tok_emb.weight": torch.ones(3, 24).long()})),
        "is torch.int64, not floating point",
    ),
    "a number among weights": (
        _changed("adam", lambda s: s.update({"lr": 0.1})),
        "entry 'lr' is a float, not a weight",
    ),
    "twice": (
        _changed("adam", lambda s: s.update({"module.pos_emb.weight": torch.zeros(10, 24)})),
        "'pos_emb.weight' twice",
    ),
    "a layer gone": (
        _changed("adam", lambda s: [s.pop(k) for k in list(s) if k.startswith("layers.0")]),
        "it has layers [1], they must run from 0",
    ),
    "a scalar gone": (
        _changed("nesterov", lambda s: s.pop("layers.1.mu_mlp_raw")),
        "missing layers.1.mu_mlp_raw",
    ),
    "a scalar gone from layer 0": (
        _changed("nesterov", lambda s: s.pop("layers.0.mu_mlp_raw")),
        "the weights fit no rule that is known here",
    ),
    "left over": (
        _changed("nesterov", lambda s: s.update({"layers.1.other": torch.zeros(1)})),
        "unexpected layers.1.other",
    ),
    "a shape": (
        _changed("adam", lambda s: s.update({"layers.1.mlp.w1.weight": torch.zeros(9, 24)})),
        "layers.1.mlp.w1.weight has shape (9, 24), the model needs (96, 24)",
    ),
    "untied": (
        _changed("adam", lambda s: s.update({"lm_head.weight": torch.zeros(31, 24)})),
        "the output is untied",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_something_else_gets_one_clear_line_and_leaves_nothing(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD[what]
    file = make(tmp_path)
    assert main(["import", str(file), str(tmp_path / "run"), "--num-heads", "3"]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule", "adam"], "they fit triple_momentum"),
        (["--rule", "nesterov"], "unexpected layers.0.nu_attn_raw"),
        (["--rule", "triple_momentum[stream_start=zeros]"], "unexpected vel_pos_emb.weight"),
        (["--rule", "triple_momentum[num_layers=3]"], "num_layers is read from the weights"),
        (["--rule", "tripple_momentum"], "did you mean 'triple_momentum'?"),
        ([], "give --num-heads"),
        (["--num-heads", "5"], "num_heads=5 does not divide d_model=24"),
        (["--num-heads", "3"], "a vocabulary of 31 does not tell its tokenizer"),
        (["--num-heads", "3", "--tokenizer", "bytes"], "has 256 tokens, the model only 31"),
        (["--num-heads", "3", "--tokenizer", "bpe-300"], "would be trained anew"),
        (["--num-heads", "3", "--tokenizer", "gpt-2"], "did you mean 'gpt2'?"),
    ],
)
def test_options_that_do_not_fit_the_weights_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(tmp_path, weights("triple_momentum"))
    assert main(["import", str(file), str(tmp_path / "run"), *words]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_weights_that_fit_two_rules_ask_which(
    registered: Callable[[str, type[UpdateRule]], str],
) -> None:
    class Mine(rules.get("nesterov")):  # type: ignore[misc]
        pass

    registered("mine", Mine)
    with pytest.raises(ConfigError, match=r"several rules \(mine, nesterov\); say which with --ru"):
        detect(weights("nesterov"), None, 3)
    assert detect(weights("nesterov"), parse_rule("mine"), 3).rule == "mine"


def test_a_checkpoint_cannot_name_a_rule_file_to_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit(7)")
    file = tmp_path / "best.pt"
    config = {"rule": f"{tmp_path}/evil.py:Evil"}
    torch.save({"model": weights("adam"), "polyak_config": config}, file)
    with pytest.raises(RunError, match="not loaded at a checkpoint's word"):
        read(file)


def test_the_released_vocabulary_is_gpt2s_padded(tmp_path: Path) -> None:
    from polyak.interop.import_run import _usual_tokenizer

    assert _usual_tokenizer(50_304) == _usual_tokenizer(50_257) == "gpt2"
    assert _usual_tokenizer(256) == "bytes"


def test_export_replaces_nothing_unasked_and_refuses_other_models(
    tmp_path: Path, tiny_model: Callable[..., Transformer]
) -> None:
    file = tmp_path / "best.pt"
    model = tiny_model("nesterov", dtype=torch.float32)
    write(model, file)
    before = file.read_bytes()
    with pytest.raises(RunError, match="--overwrite"):
        write(model, file)
    with pytest.raises(RunError, match="is a folder"):
        write(model, tmp_path)
    free = tiny_model("nesterov", rule_options={"coefficients": "unconstrained"})
    with pytest.raises(ConfigError, match="coefficients='unconstrained'"):
        write(free, file, overwrite=True)
    with pytest.raises(PolyakError, match="cannot write"):
        write(model, tmp_path / "missing" / "best.pt")
    assert file.read_bytes() == before
    write(model, file, overwrite=True)
    assert sorted(tmp_path.iterdir()) == [file]


def test_a_run_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = weights("gradient_descent")
    state["tok_emb.weight"] = torch.randn(256, 24)
    file = saved(tmp_path, state)
    words = ["import", str(file), str(tmp_path / "run"), "--num-heads", "3"]
    assert main(words) == 0
    before = load_file(tmp_path / "run/model/model.safetensors")
    assert main(words) == 1
    assert "holds a run already" in capsys.readouterr().err
    after = load_file(tmp_path / "run/model/model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_report_of_an_imported_run_says_that_there_are_no_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = weights("gradient_descent")
    state["tok_emb.weight"] = torch.randn(256, 24)
    words = ["import", str(saved(tmp_path, state)), str(tmp_path / "run"), "--num-heads", "3"]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report")]) == 1
    assert "was imported, not trained here" in capsys.readouterr().err


@every_vector
def test_conformance_vectors_go_in_and_out_bit_for_bit(name: str, tmp_path: Path) -> None:
    state = weights(name)
    tensors = load_file(FOLDER / f"{name}.safetensors")
    for form in ("bare", "training"):
        model = build(read(saved(tmp_path, state)), num_heads=int(about(name)["n_heads"]))
        write(model, tmp_path / form, form)  # type: ignore[arg-type]
        again = read(tmp_path / form)
        assert again.state.keys() == state.keys()
        assert all(torch.equal(again.state[key], state[key]) for key in state)
        logits = build(again, num_heads=int(about(name)["n_heads"])).double()(tensors["input_ids"])
        assert (logits - tensors["logits"]).abs().max() < 1e-9
