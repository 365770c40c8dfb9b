"""Tokenizers of Llama's kinds, as small as they can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

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
    template = begins_with("<|begin_of_text|>", 0)
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
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
    made.post_processor = begins_with("<s>", 1)
    return made


def begins_with(token: str, number: int) -> Any:
    """A template that puts a token before every text, as Llama's do."""
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B:1", special_tokens=[(token, number)]
    )


KINDS = {"byte-level": (byte_level, "<|end_of_text|>"), "sentencepiece": (sentencepiece, "</s>")}
"""Builder and end-of-text token."""


def save_tokenizer(kind: str, folder: Path) -> None:
    """What a model's folder holds of its tokenizer."""
    build, end = KINDS[kind]
    build().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": end}}))
