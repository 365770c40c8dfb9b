from __future__ import annotations

import random
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak.data.corpora import load_corpus
from polyak.data.documents import Document, LongText
from polyak.data.prepare import prepare
from polyak.data.split import said, score
from polyak.data.windows import WINDOW, Shared, hashes
from polyak.errors import ConfigError, DataError

WORDS = ["river", "stone", "lamp", "cloud", "bread", "window"]


def words(seed: int, count: int = 60) -> str:
    drawn = random.Random(seed)
    return " ".join(drawn.choice(WORDS) for _ in range(count)) + "\n"


def windows_of(text: str) -> list[bytes]:
    data = text.encode()
    return [data[i : i + WINDOW] for i in range(len(data) - WINDOW + 1)] or [data]


def hashes_of(text: str | LongText) -> list[int]:
    return [int(found) for block in hashes(text) for found in block]


def folder_of(path: Path, texts: dict[str, str]) -> Path:
    path.mkdir(exist_ok=True)
    for name, text in texts.items():
        (path / name).write_text(text)
    return path


# Windows


@given(st.text("ab", max_size=500), st.text("ab", max_size=500))
@settings(deadline=None)
def test_equal_windows_have_equal_hashes_and_others_do_not(one: str, other: str) -> None:
    known: dict[bytes, int] = {}
    for text in (one, other):
        found = hashes_of(text)
        assert len(found) == (len(windows_of(text)) if text else 0)
        for window, value in zip(windows_of(text), found, strict=False):
            assert known.setdefault(window.ljust(WINDOW, b"\0"), value) == value
    assert len(set(known.values())) == len(known)


def test_a_text_that_is_read_in_pieces_has_the_windows_of_the_whole(tmp_path: Path) -> None:
    text = "".join(words(seed, 3000) for seed in range(100)) + "ü" * 1000
    (tmp_path / "long.txt").write_text(text)
    whole = LongText(tmp_path / "long.txt")
    assert len(list(whole)) > 1
    assert hashes_of(whole) == hashes_of(text)


def shares(kept: list[str], met: list[str], **options: int) -> list[float]:
    shared = Shared(**options)
    for text in kept:
        shared.keep(text)
    for text in met:
        shared.meet(text)
    return shared.shares()


def test_the_share_of_common_windows_is_that_of_the_sets_of_windows() -> None:
    kept = [words(1), words(2), words(3)[:50], words(4)]
    met = [words(5) + words(1) + words(6), words(2)[:250], words(3)[:50]]
    elsewhere = {window for text in met for window in windows_of(text)}
    expected = [len({*windows_of(t)} & elsewhere) / len({*windows_of(t)}) for t in kept]
    assert shares(kept, met) == pytest.approx(expected)
    assert expected[0] == expected[2] == 1
    assert 0 < expected[1] < 1
    assert expected[3] == 0


