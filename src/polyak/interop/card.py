"""Model cards: the README.md of a shared model, with what its run measured and whom to cite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from polyak.errors import RunError
from polyak.nn.config import ModelConfig
from polyak.nn.cost import cost
from polyak.nn.pieces import AXES, opened
from polyak.nn.placement import placement_of
from polyak.nn.rule_places import renamed
from polyak.training.runs.folder import RunFolder, unfinished

PAPERS = {
    "arXiv:2605.24425": "Momentum Streams for Optimizer-Inspired Transformers",
    "arXiv:2601.23236": "YuriiFormer: A Suite of Nesterov-Accelerated Transformers",
    "arXiv:2208.00579": "Momentum Transformer",
}
"""Titles of the papers that rules name, as in CITATION.cff."""

_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{place}", trust_remote_code=True)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

The code is in the Python package polyak: `pip install "polyak[hf]"`. The file that
`trust_remote_code=True` runs only imports it; after `import polyak.interop.huggingface` that
argument is not needed."""


def model_card(run: str | Path, *, place: str = "FOLDER") -> str:
    """The card of a finished run.

    Args:
        run: its folder.
        place: what `from_pretrained` is to be given, in the card's example.

    Returns:
        Markdown with the front matter that the hub reads. Every number is the run's own.

    Raises:
        RunError: not a finished run.
    """
    folder = RunFolder(Path(run))
    if not folder.settings_file.exists():
        raise RunError(f"{run} is not a run: run.json is missing")
    recorded, result = folder.recorded(), folder.result()
    if result is None:
        raise unfinished(run)
    try:
        settings, environment = recorded["settings"], recorded["environment"]
        config = ModelConfig.from_dict(opened(folder.path, settings["model"]))
        training = _training(settings, environment, result, folder)
    except (KeyError, TypeError) as error:
        raise RunError(
            f"{folder.settings_file} is not a run's: {error!r} is missing or odd"
        ) from error
    return card(config, training, place=place)


