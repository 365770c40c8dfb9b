"""Downstream tasks through lm-evaluation-harness, on local tasks in its own YAML."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import environment, polyak

from polyak import Transformer
from polyak.data.tokenizers import ByteTokenizer
from polyak.errors import DataError, UnknownNameError
from polyak.evaluation.subjects import load_subject

pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from lm_eval.utils import get_rolling_token_windows

from polyak.evaluation.downstream import Tasks
from polyak.evaluation.generation import complete
from polyak.evaluation.harness import HarnessModel, windows
from polyak.evaluation.sampling_config import SamplingConfig

QUESTIONS = 12


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multiple-choice task, a perplexity task and a generation task over small local files."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ("quick", "brown", "fox", "jumps", "over", "lazy", "dog", "in", "depth", "straße")
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for n in range(QUESTIONS):
            choices = [" ".join(words[n % 5 : n % 5 + k + 1]) for k in range(3)]
            row = {
                "question": f"the {words[n % 10]} is", "choices": choices, "answer": n % 3,
                "text": " ".join(words[n % 7 :]) + " the end",
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    until = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "e",
        "generation_kwargs": {"until": [" "], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    for name, own in (("choose", choice), ("roll", rolling), ("make", until)):
        # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": f"tiny_{name}", **common, **own}))
    return folder


@pytest.fixture
def model(tiny_model: Any) -> Transformer:
    found: Transformer = tiny_model("triple_momentum", vocab_size=260, context_length=24)
    return found


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


def directly(model: Transformer, context: str, continuation: str) -> tuple[float, bool]:
    """Token by token, each from as much context as fits one window over the whole."""
    tokenizer = ByteTokenizer()
    before = tokenizer.encode(context).tolist() or [255]
    after = tokenizer.encode(continuation).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([(before + after)[:-1][-24:]]))[0, -len(after) :, :256]
    values = torch.log_softmax(logits, -1)
    total = sum(float(row[token]) for row, token in zip(values, after, strict=True))
    return total, values.argmax(-1).tolist() == after


PAIRS = [
    ("the", " fox"), ("", "a"), ("a longer context than the model reads", " straße"), ("the", " f"),
    ("x", "twenty-four bytes of text"[:24]), ("a", " b"), ("lazy dog", " jumps over"),
]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihoods_are_those_of_each_request_alone(model: Transformer, batch_size: int) -> None:
    found = HarnessModel(model, ByteTokenizer(), batch_size).loglikelihood(requests(*PAIRS))
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        expected, likeliest = directly(model, context, continuation)
        assert value == pytest.approx(expected, abs=1e-10)
        assert greedy == likeliest


def test_the_likeliest_continuation_is_known_as_such(model: Transformer) -> None:
    tokenizer, config = ByteTokenizer(), SamplingConfig(temperature=0, max_new_tokens=1)
    adapter = HarnessModel(model, tokenizer)
    for context in ("a", "the", "lazy"):
        (found,) = complete(model, tokenizer, [context], config)
        token = [found.tokens[0]]
        other = [(found.tokens[0] + 1) % 256]
        before = tokenizer.encode(context).tolist()
        scores = adapter._loglikelihood_tokens(
            [(("", ""), before, token), (("", ""), before, other)]
        )
        assert [greedy for _, greedy in scores] == [True, False]


def test_texts_begin_with_the_tokenizers_prefix(model: Transformer) -> None:
    class Beginning(ByteTokenizer):
        prefix = (7,)

    plain = HarnessModel(model, ByteTokenizer())
    ours = HarnessModel(model, Beginning())
    assert plain.tok_encode("ab") == [97, 98]
    assert ours.tok_encode("ab") == [7, 97, 98]
    assert ours.tok_encode("ab", add_special_tokens=False) == [97, 98]
    assert (plain.prefix_token_id, ours.prefix_token_id) == (255, 7)
    requests = [SimpleNamespace(args=pair) for pair in (("quick", " fox"), ("", "fox"))]
    found = [value for value, _ in ours.loglikelihood(requests)]
    expected = [
        value
        for value, _ in plain._loglikelihood_tokens(
            [(("", ""), [7, *b"quick"], [*b" fox"]), (("", ""), [7], [*b"fox"])]
        )
    ]
    assert found == pytest.approx(expected, abs=1e-5)
    rolled = ours.loglikelihood_rolling([SimpleNamespace(args=("fox",))])
    assert rolled == pytest.approx(expected[1:], abs=1e-5)


def test_windows_score_each_token_once_and_are_the_harnesss_own() -> None:
    for count in (1, 5, 8, 9, 16, 17, 31):
        tokens = list(range(count))
        ours = list(windows([99], tokens, 8))
        assert [t for _, targets in ours for t in targets] == tokens
        assert ours == [(list(a), list(b)) for a, b in get_rolling_token_windows(tokens, 99, 8, 1)]
        assert all(len(targets) <= len(inputs) <= 8 for inputs, targets in ours)
    assert list(windows(range(20), [7, 8], 8)) == [([*range(13, 20), 7], [7, 8])]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_generations_are_those_of_each_request_alone(model: Transformer, batch_size: int) -> None:
    options = {"until": ["e", "\n"], "max_gen_toks": 9}
    asked = [("the", options), ("a lazy dog over there", options), ("x", {"max_gen_toks": 4})]
    found = HarnessModel(model, ByteTokenizer(), batch_size).generate_until(requests(*asked))
    for (context, given), text in zip(asked, found, strict=True):
        config = SamplingConfig(
            temperature=0, max_new_tokens=given["max_gen_toks"], stop=tuple(given.get("until", ()))
        )
        assert [text] == [
            c.text for c in complete(model, ByteTokenizer(), [context], config, quiet=True)
        ]


def test_scores_do_not_depend_on_the_batch_size_and_have_standard_errors(
    run: Path, tasks: Path
) -> None:
    subject = load_subject(run)
    loaded = Tasks(["tiny_choose", "tiny_roll", "tiny_make"], shots=1, folder=tasks)
    found = {size: loaded.evaluate(subject, size) for size in (1, 4, 50)}
    for rows in found.values():
        for row, first in zip(rows, found[1], strict=True):
            assert row["value"] == pytest.approx(first["value"], rel=1e-6)
            assert {**row, "value": 0, "standard_error": 0} == {
                **first,
                "value": 0,
                "standard_error": 0,
            }
    by_name = {(row["task"], row["metric"]): row for row in found[1]}
    row = by_name["tiny_choose", "acc_norm"]
    assert row["questions"] == QUESTIONS
    assert row["shots"] == 1
    p = row["value"]
    assert row["standard_error"] == pytest.approx((p * (1 - p) / (QUESTIONS - 1)) ** 0.5, rel=1e-6)
    assert row["requests"] == 3 * QUESTIONS
    assert row["cut_contexts"] > 0  # the model reads 16 bytes
    assert by_name["tiny_roll", "byte_perplexity"]["value"] > 1
    assert 0 <= by_name["tiny_make", "exact_match"]["value"] <= 1


def test_the_command_shows_scores_and_says_what_was_cut(
    runs: Path, tasks: Path, tmp_path: Path
) -> None:
    words = ("evaluate", runs, "--tasks", "tiny_choose", "--task-folder", tasks, "--limit", "6")
    found = polyak(*words, "--out", tmp_path / "out", cwd=tmp_path, cache=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "tiny_choose, 0-shot, 6 questions" in found.stdout
    assert found.stdout.count(" ± 0.") == 4  # two runs, two metrics
    assert "fatal" not in found.stderr
    assert "Careful: only the first 6 questions of each task" in found.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["kind"], results["status"]) == ("downstream", "complete")
    assert [run["name"] for run in results["runs"]] == ["gradient_descent", "triple_momentum"]
    for run in results["runs"]:
        assert {score["metric"] for score in run["scores"]} == {"acc", "acc_norm"}
        assert all(score["standard_error"] is not None for score in run["scores"])


@pytest.mark.slow
def test_unknown_tasks_and_folders_are_one_line(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnknownNameError, match="unknown task 'tiny_chose'; did you mean 'tiny_choose'"
    ):
        Tasks(["tiny_chose"], folder=tasks)
    with pytest.raises(DataError, match="does not exist"):
        Tasks(["tiny_choose"], folder=tmp_path / "none")
    (tmp_path / "bad.yaml").write_text(
        (tasks / "choose.yaml").read_text().replace("data.jsonl", "no")
    )
    with pytest.raises(DataError) as error:
        Tasks(["tiny_choose"], folder=tmp_path)
    assert "task 'tiny_choose': its data cannot be had" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "way", ["told to stay offline", pytest.param("no answer", marks=pytest.mark.slow)]
)
def test_a_data_set_out_of_reach_is_one_line(run: Path, tmp_path: Path, way: str) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    if way == "no answer":  # asked once: six tries would be told on standard error
        offline |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    words = ("evaluate", run, "--tasks", "hellaswag,arc_easy", "--out", tmp_path / "out")
    found = polyak(*words, cwd=tmp_path, cache=tmp_path, **offline)
    assert found.returncode == 1
    assert found.stderr.startswith("polyak evaluate: task 'hellaswag': its data cannot be had: ")
    assert "--task-folder" in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_papers_shots_are_used(monkeypatch: pytest.MonkeyPatch, run: Path, tasks: Path) -> None:
    import polyak.evaluation.downstream as module

    assert module.PAPER_SHOTS == {"hellaswag": 10, "arc_easy": 25}
    monkeypatch.setitem(module.PAPER_SHOTS, "tiny_choose", 3)
    rows = Tasks(["tiny_choose"], folder=tasks, limit=2).evaluate(load_subject(run))
    assert {row["shots"] for row in rows} == {3}


def test_without_the_extra_its_name_is_said(run: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from polyak.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, "evaluate", str(run), "--tasks", "hellaswag"],
        env=environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1
    assert found.stderr == (
        "polyak evaluate: downstream tasks need lm-evaluation-harness: pip install 'polyak[eval]'\n"
    )
