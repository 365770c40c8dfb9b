"""Corpora: what is in them, what is left out, and a split that stays put."""

from __future__ import annotations

import gzip
import inspect
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyak.data.corpora import Corpus, Document, load_corpus
from polyak.errors import ConfigError, DataError, UnknownNameError

Run = Callable[..., subprocess.CompletedProcess[str]]


def _documents(corpus: Corpus) -> dict[str, str]:
    documents = list(corpus.documents)
    found = {document.name: document.text for document in documents}
    assert len(found) == len(documents)  # names are unique
    assert list(corpus.documents) == documents  # can be read again
    return found


def _write_jsonl(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


# --- the corpora that Python brings along -------------------------------------------------------


def test_stdlib_is_the_sources_of_the_standard_library_without_tests_and_packages() -> None:
    documents = _documents(load_corpus("stdlib"))
    assert documents["json/decoder.py"] == inspect.getsource(json.decoder)
    assert documents["socket.py"] == inspect.getsource(socket)
    assert len(documents) > 300
    for name in documents:
        folders, file = name.split("/")[:-1], name.split("/")[-1]
        assert file.endswith(".py")
        assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & set(folders)
        assert not file.startswith("_sysconfigdata")
        assert not name.startswith(("/", "config-"))


def test_stdlib_and_prose_are_the_same_in_every_process() -> None:
    code = (
        "from polyak.data.corpora import load_corpus\n"
        "print(*(load_corpus(name).fingerprint for name in ('stdlib', 'prose')))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for folder, seed in (("/", "1"), (Path.cwd(), "2"))
    }
    here = [load_corpus(name).fingerprint for name in ("stdlib", "prose")]
    assert [line.split() for line in seen] == [here]


def test_prose_is_docstrings_and_help_topics_and_no_code() -> None:
    documents = _documents(load_corpus("prose"))
    decoder = documents["json/decoder.py"]
    assert decoder.startswith(inspect.cleandoc(json.decoder.__doc__ or ""))
    assert inspect.getdoc(json.JSONDecoder.raw_decode) in decoder  # type: ignore[operator] # it has one
    assert "import re" not in decoder
    assert 'The "with" statement' in documents["pydoc_data/topics.py:with"]
    # in the order of the source, also across classes and their methods
    order = [decoder.index(str(inspect.getdoc(thing))) for thing in _DECODER_ORDER]
    assert order == sorted(order)


_DECODER_ORDER = (
    json.JSONDecodeError,
    json.JSONDecoder,
    json.JSONDecoder.__init__,
    json.JSONDecoder.decode,
    json.JSONDecoder.raw_decode,
)


# --- splitting ----------------------------------------------------------------------------------


def _corpus(texts: dict[str, str], by: str = "name") -> Corpus:
    documents = tuple(Document(name, text) for name, text in texts.items())
    assert by in ("name", "content")
    return Corpus(name="x", documents=documents, fingerprint="f", split_by=by)  # type: ignore[arg-type] # checked


some_texts = st.dictionaries(st.text(min_size=1, max_size=4), st.text(max_size=6), max_size=30)
fractions = st.floats(1e-9, 1 - 1e-9)


@given(some_texts, fractions, st.sampled_from(["name", "content"]))
@settings(deadline=None)
def test_a_split_is_a_partition_with_two_nonempty_sides(
    texts: dict[str, str], fraction: float, by: str
) -> None:
    visible = {name: text for name, text in texts.items() if text}
    corpus = _corpus(texts, by)
    if len(set(visible.values())) < 2:
        return
    train, validation = (_documents(side) for side in corpus.split(fraction))
    assert train
    assert validation
    assert train | validation == visible
    assert not train.keys() & validation.keys()


@given(some_texts, some_texts)
@settings(deadline=None)
def test_adding_documents_moves_none_of_the_others(
    texts: dict[str, str], more: dict[str, str]
) -> None:
    if len({text for text in texts.values() if text}) < 2:
        return
    for by in ("name", "content"):
        before, after = _corpus(texts, by), _corpus(more | texts, by)
        splitters = before.splitter(0.3), after.splitter(0.3)
        if any(s.only_train or s.only_validation for s in splitters):
            continue  # one side would have been empty
        for index in (0, 1):
            kept = _documents(before.split(0.3)[index])
            assert kept.items() <= _documents(after.split(0.3)[index]).items()


def test_the_split_is_close_to_the_fraction_asked_for() -> None:
    corpus = _corpus({str(number): f"x{number}" for number in range(20_000)})
    for version, fraction in itertools.product((1, 2), (0.05, 0.3, 0.9)):
        held_out = len(_documents(corpus.split(fraction, version=version)[1]))
        assert abs(held_out / 20_000 - fraction) < 0.013  # four standard deviations


def test_a_side_that_would_be_empty_gets_exactly_one_document() -> None:
    corpus = _corpus({name: f"text {name}" for name in "abcdef"})
    for version in (1, 2):
        few, many = (corpus.split(f, version=version) for f in (1e-6, 1 - 1e-6))
        assert [len(_documents(side)) for side in (*few, *many)] == [5, 1, 1, 5]


def test_the_split_of_a_known_document_never_changes() -> None:
    corpus = _corpus({f"{number}.txt": f"x{number}" for number in range(100)})
    by_name, by_content = (_documents(corpus.split(0.05, version=v)[1]) for v in (1, 2))
    assert list(by_name) == ["0.txt", "40.txt", "66.txt", "78.txt"]
    assert list(by_content) == [
        "14.txt",
        "17.txt",
        "60.txt",
        "61.txt",
        "67.txt",
        "88.txt",
        "90.txt",
    ]


def test_equal_records_are_on_one_side_and_inserting_one_moves_no_other(tmp_path: Path) -> None:
    texts = [f"text {number % 20}" for number in range(200)]
    sides = []
    for lines in (texts, ["a new one", *texts]):
        corpus = load_corpus(str(_write_jsonl(tmp_path / "a.jsonl", lines)))
        train, validation = (set(_documents(side).values()) for side in corpus.split(0.3))
        assert not train & validation
        assert train | validation == set(lines)
        sides.append(train - {"a new one"})
    assert sides[0] == sides[1]


@given(st.text(min_size=2, max_size=300), fractions)
@settings(deadline=None)
def test_a_single_document_is_split_by_its_tail(text: str, fraction: float) -> None:
    corpus = _corpus({"empty": "", "a": text})
    (train,), (validation,) = (_documents(side).values() for side in corpus.split(fraction))
    assert train
    assert validation
    assert train + validation == text
    assert "tail" in str(corpus.splitter(fraction).describe()["rule"])


def test_the_tail_begins_with_a_line_where_it_can() -> None:
    text = "".join(f"line {number}\n" for number in range(1000))
    corpus = _corpus({"a": text})
    (validation,) = _documents(corpus.split(0.1)[1]).values()
    assert validation.startswith("line ")
    assert 0.1 <= len(validation) / len(text) < 0.11


def test_what_cannot_be_split_says_why() -> None:
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"validation_fraction=.* strictly between 0 and 1"):
            _corpus({"a": "xy"}).split(fraction)
    with pytest.raises(DataError, match="empty"):
        _corpus({"a": "", "b": ""}).split()
    with pytest.raises(DataError, match="single character"):
        _corpus({"a": "x"}).split()


