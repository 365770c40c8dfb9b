"""Preparing: exact tokens, a manifest that can be checked, and nothing half-finished ever."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak import formats
from polyak.data.batches import TrainBatches, ValidationBatches
from polyak.data.corpora import load_corpus
from polyak.data.documents import Document
from polyak.data.prepare import Done, Prepared, open_prepared, prepare, verify
from polyak.data.shards import ShardWriter, TokenFile, check_shards
from polyak.data.split import score
from polyak.data.tokenizers import ByteTokenizer
from polyak.data.workspace import building, default_cache
from polyak.errors import ConfigError, DataError
from polyak.files import sha256_of

Run = Callable[..., subprocess.CompletedProcess[str]]

# Prepares argv[1] in cache argv[2]; tells when it is in the middle and goes on when told to.
_PAUSING = """
import pathlib, sys
from polyak.data.prepare import prepare
def pause(done):
    print("middle", flush=True)
    sys.stdin.readline()
print(prepare(sys.argv[1], cache=pathlib.Path(sys.argv[2]), progress=pause).fingerprint)
"""


def _expected(corpus: Path, side: int, prepared: Prepared) -> list[int]:
    tokens: list[int] = []
    for document in load_corpus(str(corpus)).split()[side].documents:
        tokens += [*prepared.tokenizer.encode(document.text), prepared.tokenizer.end_of_text]
    return tokens


def _folders(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "prepared").iterdir())


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-300"])
def test_tokens_are_every_document_followed_by_an_end_of_text(
    texts: Path, cache: Path, tokenizer: str
) -> None:
    prepared = prepare(str(texts), tokenizer, cache=cache)
    for index, side in enumerate((prepared.train, prepared.validation)):
        assert side[:].tolist() == _expected(texts, index, prepared)
    assert prepared.tokenizer.name == tokenizer
    assert prepared.train.dtype == np.dtype("<u2")


@given(st.integers(9, 300), st.data())
@settings(max_examples=30, deadline=None)
def test_shards_read_as_one_sequence(limit: int, data: st.DataObject) -> None:
    ids = np.arange(256, dtype=np.int64)
    with tempfile.TemporaryDirectory() as name:
        writer = ShardWriter(Path(name), "train", np.dtype("<u4"), limit)
        cuts = sorted(data.draw(st.lists(st.integers(0, 256), max_size=4)))
        for part in np.split(ids, cuts):
            writer.write(part + 70_000, np.ones_like(part))
        written = writer.finish()
        assert all(shard["tokens"] <= limit for shard in written["shards"])
        assert len(written["shards"]) == -(-256 // limit)
        paths = list(check_shards(Path(name), written["shards"], np.dtype("<u4"), hashes=True))
        table = np.ones(80_000, np.int64)
        tokens = TokenFile(paths, np.dtype("<u4"), byte_table=table, label="x")
        assert len(tokens) == 256
        bound = st.none() | st.integers(-300, 300)
        step = st.none() | st.integers(-20, 20).filter(bool)
        for _ in range(5):
            chosen = slice(data.draw(bound), data.draw(bound), data.draw(step))
            assert (tokens[chosen] == ids[chosen] + 70_000).all()
            assert len(tokens[chosen]) == len(ids[chosen])
        position = data.draw(st.integers(-256, 255))
        assert tokens[position] == ids[position] + 70_000
        with pytest.raises(IndexError):
            tokens[256]


def test_the_manifest_says_what_is_there(texts: Path, cache: Path) -> None:
    (texts / "empty.txt").touch()
    (texts / "image.bin").write_bytes(b"\0")
    with pytest.warns(UserWarning, match=r"left out of corpus 'texts': 1 binary \(image\.bin\)$"):
        prepared = prepare(str(texts), cache=cache, shard_tokens=1000)
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest == prepared.manifest
    assert manifest["corpus"]["name"] == "texts"
    assert manifest["corpus"]["fingerprint"] == load_corpus(str(texts)).fingerprint
    assert manifest["corpus"]["skipped"] == {"binary": 1, "empty": 1}
    record = {"binary": {"files": 1, "first": ["image.bin"]}}
    assert manifest["corpus"]["skipped_files"] == prepared.left_out == record
    (texts / "second.bin").write_bytes(b"\0")  # said also where nothing is prepared anew
    with pytest.warns(UserWarning, match=r"2 binary \(image\.bin, second\.bin\)$"):
        assert prepare(str(texts), cache=cache, shard_tokens=1000).folder == prepared.folder
    assert manifest["tokenizer"]["fingerprint"] == ByteTokenizer().fingerprint
    assert manifest["split"]["fraction"] == 0.05
    assert manifest["train"]["documents"] + manifest["validation"]["documents"] == 60
    total = sum(len(path.read_bytes()) for path in texts.rglob("*.txt"))
    assert sum(manifest[side]["text_bytes"] for side in ("train", "validation")) == total
    for side in ("train", "validation"):
        part = manifest[side]
        assert part["tokens"] == part["text_bytes"] + part["documents"]
        assert part["tokens"] == sum(shard["tokens"] for shard in part["shards"])
        assert part["text_bytes"] == sum(shard["text_bytes"] for shard in part["shards"])
        for shard in part["shards"]:
            content = (prepared.folder / shard["file"]).read_bytes()
            assert len(content) == 2 * shard["tokens"]
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
    assert len(manifest["train"]["shards"]) > 10


def test_the_shard_size_changes_no_token_and_no_fingerprint(texts: Path, cache: Path) -> None:
    whole, cut = (prepare(str(texts), cache=cache, shard_tokens=n) for n in (10**6, 777))
    assert whole.folder != cut.folder
    assert whole.fingerprint == cut.fingerprint
    assert (whole.train[:] == cut.train[:]).all()


def test_a_prepared_corpus_is_reused_until_something_changes(texts: Path, cache: Path) -> None:
    first = prepare(str(texts), cache=cache)
    inode = (first.folder / "train-00000.bin").stat().st_ino
    again = prepare(str(texts), cache=cache)
    assert (again.folder / "train-00000.bin").stat().st_ino == inode
    assert again.fingerprint == first.fingerprint
    other_fraction = prepare(str(texts), cache=cache, validation_fraction=0.2)
    other_tokenizer = prepare(str(texts), "bpe-257", cache=cache)
    (texts / "00.txt").write_text("changed")
    changed = prepare(str(texts), cache=cache)
    prepared = [first, other_fraction, other_tokenizer, changed]
    assert len({p.fingerprint for p in prepared}) == len({p.folder for p in prepared}) == 4


def test_bpe_is_trained_on_the_training_side_and_only_once(texts: Path, cache: Path) -> None:
    for number in range(200):  # a word that only the validation side has
        text = f"{'zyzzyva ' * 2000}{number}"
        if score(Document("", text), "content") < 0.05:
            (texts / f"held-out-{number}.txt").write_text(text)
    prepared = prepare(str(texts), "bpe-300", cache=cache)
    assert len(prepared.tokenizer.encode("zyzzyva")) == len("zyzzyva")
    (saved,) = (cache / "tokenizers").glob("*/tokenizer.json")
    inode = saved.stat().st_ino
    prepare(str(texts), "bpe-300", cache=cache, shard_tokens=500)
    assert saved.stat().st_ino == inode
    saved.write_text("{}")
    with pytest.warns(UserWarning, match="training it again"):
        prepare(str(texts), "bpe-300", cache=cache, shard_tokens=600)


def test_a_damaged_shard_is_named_and_made_again(texts: Path, cache: Path) -> None:
    healthy = prepare(str(texts), cache=cache, shard_tokens=5000)
    tokens = healthy.train[:]
    target = healthy.folder / "train-00001.bin"

    def flip(content: bytes) -> bytes:
        return content[:100] + bytes([content[100] ^ 1]) + content[101:]

    damages: list[tuple[str, Callable[[bytes], bytes | None]]] = [
        (r"train-00001\.bin is corrupt: its SHA-256", flip),
        (r"train-00001\.bin is truncated or corrupt", lambda content: content[:-2]),
        (r"train-00001\.bin is truncated or corrupt", lambda content: content + b"\0\0"),
        (r"cannot read token shard .*train-00001\.bin: No such file", lambda content: None),
    ]
    for message, damage in damages:
        content = damage(target.read_bytes())
        target.unlink()
        if content is not None:
            target.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            open_prepared(healthy.folder)
        assert "\n" not in str(caught.value)
        if "SHA-256" in message:
            assert len(open_prepared(healthy.folder, verify=False).train) == len(tokens)
        with pytest.warns(UserWarning, match=message):
            repaired = prepare(str(texts), cache=cache, shard_tokens=5000)
        assert (repaired.train[:] == tokens).all()
        assert _folders(cache) == [healthy.folder.name]


def test_an_id_beyond_the_vocabulary_is_refused_where_it_is_read(
    texts: Path, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "foreign"
    shutil.copytree(prepare(str(texts), cache=cache).folder, folder)
    ids = np.fromfile(folder / "train-00000.bin", "<u2")
    ids[7] = 60_000  # with a hash that is right: somebody else's
    ids.tofile(folder / "train-00000.bin")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["train"]["shards"][0]["sha256"] = sha256_of(folder / "train-00000.bin")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    train = open_prepared(folder).train
    assert len(train[8:20]) == 12
    for read in (lambda: train[7], lambda: train[:20], lambda: train[1:19:2]):
        with pytest.raises(DataError, match="has the token id 60000, beyond the 256 of its token"):
            read()


def test_a_damaged_manifest_is_one_clear_line(texts: Path, cache: Path) -> None:
    folder = prepare(str(texts), cache=cache).folder
    path = folder / "manifest.json"
    good, current = path.read_text(), formats.current("prepared")
    for content, message in [
        ("{", "not valid JSON"),
        ("[]", "is not a manifest"),
        ('{"format": 1}', "fingerprint must be there"),
        ('{"format": 99}', f"has format 99, this polyak reads up to {current}; upgrade polyak"),
        (good.replace(ByteTokenizer().fingerprint, "0"), "is not the one of its manifest"),
    ]:
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            open_prepared(folder)
    with pytest.raises(DataError, match=r"cannot read .*manifest\.json"):
        open_prepared(folder / "nowhere")


def test_a_folder_appears_by_one_rename_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "parent" / "final"
    with building(final) as folder:
        (folder / "a").write_text("x")
        inode = folder.stat().st_ino
        assert not final.exists()
    assert final.stat().st_ino == inode  # moved, not copied
    with building(final) as late:
        (late / "b").write_text("y")
    assert [path.name for path in final.iterdir()] == ["a"]  # the first one stays

    def interrupted() -> None:
        with building(tmp_path / "parent" / "other") as folder:
            (folder / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in (tmp_path / "parent").iterdir()] == ["final"]


# --- processes ----------------------------------------------------------------------------------


def _pausing(corpus: Path, cache: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PAUSING, str(corpus), str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "middle\n"
    return process


def test_killing_in_the_middle_leaves_nothing_that_looks_finished(texts: Path, cache: Path) -> None:
    with _pausing(texts, cache) as process:
        process.kill()
    left = _folders(cache)
    assert left
    assert all(name.startswith(".partial-") for name in left)
    prepared = prepare(str(texts), cache=cache)
    assert prepared.train[:].tolist() == _expected(texts, 0, prepared)
    assert _folders(cache) == [prepared.folder.name]  # what the killed one left is gone


def test_killing_at_random_moments_never_leaves_a_wrong_folder(texts: Path, cache: Path) -> None:
    code = (
        "import pathlib, sys; from polyak.data.prepare import prepare\n"
        "print('go', flush=True)\n"
        "prepare(sys.argv[1], cache=pathlib.Path(sys.argv[2]), shard_tokens=150)"
    )
    moments = random.Random(0)
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(texts), str(cache)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moments.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
        if (cache / "prepared").exists():
            for name in _folders(cache):
                if not name.startswith("."):
                    open_prepared(cache / "prepared" / name)  # complete, to the last hash
    prepared = prepare(str(texts), cache=cache, shard_tokens=150)
    assert prepared.train[:].tolist() == _expected(texts, 0, prepared)
    assert not [name for name in _folders(cache) if name.startswith(".")]


def test_of_two_processes_that_prepare_the_same_one_waits_for_the_other(
    texts: Path, cache: Path
) -> None:
    with _pausing(texts, cache) as first:
        code = _PAUSING.replace(
            "def pause", "import warnings; warnings.simplefilter('always')\ndef pause"
        )
        second = subprocess.Popen(
            [sys.executable, "-c", code, str(texts), str(cache)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert second.stderr is not None
        assert "another process is preparing texts-bytes-" in second.stderr.readline()
        assert second.poll() is None
        output, _ = first.communicate("go on\n" * 9)
    other, _ = second.communicate()
    assert first.returncode == second.returncode == 0
    here = prepare(str(texts), cache=cache)
    assert output.split()[-1] == here.fingerprint
    assert other.split() == [here.fingerprint]  # it never was in the middle of anything
    assert _folders(cache) == [here.folder.name]
    assert open_prepared(here.folder).train[:].tolist() == _expected(texts, 0, here)


def test_a_waiting_process_goes_on_where_the_other_is_killed(texts: Path, cache: Path) -> None:
    with _pausing(texts, cache) as first:
        second = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _PAUSING, str(texts), str(cache)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        first.kill()
    output, _ = second.communicate()
    assert output.split() == ["middle", prepare(str(texts), cache=cache).fingerprint]


_PREPARE = """
import pathlib, sys
from polyak.data.prepare import prepare
from polyak.errors import DataError
try:
    print(len(prepare(sys.argv[2], "bytes", cache=pathlib.Path(sys.argv[1])).train))
