"""Tiny copies of the hub's datasets, laid out as the hub lays them out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

STORIES = {
    "train": [f"Once upon a time {number} foxes met.\n\nThe end." for number in range(300)],
    "validation": [f"One day {number} hens sang." for number in range(30)],
}
PAGES = [f"Page {number}: naïve “web” text, 数 {number * number}.\nMore." for number in range(400)]
PASSAGES = [f'"Well," said number {number}, "well' for number in range(25)]
CRAWL = {
    "train": [f"Never read {number}" for number in range(50)],
    "validation": [f"Crawled text {number}\nwith a line" for number in range(60)],
}


def articles(split: str, count: int) -> list[list[str]]:
    """Articles as lists of lines, in the form of WikiText."""
    return [
        [
            "",
            f" = {split} article {number} = \n",
            "",
            f" The first paragraph @-@ of {number} . \n",
            " = = A section = = \n",
            "",
            f" Here x = 1 = {number} . \n",
        ]
        for number in range(count)
    ]


ARTICLES = {split: articles(split, count) for split, count in
            (("train", 40), ("validation", 5), ("test", 6))}  # fmt: skip


def write(root: Path) -> Path:
    """Every dataset that `polyak.data.hub.HUB` names, as `$POLYAK_HUB` wants them."""
    stories = root / "roneneldan" / "TinyStories"
    _parquet(stories / "data/train-00000-of-00002-2d5a1467fff1081b.parquet", STORIES["train"][:180])
    _parquet(stories / "data/train-00001-of-00002-5852b56a2bd28fd9.parquet", STORIES["train"][180:])
    _parquet(
        stories / "data/validation-00000-of-00001-869c898b519ad725.parquet", STORIES["validation"]
    )
    _card(stories, "license: cdla-sharing-1.0\n")
    pages = root / "Skylion007" / "openwebtext"
    for shard in range(4):
        _parquet(pages / f"plain_text/train-{shard:05}-of-00004.parquet", PAGES[shard::4])
    _card(pages, _configs("plain_text", {"train": "plain_text/train-*"}))
    wikitext = root / "Salesforce" / "wikitext"
    card = "configs:\n"
    for config in ("wikitext-103-raw-v1", "wikitext-103-v1"):
        for split, texts in ARTICLES.items():
            lines = [line for article in texts for line in article]
            if config == "wikitext-103-v1":
                lines = [line.replace("first", "<unk>") for line in lines]
            _parquet(wikitext / config / f"{split}-00000-of-00001.parquet", lines)
        card += _configs(config, {split: f"{config}/{split}-*" for split in ARTICLES})[9:]
    _card(wikitext, card)
    crawl = root / "allenai" / "c4"
    for split, texts in CRAWL.items():
        for shard in range(2):
            records = [{"text": text, "timestamp": "2019", "url": "u"} for text in texts[shard::2]]
            _json(crawl / "en" / f"c4-{split}.{shard:05}-of-00002.json.gz", records)
    _card(crawl, _configs("en", {split: f"en/c4-{split}.*.json.gz" for split in CRAWL}))
    passages = root / "EleutherAI" / "lambada_openai"
    _json(passages / "data" / "lambada_test.jsonl", [{"text": text} for text in PASSAGES])
    _card(passages, _configs("default", {"test": "data/lambada_test.jsonl"}))
    return root


def _configs(name: str, files: dict[str, str]) -> str:
    lines = ["configs:", f"- config_name: {name}", "  data_files:"]
    for split, pattern in files.items():
        lines += [f"  - split: {split}", f"    path: {pattern}"]
    return "\n".join(lines) + "\n"


def _card(folder: Path, header: str) -> None:
    (folder / "README.md").write_text(f"---\n{header}---\n\n# Dataset card\n")


def _parquet(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path, row_group_size=50)


def _json(path: Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