# --- what is left out, and how else it is read --------------------------------------------------


def test_text_in_another_encoding_is_read_when_that_is_named(tmp_path: Path) -> None:
    text = "un café crème\n" * 3
    (tmp_path / "a.txt").write_bytes(text.encode("latin-1"))
    (tmp_path / "b.jsonl").write_bytes('{"text": "naïve"}\n'.encode("latin-1"))
    corpus = load_corpus(str(tmp_path), encoding="latin-1")
    assert _documents(corpus) == {"a.txt": text, "b.jsonl:1": "naïve"}
    assert not corpus.left_out
    assert corpus.fingerprint != load_corpus(str(tmp_path)).fingerprint
    (tmp_path / "c.txt").write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match=r"b\.jsonl: JSON Lines cannot be in utf-16"):
        list(load_corpus(str(tmp_path), encoding="utf-16").documents)
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "a.txt").unlink()
    assert _documents(load_corpus(str(tmp_path), encoding="utf-16")) == {"c.txt": text}


def test_a_long_text_in_another_encoding_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyak.data.readers.LONG_FILE", 1000)
    text = "déjà vu, " * 500
    (tmp_path / "a.txt").write_bytes(text.encode("utf-16"))
    (document,) = load_corpus(str(tmp_path / "a.txt"), encoding="utf-16").documents
    assert not isinstance(document.text, str)
    assert "".join(document.text) == text
    assert "".join(part for half in document.text.cut(1000) for part in half) == text