def test_with_bounded_memory_every_document_keeps_an_equal_share_of_its_windows() -> None:
    kept = [words(seed, 2000) for seed in range(8)]
    met = [kept[0], kept[1][: len(kept[1]) // 2]]
    shared = Shared(limit=4000)
    for text in kept:
        shared.keep(text)
    assert not shared.exact
    assert shared._count <= 4000
    for text in met:
        shared.meet(text)
    found = shared.shares()
    assert found[0] == 1
    assert found[1] == pytest.approx(0.5, abs=0.1)
    assert found[2:] == [0] * 6
    assert shares(["short"], ["short"], limit=1) == [1]  # the least hash is always kept


# The split of users' files


def test_equal_files_are_on_one_side_and_what_is_known_of_a_file_is_its_content(
    tmp_path: Path,
) -> None:
    texts = {f"{copy}-{n}.txt": words(n) for n in range(60) for copy in "abc"}
    train, validation = load_corpus(str(folder_of(tmp_path / "t", texts))).split(0.2)
    sides = [{d.text for d in side.documents} for side in (train, validation)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(texts.values())


def held_out_text(start: str, fraction: float = 0.05) -> str:
    """A text with this beginning whose hash holds it out."""
    return next(
        text
        for number in range(10_000)
        if score(Document("", text := f"{start}{number}"), "content") < fraction
    )


def test_a_held_out_file_with_text_of_the_training_side_is_left_out_and_said(
    tmp_path: Path,
) -> None:
    texts = {f"{n}.txt": words(n) for n in range(60)}
    trained = next(t for t in texts.values() if score(Document("", t), "content") >= 0.05)
    texts["near.txt"] = held_out_text(trained + words(1000))  # about half of it
    texts["far.txt"] = held_out_text(words(2000))
    folder, cache = folder_of(tmp_path / "t", texts), tmp_path / "cache"
    prepared = prepare(str(folder), cache=cache)
    found = prepared.manifest["split"]["near_duplicates"]
    assert prepared.manifest["split"]["version"] == 2
    assert found["documents"] == 1
    assert found["bytes"] == len(texts["near.txt"])
    assert found["first"] == ["near.txt"]
    assert found["exact"]
    assert "1 document" in str(said(prepared.manifest["split"]))
    total = prepared.manifest["train"]["documents"] + prepared.manifest["validation"]["documents"]
    assert total == len(texts) - 1
    everything = prepare(str(folder), cache=cache, near_duplicates=0.9)
    assert everything.manifest["split"]["near_duplicates"]["documents"] == 0
    assert everything.fingerprint != prepared.fingerprint


def test_adding_a_file_moves_no_other_across(tmp_path: Path) -> None:
    texts = {f"{n}.txt": words(n) for n in range(80)}
    before = load_corpus(str(folder_of(tmp_path / "t", texts))).split(0.2)
    held = next(iter(before[1].documents))
    (tmp_path / "t" / "more.txt").write_text(str(held.text) + words(3000))
    after = load_corpus(str(tmp_path / "t")).split(0.2)
    names = [[{d.name for d in side.documents} for side in split] for split in (before, after)]
    assert not names[0][0] & names[1][1]
    assert not names[0][1] & names[1][0]
    assert names[0][0] <= names[1][0]
    left_out = names[0][1] - names[1][1]
    assert left_out == ({held.name} if "more.txt" in names[1][0] else set())


def test_where_nothing_can_be_held_out_one_line_says_why(tmp_path: Path) -> None:
    copies = folder_of(tmp_path / "copies", dict.fromkeys(("a", "b", "c"), words(0)))
    with pytest.raises(DataError, match="3 copies of one document"):
        prepare(str(copies), cache=tmp_path / "cache")
    alike = {f"{n}.txt": words(0, 600) + f"version {n}\n" for n in range(40)}
    with pytest.warns(UserWarning, match=r"all \d+ held-out documents .* losses will be too low"):
        kept = prepare(str(folder_of(tmp_path / "alike", alike)), cache=tmp_path / "cache")
    found = kept.manifest["split"]["near_duplicates"]
    assert found["documents"] == found["held_out_documents"] > 0
    assert kept.manifest["validation"]["documents"] == found["documents"]
    assert "held out all the same" in str(said(kept.manifest["split"]))
    for options in ({"split": 3}, {"split": 0}, {"near_duplicates": 2.0}):
        with pytest.raises(ConfigError, match=r"split=|near_duplicates="):
            prepare(str(copies), cache=tmp_path / "cache", **options)  # type: ignore[arg-type]


# Versions


def test_the_first_version_of_the_split_is_what_it_was(tmp_path: Path) -> None:
    texts = folder_of(tmp_path / "texts", {f"{n:02d}.txt": words(n) for n in range(40)})
    old = prepare(str(texts), cache=tmp_path / "cache", split=1)
    assert old.fingerprint == "3c59a62662579e32d6f4473562c7022bb95ad3c98ecb22724fe2a29e7839147a"
    new = prepare(str(texts), cache=tmp_path / "cache")
    assert new.fingerprint != old.fingerprint
    assert (old.manifest["split"]["version"], new.manifest["split"]["version"]) == (1, 2)


# The corpora that come with Python


def independent(text: str) -> set[bytes]:
    return {blake2b(window, digest_size=8).digest() for window in windows_of(text)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prose", "stdlib"])
def test_no_window_of_a_default_corpus_is_on_both_sides(name: str) -> None:
    corpus = load_corpus(name)
    train, validation = corpus.split()
    held = set[bytes]().union(*(independent(str(d.text)) for d in validation.documents))
    assert held
    for document in train.documents:
        assert not held & independent(str(document.text)), document.name
    first = {d.name for d in corpus.split(version=1)[1].documents}
    kept = {d.name for d in validation.documents}
    assert kept < first  # models of the first version have not been trained on any of it
    lengths = [sum(len(str(d.text)) for d in side.documents) for side in (train, validation)]
    assert 0.02 < lengths[1] / np.sum(lengths) < 0.1