except DataError as problem:
    print(problem)
print([p.name for p in pathlib.Path(sys.argv[1]).rglob("*")])
"""


def test_an_unwritable_cache_is_one_clear_line_but_can_be_read(
    texts: Path, cache: Path, python_obeying_permissions: Run
) -> None:
    cache.mkdir(mode=0o555)
    result = python_obeying_permissions(_PREPARE, cache, texts)
    expected = f"cannot create folder {cache / 'prepared'}: Permission denied"
    assert result.stdout.splitlines() == [expected, "[]"], result.stderr
    cache.chmod(0o755)
    length = len(prepare(str(texts), cache=cache).train)
    (cache / "prepared").chmod(0o555)
    result = python_obeying_permissions(_PREPARE, cache, texts)
    assert result.stdout.splitlines()[0] == str(length), result.stderr
    (texts / "00.txt").write_text("changed")
    result = python_obeying_permissions(_PREPARE, cache, texts)
    expected = f"cannot write in folder {cache / 'prepared'}: Permission denied"
    assert result.stdout.splitlines()[0] == expected, result.stderr
    (cache / "prepared").chmod(0o755)


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, python_in_mount: Run
) -> None:
    corpus = tmp_path / "big.txt"
    corpus.write_text("a line of text\n" * 40_000)
    result = python_in_mount(_PREPARE, "size=200k", tmp_path / "mount", corpus)
    assert result.stdout.splitlines() == [
        f"cannot write in folder {tmp_path / 'mount' / 'prepared'}: No space left on device",
        "['prepared']",
    ], result.stderr


def test_a_read_only_file_system_is_one_clear_line(
    texts: Path, tmp_path: Path, python_in_mount: Run
) -> None:
    result = python_in_mount(_PREPARE, "ro", tmp_path / "mount", texts)
    expected = f"cannot create folder {tmp_path / 'mount' / 'prepared'}: Read-only file system"
    assert result.stdout.splitlines() == [expected, "[]"], result.stderr


# --- the rest -----------------------------------------------------------------------------------


def test_a_bad_record_stops_the_preparation_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"text {number}"}) for number in range(200)]
    path.write_text("\n".join([*lines, '{"body": "x"}']))
    for tokenizer in ("bytes", "bpe-270"):  # while writing, and while training the tokenizer
        with pytest.raises(DataError, match=r"a\.jsonl, line 201: no field 'text'; .*: body"):
            prepare(str(path), tokenizer, cache=cache)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_a_corpus_of_one_document_says_how_it_was_split(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("It was a dark and stormy night.\n" * 100)
    prepared = prepare(str(path), cache=cache)
    assert prepared.manifest["split"]["rule"] == "the corpus is one document; its tail is held out"
    decode = prepared.tokenizer.decode
    joined = decode(prepared.train[:-1]) + decode(prepared.validation[:-1])
    assert joined == path.read_text()


def test_prepared_corpora_feed_the_batches(texts: Path, cache: Path) -> None:
    prepared = prepare(str(texts), cache=cache, shard_tokens=333)
    plain = TrainBatches(prepared.train[:], 32, 4, seed=1)
    mapped = TrainBatches(prepared.train, 32, 4, seed=1)
    for step in range(100):
        assert (mapped.batch(step) == plain.batch(step)).all()
    validation = ValidationBatches(prepared.validation, 32, 4, None)
    targets = np.concatenate(list(validation))[:, 1:]
    assert validation.bytes == (targets != prepared.tokenizer.end_of_text).sum()
    with pytest.raises(DataError, match="the validation side of corpus 'texts' is too short: "):
        ValidationBatches(prepared.validation, 10**6, 4, None)


def test_progress_is_reported_up_to_the_end(texts: Path, cache: Path) -> None:
    seen: list[Done] = []
    prepared = prepare(str(texts), cache=cache, progress=seen.append)
    total = sum(len(path.read_bytes()) for path in texts.rglob("*.txt"))
    tokens = len(prepared.train) + len(prepared.validation)
    assert seen[-1] == Done(60, total, tokens, found_bytes=0, all_bytes=total)
    lines = texts.parent / "lines.jsonl"  # of records only reading tells
    lines.write_text("".join(json.dumps({"text": f"{n} lamps"}) + "\n" for n in range(9)))
    prepare(str(lines), cache=cache, progress=seen.append)
    assert seen[-1].all_bytes is None


def test_settings_that_cannot_work_are_refused_before_any_work(texts: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match="unknown tokenizer 'byte'"):
        prepare(str(texts), "byte", cache=cache)
    with pytest.raises(ConfigError, match=r"validation_fraction=1\.5"):
        prepare(str(texts), cache=cache, validation_fraction=1.5)
    with pytest.raises(ConfigError, match="shard_tokens=0"):
        prepare(str(texts), cache=cache, shard_tokens=0)
    with pytest.raises(ConfigError, match="workers=0"):
        prepare(str(texts), cache=cache, workers=0)
    assert not cache.exists()


def test_verifying_checks_every_hash_and_makes_nothing(texts: Path, cache: Path) -> None:
    with pytest.raises(DataError, match="with tokenizer 'bytes' is not prepared in "):
        verify(str(texts), cache=cache)
    assert not cache.exists()
    prepared = prepare(str(texts), cache=cache, shard_tokens=2000)
    assert verify(str(texts), cache=cache, shard_tokens=2000).fingerprint == prepared.fingerprint
    shard = prepared.folder / "train-00002.bin"
    content = bytearray(shard.read_bytes())
    content[7] ^= 4
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00002\.bin is corrupt: its SHA-256"):
        verify(str(texts), cache=cache, shard_tokens=2000)
    assert shard.read_bytes() == content


def test_the_default_cache_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, texts: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("POLYAK_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"
    assert prepare(str(texts)).folder.is_relative_to(tmp_path / "own")
    monkeypatch.delenv("POLYAK_CACHE")
    assert default_cache() == tmp_path / "xdg" / "polyak"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    if os.name != "nt":
        assert default_cache() == tmp_path / "home" / ".cache" / "polyak"
