"""Tokenizers by name or path: `bytes`, `bpe-N`, `gpt2`, or files in Hugging Face's formats."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from polyak import formats
from polyak.data.tokenizers import (
    _DESCRIPTION,
    END_OF_TEXT,
    SMALLEST_BPE,
    BPETokenizer,
    ByteTokenizer,
    Tokenizer,
    pairs,
)
from polyak.errors import ConfigError, DataError, nearest
from polyak.files import read_json, read_text

GPT2 = "gpt2"
GPT2_SIZE = 50_257
# The repository's name today, and the one under which older programs have cached it.
_GPT2_REPOSITORIES = ("openai-community/gpt2", "gpt2")
_PATIENCE = 10.0


@dataclass(frozen=True)
class TokenizerName:
    """What a tokenizer's name asks for.

    Attributes:
        name: As the user wrote it.
        size: N of `bpe-N`, to be trained on the corpus.
        path: The file or folder to read it from.
    """

    name: str
    size: int | None = None
    path: Path | None = None

    @property
    def library(self) -> str:
        """The version of the library that computes the ids, for cache keys."""
        return "" if self.name == ByteTokenizer.name else version("tokenizers")

    def load(self) -> Tokenizer:
        """The tokenizer, unless it is to be trained; raises `DataError` where it can't be had."""
        assert self.size is None, "bpe-N is trained on a corpus"
        if self.path is not None:
            return read_tokenizer(self.path)
        return ByteTokenizer() if self.name == ByteTokenizer.name else gpt2()


def parse_name(name: str) -> TokenizerName:
    """`bytes`, `gpt2`, `bpe-4096`, or the path of a tokenizer's folder or `tokenizer.json`.

    Raises `ConfigError` for anything else, and for BPE below 257 tokens.
    """
    if name in (ByteTokenizer.name, GPT2):
        return TokenizerName(name)
    match = re.fullmatch(r"bpe-([1-9][0-9]{0,8})", name)
    if match:
        size = int(match[1])
        if size < SMALLEST_BPE:
            raise ConfigError(
                f"tokenizer {name!r} is too small: BPE needs at least {SMALLEST_BPE} tokens "
                "(256 bytes and the end of text)"
            )
        return TokenizerName(name, size=size)
    path = Path(name)
    if name and os.path.exists(path):  # False, too, for what can be no path
        return TokenizerName(name, path=path)
    known = nearest(name, [ByteTokenizer.name, GPT2, "bpe-4096"])
    raise ConfigError(
        f"unknown tokenizer {name!r}{known} (known: bytes, gpt2, bpe-N with N at least "
        f"{SMALLEST_BPE}, such as bpe-4096, and the path of a tokenizer's folder)"
    )


