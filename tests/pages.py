"""What every page of this package must be: well formed, whole in one file, right in a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from polyak.report.svg import PALETTE

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags close in order, and gathers ids, references and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.links += [str(values[a]) for a in ("src", "href", "xlink:href") if values.get(a)]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def check_text(text: str) -> None:
    """One well-formed file: unique ids, nothing outside it, no script, no Python in its words."""
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    # everything it refers to is in the file
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "<script" not in text
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", page.text)


def check_in_browser(browser: Any, path: Path, width: int, theme: str) -> None:
    """Shown without a word in the console, a request, or anything that sticks out."""
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=theme, offline=True
    )
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    address = path.as_uri()
    page.goto(address)
    assert said == []
    assert [url for url in asked if url != address and not url.startswith("data:")] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # nothing sticks out to the right except inside a box that scrolls by itself
    outside = page.evaluate(
        """() => [...document.querySelectorAll("main *")]
            .filter(e => !e.closest(".scroll") && !e.closest("svg"))
            .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
            .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert outside == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    surface = PALETTE["surface"][theme == "dark"]
    assert background == "rgb({}, {}, {})".format(*(int(surface[i : i + 2], 16) for i in (1, 3, 5)))
    context.close()


def check_figures_in_browser(browser: Any, path: Path) -> None:
    """On a phone, no text of a figure is cut and no two labels of an axis touch."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(path.as_uri())
    cut = page.evaluate(
        """() => [...document.querySelectorAll("svg.figure")].flatMap(svg => {
            const box = svg.getBoundingClientRect();
            const texts = [...svg.querySelectorAll("text")];
            const out = texts.filter(t => {
                const b = t.getBoundingClientRect();
                return b.left < box.left - 2 || b.right > innerWidth || b.top < box.top - 8
                    || b.bottom > box.bottom + 8;
            });
            const ticks = [...svg.querySelectorAll("g[id*='matplotlib.axis_1'] text")]
                .filter(t => t.closest("g[id*='xtick']"))
                .map(t => t.getBoundingClientRect())
                .sort((a, b) => a.left - b.left);
            const near = ticks.filter((t, i) => i && t.left < ticks[i - 1].right + 1);
            if (!ticks.length) return ["no ticks found"];
            return [...out.map(t => t.textContent), ...near.map(t => "tick at " + t.left)];
        })"""
    )
    assert cut == []
    page.close()
