"""Every code block of the documentation runs, or says why not and is of its language."""

from __future__ import annotations

import importlib
import importlib.util
import keyword
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blocks import PAGES, ROOT, blocks, commands, faults, parse, run, smaller
from tiny_runs import environment, run_config, write_corpus

from polyak.errors import PolyakError
from polyak.training.loop import train
from polyak.training.train_config import TrainOptions, resolve

GIVEN = {
    "README.md": ("runs/mine",),
    "analysis-dynamics.md": ("runs/mine",),
    "analysis-sharpness.md": ("runs/mine",),
    "analysis-spectrum.md": ("runs/mine",),
    "convert.md": ("runs/plain",),
    "huggingface.md": ("runs/mine",),
    "recipes.md": ("texts",),
    "rules.md": ("docs/examples",),
}
"""What lies in the folder where a page's blocks run: what its reader has by then."""
EXTRAS = {
    "backbones.md": ("transformers",),
    "guide.md": ("transformers", "lm_eval", "accelerate"),
    "huggingface.md": ("transformers", "accelerate"),
}
"""Modules of the optional dependencies that a page says it needs."""
RUN = [page for page in PAGES if any(block.runs for block in blocks(page))]
IN_PROCESS = [p for p in RUN if all(b.language != "bash" for b in blocks(p) if b.runs)]

Give = Callable[[str], Path]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class ParsedError(Exception):
    """Thrown once the options are read, so that nothing of the command runs."""


@pytest.fixture
def read_options(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Has a command's own parser read its words, and for `train` its recipe resolved."""

    def read(words: list[str]) -> None:
        name, *rest = words
        module = importlib.import_module(f"polyak.cli.{name}{'_' * keyword.iskeyword(name)}")
        original = module.parse

        def only(*arguments: Any) -> None:
            options = original(*arguments)
            own = isinstance(options, TrainOptions) and not (options.resume or options.init)
            if own and not (options.recipe or "").endswith(".toml"):
                resolve(options)
            raise ParsedError

        with monkeypatch.context() as patch:
            patch.setattr(module, "parse", only)
            with pytest.raises(ParsedError):
                module.main(rest)

    return read


@every_page
def test_every_block_runs_or_says_why_not(page: Path) -> None:
    assert faults(page) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```\npolyak rules\n```\n", "is not one of"),
        ("``` bash\npolyak rules\n```\n<!-- no-run: late -->\n", "before no block"),
        ("<!-- no-run -->\n```bash\npolyak rules\n```\n", "no reason"),
        ("<!-- no-run: -->\n```bash\npolyak rules\n```\n", "no reason"),
        ("<!-- no-run on this page -->\n```bash\npolyak rules\n```\n", "no reason"),
        ("<!-- it is no-run: long -->\n```bash\npolyak rules\n```\n", "not read as a mark"),
        ("<!-- no-run: long -->\n\n```bash\npolyak rules\n```\n", "before no block"),
        ("so:\n\n    polyak rules\n", "without a fence"),
        ("so:\n\n    steps = 600\n", "without a fence"),
        ("- so:\n\n  ```bash\n  polyak rules\n  ```\n", "without a fence"),
    ],
)
def test_a_block_that_would_go_unseen_is_a_fault(text: str, said: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert any(said in fault for fault in faults(page))


@pytest.mark.parametrize(
    "code", ["polyak tran", "nice; polyak train --step 3", "polyak train --set training.step=3"]
)
def test_a_command_that_does_not_exist_is_a_fault(
    code: str, read_options: Callable[[list[str]], None]
) -> None:
    (words_of_it,) = commands(code)
    with pytest.raises((Exception, SystemExit)):
        read_options(words_of_it)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("```python\nprint(nowhere)\n```\n", NameError),
        ("```bash\nfalse\n```\n", AssertionError),
        ("```toml\n# my.toml\nbase = 'quick'\nstep = 3\n```\n", PolyakError),
    ],
)
def test_a_block_that_fails_fails_its_page(
    code: str, fault: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fault):
        run(page)


@every_page
def test_blocks_are_of_their_language_and_commands_exist(
    page: Path, read_options: Callable[[list[str]], None]
) -> None:
    for block in dict.fromkeys((*blocks(page), *smaller(page))):
        parse(block)
        if block.language == "bash":
            for found in commands(block.code):
                try:
                    read_options(found)
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"{block.place}: polyak {found}") from error


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("docs-cache")


@pytest.fixture(scope="session")
def give(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Give:
    """Makes what a reader has, tiny, once: two runs and a folder of texts."""
    folder = tmp_path_factory.mktemp("given")

    def made(name: str) -> Path:
        path = folder / name
        if path.exists():
            return path
        corpus = write_corpus(folder)
        if name == "texts":
            path.mkdir()
            shutil.copy(corpus, path)
        else:
            rule = "triple_momentum" if name == "runs/mine" else "gradient_descent"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("POLYAK_CACHE", str(cache))
                train(run_config(corpus, rule, num_layers=2, context_length=24), path)
        return path

    return made


@pytest.fixture
def reader(tmp_path: Path, give: Give) -> Callable[[Path], Path]:
    """The folder in which a page's blocks run, with what its reader has by then."""

    def at(page: Path) -> Path:
        for module in EXTRAS.get(page.name, ()):
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed")
        for name in GIVEN.get(page.name, ()):
            inside = ROOT / name  # of the clone that the reader has
            shutil.copytree(inside if inside.exists() else give(name), tmp_path / name)
        return tmp_path

    return at


@pytest.mark.parametrize("page", IN_PROCESS, ids=[page.name for page in IN_PROCESS])
def test_blocks_run(
    page: Path, reader: Callable[[Path], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYAK_CACHE", str(cache))
    monkeypatch.chdir(reader(page))
    assert run(page) > 0


BY_COMMAND = [page for page in RUN if page not in IN_PROCESS]


@pytest.mark.slow
@pytest.mark.parametrize("page", BY_COMMAND, ids=[page.name for page in BY_COMMAND])
def test_blocks_with_commands_run(page: Path, reader: Callable[[Path], Path], cache: Path) -> None:
    folder = reader(page)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/docs/blocks.py"), str(page)],
        cwd=folder,
        env=environment(cache, PATH=path, HOME=str(folder), HF_HOME=str(folder / "hub")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
