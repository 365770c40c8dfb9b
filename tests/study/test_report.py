"""The page: what it says, that it is one file, and how a browser shows it."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterator
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from polyak.errors import PolyakError
from polyak.study.report import render, write_picture, write_report
from polyak.study.svg import PALETTE
from polyak.study.verdict import complete
from tests.study.fixtures import fail, made_up

PAIR = ["gradient_descent", "triple_momentum"]
VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


def partial() -> dict[str, Any]:
    """A study under way: a failure, runs waiting, one half done, costs not measured yet."""
    results = fail(made_up(status="partial"), "adam", 1)
    for run in results["runs"]:
        if run["seed"] == 2 or run["entry"] == "nesterov":
            run.update(status="pending", seconds=None, curve={k: [] for k in run["curve"]})
    running = next(r for r in results["runs"] if r["entry"] == "heavy_ball" and r["seed"] == 1)
    running["status"] = "running"
    running["curve"] = {key: values[:9] for key, values in running["curve"].items()}
    for entry in results["entries"]:
        entry.update(tokens_per_second=None, peak_memory_bytes=None, scalars=None, equation=None)
    return complete(results)


def nothing_yet() -> dict[str, Any]:
    """A study that has just begun."""
    results = copy.deepcopy(partial())
    for run in results["runs"]:
        run.update(status="pending", error=None, curve={})
    return complete(results)


def only_failures() -> dict[str, Any]:
    """Every run failed, before its first validation."""
    results = made_up(PAIR)
    for run in results["runs"]:
        fail(results, run["entry"], run["seed"], at=0)
    return complete(results)


CASES = {
    "family": lambda: complete(made_up(sweep=True)),
    "quick": lambda: complete(made_up(PAIR)),
    "one seed": lambda: complete(made_up(PAIR, 1)),
    "partial": partial,
    "nothing yet": nothing_yet,
    "only failures": only_failures,
}


@lru_cache
def rendered(case: str) -> str:
    """The page of a case, made once."""
    return render(CASES[case]())


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


@pytest.mark.parametrize("case", CASES)
def test_every_stage_of_a_study_gives_one_well_formed_page(case: str) -> None:
    results = CASES[case]()
    text = rendered(case)
    page = Page(text)
    assert results["verdict"]["sentence"] in page.text
    assert len(set(page.ids)) == len(page.ids)
    # everything it refers to is in the file
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "<script" not in text
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", page.text)


def test_the_page_has_all_that_a_rerun_needs_and_what_failed() -> None:
    results = complete(fail(made_up(sweep=True), "adam", 1))
    text = Page(render(results)).text
    for needed in (
        results["command"],
        results["corpus"]["fingerprint"],
        results["versions"]["torch"],
        results["machine"]["cpu"],
        results["commit"],
        "8 GiB",
        "loss became NaN at step 160",
        "What this cannot show",
        results["limits"][0],
        "training.muon_lr",
    ):
        assert needed in text, needed


def test_names_and_messages_are_escaped() -> None:
    name = "<script>alert(1)</script>&[x=1]"
    results = made_up(["gradient_descent", name])
    fail(results, name, 0)
    results["runs"][-3]["error"] = "<b>bold</b>"
    text = render(complete(results))
    assert "<script>alert" not in text
    assert "<b>bold" not in text
    assert name in Page(text).text


def test_the_same_results_give_the_same_page() -> None:
    assert render(CASES["quick"]()) == rendered("quick")


def test_figures_use_only_the_palette() -> None:
    text = rendered("family")
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", svgs)
    assert set(re.findall(r"var\(--([\w-]+)\)", svgs)) <= set(PALETTE)


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("role", [role for role in PALETTE if role not in ("grid", "surface")])
def test_colours_contrast_with_the_surface(theme: int, role: str) -> None:
    one, two = sorted(luminance(PALETTE[name][theme]) for name in (role, "surface"))
    needed = 3.0 if role.startswith("series") else 4.5
    assert (two + 0.05) / (one + 0.05) >= needed


def test_the_report_replaces_the_one_before_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = write_report(CASES["nothing yet"](), tmp_path)
    before = path.read_text(encoding="utf-8")
    write_report(CASES["quick"](), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") != before


def test_a_report_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(PolyakError, match=r"report\.html"):
        write_report(CASES["quick"](), tmp_path / "missing")


@pytest.mark.parametrize("case", ["family", "partial", "nothing yet"])
def test_the_picture_is_a_png(case: str, tmp_path: Path) -> None:
    path = write_picture(CASES[case](), tmp_path / "picture.png")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") >= 1600


# ---------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(names)})")
    quiet = ("background-networking", "component-update", "sync", "gpu")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--no-first-run", *(f"--disable-{word}" for word in quiet)],
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    for case in CASES:
        (folder / f"{case}.html").write_text(rendered(case), encoding="utf-8")
    return {case: folder / f"{case}.html" for case in CASES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("width", "theme"), [(390, "light"), (390, "dark"), (800, "light"), (1280, "dark")]
)
def test_a_browser_shows_the_page(
    browser: Any, pages: dict[str, Path], case: str, width: int, theme: str
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=theme, offline=True
    )
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    address = pages[case].as_uri()
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


def test_no_text_of_a_figure_is_cut_or_overlaps_the_ticks(
    browser: Any, pages: dict[str, Path]
) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    for path in pages.values():
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
