"""Every command that reads a corpus: how it is read is an option, what is left out is recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run_config

from polyak.cli.main import main
from polyak.training.loop import train

SMALL: dict[str, tuple[str, ...]] = {
    "evaluate": ("--tokens", "64"),
    "forgetting": ("--steps", "2", "--batch-size", "1", "--eval-tokens", "64", "--warmup", "0"),
    "sharpness": (
        *("--tokens", "16", "--top-k", "1", "--density-probes", "0", "--slice-radius", "0"),
        *("--max-probes", "8", "--scale", "none", "--max-products", "5"),
    ),
    "spectrum": ("--length", "4", "--parts", "c", "--quantiles", "0.5", "--steps", "4"),
    "dynamics": ("--tokens", "16", "--parts", "curve"),
    "study landscape": (
        *("--eval-tokens", "64", "--sharpness-tokens", "16", "--forgetting-steps", "2"),
        *("--spectrum-length", "4", "--trace-precision", "0.9"),
    ),
    "upgrade": ("--tokens", "64", "--rule", "heavy_ball"),
}
CORPUS = {
    "evaluate": ("--corpora",),
    "forgetting": ("--onto",),
    "study landscape": ("--corpora", "--onto"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Path]:
    """A run, a folder of which a file is in Latin-1, and records with a field `body`."""
    folder = tmp_path_factory.mktemp("reading")
    (folder / "mixed").mkdir()
    for n in range(8):
        (folder / "mixed" / f"{n}.txt").write_text(f"{n} pears, {n + 1} figs; " * 30)
    (folder / "mixed" / "late.txt").write_bytes("caf\u00e9".encode("latin-1"))
    lines = [json.dumps({"body": f"{n} café and {n + 1} figs; " * 30}) for n in range(12)]
    (folder / "body.json").write_bytes(f"[{','.join(lines)}]".encode("latin-1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYAK_CACHE", str(folder / "cache"))
        config = run_config(corpus, steps=2, d_model=8, num_layers=2, context_length=8)
        train(config, folder / "run")
        yield folder


def run(name: str, place: Path, out: Path, corpus: str, *more: str) -> int:
    options = [word for flag in CORPUS.get(name, ("--corpus",)) for word in (flag, corpus)]
    where = [str(out)] if name == "upgrade" else ["--out", str(out)]
    return main([*name.split(), str(place / "run"), *where, *options, *SMALL[name], *more])


def found_in(value: Any) -> list[dict[str, Any]]:
    """Everything in results that says which files were left out."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    here = [value] if isinstance(value, dict) and "skipped_files" in value else []
    return here + [part for one in inner for part in found_in(one)]


def results_of(name: str, out: Path) -> Any:
    return json.loads((out / ("run.json" if name == "upgrade" else "results.json")).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_what_is_left_out_is_said_recorded_and_on_the_page(
    name: str, place: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    assert run(name, place, tmp_path / "out", str(place / "mixed")) == 0
    assert any("1 not UTF-8 (late.txt)" in str(warning.message) for warning in recwarn)
    records = found_in(results_of(name, tmp_path / "out"))
    assert records
    assert all(
        record["skipped_files"] == {"not UTF-8": {"files": 1, "first": ["late.txt"]}}
        for record in records
    )
    if name != "upgrade":
        page = (tmp_path / "out" / "report.html").read_text().replace("<wbr>", "")
        assert "Left out of mixed: 1 not UTF-8 (late.txt)." in page


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_records_of_another_field_in_another_encoding_are_read(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = str(place / "body.json")
    more = () if name != "study landscape" else ("--parts", "evaluate", "--parts", "forgetting")
    how = ("--text-field", "body", "--encoding", "latin-1")
    assert run(name, place, tmp_path / "out", corpus, *more, *how) == 0
    capsys.readouterr()
    assert run(name, place, tmp_path / "other", corpus, *more, "--encoding", "latin-1") == 1
    assert "no field 'text'; its fields are: body" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sharpness", "spectrum", "dynamics", "upgrade"])
def test_a_way_of_reading_is_for_a_corpus_that_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [str(tmp_path / "out")] if name == "upgrade" else []
    with pytest.raises(SystemExit, match="2"):
        main([name, str(tmp_path), *where, "--encoding", "latin-1"])
    assert "encoding='latin-1' is for a corpus named with --corpus" in capsys.readouterr().err
