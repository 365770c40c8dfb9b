"""Tokenizers that came with a model: Hugging Face's `tokenizer.json`, kept and run as it is.

For models of the Llama family, whose tokenizers split words differently from GPT-2's or are no
byte-level BPE. Such a tokenizer may normalise, so text need not come back to the last byte, and a
long text is encoded whole. Special tokens never come out of `encode`, whatever the text spells;
those that the template puts before a text are its `prefix`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polyak.data.byte_level import byte_letters
from polyak.data.documents import Text, parts_of
from polyak.data.tokenizers import END_OF_TEXT, Ids, Tokenizer
from polyak.errors import DataError, PolyakError
from polyak.files import parse_json, read_json, read_text

_SPACE = "▁"
MOST_TOKENS = 2**24
"""Ids are listed, so they are bounded."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class KeptTokenizer(Tokenizer):
    """A tokenizer by its `tokenizer.json`.

    Args:
        definition: the file's content.
        end_of_text: the id that ends a document.
        chat_template: goes with it into folders for Hugging Face.

    Raises:
        DataError: Hugging Face's `tokenizers` cannot read it, or it does not tell how many bytes a
            token stands for: it is neither byte-level nor of SentencePiece's form.
    """

    kind = "kept"

    def __init__(self, definition: str, end_of_text: int, chat_template: str | None = None) -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        with in_rust("tokenizer.json cannot be read", quiet=True):
            self._inner = HuggingFaceTokenizer.from_str(definition)
        self._inner.no_padding()
        self._inner.no_truncation()
        self._inner.encode_special_tokens = True  # text that spells one is just text
        self._definition, self._end, self.chat_template = definition, end_of_text, chat_template
        tokens: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        self._tokens = {number: token for token, number in tokens.items()}
        self.vocab_size = max(self._tokens, default=-1) + 1
        if self.vocab_size > MOST_TOKENS:
            raise DataError(
                f"tokenizer.json has an id above {MOST_TOKENS:,}, which polyak does not"
            )
        if end_of_text not in self._tokens:
            raise DataError(f"tokenizer.json has no token {end_of_text} to end a text with")
        self.name = f"kept-{self.vocab_size}"
        self.fingerprint = sha256(f"polyak kept 1 {end_of_text} {definition}".encode()).hexdigest()
        self._form = _form(parse_json(definition, "tokenizer.json", error=DataError))
        with in_rust("tokenizer.json cannot be used", quiet=True):
            self.prefix = self._prefix()
            self._inner.decode(sorted(self._tokens), skip_special_tokens=False)
        if not set(self.prefix) <= self._tokens.keys():
            raise DataError("tokenizer.json puts an id before a text that no token has")
        self.end_token = self._tokens[end_of_text]
        self.begin_token = self._tokens[self.prefix[0]] if self.prefix else self.end_token

    @property
    def end_of_text(self) -> int:
        """The id that ends every document."""
        return self._end

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        """See `Tokenizer.encode_many`; without the tokens that a model's template puts around."""
        try:
            with in_rust("the model's tokenizer cannot encode this text"):
                found = self._inner.encode_batch(list(texts), add_special_tokens=False)
        except UnicodeEncodeError as problem:
            raise DataError("the text is not valid Unicode: unpaired surrogate") from problem
        return [np.asarray(one.ids, dtype=np.int64) for one in found]

    def _prefix(self) -> tuple[int, ...]:
        """What the template puts before a text."""
        plain, whole = (
            self._inner.encode("a", add_special_tokens=added).ids for added in (False, True)
        )
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start])
        return ()

    def decode(self, ids: npt.ArrayLike) -> str:
        """See `Tokenizer.decode`; the end-of-text token reads `<|endoftext|>`."""
        given = np.asarray(ids, dtype=np.int64).reshape(-1)
        known = np.isin(given, np.fromiter(self._tokens, np.int64))
        # a model's vocabulary may be padded: ids that no token has stand for nothing
        documents = np.split(given, np.flatnonzero(given == self._end))
        masks = np.split(known & (given != self._end), np.flatnonzero(given == self._end))
        with in_rust("the model's tokenizer cannot decode these ids"):
            return END_OF_TEXT.join(
                self._inner.decode(document[mask].tolist(), skip_special_tokens=False)
                for document, mask in zip(documents, masks, strict=True)
            )

    @cached_property
    def byte_table(self) -> npt.NDArray[np.int64]:
        """See `Tokenizer.byte_table`; special tokens are 0.

        For SentencePiece, exact up to the space that it puts before a text.
        """
        table = np.array([len(string) for string in self.byte_strings], dtype=np.int64)
        for number, token in self._inner.get_added_tokens_decoder().items():
            if token.special:
                table[number] = 0
        table[self._end] = 0
        return table

    @cached_property
    def byte_strings(self) -> list[bytes]:
        """See `Tokenizer.byte_strings`; empty for ids that no token has."""
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        added = self._inner.get_added_tokens_decoder()
        strings = [b""] * self.vocab_size
        for number, token in self._tokens.items():
            if number in added:
                strings[number] = added[number].content.encode()
            elif self._form == "bytes" and byte_of.keys() >= set(token):
                strings[number] = bytes(byte_of[letter] for letter in token)
            elif self._form == "bytes":  # not in the letters: `tokenizers` takes it for text
                strings[number] = token.encode()
            elif _BYTE.fullmatch(token):
                strings[number] = bytes([int(token[3:5], 16)])
            else:
                strings[number] = token.replace(_SPACE, " ").encode()
        strings[self._end] = END_OF_TEXT.encode()
        return strings

    def pieces(self, text: Text) -> Iterator[str]:
        """The text as one piece: where it may be cut is not known."""
        whole = "".join(parts_of(text))
        if whole:
            yield whole

    def hugging_face_json(self) -> str:
        """The file as it came."""
        return self._definition