@pytest.mark.parametrize("name", ["latin-99", "rot13", "base64", "idna", "utf-7", "", "a\0b", "os"])
def test_an_encoding_that_is_none_of_text_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match="is no encoding of text files; write utf-8, latin-1"):
        load_corpus(str(tmp_path / "a.txt"), encoding=name)


def test_a_corpus_of_a_name_has_its_own_encoding() -> None:
    with pytest.raises(ConfigError, match=r"encoding='latin-1': corpus 'stdlib' has its own"):
        load_corpus("stdlib", encoding="latin-1")


@pytest.mark.parametrize("ending", ["ndjson", "ndjson.gz", "json", "json.gz", "JSONL"])
def test_lines_of_records_are_read_under_every_usual_ending(tmp_path: Path, ending: str) -> None:
    lines = "".join(json.dumps({"id": n, "text": f"lamp {n}"}) + "\n" for n in range(9)).encode()
    packed = gzip.compress(lines) if ending.endswith("gz") else lines
    (tmp_path / f"a.{ending}").write_bytes(packed)
    corpus = load_corpus(str(tmp_path / f"a.{ending}"))
    assert list(_documents(corpus).values()) == [f"lamp {n}" for n in range(9)]
    assert corpus.split_by == "content"


def test_a_json_file_is_its_records_or_else_text(tmp_path: Path) -> None:
    records = [{"text": "one", "id": 1}, {"text": "two"}]
    for name, content in {
        "list.json": json.dumps(records, indent=1),
        "object.json": json.dumps({"name": "a package", "text": "x"}),
        "numbers.json": "[1, 2, 3]",
        "broken.json": '{"text": ',
    }.items():
        (tmp_path / name).write_text(content)
    found = _documents(load_corpus(str(tmp_path)))
    assert {name: found.pop(name) for name in ("list.json:1", "list.json:2")} == {
        "list.json:1": "one",
        "list.json:2": "two",
    }
    assert found == {name: (tmp_path / name).read_text() for name in found}
    assert set(found) == {"object.json", "numbers.json", "broken.json"}
    corpus = load_corpus(str(tmp_path / "list.json"))
    assert [d.name for d in corpus.documents.after(1)] == ["list.json:2"]  # type: ignore[attr-defined]
    (tmp_path / "list.json").write_text('[{"text": "x"}, {"body": "y"}]')
    with pytest.raises(DataError, match=r"list\.json, record 2: no field 'text'"):
        list(load_corpus(str(tmp_path / "list.json")).documents)


def test_tables_are_not_read_as_prose(texts: Path) -> None:
    (texts / "a.csv").write_text("id,text\n1,lamp\n")
    (texts / "b.TSV").write_text("id\ttext\n1\tlamp\n")
    assert load_corpus(str(texts)).left_out.counts == {"CSV or TSV": 2}
    with pytest.raises(DataError, match=r"a\.csv is CSV or TSV; a corpus is UTF-8 text .*\.jsonl"):
        load_corpus(str(texts / "a.csv"))


