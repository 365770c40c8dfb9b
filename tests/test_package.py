from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from tiny_runs import SETTINGS, write_corpus

import polyak

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    cited = re.search(r"^version: (\S+)$", citation, re.MULTILINE)
    dated = re.search(r'^date-released: "(\S+)"$', citation, re.MULTILINE)
    logged = re.search(r"^## (\S+) \((\S+)\)$", changelog, re.MULTILINE)
    assert cited is not None
    assert dated is not None
    assert logged is not None
    assert cited[1] == logged[1] == polyak.__version__
    assert dated[1] == logged[2]


def test_importing_polyak_imports_no_torch() -> None:
    program = (
        "import sys, polyak, polyak.compare.config, polyak.training.config.run\n"
        "polyak.ModelConfig()\n"
        "print('torch' in sys.modules, 'tyro' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_public_names_exist() -> None:
    for name in polyak.__all__:
        assert getattr(polyak, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = polyak.nothing


def build(folder: Path) -> Path:
    """The wheel, built from the source tree with what is installed here."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_whole_package_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    wheel = build(tmp_path)
    assert wheel.name == f"polyak-{polyak.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    source = ROOT / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    info = f"polyak-{polyak.__version__}.dist-info"
    assert {name for name in held if not name.startswith(info)} == wanted
    assert "polyak/py.typed" in held
    assert any(name.startswith("polyak/report/templates/") for name in held)
    assert f"{info}/licenses/LICENSE" in held


@pytest.mark.slow
def test_the_wheel_runs_in_an_environment_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("build")
    wheel = build(tmp_path)
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    paths = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    python = Path(paths["scripts"]) / Path(sys.executable).name
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*map(str, words)],
            cwd=tmp_path,
            env={**clean, "POLYAK_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    assert run(python, "-m", "pip", "install", "-q", "--no-deps", wheel).returncode == 0
    # the dependencies are those of this environment, without its editable polyak (a .pth file
    # further down the path is not read)
    here = sysconfig.get_paths()["purelib"]
    (Path(paths["purelib"]) / "dependencies.pth").write_text(f"{here}\n")
    where = run(python, "-c", "import polyak; print(polyak.__file__)").stdout.strip()
    assert Path(where).is_relative_to(home)
    script = Path(paths["scripts"]) / "polyak"
    assert run(script, "--version").stdout == f"polyak {polyak.__version__}\n"
    corpus = write_corpus(tmp_path)
    done = run(
        *(script, "compare", "--quick", "--corpus", corpus, "--out", "out", "--seeds", 1),
        *("--steps", 3, *SETTINGS),
    )
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["status"] == "complete"
    assert results["commit"] is None
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
