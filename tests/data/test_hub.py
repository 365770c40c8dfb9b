"""Corpora of the hub: read from copies in its own format, split as the papers split, and offline.

The copies go through the same code as the hub's repositories: only the address differs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import hub_copies
import numpy as np
import pytest

from polyak.data import encode
from polyak.data.batches import TrainBatches
from polyak.data.corpora import load_corpus
from polyak.data.documents import Document, open_reader
from polyak.data.hub import HUB, parse
from polyak.data.prepare import Prepared, prepare
from polyak.data.shards import TokenFile
from polyak.errors import ConfigError, DataError, MissingExtraError, UnknownNameError


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_copies.write(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def hub(copies: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYAK_HUB", str(copies))
    return copies


def _texts(prepared: Prepared, side: str) -> list[str]:
    tokens: TokenFile = getattr(prepared, side)
    ends = np.flatnonzero(tokens[:] == prepared.tokenizer.end_of_text)
    starts = [0, *(ends[:-1] + 1)] if len(ends) else []
    return [
        prepared.tokenizer.decode(tokens[int(start) : int(end)])
        for start, end in zip(starts, ends, strict=True)
    ]


def test_tinystories_holds_out_half_a_percent_of_its_train(hub: Path, cache: Path) -> None:
    prepared = prepare("tinystories", cache=cache)
    train, validation = _texts(prepared, "train"), _texts(prepared, "validation")
    assert sorted(train + validation) == sorted(hub_copies.STORIES["train"])
    assert 1 <= len(validation) <= 6
    assert prepared.manifest["split"]["fraction"] == 0.005
    more = prepare("tinystories", cache=cache, validation_fraction=0.05)
    assert set(validation) <= set(_texts(more, "validation"))


def test_tinystories_own_keeps_the_split_of_the_dataset(hub: Path, cache: Path) -> None:
    prepared = prepare("tinystories-own", cache=cache)
    for side in ("train", "validation"):
        assert _texts(prepared, side) == hub_copies.STORIES[side]
    assert prepared.test is None
    assert prepared.manifest["split"] == {
        "version": 1,
        "by": "own",
        "rule": "the corpus's own split",
    }
    found = prepared.manifest["corpus"]["hub"]
    assert found["repository"] == "roneneldan/TinyStories"
    assert len(found["revision"]) == 64


def test_openwebtext_holds_out_five_percent_of_the_documents(hub: Path, cache: Path) -> None:
    prepared = prepare("openwebtext", cache=cache)
    train, validation = _texts(prepared, "train"), _texts(prepared, "validation")
    assert sorted(train + validation) == sorted(hub_copies.PAGES)
    assert 8 <= len(validation) <= 32
    assert prepared.manifest["split"]["fraction"] == 0.05
    more = prepare("openwebtext[documents=100]", cache=cache, validation_fraction=0.5)
    assert len(_texts(more, "train") + _texts(more, "validation")) == 100
    assert not set(validation) & set(_texts(more, "train"))  # 5% are part of 50%


def test_wikitext_is_articles_with_a_test_side(hub: Path, cache: Path) -> None:
    prepared = prepare("wikitext-103", cache=cache)
    for side in ("train", "validation", "test"):
        expected = ["".join(lines) for lines in hub_copies.ARTICLES[side]]
        assert _texts(prepared, side) == expected


def test_wikitext_lines_is_what_the_released_evaluation_reads(hub: Path, cache: Path) -> None:
    prepared = prepare("wikitext-103-lines", cache=cache)
    lines = [line for article in hub_copies.ARTICLES["validation"] for line in article]
    expected = [line.replace("first", "<unk>") for line in lines if line.strip()]
    assert _texts(prepared, "validation") == expected


def test_c4_is_the_first_documents_of_its_validation_split(hub: Path, cache: Path) -> None:
    texts = hub_copies.CRAWL["validation"]
    in_order = texts[::2] + texts[1::2]  # two files
    assert _texts(prepare("c4", cache=cache), "validation") == in_order
    for count in (1, 30, 31, 60):
        prepared = prepare(f"c4[documents={count}]", cache=cache)
        assert _texts(prepared, "validation") == in_order[:count]
        assert len(prepared.train) == 0
    with pytest.warns(
        UserWarning, match="validation split has only 60 documents, fewer than .*=61"
    ):
        prepare("c4[documents=61]", cache=cache)


def test_lambada_is_passages_for_evaluation(hub: Path, cache: Path) -> None:
    prepared = prepare("lambada", cache=cache)
    assert _texts(prepared, "validation") == hub_copies.PASSAGES
    with pytest.raises(
        DataError, match="the train side of corpus 'lambada' is too short: 0 tokens"
    ):
        TrainBatches(prepared.train, 8, 2, seed=0)
    with pytest.raises(ConfigError, match="'lambada', which is for evaluation and has no training"):
        prepare("lambada", "bpe-300", cache=cache)


def test_evaluation_uses_the_tokenizer_of_the_model(hub: Path, cache: Path) -> None:
    trained = prepare("tinystories", "bpe-300", cache=cache)
    prepared = prepare("lambada", str(trained.folder), cache=cache)
    assert prepared.tokenizer.fingerprint == trained.tokenizer.fingerprint
    assert _texts(prepared, "validation") == hub_copies.PASSAGES
    assert prepare("tinystories", str(trained.folder), cache=cache).fingerprint == (
        trained.fingerprint
    )


@pytest.mark.parametrize("name", HUB)
def test_reading_goes_on_from_any_document(hub: Path, name: str) -> None:
    source = load_corpus(f"{name}[documents=70]").documents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        whole = list(source)
        places, documents = [], []
        reader = open_reader(source)
        for document in reader:
            documents.append(document)
            places.append(json.loads(json.dumps(reader.position())))
        assert documents == whole
        assert len({document.name for document in whole}) == len(whole)
        for number in {0, 1, 39, 40, len(whole) // 2, len(whole) - 2, len(whole) - 1}:
            if number < len(whole):
                rest: list[Document] = list(open_reader(source, places[number]))
                assert rest == whole[number + 1 :], number


def test_what_is_prepared_is_found_again_until_the_copy_changes(
    hub: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare("lambada", cache=cache)
    made = (first.folder / "manifest.json").stat().st_mtime_ns
    other = hub_copies.write(tmp_path / "elsewhere")
    monkeypatch.setenv("POLYAK_HUB", str(other))
    again = prepare("lambada", cache=cache)
    assert (again.folder / "manifest.json").stat().st_mtime_ns == made
    with (other / "EleutherAI/lambada_openai/data/lambada_test.jsonl").open("a") as handle:
        handle.write('{"text": "new"}\n')
    changed = prepare("lambada", cache=cache)
    assert changed.fingerprint != first.fingerprint
    assert _texts(changed, "validation") == [*hub_copies.PASSAGES, "new"]


def test_a_corpus_with_its_own_split_takes_no_fraction(hub: Path, cache: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"validation_fraction=0\.1: corpus 'tinystories-own' has"
    ):
        prepare("tinystories-own", cache=cache, validation_fraction=0.1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("c4[documets=5]", r"unknown option of corpus 'c4' 'documets'; did you mean 'documents'\?"),
        ("c4[documents=0]", "'documents=0' must be documents=N with a whole number of at least 1"),
        ("c4[documents=many]", "'documents=many' must be documents=N with a whole number"),
        ("c4[documents]", "'documents' must be documents=N with a whole number"),
        ("c4[revision=]", "'revision=' must be revision=N with a commit or tag"),
        ("c4[]", "unknown option of corpus 'c4' ''"),
        ("c44[documents=5]", "unknown corpus 'c44'; did you mean 'c4'"),
        ("tinystory", "unknown corpus 'tinystory'; did you mean 'tinystories'"),
    ],
)
def test_mistakes_in_names_are_one_line_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_corpus(name)
    assert "\n" not in str(caught.value)


def test_options_are_read() -> None:
    found = parse("openwebtext[ documents = 12, revision=v1.0/x ]")
    assert found is not None
    assert (found.limit, found.pinned) == (12, "v1.0/x")
    assert parse("stdlib") is parse("./c4") is parse("a/c4") is None
    c4 = parse("c4")
    assert c4 is not None
    assert c4.limit == 5000


def test_a_copy_that_is_missing_or_broken_is_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYAK_HUB", str(tmp_path))
    with pytest.raises(DataError, match=r"holds no folder allenai/c4; make one with 'hf download"):
        prepare("c4", cache=cache)
    folder = tmp_path / "EleutherAI" / "lambada_openai"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match="is no readable copy of the dataset") as caught:
        prepare("lambada", cache=cache)
    assert "\n" not in str(caught.value)
    hub_copies.write(tmp_path)
    (folder / "data" / "lambada_test.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(DataError, match=r"test split, record 0 .*must be text, found int"):
        prepare("lambada", cache=cache)
    (folder / "data" / "lambada_test.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="no field 'text'; its fields are: body"):
        prepare("lambada", cache=cache)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


_OFFLINE = """
import sys
from polyak.data.prepare import prepare
from polyak.errors import PolyakError
try:
    prepare(sys.argv[1], sys.argv[2])
