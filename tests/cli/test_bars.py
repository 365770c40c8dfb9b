"""Long work says where it is: by a bar on a terminal, by lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from polyak.cli import _bars, _console
from polyak.output import in_lines


def test_without_a_terminal_a_line_appears_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(_bars.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with _bars.Bar(Console(file=out, force_terminal=False)) as bar:
        for seconds, share in ((5, 0.1), (19, 0.2), (21, 0.25), (40, 0.5), (42, 0.75)):
            now[0] = seconds
            bar(share, "block 1 [a]")
    # a tenth at 5 s, and 15% in the next 16 s; 65% in 37 s
    assert out.getvalue() == (
        " 25%, about 1 min 20 s left  block 1 [a]\n 75%, about 14 s left  block 1 [a]\n"
    )


def test_on_a_terminal_there_is_a_bar_and_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bars, "_EVERY", -1.0)
    out = io.StringIO()
    with _bars.Bar(Console(file=out, force_terminal=True, width=80)) as bar:
        bar(0.5, "block 1")
    assert "50%" in out.getvalue()
    assert " 50%  block 1\n" not in out.getvalue()


def test_in_a_narrow_terminal_share_and_time_left_stay_and_a_name_loses_its_beginning() -> None:
    out = io.StringIO()
    with _bars.Bar(Console(file=out, force_terminal=True, width=40)) as bar:
        bar(0.25, "runs/a-name-that-is-long/seed-0: forgetting")
        bar(0.5, "runs/a-name-that-is-long/seed-0: forgetting")
    assert " 50%" in out.getvalue()
    assert "left  …ng/seed-0: forgetting" in out.getvalue()


def test_a_line_is_broken_between_words_and_a_path_stays_whole() -> None:
    line = "triple_momentum on stdlib, 600 steps of 2,048 tokens; folder: runs/a-path/" + "x" * 40
    for width, terminal in ((40, True), (40, False), (200, True)):
        out = io.StringIO()
        _console.Console(file=out, force_terminal=terminal, width=width).say(line)
        lines = out.getvalue().splitlines()
        assert " ".join(lines) == line
        assert all(len(one) <= width or " " not in one for one in lines) == terminal
    assert in_lines("corpus       a corpus of words", 24, 13).split("\n") == [
        "corpus       a corpus of",
        "            words",
    ]
