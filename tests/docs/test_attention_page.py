"""The page on kinds of attention says what the kinds declare."""

from __future__ import annotations

from typing import Any

from blocks import ROOT

from polyak.nn import attention
from polyak.nn.attention._options import Option

PAGE = ROOT / "docs" / "momentum-transformer.md"


def option_rows() -> list[str]:
    """Every option as a row, options that several kinds declare alike as one."""
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for name in attention.names():
        for option in attention.get(name).declared.values():
            kinds.setdefault(_said(option), []).append(f"`{name}`")
    rows = []
    for (option, values, default, about, causal), names in sorted(kinds.items()):
        where = {None: "", True: " (`causal=true`)", False: " (`causal=false`)"}[causal]
        cells = (f"`{option}`{where}", ", ".join(names), values, default, about)
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _said(option: Option) -> tuple[Any, ...]:
    default = str(option.default).lower() if isinstance(option.default, bool) else option.default
    return option.name, option.domain, str(default), option.about, option.causal


def test_the_table_of_options_is_what_the_kinds_declare() -> None:
    page = PAGE.read_text(encoding="utf-8")
    table = page.partition("| option | kinds |")[2].partition("\n\n")[0]
    assert table.splitlines()[2:] == option_rows()


def test_every_kind_is_in_the_table_with_its_equation() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in attention.names():
        kind = attention.get(name)
        assert f"| `{name}` | {kind.equation} | {kind.paper} |" in page
