"""Tokenizers lose nothing, invent nothing, and agree with Hugging Face's reading of their file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hugging_face
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak.data.byte_level import pieces
from polyak.data.tokenizer_names import load_tokenizer, parse_name
from polyak.data.tokenizers import END_OF_TEXT, BPETokenizer, ByteTokenizer, Tokenizer
from polyak.errors import ConfigError, DataError

TRAINING = [
    "def step(self, x, state, oracle):\n    return x + self.nu * state.v\n" * 3,
    "the quick brown fox isn't quicker than the quickest brown foxes, 1234 times 5678\n\n\n" * 3,
    "x\n\ny\n\n\nz    0\n\n\n\n  1\n" * 9,  # so that runs of line breaks become tokens
    ".\x1c. " * 60,  # white space to Python, not to the word splitting
    f"naïve café 数学 数学 Ωμέγα {END_OF_TEXT} {END_OF_TEXT}\r\n\t\ttabs  and   spaces \n",
]
BPE = BPETokenizer.train(TRAINING, 360)
BYTES = ByteTokenizer()

both = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])

# Any text, and text that is likely to meet the merges, the word splitting and the special token.
texts = st.text() | st.lists(
    st.sampled_from(
        [
            ".\x1c",
            *("the quick", " brown", "'t", "1", "23", ".", "_", "é", "数", "e\u0301", "\U0001f600"),
            *("\n", " ", "\t", "\r\n", "\x1c", "\x85", "\xa0", "\u3000", "\0"),
            *("<|", "endoftext", "|>", END_OF_TEXT, "ÿ", "Ġ"),
        ]
    ),
    max_size=30,
).map("".join)


@both
@given(text=texts)
def test_decoding_undoes_encoding(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == text


@both
@given(text=texts)
def test_no_text_encodes_to_the_end_of_text_token(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.end_of_text not in tokenizer.encode(text + END_OF_TEXT + text)


@both
@given(text=texts)
def test_byte_lengths_add_up_to_the_bytes_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = np.append(tokenizer.encode(text), tokenizer.end_of_text)
    lengths = tokenizer.byte_lengths(ids)
    assert lengths.shape == ids.shape
    assert lengths.sum() == len(text.encode())
    assert lengths[-1] == 0


@pytest.fixture(scope="module", params=[BYTES, BPE], ids=["bytes", "bpe"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, hugging_face.Tokenizer]:
    """A tokenizer, and Hugging Face's reading of the file it saved."""
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param.save(folder)
    return request.param, hugging_face.Tokenizer.from_file(str(folder / "tokenizer.json"))


@given(text=texts)
def test_hugging_face_reads_the_saved_file_with_the_same_ids(
    pair: tuple[Tokenizer, hugging_face.Tokenizer], text: str
) -> None:
    ours, theirs = pair
    ids = ours.encode(text).tolist()
    assert theirs.encode(text).ids == ids
    assert theirs.decode([*ids, ours.end_of_text]) == ours.decode([*ids, ours.end_of_text])
    assert theirs.token_to_id(END_OF_TEXT) == ours.end_of_text
    assert theirs.get_vocab_size() == ours.vocab_size


@given(given=st.lists(texts), size=st.integers(1, 12))
@settings(max_examples=300)
def test_pieces_of_a_text_encode_as_the_whole(given: list[str], size: int) -> None:
    text = "".join(given)
    whole = hugging_face.Tokenizer.from_str(BPE.hugging_face_json()).encode(text).ids
    parts = list(pieces(given, size))
    assert "".join(parts) == text
    assert parts == list(pieces([text], size))  # wherever the text is torn
    assert [int(token) for part in parts for token in BPE.encode(part)] == whole


