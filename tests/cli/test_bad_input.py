"""Bad input: one line that says what is wrong, a code other than 0, no traceback, nothing begun."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mounts import mounted
from tiny_runs import SETTINGS, polyak, settings_beside

from polyak.cli.main import COMMANDS, main

Streams = pytest.CaptureFixture[str]


def run(words: list[str], capsys: Streams) -> tuple[int, str]:
    """The exit code and standard error of the command line in this process."""
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as stop:  # options that cannot be read
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


def check(code: int, error: str, says: str, command: str = "compare") -> None:
    assert code not in (0, 130)
    assert error.count("\n") == 1, error
    assert error.endswith("\n")
    assert error.startswith(f"polyak {command}: ")
    assert says in error
    assert "Traceback" not in error
    assert not any(sign in error for sign in "│╭╰")


@pytest.fixture
def refused(corpus: Path, tmp_path: Path, capsys: Streams) -> Callable[..., None]:
    """`refused(says, *words)`: a tiny comparison with these words is refused, and says that."""
    out = tmp_path / "out"

    def compare(says: str, *words: object) -> None:
        given = [str(word) for word in words]
        base = ["compare", *settings_beside(given), "--out", str(out)]
        base += [] if "--corpus" in given else ["--corpus", str(corpus)]
        base += [] if "--steps" in given else ["--steps", "2"]
        check(*run([*base, *given], capsys), says)
        assert not out.exists()

    return compare


RULES = "gradient_descent,triple_momentum"


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("'triple_momentun'; did you mean 'triple_momentum'?", ["--rules", "triple_momentun"]),
        ("rules: nothing to compare", ["--rules", " , "]),
        ("'adam' is named twice", ["--rules", "adam,adam"]),
        ("num_heads=3 does not divide d_model=16", ["--set", "model.num_heads=3"]),
        ("num_heads=5 does not divide", ["--rules", "adam[num_heads=5]"]),
        ("in 'heavy_ball[mu=0.5]': 'mu' (known: ", ["--rules", "heavy_ball[mu=0.5]"]),
        ("'state_nrm'; did you mean 'state_norm'?", ["--rules", "nesterov[state_nrm=none]"]),
        ("state_norm='no' of nesterov: use one of layer", ["--rules", "nesterov[state_norm=no]"]),
        ("beta=2", ["--rules", "nesterov[beta=2]"]),
        ("frozen scalar of nesterov 'nu'", ["--rules", "nesterov[frozen=nu]"]),
        ("'mu' in 'nesterov[mu]' has no '='", ["--rules", "nesterov[mu]"]),
        ("'mu' is set twice", ["--rules", "nesterov[mu=0.1,mu=0.2]"]),
        ("cannot read 'nesterov[mu=0.1'", ["--rules", "nesterov[mu=0.1"]),
        ("would not see the same batches", ["--rules", "adam[context_length=8]"]),
        ("has no stream that starts from an embedding", ["--rules", "ortho[stream_start=zeros]"]),
        ("stream_start='ones' must be 'zeros'", ["--rules", "adam[stream_start=ones]"]),
        ("tie_embeddings='no' must be true or false", ["--rules", "adam[tie_embeddings=no]"]),
        ("'sdtlib'; did you mean 'stdlib'?", ["--corpus", "sdtlib"]),
        ("there is no file or folder of that name", ["--corpus", "/nowhere/at/all.txt"]),
        ("unknown tokenizer 'words'", ["--tokenizer", "words"]),
        ("'bpe-10' is too small", ["--tokenizer", "bpe-10"]),
        ("steps=0 must be a whole number of at least 1", ["--steps", "0"]),
        ("steps=-3 must be", ["--steps", "-3"]),
        ("--steps", ["--steps", "many"]),
        ("seeds=0 must be a whole number of at least 1", ["--seeds", "0"]),
        ("seeds=-1 must be", ["--seeds", "-1"]),
        ("--seeds", ["--seeds", "1.5"]),
        ("seeds=1000 must be below 1000", ["--seeds", "1000"]),
        ("jobs=0 must be", ["--jobs", "0"]),
        ("--match", ["--match", "time"]),
        (
            "polyak compare: Unrecognized options: --corpos, stdlib; did you mean --corpus?",
            ["--corpos", "stdlib"],
        ),
        ("'num_layer'; did you mean 'num_layers'?", ["--set", "model.num_layer=3"]),
        ("'muon_rate'; did you mean", ["--set", "training.muon_rate=3"]),
        ("write model.FIELD=VALUE or training.FIELD=VALUE", ["--set", "num_layers=3"]),
        ("num_layers='three' must be a whole number", ["--set", "model.num_layers=three"]),
        ("muon_lr=nan must be a number", ["--set", "training.muon_lr=nan"]),
        ("muon_lr=-1.0 must be a number", ["--set", "training.muon_lr=-1"]),
        ("has no '='", ["--set", "model.num_layers"]),
        ("use --rules", ["--set", "model.rule=adam"]),
        ("use --seeds", ["--set", "training.seed=1"]),
        ("use --steps", ["--set", "training.steps=1"]),
        ("batch_size=4; choose a divisor", ["--set", "training.micro_batch_size=3"]),
        ("eval_tokens=8 is less than one block", ["--set", "training.eval_tokens=8"]),
        ("is smaller than the 256 tokens", ["--set", "model.vocab_size=100"]),
        ("leave out either --quick or --rules", ["--quick", "--rules", "adam,muon"]),
        ("sweep='training.lr=1,2': write one of", ["--sweep", "training.lr=1,2"]),
        ("at least two different values", ["--sweep", "training.muon_lr=0.1"]),
        ("at least two different values", ["--sweep", "training.muon_lr=0.1,0.10"]),
        ("must be a number", ["--sweep", "training.muon_lr=a,b"]),
        ("muon_lr=-0.1 must be a number", ["--sweep", "training.muon_lr=-0.1,0.1"]),
        (
            "muon_lr is swept twice",
            ["--sweep=training.muon_lr=1,2", "--sweep=training.muon_lr=3,4"],
        ),
        (
            "muon_lr is set for all by --set",
            ["--set", "training.muon_lr=1", "--sweep", "training.muon_lr=3,4"],
        ),
        ("model.num_layers is set twice", ["--set", "model.num_layers=1"] * 2),
        ("needs something to match", ["--match", "params", "--rules", "adam"]),
        ("put a smaller entry first", ["--match", "params", "--rules", "adam,gradient_descent"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_line(
    says: str, words: list[str], refused: Callable[..., None]
) -> None:
    refused(
        says, *(words if "--rules" in words or "--quick" in words else ["--rules", RULES, *words])
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_one_line(refused: Callable[..., None]) -> None:
    refused("device='cuda': torch sees no CUDA device", "--quick", "--device", "cuda")


# Corpora


def test_bad_corpora_are_one_line(refused: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 50)
    (tmp_path / "short.txt").write_text("ten bytes.")
    (tmp_path / "tail.txt").write_text("word " * 30)
    (tmp_path / "records.jsonl").write_text('{"body": "text"}\n' * 50)
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    for name, says in (
        ("folder", "is empty: no files in it"),
        ("empty.txt", "is empty: it holds no document with any text"),
        ("binary.txt", "is binary"),
        ("short.txt", "is too short"),
        ("tail.txt", "the validation side of corpus 'tail.txt' is too short"),
        ("records.jsonl", "no field 'text'; its fields are: body"),
        ("broken.jsonl", "line 2: not JSON"),
    ):
        refused(says, "--quick", "--corpus", tmp_path / name)


# Users' rules


def test_bad_rule_files_are_one_line(refused: Callable[..., None], tmp_path: Path) -> None:
    head = "from polyak.rules import UpdateRule\n"
    files = {
        "good.py": head + "class Mine(UpdateRule):\n"
        "    def step(self, x, state, oracle):\n        return x + oracle(x), state\n",
        "broken.py": "def step(:\n",
        "raises.py": "1 / 0\n",
        "imports.py": "import no_such_module\n",
        "plain.py": "class Mine:\n    pass\nnumber = 3\n",
        "empty.py": head + "class Mine(UpdateRule):\n    pass\n",
        "fails.py": head + "class Mine(UpdateRule):\n"
        "    def step(self, x, state, oracle):\n        return x @ x, state\n",
        "taken.py": head + "from polyak.rules import register\n"
        "@register('adam')\nclass Mine(UpdateRule):\n    pass\n",
        "stream.py": head + "from polyak.rules import Stream\n"
        "class Mine(UpdateRule):\n    streams = (Stream('v', start='somewhere'),)\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "good.py", tmp_path / "other" / "good.py")
    for rule, says in (
        ("nowhere.py:Mine", "does not exist; give path/to/file.py:ClassName"),
        ("good.py:Mime", "does not define 'Mime'; did you mean 'Mine'?"),
        ("broken.py:Mine", "does not import: SyntaxError"),
        ("raises.py:Mine", "does not import: ZeroDivisionError"),
        ("imports.py:Mine", "does not import: ModuleNotFoundError"),
        ("plain.py:Mine", "is not a subclass of polyak.rules.UpdateRule"),
        ("plain.py:number", "is not a subclass of polyak.rules.UpdateRule"),
        ("empty.py:Mine", "Mine defines no step(self, x, state, oracle)"),
        ("fails.py:Mine", "rule Mine: its step fails: RuntimeError"),
        ("taken.py:Mine", "rule name 'adam' is taken"),
        ("stream.py:Mine", "start='somewhere' must be one of"),
        ("good.py:Mine[beta=1]", "'beta'"),
        (f"good.py:Mine,{tmp_path}/other/good.py:Mine", "are both called 'Mine'"),
    ):
        refused(says, "--rules", f"gradient_descent,{tmp_path}/{rule}")
    refused("does not import: No module named", "--rules", "adam,no_such_module:Mine")


# Folders


@pytest.mark.parametrize("under", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_one_line(
    under: str, corpus: Path, tmp_path: Path, capsys: Streams
) -> None:
    (tmp_path / "file").write_text("in the way")
    words = ["compare", *SETTINGS, "--rules", RULES, "--corpus", str(corpus)]
    found = run([*words, "--out", str(tmp_path / under)], capsys)
    check(*found, "cannot create folder")


def test_a_read_only_folder_is_one_line(corpus: Path, tmp_path: Path, capsys: Streams) -> None:
    words = ["compare", *SETTINGS, "--rules", RULES, "--corpus", str(corpus), "--out"]
    with mounted(tmp_path / "disk", "ro,size=1m") as disk:
        check(*run([*words, str(disk)], capsys), f"cannot write in {disk}: Read-only file system")
        check(*run([*words, str(disk / "new")], capsys), "Read-only file system")


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(
    corpus: Path, tmp_path: Path, capsys: Streams
) -> None:
    words = ["compare", *SETTINGS, "--rules", "gradient_descent", "--corpus", str(corpus)]
    words += ["--seeds", "1", "--steps", "2"]
    with mounted(tmp_path / "disk", "size=1m") as disk:
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(2 << 20))
        check(*run([*words, "--out", str(disk / "out")], capsys), "No space left on device")
        # a little room: the run can begin, but its model or the report finds none
        filler.write_bytes(bytes((1 << 20) - (48 << 10)))
        code, error = run([*words, "--out", str(disk / "out")], capsys)
        check(code, error, "No space left on device")
        filler.unlink()
        code, error = run([*words, "--out", str(disk / "out")], capsys)
        assert (code, error) == (0, "")
        assert (disk / "out" / "report.html").stat().st_size > 0
        left = [path.name for path in disk.rglob("*") if path.name.endswith(".tmp")]
        assert left == []


# Other commands, and a process of its own


def test_unknown_commands_offer_the_nearest(capsys: Streams) -> None:
    code, error = run(["compere"], capsys)
    assert code == 2
    assert error.count("\n") == 1
    assert error.startswith("polyak: unknown command 'compere'; did you mean 'compare'?")


@pytest.mark.parametrize(
    ("command", "says", "words"),
    [
        ("rules", "'nestrov'; did you mean 'nesterov'?", ["--rules", "nestrov"]),
        ("rules", "does not divide d_model", ["--num-heads", "3"]),
        ("rules", "--num-layers", ["--num-layers", "few"]),
        ("rules", "--format", ["--format", "yaml"]),
        ("bench", "rounds=0 must be a whole number of at least 1", ["--rounds", "0"]),
        (
            "import",
            "tokens=0 must be a whole number of at least 1",
            ["best.pt", "run", "--tokens", "0"],
        ),
        ("bench", "threads=0 must be a whole number of at least 1", ["--threads", "0"]),
        ("bench", "lengths='9,x' must be", ["--what", "attention", "--lengths", "9,x"]),
        ("bench", "lengths='0' must be whole", ["--what", "attention", "--lengths", "0"]),
        ("bench", "lengths is for --what attention", ["--lengths", "40"]),
        ("bench", "'nestrov'; did you mean 'nesterov'?", ["--rules", "nestrov"]),
        ("bench", "--round", ["--round", "3"]),
    ],
)
def test_other_commands_answer_bad_options_in_one_line(
    command: str, says: str, words: list[str], capsys: Streams
) -> None:
    check(*run([command, *words], capsys), says, command)


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("did you mean 'triple_momentum'?", ["--rules", "triple_momentun"]),
        ("--steps", ["--steps", "many"]),
    ],
)
def test_a_process_answers_as_the_function_does(
    says: str, words: list[str], tmp_path: Path
) -> None:
    found = polyak("compare", *words, cwd=tmp_path, cache=tmp_path)
    check(found.returncode, found.stderr, says)
    assert found.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where(capsys: Streams) -> None:
    with pytest.raises(ValueError, match="nestrov"):
        main(["rules", "--rules", "nestrov", "--debug"])


# Options given twice, and folders that hold something else


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--steps", ["train", "--steps", "3", "--steps=4"]),
        ("--out", ["compare", "--out", "a", "--set", "model.num_layers=1", "--out", "a"]),
        ("--quick", ["compare", "--quick", "--quick"]),
        ("--text-field", ["prepare", "x", "--text-field", "a", "--text_field", "b"]),
        ("--top-p", ["generate", "run", "--top-p", "0.5", "--top-p", "0.9"]),
        ("--corpus", ["sharpness", "run", "--rho", "1", "--rho", "2", "--corpus=a", "--corpus=b"]),
    ],
)
def test_an_option_given_twice_is_one_line(
    option: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    said = f"polyak {words[0]}: {option} is given twice; leave one out\n"
    assert capsys.readouterr().err == said


def options_of(command: str) -> dict[str, bool]:
    """Every option in a command's help, and whether it may be given several times."""
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", "", said.getvalue())
    _, *blocks = re.split(r"\n +(?=--[a-z])", text.partition("show this help")[2])
    return {block.split()[0]: "repeatable" in block for block in blocks}