def test_a_line_longer_than_memory_should_hold_is_refused_before_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyak.data.readers.LONGEST_RECORD", 1 << 16)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * (32 << 20)))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"line 1: a record of more than 65,536 bytes"):
        list(load_corpus(str(path)).documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_name_that_hides_a_folder_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()
    with pytest.warns(UserWarning, match=r"for the folder c4 that lies here, write \./c4"):
        load_corpus("c4[documents=3]")


# --- paths --------------------------------------------------------------------------------------


def test_a_folder_holds_its_text_files_by_relative_name(texts: Path) -> None:
    (texts / "bom.md").write_bytes(b"\xef\xbb\xbfmarked\r\n")
    documents = _documents(load_corpus(str(texts)))
    assert len(documents) == 61
    assert documents["bom.md"] == "marked\r\n"
    for name, text in documents.items():
        if name != "bom.md":
            assert text == (texts / name).read_bytes().decode()
    assert list(documents) == sorted(documents)


def test_what_is_left_out_of_a_folder_is_counted(texts: Path) -> None:
    (texts / "nul.txt").write_bytes(b"text\0text")
    (texts / "latin.txt").write_bytes("café".encode("latin-1"))
    (texts / "cut.txt").write_bytes("café".encode()[:-1])
    (texts / "late.txt").write_bytes(b"x" * (1 << 20) + b"\xff")
    (texts / ".hidden").write_text("x")
    (texts / ".git").mkdir()
    (texts / ".git" / "config").write_text("x")
    (texts / "loop").symlink_to(texts)
    os.mkfifo(texts / "pipe")
    corpus = load_corpus(str(texts))
    assert len(_documents(corpus)) == 60
    assert corpus.left_out.counts == {
        "binary": 1,
        "not UTF-8": 3,
        "hidden": 2,
        "links to folders": 1,
        "not regular files": 1,
    }
    assert corpus.left_out.first["not UTF-8"] == ["cut.txt", "late.txt", "latin.txt"]


def test_a_character_across_two_reads_is_still_text(tmp_path: Path) -> None:
    text = "x" * ((1 << 20) - 1) + "é" + "y" * 10
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert _documents(load_corpus(str(tmp_path / "a.txt"))) == {"a.txt": text}


def test_the_fingerprint_is_that_of_names_and_contents(texts: Path, tmp_path: Path) -> None:
    original = load_corpus(str(texts)).fingerprint
    shutil.copytree(texts, tmp_path / "elsewhere")
    assert load_corpus(str(tmp_path / "elsewhere")).fingerprint == original
    file = tmp_path / "elsewhere" / "00.txt"
    content = file.read_text()
    file.write_text(content + "x")
    assert load_corpus(str(tmp_path / "elsewhere")).fingerprint != original
    file.write_text(content)
    assert load_corpus(str(tmp_path / "elsewhere")).fingerprint == original
    file.rename(file.with_name("renamed.txt"))
    assert load_corpus(str(tmp_path / "elsewhere")).fingerprint != original


def test_the_text_field_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "title": "b"}\n')
    assert len({load_corpus(str(path), text_field=f).fingerprint for f in ("text", "title")}) == 2


def test_a_number_too_long_for_python_is_no_matter_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine", "key": ' + "7" * 10_000 + "}\n" + '{"text": "too"}\n')
    assert [document.text for document in load_corpus(str(path)).documents] == ["fine", "too"]
    path.write_text('{"text": ' + "7" * 10_000 + "}\n")
    with pytest.raises(DataError, match=r"line 1: field 'text' must be text, found int"):
        list(load_corpus(str(path)).documents)


def test_records_are_the_same_from_jsonl_gzip_and_parquet(tmp_path: Path) -> None:
    texts = [f"naïve {number} 数\n\u2028\x85 x" for number in range(700)]
    plain = _write_jsonl(tmp_path / "a.jsonl", texts, "body")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    table = pa.table({"id": list(range(700)), "body": texts})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    for file in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        documents = _documents(load_corpus(str(tmp_path / file), text_field="body"))
        assert list(documents.values()) == texts
        assert f"{file}:700" in documents
    folder = load_corpus(str(tmp_path), text_field="body")
    assert sorted(_documents(folder).values()) == sorted(texts * 3)