def test_a_long_text_is_cut_into_pieces_and_trains_as_the_whole() -> None:
    text = "".join(f"{number % 300} apples and\nsome  pears.\n\n" for number in range(45_000))
    assert len(list(pieces([text]))) == 2
    trainer = hugging_face.trainers.BpeTrainer(
        vocab_size=299,
        initial_alphabet=hugging_face.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    whole = hugging_face.Tokenizer(hugging_face.models.BPE())
    whole.pre_tokenizer = hugging_face.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.train_from_iterator([text], trainer)
    whole_ids = whole.encode(text).ids
    vocabulary = json.loads(whole.to_str())["model"]["vocab"]
    trained = BPETokenizer.train([text], 300)
    assert json.loads(trained.hugging_face_json())["model"]["vocab"] == (
        vocabulary | {END_OF_TEXT: 299}
    )
    assert trained.encode(text).tolist() == whole_ids


def test_many_texts_encode_as_one_by_one() -> None:
    for tokenizer in (BYTES, BPE):
        many = tokenizer.encode_many([*TRAINING, ""])
        assert len(many) == len(TRAINING) + 1
        for text, ids in zip([*TRAINING, ""], many, strict=True):
            assert (ids == tokenizer.encode(text)).all()


def test_bytes_are_bytes() -> None:
    assert BYTES.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert (BYTES.vocab_size, BYTES.end_of_text, BYTES.name) == (256, 255, "bytes")
    assert BYTES.decode([97, 255, 98]) == f"a{END_OF_TEXT}b"


def test_training_compresses_and_knows_its_words() -> None:
    assert (BPE.vocab_size, BPE.end_of_text, BPE.name) == (360, 359, "bpe-360")
    text = "the quick brown fox"
    assert len(BPE.encode(text)) <= 6
    assert max(BPE.byte_table) >= len(" quick")
    assert len(BPE.encode("\n\n")) == len(BPE.encode(".\x1c")) == 1


def test_training_is_the_same_whatever_the_threads_and_hash_seed() -> None:
    code = (
        "import sys, json; from polyak.data.tokenizers import BPETokenizer\n"
        "print(BPETokenizer.train(json.load(sys.stdin), 360).fingerprint)"
    )
    for seed, threads in (("1", "1"), ("2", "3")):
        result = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(TRAINING),
            env=os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            check=True,
            capture_output=True,
            text=True,
        )
        assert result.stdout.strip() == BPE.fingerprint


def test_the_smallest_bpe_is_bytes_without_merges() -> None:
    smallest = BPETokenizer.train(["some text"], 257)
    assert len(smallest.encode("some text")) == len("some text")
    assert set(smallest.byte_table.tolist()) == {0, 1}


def test_a_text_too_short_for_the_vocabulary_says_how_far_it_goes() -> None:
    with pytest.raises(DataError, match=r"only (\d+) tokens, fewer than 'bpe-9000'") as caught:
        BPETokenizer.train(["some words"], 9000)
    reachable = int(str(caught.value).split("only ")[1].split()[0])
    assert BPETokenizer.train(["some words"], reachable).vocab_size == reachable


@both
def test_a_saved_tokenizer_loads_as_itself(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert type(loaded) is type(tokenizer)
    assert (loaded.name, loaded.fingerprint) == (tokenizer.name, tokenizer.fingerprint)
    assert all((loaded.encode(text) == tokenizer.encode(text)).all() for text in TRAINING)


def test_different_tokenizers_have_different_fingerprints() -> None:
    others = [BPETokenizer.train(TRAINING, 361), BPETokenizer.train(TRAINING[:2], 300)]
    assert len({t.fingerprint for t in (BYTES, BPE, *others)}) == 4


def test_a_tokenizer_changed_after_saving_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*polyak_tokenizer\.json"):
        load_tokenizer(tmp_path)
    BPE.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["model"]["merges"][0], saved["model"]["merges"][1] = saved["model"]["merges"][1::-1]
    path.write_text(json.dumps(saved))
    with pytest.raises(DataError, match="was changed after it was saved"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps({"model": {"vocab": []}}))
    with pytest.raises(DataError, match="holds no tokenizer that polyak wrote"):
        load_tokenizer(tmp_path)
    description = tmp_path / "polyak_tokenizer.json"
    description.write_text(description.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DataError, match="has format 2, this polyak reads up to 1; upgrade polyak"):
        load_tokenizer(tmp_path)


@both
def test_broken_bytes_decode_to_replacement_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")
    if len(ids) == 1:  # a merged token is never broken
        ids = tokenizer.encode("\U0001f600")
    assert tokenizer.decode(ids[:-1]).strip("\ufffd") == ""


@both
def test_ids_that_do_not_exist_and_text_that_is_not_unicode_are_errors(
    tokenizer: Tokenizer,
) -> None:
    for ids in ([tokenizer.vocab_size], [0, -1]):
        with pytest.raises(DataError, match=f"has ids 0 to {tokenizer.end_of_text}"):
            tokenizer.decode(ids)
    with pytest.raises(DataError, match="unpaired surrogate at character 1"):
        tokenizer.encode("a\ud800")
    assert tokenizer.decode([]) == ""


def test_names_give_sizes_and_bad_names_say_what_is_known() -> None:
    assert parse_name("bytes").size is None
    assert parse_name("bpe-4096").size == 4096
    assert parse_name("gpt2").path is parse_name("gpt2").size is None
    with pytest.raises(ConfigError, match="'bpe-256' is too small: BPE needs at least 257"):
        parse_name("bpe-256")
    for name in ("byte", "bpe", "bpe-", "bpe-x", "bpe--5", "gpt-2", "", "bpe-0300", "BYTES "):
        with pytest.raises(ConfigError, match=r"unknown tokenizer .*known: bytes, gpt2, bpe-N"):
            parse_name(name)
    for typo, meant in (("byte", "bytes"), ("gpt-2", "gpt2"), ("bpe4096", "bpe-4096")):
        with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
            parse_name(typo)
