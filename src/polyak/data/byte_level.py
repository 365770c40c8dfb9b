"""GPT-2's byte-level letters and word splitting, as Hugging Face `tokenizers` writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# Long documents are encoded in pieces of about this many characters, which bounds memory.
PIECE = 1 << 20

_CUT = re.compile(r"\S(?=[ \n])")


def pieces(parts: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """Cut a long text where the word splitting cuts anyway, so that pieces encode as the whole.

    No word of GPT-2's splitting goes from a visible character on to a space or a line break, so
    it is safe to cut before the first one of a run (but not inside the run).

    Args:
        parts: Strings that join to the text; where they end does not matter.
        size: Least number of characters of every piece but the last.
    """
    rest = ""
    for part in parts:
        rest = rest + part if rest else part
        start = 0
        while len(rest) - start > size:
            cut = _CUT.search(rest, start + size)
            if cut is None:
                break
            yield rest[start : cut.end()]
            start = cut.end()
        rest = rest[start:]
    if rest:
        yield rest


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the rest follow U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256))
    return [chr(byte if byte in printable else 256 + next(hidden)) for byte in range(256)]


def hugging_face_json(
    vocabulary: dict[str, int], merges: Sequence[Sequence[str]], *, split_words: bool
) -> str:
    """The `tokenizer.json` of a byte-level BPE; the vocabulary holds the end of text too."""
    # The end of text is an ordinary entry that no merge leads to, not an added token: added
    # tokens are cut out of the text before encoding, and a text may well spell this one.
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    description: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": split_words},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": split_words},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            # "a b", not ["a", "b"]: every version of `tokenizers` reads it, and byte-level
            # letters hold no space.
            "merges": [" ".join(pair) for pair in merges],
        },
    }
    return json.dumps(description, ensure_ascii=False, indent=1) + "\n"