@contextlib.contextmanager
def in_rust(what: str, *, quiet: bool = False) -> Iterator[None]:
    """A `DataError` for whatever `tokenizers` raises: bare Exceptions, and panics of Rust.

    Args:
        what: the error's line begins with it.
        quiet: keep from standard error what Rust writes there of a panic.
    """
    try:
        with _without_stderr() if quiet else contextlib.nullcontext():
            yield
    except BaseException as problem:
        panic = type(problem).__name__ == "PanicException"  # no Exception
        if not panic and not (quiet and isinstance(problem, Exception)):
            raise
        if isinstance(problem, PolyakError):
            raise
        raise DataError(f"{what}: {' '.join(str(problem).split())[:300]}") from problem


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """The process's standard error leads nowhere."""
    try:
        before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is none
        yield
        return
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def kept(folder: Path) -> KeptTokenizer | None:
    """The tokenizer of a model's folder, if it says there which token ends a text.

    Raises:
        DataError: it does, but the tokenizer cannot be used.
    """
    file, about = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file() or not about.is_file():
        return None
    described = read_json(about, error=DataError)
    end = described.get("eos_token") if isinstance(described, dict) else None
    if isinstance(end, dict):
        end = end.get("content")
    content = read_json(file, error=DataError)
    number = _number_of(content, end)
    if number is None:
        return None
    return KeptTokenizer(
        read_text(file, error=DataError), number, _chat_template(folder, described)
    )


def _chat_template(folder: Path, described: dict[str, Any]) -> str | None:
    """The default one, from a file of its own or, in older models, from `tokenizer_config.json`."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file, error=DataError)
    found = described.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = [o for o in found if isinstance(o, dict) and o.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None


def _number_of(content: Any, token: Any) -> int | None:
    try:
        for added in content.get("added_tokens") or ():
            if added["content"] == token:
                return int(added["id"])
        found = content["model"]["vocab"].get(token)
    except (KeyError, TypeError, AttributeError):
        return None
    return found if isinstance(found, int) else None


def _form(content: dict[str, Any]) -> str:
    """`bytes`: tokens spelled in GPT-2's letters; `sentencepiece`: in text with ▁ for spaces."""
    decoder = content.get("decoder") or {}
    steps = [decoder, *(decoder.get("decoders") or ())]
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds:
        return "bytes"
    replaced = any(s.get("type") == "Replace" and s.get("content") == " " for s in steps)
    if "Metaspace" in kinds or replaced:
        return "sentencepiece"
    raise DataError(
        "tokenizer.json is neither byte-level nor of SentencePiece's form, so that polyak cannot "
        "tell how many bytes its tokens stand for"
    )