@pytest.mark.parametrize(
    "command", [*sorted({*COMMANDS} - {"study"}), "study factorial", "study landscape"]
)
def test_no_option_but_those_of_several_values_is_given_twice(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of(command)
    assert len(options) > 1
    for name, several in options.items():
        code, error = run([*command.split(), f"{name}=1", name, "2"], capsys)
        assert code != 0
        assert (error == f"polyak {command}: {name} is given twice; leave one out\n") != several


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "--quick"],
        ["generate", "run", "--prompt", "a"],
        ["bench"],
        ["prepare", "stdlib", "--bench"],
        ["evaluate", "run"],
        ["report", "run"],
        ["sharpness", "run"],
        ["spectrum", "run"],
        ["dynamics", "run"],
        ["forgetting", "run", "--onto", "prose"],
        ["study", "landscape", "run"],
        ["study", "factorial", "--factors", "bias=true,false"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_no_command_writes_over_what_another_found(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(Path(__file__).parents[1] / "releases" / "0.1.0", tmp_path / "kept")
    monkeypatch.chdir(tmp_path / "kept")
    out = tmp_path / "measured"
    out.mkdir()
    for name, content, says in (
        ("results.json", '{"kind": "weather", "format": 1}', "holds the results of another"),
        ("report.html", "a page of my own", "holds a report.html of something else"),
    ):
        (out / name).write_text(content)
        assert main([*words, "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert says in error, error
        assert error.count("\n") == 1
        assert [(f.name, f.read_text()) for f in out.iterdir()] == [(name, content)]
        (out / name).unlink()
