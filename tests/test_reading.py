"""What a file must look like, in tables: the line names file, field, what must be and what is."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from rich.table import Table

import polyak
from polyak.cli._console import Console
from polyak.data.prepare import open_prepared
from polyak.errors import ConfigError, DataError, RunError, UnknownNameError, plain, shown_value
from polyak.nn.config import ModelConfig
from polyak.output import say, show, tell
from polyak.reading import (
    Check,
    fields,
    file_name,
    inside,
    list_of,
    mapping_of,
    number,
    one_of,
    optional,
    table,
    text,
    whole,
)
from polyak.report.svg import STAND_IN, house_style, to_svg

KEPT = Path(__file__).parent / "releases" / "0.1.0"


@pytest.mark.parametrize(
    ("check", "value", "says"),
    [
        (whole(1), 0, "x must be a whole number from 1 to 2^53, found 0"),
        (whole(), True, "x must be a whole number from 0 to 2^53, found True"),
        (whole(0, 7), 10**400, "from 0 to 7, found a whole number of more than 60 digits"),
        (number, 10**400, "x must be a number, found a whole number"),
        (number, "1", "x must be a number, found '1'"),
        (text(3), "long", "x must be text of at most 3 characters, found 'long'"),
        (one_of("<u2", "<u4"), "O", "x must be one of '<u2', '<u4', found 'O'"),
        (one_of(1), True, "x must be one of 1, found True"),
        (list_of(whole(), 2), [1, 2, 3], "x must be a list of at most 2, found a list of 3"),
        (list_of(whole()), [1, -1], "x.1 must be a whole number"),
        (mapping_of(table({"a": text()})), {"k\x1b": {}}, r"x.k\x1b.a must be there, found None"),
        (optional(whole()), "", "x must be a whole number"),
        *[
            (file_name, name, "x must be the name of a file in this folder, found ")
            for name in ("../a", "/etc/passwd", "a/b", "..", "", "a\\b", "C:a", "a\0", None)
        ],
    ],
)
def test_what_does_not_fit_is_one_line(check: Check, value: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        fields({"x": value}, "m.json", {"x": check}, error=DataError)
    assert says in str(caught.value)
    assert str(caught.value).startswith("m.json: ")
    assert str(caught.value).isprintable()


def test_what_fits_is_passed_on() -> None:
    value = {"x": 1, "y": [{"f": "a.bin"}], "more": 2}
    wanted = {"x": whole(), "y": list_of(table({"f": file_name})), "z": optional(number)}
    assert fields(value, "m.json", wanted) is value


def test_a_file_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").touch()
    (tmp_path / "in" / "out").symlink_to(tmp_path)
    (tmp_path / "in" / "loop").symlink_to("loop")
    assert inside(tmp_path / "in", "a") == tmp_path / "in" / "a"
    for name in ("out", "loop", "../x", "/etc/passwd"):
        with pytest.raises(RunError, match="leads out of its folder"):
            inside(tmp_path / "in", name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "O"}, "dtype must be one of '<u2', '<u4', found 'O'"),
        ({"dtype": "object"}, "dtype must be one of"),
        ({"file": "../../train-00000.bin"}, "train.shards.0.file must be the name of a file in"),
        ({"file": "/dev/zero"}, "train.shards.0.file must be the name of a file in this folder"),
        ({"tokens": -1}, "train.shards.0.tokens must be a whole number from 0 to"),
        ({"tokens": 2**62}, "train.shards.0.tokens must be a whole number from 0 to"),
    ],
)
def test_a_manifest_maps_nothing_but_ids_in_its_own_folder(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(KEPT / "prepared", tmp_path / "prepared")
    manifest = json.loads((folder / "manifest.json").read_text())
    (manifest if "dtype" in change else manifest["train"]["shards"][0]).update(change)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json: ") as caught:
        open_prepared(folder)
    assert says in str(caught.value)


def test_a_shard_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    folder = shutil.copytree(KEPT / "prepared", tmp_path / "prepared")
    (folder / "train-00000.bin").rename(tmp_path / "elsewhere.bin")
    (folder / "train-00000.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(DataError, match=r"train-00000\.bin leads out of its folder, or is a link"):
        open_prepared(folder)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_layers": 10**12}, "num_layers=1000000000000 must be at most 10,000"),
        ({"d_model": 10**9 + 1, "num_heads": 2}, "d_model=1000000001 must be at most 1,048,576"),
        ({"rule": ["adam"]}, "rule=a list of 1 must be text"),
        ({"splitting": [1] * 10**5}, "splitting=a list of 100000 must be text"),
        ({"rule_options": {"mu": {"a": 1}}}, "rule_options.mu=an object of 1 must be a number"),
        ({"norm_eps": 10**400}, "norm_eps"),
    ],
)
def test_a_models_sizes_and_types_are_looked_at_first(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(values)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


def test_control_characters_are_written_out() -> None:
    assert plain("a\x1b[2J\x07\x9b\u202eb\ud800\n") == r"a\x1b[2J\x07\x9b\u202eb\ud800\x0a"
    assert plain("naïve 数 ✓\n\t", "\n\t") == "naïve 数 ✓\n\t"
    assert shown_value("x" * 10**6) == "'" + "x" * 79 + "…"


def test_tables_and_lines_give_a_terminal_no_foreign_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(force_terminal=True, color_system="truecolor", highlight=False, width=80)
    shown = Table("\x1b]0;title\x07", title="t\x9b2J")
    shown.add_row("a\x1b[31mb")
    console.print(shown)
    console.print("one \x1b[2J line\r", style="bold")
    out = capsys.readouterr().out
    assert r"a\x1b[31" in out
    assert r"one \x1b[2J line" in out
    for sign in ("\x1b[31m", "\x1b[2J", "\x1b]", "\x07", "\x9b", "\r"):
        assert sign not in out
    assert "\x1b[1m" in out  # the style is rich's own


def test_a_name_is_literal_in_a_figure_whatever_it_looks_like() -> None:
    name = f'a#b id="x" url(#y) href="#z" $x$ <b> {next(iter(STAND_IN.values()))}'
    with house_style(11):
        figure = Figure(figsize=(3, 2))
        figure.subplots().set_xlabel(name)
        drawn = ElementTree.fromstring(to_svg(figure, "one", "a title"))
    assert name in list(drawn.itertext())


def test_an_error_is_one_line_of_a_bounded_length() -> None:
    error = RunError("a file says\n  this:\r\n\x85 " + "x" * 10_000 + "; do that")
    assert str(error).startswith("a file says this: xxx")
    assert str(error).endswith("xxx; do that")
    assert len(str(error)) <= 1500
    assert str(UnknownNameError("two\nlines")) == "two lines"


def test_commands_print_by_way_of_what_writes_control_characters_out() -> None:
    """`print` itself knows nothing of terminals: `show`, `say`, `tell` and `Console` do."""
    rooms = Path(polyak.__file__).parent / "cli"
    bare = [
        path.name
        for path in rooms.glob("*.py")
        if re.search(r"(?<![.\w])print\(", path.read_text())
    ]
    assert bare == []


@pytest.mark.parametrize(("write", "stream"), [(show, "stdout"), (say, "stdout"), (tell, "stderr")])
def test_a_terminal_gets_no_control_characters_of_a_line(write: Any, stream: str) -> None:
    controller, terminal = os.openpty()
    with (
        os.fdopen(terminal, "w") as handle,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, stream, handle)
        write("corpus \x1b[2J\x07 name")
        handle.flush()
        assert os.read(controller, 100) == rb"corpus \x1b[2J\x07 name" + b"\r\n"
    os.close(controller)
