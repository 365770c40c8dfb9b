r"""GPT-2's word splitting with Python's `re`, and a memory of the words' ids.

Byte-level BPE never merges across words, so the ids of a text are those of its words, and most
words come again and again. GPT-2 splits by

    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

Python's `re` has no `\p{…}`, so the classes are spelled out for the scripts in which nothing has
changed in Unicode for years; a line with any other character is left to Hugging Face as a whole.
Every word alone splits into itself, so its ids may be asked for alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

# ASCII, Latin, Greek, Cyrillic, punctuation, kana and the first block of Han characters.
_RANGES = (
    *((0x00, 0x250), (0x370, 0x500), (0x2000, 0x2065), (0x3000, 0x3040)),
    *((0x3041, 0x3097), (0x3099, 0x3100), (0x4E00, 0x9FA6)),
)

# Unicode's White_Space; Python's \s has the separators U+001C…U+001F too.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

_LONGEST = 40  # characters of a word that is worth remembering
_MOST = 1 << 18  # words remembered


def _class(wanted: Callable[[str], bool]) -> str:
    """A regular expression's class, without brackets, of the characters that are wanted."""
    found: list[list[int]] = []
    for code in (code for start, stop in _RANGES for code in range(start, stop)):
        if wanted(unicodedata.category(chr(code))):
            if found and found[-1][1] == code - 1:
                found[-1][1] = code
            else:
                found.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in found)


_LETTER = _class(lambda category: category[0] == "L")
_NUMBER = _class(lambda category: category[0] == "N")
_OTHER = re.compile(f"[^{_class(lambda category: category != 'Cn')}]")
_LINES = re.compile(r"(?<=\S)(?=\n)")  # no word goes on from a visible character to a line break
_WORD = re.compile(
    f"'s|'t|'re|'ve|'m|'ll|'d| ?[{_LETTER}]+| ?[{_NUMBER}]+| ?[^{_SPACE}{_LETTER}{_NUMBER}]+"
    f"|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
)


def words_of(text: str) -> list[str]:
    """The words of a text, in order; a line with unusual characters is one of them."""
    if _OTHER.search(text) is None:
        return _WORD.findall(text)
    found: list[str] = []
    for line in _LINES.split(text):
        if _OTHER.search(line) is None:
            found += _WORD.findall(line)
        else:
            found.append(line)
    return found


class WordEncoder:
    """Encodes texts with a Hugging Face tokenizer that splits as GPT-2's, each word but once."""

    def __init__(self, tokenizer: Any) -> None:
        # without offsets where the library can
        self._encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
        self._known: dict[str, list[int]] = {}

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text; equal to `directly`."""
        split = [words_of(text) for text in texts]
        known = self._known
        missing = set(chain.from_iterable(split)).difference(known)
        if len(known) + len(missing) > _MOST:  # a new one: other threads may read the old one
            known = self._known = {}
            missing = set(chain.from_iterable(split))
        new = list(missing)
        ids = dict(zip(new, (found.ids for found in self._encode(new)), strict=True))
        once = {word: found for word, found in ids.items() if len(word) > _LONGEST}
        known.update((word, found) for word, found in ids.items() if len(word) <= _LONGEST)
        if not once:
            return [_join(map(known.__getitem__, words)) for words in split]
        return [
            _join(once[word] if word in once else known[word] for word in words) for words in split
        ]

    def directly(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text as Hugging Face's library computes them: the reference."""
        return [np.asarray(found.ids, dtype=np.int64) for found in self._encode(list(texts))]


def _join(parts: Iterable[list[int]]) -> Ids:
    return np.fromiter(chain.from_iterable(parts), dtype=np.int64)