CUT_SHORT = gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[
    :-9
]  # else a test's name has the time in it


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "x", "id": 1}\n', r"a\.jsonl, line 3: no field "
         r"'text'; its fields are: body, id"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', r"line 1: not JSON: 'text' stands twice"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "b", "meta": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n",
            r"a\.jsonl, line 2: not read: its lists and objects are nested too deep",
        ),
        ("a.jsonl", b'["text"]\n', r"line 1: expected a JSON object, found list"),
        ("a.jsonl", b'{"text": null}\n', r"line 1: field 'text' must be text, found null"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: field 'text' must be text, found int"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', r"line 1: .*unpaired surrogate at character 1"),
        ("a.jsonl", b"\n \n", r"'a\.jsonl' is empty"),
        ("a.jsonl", b"", r"'a\.jsonl' is empty"),
        ("a.jsonl.gz", CUT_SHORT, r"not a whole gzip file"),
        ("a.jsonl.gz", b'{"text": "x"}\n', r"not a whole gzip file"),
        ("a.parquet", b"PAR1 nonsense", r"a\.parquet is not a readable Parquet file"),
        ("a.txt", b"\0\1\2", r"a\.txt is binary; a corpus is UTF-8 text"),
        ("a.txt", b"", r"'a\.txt' is empty"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_naming_the_place(
    tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(load_corpus(str(tmp_path / file)).split(0.9)[0].documents)
    assert "\n" not in str(caught.value)


def test_bad_parquet_columns_are_one_line_naming_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for columns, message in [
        ({"body": ["x"], "id": [1]}, r"a\.parquet: no field 'text'; its fields are: body, id"),
        ({"text": ["x", None]}, r"a\.parquet, row 2: field 'text' must be text, found null"),
        ({"text": [1, 2]}, r"a\.parquet, row 1: field 'text' must be text, found int"),
    ]:
        pq.write_table(pa.table(columns), path)
        with pytest.raises(DataError, match=message):
            list(load_corpus(str(path)).documents)


def test_folders_without_text_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty: no files in it"):
        load_corpus(str(tmp_path))
    (tmp_path / ".hidden").touch()
    with pytest.raises(DataError, match=r"no files in it \(left out: 1 hidden \(\.hidden\)\)"):
        load_corpus(str(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"\0")
    (tmp_path / "b.bin").write_bytes(b"\xff")
    with pytest.raises(
        DataError, match=r"nothing that can be read: 1 hidden .*, 1 binary \(a\.bin\), 1 not UTF-8"
    ):
        load_corpus(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a regular file nor a folder"):
        load_corpus(str(tmp_path / "pipe"))


@pytest.mark.parametrize("name", ["stdlb", "no/such/folder", "", "~no_such_user/x", "a\0b"])
def test_an_unknown_corpus_lists_the_names_and_says_that_there_is_no_such_path(name: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_corpus(name)
    message = str(caught.value)
    assert (
        "(known: c4, lambada, openwebtext, prose, stdlib, tinystories, tinystories-own, " in message
    )
    assert "no file or folder of that name" in message
    assert ("did you mean 'stdlib'" in message) == (name == "stdlb")


def test_a_name_wins_over_a_file_and_the_file_stays_reachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stdlib").write_text("mine")
    assert len(_documents(load_corpus("stdlib"))) > 300
    assert _documents(load_corpus("./stdlib")) == {"stdlib": "mine"}


def test_unreadable_files_and_folders_are_errors_not_omissions(
    texts: Path, python_obeying_permissions: Run
) -> None:
    code = (
        "import sys; from polyak.data.corpora import load_corpus\n"
        "from polyak.errors import DataError\n"
        "try: load_corpus(sys.argv[1])\n"
        "except DataError as problem: print(problem)"
    )
    for target, mode in ((texts / "00.txt", 0o000), (texts / "sub", 0o000), (texts, 0o000)):
        usual = target.stat().st_mode
        target.chmod(mode)
        result = python_obeying_permissions(code, texts)
        target.chmod(usual)
        assert result.stdout == f"cannot read corpus {target}: Permission denied\n", result.stderr


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x", "y"]}), tmp_path / "a.parquet")
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"  # as if it were not installed
        "from polyak.data.corpora import load_corpus\n"
        "from polyak.errors import MissingExtraError\n"
        "try: load_corpus(sys.argv[1])\n"
        "except MissingExtraError as problem: print(problem)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.parquet")], capture_output=True, text=True
    )
    assert "pip install 'polyak[data]'" in result.stdout, result.stderr


def test_records_stream_through_memory(tmp_path: Path) -> None:
    text = "x" * 10_000
    _write_jsonl(tmp_path / "a.jsonl", [text] * 1000)
    pq.write_table(pa.table({"text": [text] * 1000}), tmp_path / "a.parquet", row_group_size=100)
    for file in ("a.jsonl", "a.parquet"):
        corpus = load_corpus(str(tmp_path / file))
        tracemalloc.start()
        total = sum(len(document.text) for document in corpus.documents)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert total == 10_000_000
        assert peak < 4_000_000


def test_data_needs_no_torch() -> None:
    code = (
        "import sys, polyak.data.prepare, polyak.data.batches\n"
        "polyak.data.prepare.load_corpus('stdlib').split()\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
