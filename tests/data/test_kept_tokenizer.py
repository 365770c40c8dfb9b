"""Tokenizers of Llama's kinds, kept as their models bring them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from polyak.data.kept_tokenizer import KeptTokenizer
from polyak.data.prepare import prepare
from polyak.data.tokenizer_names import read_tokenizer
from polyak.data.tokenizers import load_tokenizer
from polyak.errors import DataError

TEXTS = ["The heavy ball rolls on, faster than 1,234 others.\n\n  Größe ≠ 世界 🙂", "a  b\tc", "x"]


def byte_level() -> Any:
    """Llama 3's kind: byte-level, but other word splitting and special tokens."""
    made = hf.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(hf.Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, byte])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    made.train_from_iterator(
        TEXTS * 5,
        trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=special),
    )
    return made


def sentencepiece() -> Any:
    """Llama 2's kind: text with ▁ for spaces, single bytes where a character is unknown."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    tokens += ["▁a", "T", "h", "e", "▁T", "he", "▁The"]
    merges = [("▁", "a"), ("▁", "T"), ("h", "e"), ("▁T", "he")]
    model = models.BPE(
        {token: number for number, token in enumerate(tokens)},
        merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    made = hf.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["<s>", "</s>"])
    return made


KINDS = {"byte-level": (byte_level, "<|end_of_text|>"), "sentencepiece": (sentencepiece, "</s>")}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    build, end = KINDS[request.param]
    build().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": end}}))
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
