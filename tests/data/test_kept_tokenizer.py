"""Tokenizers of Llama's kinds, kept as their models bring them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers as hf
from tiny_runs import polyak
from tiny_tokenizers import KINDS, TEXTS, save_tokenizer
from tokenizers import decoders, models

from polyak.data.kept_tokenizer import KeptTokenizer
from polyak.data.prepare import prepare
from polyak.data.tokenizer_names import load_tokenizer, read_tokenizer
from polyak.errors import DataError


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_tokenizer(request.param, tmp_path)
    return tmp_path


def test_ids_are_those_of_hugging_face_and_text_comes_back(folder: Path) -> None:
    ours = read_tokenizer(folder)
    assert isinstance(ours, KeptTokenizer)
    theirs = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, ids in zip(TEXTS, ours.encode_many(TEXTS), strict=True):
        assert ids.tolist() == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text
        assert ours.end_of_text not in ids
        bytes_of_text = len(text.encode())
        prefix = ours.byte_lengths(ids).sum() - bytes_of_text
        assert prefix == (0 if ours._form == "bytes" else 1)
    assert ours.vocab_size == theirs.get_vocab_size(with_added_tokens=True)
    assert ours.decode([*ours.encode("a"), ours.end_of_text, *ours.encode("b")]) == (
        "a<|endoftext|>b"
    )
    assert ours.byte_lengths([ours.end_of_text]).tolist() == [0]


def test_what_the_template_puts_before_a_text_is_the_prefix(folder: Path) -> None:
    ours = read_tokenizer(folder)
    theirs = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours.save(folder / "saved")
    for tokenizer in (ours, load_tokenizer(folder / "saved")):
        for text in [*TEXTS, ""]:
            assert [*tokenizer.prefix, *tokenizer.encode(text)] == theirs.encode(text).ids
    assert len(ours.prefix) == 1
    assert theirs.id_to_token(ours.prefix[0]) == ours.begin_token
    assert theirs.id_to_token(ours.end_of_text) == ours.end_token
    plain = hf.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.post_processor = None  # as Qwen's
    plain.save(str(folder / "tokenizer.json"))
    assert read_tokenizer(folder).prefix == ()
    assert read_tokenizer(folder).begin_token == ours.end_token


def test_the_bytes_of_its_tokens_are_the_text(folder: Path) -> None:
    """What streamed text is put together from."""
    tokenizer = read_tokenizer(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        found = b"".join(tokenizer.byte_strings[number] for number in ids).decode()
        assert found.removeprefix(" ") == text  # SentencePiece puts a space before a text
        assert [len(tokenizer.byte_strings[n]) for n in ids] == tokenizer.byte_lengths(ids).tolist()


def test_a_token_outside_the_byte_letters_stands_for_its_text(tmp_path: Path) -> None:
    """As in `tokenizers`; such a token is in the vocabulary, and no merge leads to it."""
    save_tokenizer("byte-level", tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    number = hf.Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=True)
    content["model"]["vocab"]["a b"] = number
    file.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.byte_strings[number] == tokenizer.decode([number]).encode() == b"a b"


def test_text_that_spells_a_special_token_is_just_text(folder: Path) -> None:
    ours = read_tokenizer(folder)
    for spelled in ("<|end_of_text|>", "</s>", "<s> a"):
        ids = ours.encode(spelled)
        assert ours.end_of_text not in ids
        assert ours.decode(ids) == spelled


def test_it_is_saved_loaded_and_used_for_a_corpus(folder: Path, tmp_path: Path) -> None:
    ours = read_tokenizer(folder)
    ours.save(tmp_path / "model")
    again = load_tokenizer(tmp_path / "model")
    assert again.fingerprint == ours.fingerprint
    assert again.end_of_text == ours.end_of_text
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"The a b {number} " * 30, encoding="utf-8")
    data = prepare(str(texts), str(tmp_path / "model"), cache=tmp_path / "cache")
    assert data.tokenizer.fingerprint == ours.fingerprint
    ids = data.train[0 : len(data.train)]
    assert (ids == ours.end_of_text).sum() > 20
    assert "The a b" in data.tokenizer.decode(ids[:50])
    file = tmp_path / "model/tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(DataError, match="was changed after it was saved"):
        load_tokenizer(tmp_path / "model")


def test_what_does_not_say_where_a_text_ends_or_what_a_token_is_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "nothing"}))
    with pytest.raises(DataError, match="is no tokenizer that polyak can use"):
        read_tokenizer(folder)
    word_piece = hf.Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    word_piece.decoder = decoders.WordPiece()
    word_piece.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    with pytest.raises(DataError, match="neither byte-level nor of SentencePiece's form"):
        read_tokenizer(folder)


TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
SINGLE = [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
PANICS = {
    "template": {"post_processor": {**TEMPLATE, "single": SINGLE}},
    "strip": {
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Strip", "content": "a", "start": 3, "stop": 5},
                {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
            ],
        }
    },
}


@pytest.mark.parametrize("name", PANICS)
def test_a_file_that_makes_the_library_panic_is_one_line_by_every_door(
    name: str, tmp_path: Path
) -> None:
    save_tokenizer("byte-level", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **PANICS[name]}))
    with pytest.raises(DataError, match=r"tokenizer.json cannot be used: (no entry|index out)"):
        read_tokenizer(tmp_path)
    (tmp_path / "a.txt").write_text("a lamp on a table\n" * 99)
    words = ("prepare", "a.txt", "--tokenizer", ".")
    done = polyak(*words, cwd=tmp_path, cache=tmp_path / "cache", RUST_BACKTRACE="1")
    assert done.returncode == 1
    assert done.stderr.startswith("polyak prepare: tokenizer.json cannot be used: ")
    assert done.stderr.count("\n") == 1