def gpt2() -> Tokenizer:
    """GPT-2's tokenizer from Hugging Face's cache, or else from the hub; its end of text is 50256.

    Raises:
        DataError: neither has it; the message says how to bring it here.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    for repository in _GPT2_REPOSITORIES:
        cached = try_to_load_from_cache(repository, "tokenizer.json")
        if isinstance(cached, str):
            return _checked_gpt2(Path(cached))
    try:
        _reach(_GPT2_REPOSITORIES[0])
        path = hf_hub_download(_GPT2_REPOSITORIES[0], "tokenizer.json")
    except Exception as problem:  # the layers below have error classes of their own
        reason = " ".join(str(problem).split())[:300] or type(problem).__name__
        raise DataError(
            f"tokenizer 'gpt2' is not in Hugging Face's cache, and the hub cannot be reached: "
            f"{reason}; go online once ('hf download {_GPT2_REPOSITORIES[0]} tokenizer.json'), or "
            "give the path of a folder with its tokenizer.json, or use 'bytes' or 'bpe-4096'"
        ) from problem
    return _checked_gpt2(Path(path))


def _reach(repository: str) -> None:
    """Ask the hub once: downloads would try again and again for half a minute."""
    from huggingface_hub import HfApi

    HfApi().model_info(repository, timeout=_PATIENCE)


def _checked_gpt2(path: Path) -> Tokenizer:
    tokenizer = read_tokenizer(path, name=GPT2)
    if tokenizer.vocab_size != GPT2_SIZE:
        raise DataError(
            f"{path} is not GPT-2's tokenizer: it has {tokenizer.vocab_size} tokens instead of "
            f"{GPT2_SIZE}; delete it and download it again"
        )
    return tokenizer


def read_tokenizer(path: Path, name: str | None = None) -> Tokenizer:
    """A tokenizer from a folder or a `tokenizer.json`.

    A folder is one that polyak wrote (`Tokenizer.save`, a run's `model/`), or holds
    `tokenizer.json`, or GPT-2's older pair `vocab.json` and `merges.txt`. What polyak did not
    write must be byte-level BPE with GPT-2's word splitting, no normalisation, and
    `<|endoftext|>` as its last id; or lie beside a `tokenizer_config.json` that says which token
    ends a text, and is then kept as it is (`polyak.data.kept_tokenizer`).

    Raises:
        DataError: there is no such tokenizer at `path`.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (path / "polyak_tokenizer.json").is_file():
        return load_tokenizer(path)
    try:
        return _gpt2_like(path, folder, name)
    except DataError:
        # another kind, with which a model came: its folder says which token ends a text
        from polyak.data.kept_tokenizer import kept

        found = kept(path) if path.is_dir() and name is None else None
        if found is None:
            raise
        return found


def _gpt2_like(path: Path, folder: Path, name: str | None) -> Tokenizer:
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        vocabulary, merges = _from_json(file)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        file = folder / "vocab.json"
        vocabulary, merges = read_json(file, error=DataError), _from_text(folder / "merges.txt")
    else:
        raise DataError(f"{path} holds no tokenizer: no tokenizer.json, no vocab.json + merges.txt")
    try:
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        if [vocabulary[token] for token in tokens] != list(range(len(tokens))):
            raise _unfit(file, "its ids do not run from 0 without gaps")
        if len(tokens) < SMALLEST_BPE or tokens[-1] != END_OF_TEXT:
            raise _unfit(file, f"its last id is not {END_OF_TEXT}")
        if name is None:
            name = GPT2 if len(tokens) == GPT2_SIZE else None
        return BPETokenizer(tokens[:-1], pairs(merges), name)
    except DataError:
        raise
    except Exception as problem:  # `tokenizers` raises bare Exception for merges that don't fit
        raise _unfit(file, " ".join(str(problem).split())) from problem


def _from_json(file: Path) -> tuple[dict[str, int], Any]:
    content = read_json(file, error=DataError)
    try:
        model = content["model"]
        vocabulary = {str(token): int(number) for token, number in model["vocab"].items()}
        for added in content.get("added_tokens") or ():
            if added["content"] != END_OF_TEXT:
                raise _unfit(file, f"it has the added token {added['content']!r}")
            vocabulary[added["content"]] = int(added["id"])
        before = content.get("pre_tokenizer") or {}
        if model.get("type") != "BPE" or before.get("type") != "ByteLevel":
            raise _unfit(file, "it is not byte-level BPE")
        if before.get("add_prefix_space") or not before.get("use_regex", True):
            raise _unfit(file, "its word splitting is not GPT-2's")
        if content.get("normalizer") is not None or model.get("dropout"):
            raise _unfit(file, "it normalises or drops out")
        return vocabulary, model["merges"]
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise _unfit(file, f"no tokenizer.json: {problem!r}") from problem


def _from_text(file: Path) -> list[str]:
    lines = read_text(file, error=DataError).split("\n")
    return [line for line in lines if line and not line.startswith("#version")]


def _unfit(file: Path, why: str) -> DataError:
    return DataError(
        f"{file} is no tokenizer that polyak can use: {why[:200]} (needed: byte-level "
        f"BPE with GPT-2's word splitting and {END_OF_TEXT} as the last id)"
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote; raises `DataError` where it is missing or was changed."""
    description = formats.read(folder / _DESCRIPTION, "tokenizer", error=DataError)
    try:
        if description["kind"] == ByteTokenizer.kind:
            tokenizer: Tokenizer = ByteTokenizer()
        elif description["kind"] == "kept":
            from polyak.data.kept_tokenizer import KeptTokenizer

            definition = read_text(folder / "tokenizer.json", error=DataError)
            chat = description.get("chat_template")
            tokenizer = KeptTokenizer(definition, int(description["end_of_text"]), chat)
        else:
            model = read_json(folder / "tokenizer.json", error=DataError)["model"]
            vocabulary: dict[str, int] = model["vocab"]
            tokens = sorted(vocabulary, key=vocabulary.__getitem__)
            name = str(description["name"])
            tokenizer = BPETokenizer(tokens[:-1], pairs(model["merges"]), name)
        intact = tokenizer.fingerprint == description["fingerprint"]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as problem:
        raise DataError(f"{folder} holds no tokenizer that polyak wrote: {problem!r}") from problem
    if not intact:
        raise DataError(f"the tokenizer in {folder} was changed after it was saved")
    return tokenizer
