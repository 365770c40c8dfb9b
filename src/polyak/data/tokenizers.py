"""Tokenizers: UTF-8 bytes, or byte-level BPE: GPT-2's, or trained on a corpus.

Both turn any Unicode text into ids and back without loss. The end-of-text token has the last id
and can never come out of `encode`: text that literally contains `<|endoftext|>` is just text.
Saved tokenizers are read by Hugging Face's `tokenizers.Tokenizer.from_file`, with the same ids.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from polyak import formats
from polyak.data.byte_level import PIECE, byte_letters, hugging_face_json, pieces
from polyak.data.documents import Text, parts_of
from polyak.data.words import WordEncoder
from polyak.errors import ConfigError, DataError
from polyak.files import make_folder, write_atomic, write_json

END_OF_TEXT = "<|endoftext|>"
SMALLEST_BPE = 257  # 256 bytes and the end-of-text token
_DESCRIPTION = "polyak_tokenizer.json"

Ids = npt.NDArray[np.int64]


class Tokenizer(abc.ABC):
    """What the rest of polyak asks of a tokenizer.

    Attributes:
        name: `bytes`, `gpt2`, or `bpe-N` with N tokens.
        vocab_size: Number of ids, the end-of-text token included.
        fingerprint: SHA-256 of everything that decides the ids.
        prefix: ids that a text begins with when it is continued or scored, such as Llama's
            beginning-of-text token; they are no part of `encode`.
        end_token: how the end-of-text token is spelled in `tokenizer.json`.
        begin_token: the same for the first token of `prefix`; the end-of-text token if none.
        chat_template: how a conversation is spelled, in Jinja, for Hugging Face; not used here.
    """

    kind: ClassVar[str]
    name: str
    vocab_size: int
    fingerprint: str
    prefix: tuple[int, ...] = ()
    end_token = begin_token = END_OF_TEXT
    chat_template: str | None = None

    @property
    def end_of_text(self) -> int:
        """The id that ends every document: the last one."""
        return self.vocab_size - 1

    def encode(self, text: str) -> Ids:
        """The ids of a text, shape (tokens,), without an end-of-text token.

        Raises `DataError` for text that is not valid Unicode (an unpaired surrogate).
        """
        return self.encode_many([text])[0]

    @abc.abstractmethod
    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        """`encode` of each text; in parallel where the tokenizer can."""

    @abc.abstractmethod
    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""

    @cached_property
    @abc.abstractmethod
    def byte_table(self) -> npt.NDArray[np.int64]:
        """Bytes of text that each id stands for, shape (vocab_size,); end-of-text is 0."""

    @cached_property
    @abc.abstractmethod
    def byte_strings(self) -> list[bytes]:
        """The bytes of text that each id stands for; end-of-text reads `<|endoftext|>`."""

    @abc.abstractmethod
    def hugging_face_json(self) -> str:
        """The `tokenizer.json` of the same tokenizer for Hugging Face `tokenizers`."""

    def byte_lengths(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Bytes of text that each of `ids` stands for (same shape), for bits per byte."""
        return self.byte_table[np.asarray(ids, dtype=np.int64)]

    def pieces(self, text: Text) -> Iterator[str]:
        """Cut a long text so that the pieces' ids, joined, are the ids of the whole."""
        yield from pieces(parts_of(text))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest little-endian type that holds every id on disk."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` (for Hugging Face) and `polyak_tokenizer.json` to a folder."""
        make_folder(folder, error=DataError)
        description = {
            "format": formats.current("tokenizer"),
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "fingerprint": self.fingerprint,
            "tokenizers_version": version("tokenizers"),
        }
        if self.chat_template is not None:
            description["chat_template"] = self.chat_template
        write_atomic(folder / "tokenizer.json", self.hugging_face_json(), error=DataError)
        write_json(folder / _DESCRIPTION, description, error=DataError)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: id = byte. 0xFF never occurs in UTF-8, so 255 is the end-of-text token."""

    kind = "bytes"
    name = "bytes"
    vocab_size = 256
    fingerprint = sha256(b"polyak bytes 1: id = UTF-8 byte, 255 = end of text").hexdigest()

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        """See `Tokenizer.encode_many`."""
        return [np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int64) for text in texts]

    def pieces(self, text: Text) -> Iterator[str]:
        """Pieces of at most `PIECE` characters: any cut between characters will do."""
        for part in parts_of(text):
            yield from (part[start : start + PIECE] for start in range(0, len(part), PIECE))

    def decode(self, ids: npt.ArrayLike) -> str:
        """See `Tokenizer.decode`; the end-of-text token reads `<|endoftext|>`."""
        parts = _checked(ids, self.vocab_size).astype(np.uint8).tobytes().split(b"\xff")
        return END_OF_TEXT.join(part.decode("utf-8", errors="replace") for part in parts)

    @cached_property
    def byte_table(self) -> npt.NDArray[np.int64]:
        """See `Tokenizer.byte_table`."""
        return _byte_table([1] * 255)

    @cached_property
    def byte_strings(self) -> list[bytes]:
        """See `Tokenizer.byte_strings`."""
        return [*(bytes([byte]) for byte in range(255)), END_OF_TEXT.encode()]

    def hugging_face_json(self) -> str:
        """A byte-level BPE without merges."""
        vocabulary = {letter: byte for byte, letter in enumerate(byte_letters()[:255])}
        return hugging_face_json(vocabulary | {END_OF_TEXT: 255}, [], split_words=False)


class BPETokenizer(Tokenizer):
    """Byte-level BPE with GPT-2's word splitting, run by Hugging Face `tokenizers`.

    Args:
        tokens: The tokens in order of id, in byte-level letters, without the end-of-text token.
        merges: Pairs of tokens, most frequent first.
        name: `bpe-N` by default.
    """

    kind = "bpe"

    def __init__(
        self, tokens: Sequence[str], merges: Sequence[tuple[str, str]], name: str | None = None
    ) -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        self.vocab_size = len(tokens) + 1
        self.name = f"bpe-{self.vocab_size}" if name is None else name
        self._tokens = list(tokens)
        self._merges = [tuple(pair) for pair in merges]
        definition = json.dumps(["polyak bpe 1", self._tokens, self._merges])
        self.fingerprint = sha256(definition.encode()).hexdigest()
        if not set("".join(self._tokens)) <= set(byte_letters()):
            raise DataError("its tokens are not spelled in byte-level BPE's letters")
        self._words = WordEncoder(HuggingFaceTokenizer.from_str(self.hugging_face_json()))

    @classmethod
    def train(cls, texts: Iterable[Text], vocab_size: int) -> BPETokenizer:
        """Train on texts, read once; the same texts in the same order give the same tokenizer.

        Raises:
            ConfigError: `vocab_size` is below 257.
            DataError: The texts are too short to yield that many tokens.
        """
        from tokenizers import Tokenizer as HuggingFaceTokenizer
        from tokenizers import models, pre_tokenizers, trainers

        if vocab_size < SMALLEST_BPE:
            raise ConfigError(
                f"tokenizer 'bpe-{vocab_size}' is too small: BPE needs at least {SMALLEST_BPE} "
                "tokens (256 bytes and the end of text)"
            )
        tokenizer = HuggingFaceTokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=sorted(byte_letters()),
            show_progress=False,
            special_tokens=[],
        )
        # Pieces cut where words end: the counted words are those of the whole text.
        tokenizer.train_from_iterator(
            (part for text in texts for part in pieces(parts_of(text))), trainer
        )
        model = json.loads(tokenizer.to_str())["model"]
        vocabulary: dict[str, int] = model["vocab"]
        if len(vocabulary) != vocab_size - 1:
            raise DataError(
                f"the training text yields only {len(vocabulary) + 1} tokens, fewer than "
                f"'bpe-{vocab_size}' asks for; use 'bpe-{len(vocabulary) + 1}', a smaller one, "
                "or 'bytes'"
            )
        return cls(sorted(vocabulary, key=vocabulary.__getitem__), pairs(model["merges"]))

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        """See `Tokenizer.encode_many`; long texts are encoded in pieces, with the same result."""
        for text in texts:
            utf8(text)
        parts = [list(pieces([text])) for text in texts]
        ids = iter(self._words.encode_many([part for text in parts for part in text]))
        return [
            np.concatenate([np.empty(0, np.int64), *(next(ids) for _ in text)]) for text in parts
        ]

    def decode(self, ids: npt.ArrayLike) -> str:
        """See `Tokenizer.decode`; the end-of-text token reads `<|endoftext|>`."""
        table = self.byte_strings
        checked = _checked(ids, self.vocab_size)
        ends = np.flatnonzero(checked == self.end_of_text)
        documents = np.split(checked, ends)
        return END_OF_TEXT.join(
            b"".join(table[i] for i in document[1 if number else 0 :]).decode("utf-8", "replace")
            for number, document in enumerate(documents)
        )

    @cached_property
    def byte_table(self) -> npt.NDArray[np.int64]:
        """See `Tokenizer.byte_table`."""
        return _byte_table([len(token) for token in self._tokens])  # one letter is one byte

    @cached_property
    def byte_strings(self) -> list[bytes]:
        """See `Tokenizer.byte_strings`."""
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        strings = [bytes(byte_of[letter] for letter in token) for token in self._tokens]
        return [*strings, END_OF_TEXT.encode()]

    def hugging_face_json(self) -> str:
        """See `Tokenizer.hugging_face_json`."""
        vocabulary = {token: number for number, token in enumerate([*self._tokens, END_OF_TEXT])}
        return hugging_face_json(vocabulary, self._merges, split_words=True)


def pairs(merges: Sequence[str | Sequence[str]]) -> list[tuple[str, str]]:
    """Merges as pairs; `tokenizers` writes "a b" up to 0.19 and ["a", "b"] from 0.20."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def _byte_table(lengths: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.array([*lengths, 0], dtype=np.int64)


def _checked(ids: npt.ArrayLike, vocab_size: int) -> Ids:
    checked = np.asarray(ids, dtype=np.int64).reshape(-1)
    if checked.size and not 0 <= checked.min() <= checked.max() < vocab_size:
        raise DataError(
            f"cannot decode ids from {checked.min()} to {checked.max()}: this tokenizer has "
            f"ids 0 to {vocab_size - 1}"
        )
    return checked


def utf8(text: str) -> bytes:
    """A text's bytes; raises `DataError` where it is not valid Unicode."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise DataError(
            f"the text is not valid Unicode: unpaired surrogate at character {problem.start}"
        ) from problem
