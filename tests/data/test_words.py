"""The memory of words gives the ids that Hugging Face's library gives, for any text."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata

import pytest
import tokenizers as hugging_face
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak.data import words
from polyak.data.tokenizers import BPETokenizer
from polyak.data.words import WordEncoder, words_of

BPE = BPETokenizer.train(
    [
        "the quick brown fox isn't quicker than the quickest foxes, 1234 times 5678\n\n\n" * 3,
        "x\n\ny\n\n\nz    0\n\n\n\n  1\n  \t \n" * 9 + ".\x1c. don't we'll I'd they've you're I'm ",
        "naïve café 数学 数学 Ωμέγα “quoted” — dashed… \r\n\t\ttabs  and   spaces \n'''s 's's",
    ],
    340,
)
FAST = hugging_face.Tokenizer.from_str(BPE.hugging_face_json())

pieces = st.sampled_from(
    [
        *("the", " quick", "'t", "'", "s", "ll", "1", "23", ".", "_", "é", "数", "e\u0301", "ß"),
        *("\n", " ", "  ", "\t", "\r\n", "\x1c", "\x1f", "\x85", "\xa0", "\u3000", "\u2028", "\0"),
        *("²", "½", "Ⅷ", "٣", "ـ", "\u200b", "\u200d", "\ufeff", "\U0001f600", "ﬁ", "ა", "\u0378"),
    ]
)
texts = st.text() | st.lists(pieces, max_size=40).map("".join)


@given(given_texts=st.lists(texts, max_size=4))
@settings(max_examples=500, deadline=None)
def test_words_give_the_ids_of_the_whole(given_texts: list[str]) -> None:
    encoder = WordEncoder(FAST)
    for _ in range(2):  # new words, and remembered ones
        found = encoder.encode_many(given_texts)
        for ids, expected in zip(found, encoder.directly(given_texts), strict=True):
            assert ids.dtype == expected.dtype
            assert ids.tolist() == expected.tolist()


def test_every_usual_character_is_split_as_hugging_face_splits_it() -> None:
    split = hugging_face.pre_tokenizers.Split(
        hugging_face.Regex(
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        ),
        "isolated",
    )
    codes = [code for start, stop in words._RANGES for code in range(start, stop)]
    usual = [chr(code) for code in codes if unicodedata.category(chr(code)) != "Cn"]
    assert len(usual) > 22_000
    for first in range(0, len(usual), 500):
        text = "".join(f"a{c}b {c}{c}1{c}. {c} \n{c}\n" for c in usual[first : first + 500])
        assert words._OTHER.search(text) is None
        assert words_of(text) == [word for word, _ in split.pre_tokenize_str(text)]


def test_lines_with_unusual_characters_stay_whole() -> None:
    text = "usual words\nan unusual \U0001f600 line\n\nusual again"
    assert words_of(text) == [
        *("usual", " words", "\nan unusual \U0001f600 line", "\n", "\n", "usual", " again"),
    ]
    assert "".join(words_of(text)) == text


def test_it_forgets_and_never_remembers_long_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_MOST", 50)
    encoder = WordEncoder(FAST)
    for number in range(30):
        given_texts = [f"word{i} {'x' * i} " for i in range(number, number + 45)]
        found = encoder.encode_many(given_texts)
        for ids, expected in zip(found, encoder.directly(given_texts), strict=True):
            assert (ids == expected).all()
        assert all(len(word) <= words._LONGEST for word in encoder._known)
    assert encoder.encode_many([]) == []
    assert encoder.encode_many([""])[0].tolist() == []


def test_the_prose_of_this_python_is_encoded_as_directly() -> None:
    code = (
        "import json, sys\n"
        "from polyak.data.corpora import load_corpus\n"
        "from polyak.data.tokenizers import BPETokenizer\n"
        "texts = [d.text for d in load_corpus('stdlib').documents][:120]\n"
        "words = BPETokenizer.train(texts[:20], 600)._words\n"
        "pairs = zip(words.encode_many(texts), words.directly(texts), strict=True)\n"
        "print(json.dumps([len(texts), all((a == b).all() for a, b in pairs)]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == [120, True]
