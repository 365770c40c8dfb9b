"""GPT-2's tokenizer: from Hugging Face's cache or from files, with its ids and its end of text.

The files here have GPT-2's form and size, but merges of their own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hugging_face

from polyak.data.byte_level import byte_letters
from polyak.data.prepare import open_prepared, prepare
from polyak.data.tokenizer_names import load_tokenizer, parse_name, read_tokenizer
from polyak.data.tokenizers import END_OF_TEXT, BPETokenizer
from polyak.errors import ConfigError, DataError


def _description(size: int = 50_257) -> dict[str, Any]:
    """A `tokenizer.json` as the hub has it: the end of text is also an added, special token."""
    letters = sorted(byte_letters())
    merges = [f"{left} {right}" for left in letters for right in letters][: size - 257]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), END_OF_TEXT]
    made: dict[str, Any] = json.loads(hugging_face_form(tokens, merges))
    return made


def hugging_face_form(tokens: list[str], merges: list[str]) -> str:
    """The file that Hugging Face's library writes itself."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = hugging_face.Tokenizer(hugging_face.models.BPE(vocabulary, pairs))  # type: ignore[arg-type] # its stubs are narrow
    made.pre_tokenizer = hugging_face.pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment] # as documented
    made.decoder = hugging_face.decoders.ByteLevel()  # type: ignore[assignment] # as documented
    made.add_special_tokens([END_OF_TEXT])
    return made.to_str()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "tokenizer.json").write_text(json.dumps(_description()))
    return folder


def test_a_folder_of_gpt2_gives_its_ids_and_its_end_of_text(folder: Path, tmp_path: Path) -> None:
    theirs = hugging_face.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for path in (folder, folder / "tokenizer.json"):
        ours = read_tokenizer(path)
        assert (ours.name, ours.vocab_size, ours.end_of_text) == ("gpt2", 50_257, 50_256)
        for text in ("Hello world, isn't it?", "naïve 数学\n\n  x = 1234", ""):
            assert ours.encode(text).tolist() == theirs.encode(text).ids
            assert ours.decode(ours.encode(text)) == text
    assert theirs.token_to_id(END_OF_TEXT) == 50_256
    text = f"a{END_OF_TEXT}b"  # in a text it is text, so a document cannot end another one
    assert theirs.encode(text).ids.count(50_256) == 1
    assert 50_256 not in ours.encode(text)
    ours.save(tmp_path)
    assert load_tokenizer(tmp_path).name == "gpt2"
    assert load_tokenizer(tmp_path).fingerprint == ours.fingerprint


def test_the_older_pair_of_files_is_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    assert read_tokenizer(tmp_path).fingerprint == read_tokenizer(folder).fingerprint


def test_by_name_it_comes_from_hugging_faces_cache_offline(
    folder: Path, texts: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, pathlib; from polyak.data.prepare import prepare\n"
        "found = prepare(sys.argv[1], 'gpt2', cache=pathlib.Path(sys.argv[2]))\n"
        "print(found.tokenizer.name, found.tokenizer.end_of_text, found.folder.name[:11])\n"
        "print(found.folder); print('torch' in sys.modules)"
    )
    for number, repository in enumerate(("openai-community--gpt2", "gpt2")):
        home = tmp_path / repository
        stored = home / "hub" / f"models--{repository}"
        (stored / "refs").mkdir(parents=True)
        (stored / "refs" / "main").write_text("a" * 40)
        (stored / "snapshots" / ("a" * 40)).mkdir(parents=True)
        (stored / "snapshots" / ("a" * 40) / "tokenizer.json").symlink_to(folder / "tokenizer.json")
        result = subprocess.run(
            [sys.executable, "-c", code, str(texts), str(tmp_path / str(number))],
            env=os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9"},
            capture_output=True,
            text=True,
        )
        first, path, torch = result.stdout.splitlines()
        assert first == "gpt2 50256 texts-gpt2-", result.stderr
        assert torch == "False"
        assert open_prepared(Path(path)).train[-1] == 50_256
    # the name is enough to find it again, without any tokenizer at hand
    assert prepare(str(texts), "gpt2", cache=tmp_path / "0").tokenizer.vocab_size == 50_257


def test_in_the_cache_it_must_have_gpt2s_size(texts: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--gpt2" / "snapshots" / "b"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text(json.dumps(_description(300)))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("b")
    code = (
        "import sys; from polyak.data.tokenizer_names import parse_name\n"
        "try: parse_name('gpt2').load()\n"
        "except ValueError: raise\n"
        "except Exception as problem: print(problem)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "is not GPT-2's tokenizer: it has 300 tokens instead of 50257" in result.stdout


def test_a_tokenizer_by_path_is_the_one_it_was_trained_as(texts: Path, cache: Path) -> None:
    trained = prepare(str(texts), "bpe-300", cache=cache)
    by_path = prepare(str(texts), str(trained.folder), cache=cache)
    assert by_path.tokenizer.name == "bpe-300"
    assert by_path.fingerprint == trained.fingerprint
    assert (by_path.train[:] == trained.train[:]).all()
    assert by_path.folder.name.startswith("texts-bpe-300-")


_SWAPPED = {END_OF_TEXT: 0, "!": 299}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"].update(type="WordPiece"), "it is not byte-level BPE"),
        (lambda d: d.update(pre_tokenizer=None), "it is not byte-level BPE"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "splitting is not GPT-2's"),
        (lambda d: d["pre_tokenizer"].update(use_regex=False), "its word splitting is not GPT-2's"),
        (lambda d: d.update(normalizer={"type": "NFC"}), "it normalises or drops out"),
        (lambda d: d["added_tokens"][0].update(content="<pad>"), "it has the added token '<pad>'"),
        (lambda d: d["model"]["vocab"].update(AB=400), "its ids do not run from 0 without gaps"),
        (
            lambda d: (d.update(added_tokens=[]), d["model"]["vocab"].update(_SWAPPED)),
            r"its last id is not <\|endoftext\|>",
        ),
        (lambda d: d["model"]["merges"].append(["zz", "zz"]), "Token `zz` out of vocabulary"),
        (lambda d: d["model"].pop("merges"), "no tokenizer.json: KeyError"),
    ],
)  # fmt: skip
def test_what_is_not_of_gpt2s_kind_is_one_line(tmp_path: Path, change: Any, message: str) -> None:
    description = _description(300)
    change(description)
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=message) as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_paths_without_a_tokenizer_and_unknown_names_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer: no tokenizer\.json, no vocab\.json"):
        parse_name(str(tmp_path)).load()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="is not valid JSON"):
        parse_name(str(tmp_path)).load()
    with pytest.raises(ConfigError, match=r"unknown tokenizer 'no/where' \(known: bytes, gpt2"):
        parse_name("no/where")


def test_names_of_trained_ones_stay(tmp_path: Path) -> None:
    BPETokenizer([*byte_letters()], []).save(tmp_path)
    assert re.fullmatch("bpe-257", load_tokenizer(tmp_path).name)