except PolyakError as problem:
    print(type(problem).__name__, problem)
"""


@pytest.mark.parametrize(
    ("asked", "variables"),
    [
        # a port that nobody listens on, a name that does not exist, and the hub's own switch
        (("tinystories", "bytes"), {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        (("c4", "bytes"), {"HF_ENDPOINT": "http://nowhere.invalid"}),
        (("openwebtext", "bytes"), {"HF_HUB_OFFLINE": "1"}),
        (("stdlib", "gpt2"), {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        (("stdlib", "gpt2"), {"HF_HUB_OFFLINE": "1"}),
    ],
)
def test_offline_is_one_line_at_once_that_says_what_to_do(
    tmp_path: Path, asked: tuple[str, str], variables: dict[str, str]
) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "POLYAK_HUB"}
    homes = {"HF_HOME": str(tmp_path / "hf"), "POLYAK_CACHE": str(tmp_path / "cache")}
    begun = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", _OFFLINE, *asked],
        env=kept | homes | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert time.monotonic() - begun < 30
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    if asked[1] == "gpt2":
        assert re.search(
            r"^DataError tokenizer 'gpt2' .*hf download openai-community/gpt2", result.stdout
        )
    else:
        assert result.stdout.startswith(
            f"HubError cannot read corpus '{asked[0]}' from the Hugging"
        )
        assert f"'hf download {HUB[asked[0]].repository} --repo-type dataset" in result.stdout
        assert "set POLYAK_HUB=DIR" in result.stdout
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_prepared_corpora_of_the_hub_are_found_offline(tmp_path: Path, cache: Path) -> None:
    """The address alone decides the place in the cache, so no question is asked."""
    found = parse("tinystories")
    assert found is not None
    code = (
        "from polyak.data.hub import parse\n"
        "print(parse('tinystories').fingerprint, parse('tinystories[documents=9]').fingerprint)"
    )
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    first, limited = result.stdout.split()
    assert first == found.fingerprint != limited


def test_without_datasets_the_extra_is_named(hub: Path, cache: Path) -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"  # as if it were not installed
        "from polyak.data.prepare import prepare\n"
        "from polyak.errors import MissingExtraError\n"
        "try: prepare('lambada')\n"
        "except MissingExtraError as problem: print(problem)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'polyak[data]'" in result.stdout, result.stderr
    assert issubclass(MissingExtraError, ImportError)


def test_reading_a_copy_imports_no_torch(hub: Path) -> None:
    code = (
        "import sys\n"
        "from polyak.data.prepare import prepare\n"
        "prepare('lambada'); prepare('tinystories', 'bpe-300', workers=2)\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def test_chunks_of_a_copy_end_with_documents(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK", 100)
    corpus = load_corpus("tinystories")
    reader = open_reader(corpus.documents)
    from polyak.data.tokenizers import ByteTokenizer

    found = list(encode.chunks(reader, corpus.splitter(), ByteTokenizer()))
    assert len(found) > 50
    for chunk in found:
        assert chunk.place[1] == 0
        assert all(part.last for part in chunk.parts)


def test_unknown_names_are_unknown_name_errors() -> None:
    with pytest.raises(UnknownNameError):
        load_corpus("openwebtex")