def card(
    config: ModelConfig, training: Mapping[str, str] | None = None, *, place: str = "FOLDER"
) -> str:
    """The card of a model.

    Args:
        config: the model.
        training: what its training measured, by name; None if that is not known.
        place: see `model_card`.
    """
    placement = placement_of(config)
    several = len(placement.parts) > 1
    title = "" if several else placement.only.architecture
    equations = [
        (f"    {placed.part.place or 'else'}: " if several else "    ") + placed.rule.equation
        for placed in placement.parts
        if placed.rule.equation
    ]
    use = _USE.format(place=place)
    if not config.causal:
        use = (
            use.partition("inputs =")[0].replace("CausalLM", "MaskedLM")
            + "```"
            + (use.partition("```\n")[2].partition("```")[2])
        )
    parts = [
        _front_matter(config),
        f"# {title or placement.name}, {_count(cost(config).total_parameters)} parameters",
        f"A {'language model' if config.causal else 'masked-language model (encoder)'} whose "
        f"layers are steps of the optimizer `{placement.name}`: attention and MLP say where to go, "
        "the update rule says how.",
        "\n".join(equations),
        "## Use",
        use,
        "## Model",
        _table(_architecture(config)),
        "## Training",
        _table(training)
        if training
        else "Not recorded with these weights: they were not shared from a run's folder.",
        "## Citation",
        _citation(dict.fromkeys(placed.rule.paper for placed in placement.parts)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(config: ModelConfig) -> str:
    task = "text-generation" if config.causal else "fill-mask"
    names = dict.fromkeys(placed.rule.name for placed in placement_of(config).parts)
    tags = "".join(f"\n- {tag}" for tag in ("polyak", *names))
    return f"---\nlibrary_name: transformers\npipeline_tag: {task}\ntags:{tags}\n---"


def _shareable(name: str) -> str:
    file, colon, of = name.rpartition(":")
    return f"{Path(file).name}:{of} (not included)" if colon else name


def _architecture(config: ModelConfig) -> dict[str, str]:
    costs = cost(config)
    fields = {k: v for k, v in config.to_dict().items() if v not in (None, {}, "", ())}
    for axis in AXES:  # of a user's file: where it lies on one machine is nobody's concern
        fields[axis] = renamed(fields[axis], _shareable)
    rule = fields.pop("rule")
    groups = {name: count for name, count in costs.parameters.items() if count}
    return {
        "rule": f"`{rule}`",
        **{name: f"`{value}`" for name, value in fields.items()},
        "parameters": f"{costs.total_parameters:,} ("
        + ", ".join(f"{name} {count:,}" for name, count in groups.items())
        + ")",
        "FLOPs a token, forward": f"{costs.forward_flops_per_token:,}",
        "FLOPs a token, training": f"{costs.training_flops_per_token:,}",
    }


def _training(
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
    result: Mapping[str, Any],
    folder: RunFolder,
) -> dict[str, str]:
    """What the run measured. What it does not know, as of an imported model, is left out."""
    corpus, training = settings.get("corpus"), settings.get("training")
    validation, loss = settings.get("validation"), result["loss"]
    rows: dict[str, str] = {}
    if corpus:
        rows["corpus"] = f"{corpus['name']} (SHA-256 {corpus['fingerprint'][:16]}…)"
    rows["tokenizer"] = settings["tokenizer"]["name"]
    for name in ("steps", "tokens"):
        if result.get(name):
            rows[name] = f"{result[name]:,}"
    flops = [row["flops"] for row in folder.metrics() if row.get("flops")]
    if flops:
        rows["FLOPs"] = f"{flops[-1]:.3g}"
    if training:
        rows["optimizer"] = f"{training['optimizer']}, batch {training['batch_size']} sequences"
        rows["seed"] = str(training["seed"])
    if loss is not None:
        counted = f" ({validation['tokens']:,} tokens)" if validation else ""
        rows["validation loss"] = f"{loss:.4f} nats a token{counted}"
        if loss < 700:  # beyond, exp overflows
            rows["perplexity"] = f"{math.exp(loss):.4g}"
        if validation and validation.get("bytes"):
            bits = loss * validation["tokens"] / validation["bytes"] / math.log(2)
            rows["validation bits per byte"] = f"{bits:.4f}"
    losses = [row["loss"] for row in folder.metrics("train") if row.get("loss") is not None]
    if losses:
        rows["training loss, last logged"] = f"{losses[-1]:.4f} nats a token"
    if training:  # else the machine and the versions are those of the import
        rows |= _where(environment, result)
    return rows


def _where(environment: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str]:
    machine, rows = environment["machine"], {}
    if result.get("seconds"):
        rows["time"] = f"{result['seconds']:,.1f} s"
    if result.get("tokens_per_second"):
        rows["tokens a second"] = f"{result['tokens_per_second']:,.0f}"
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    cores = f"{machine['cores']} core{'s' if machine['cores'] != 1 else ''}"
    rows["hardware"] = f"{machine['cpu']}, {cores}{device}"
    rows["versions"] = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    return rows


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _citation(papers: Iterable[str]) -> str:
    from polyak.version import __version__

    entries = [
        "@software{polyak,\n"
        "  title = {polyak: Transformers whose layers are optimizer steps},\n"
        "  author = {{The polyak authors}},\n"
        f"  version = {{{__version__}}}\n}}"
    ]
    for paper in papers:
        if paper in PAPERS:
            number = paper.removeprefix("arXiv:")
            entries.append(
                f"@misc{{arxiv{number.replace('.', '_')},\n  title = {{{PAPERS[paper]}}},\n"
                f"  eprint = {{{number}}},\n  archivePrefix = {{arXiv}},\n"
                f"  url = {{https://arxiv.org/abs/{number}}}\n}}"
            )
        elif paper:
            entries.append(f"% the rule: {paper}")
    return "```bibtex\n" + "\n".join(entries) + "\n```"


def _count(number: int) -> str:
    for size, letter in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)
