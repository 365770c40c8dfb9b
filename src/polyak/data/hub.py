"""Corpora of the papers by name, streamed from the Hugging Face hub or from a local copy of it.

Nothing here contacts the hub until documents are asked for, so a corpus that was prepared once is
found again offline. `$POLYAK_HUB` names a folder with copies of repositories, each as the hub
lays it out (`$POLYAK_HUB/roneneldan/TinyStories/README.md`, `…/data/train-….parquet`); they are
read by the same code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

from polyak.data.documents import Document, fingerprint_of
from polyak.data.readers import text_of
from polyak.errors import ConfigError, DataError, MissingExtraError, unknown
from polyak.files import sha256_of

MIRROR = "POLYAK_HUB"
_PATIENCE = 10.0  # seconds for the hub's first answer


class HubError(DataError):
    """The hub cannot be reached, or the connection broke; what was prepared so far is kept."""


class Split(NamedTuple):
    """A split of a dataset and the side it becomes; None where the documents are split by hash."""

    name: str
    side: str | None


@dataclass(frozen=True, kw_only=True)
class HubCorpus:
    """Where a named corpus lies on the hub, and how it is split.

    Attributes:
        repository: Its name on the hub.
        config: The configuration (subset) of the dataset; None for its only one.
        splits: The dataset's splits that are read, in this order.
        about: One line for `--help` and documentation.
        documents: The first so many documents of each split; None for all.
        joined: `articles` joins lines into articles, `lines` leaves out empty lines.
        held_out: Share of the documents held out by hash where no split is a side of its own.
    """

    repository: str
    config: str | None = None
    splits: tuple[Split, ...]
    about: str
    documents: int | None = None
    joined: Literal["articles", "lines"] | None = None
    held_out: float = 0.05

    @property
    def own_sides(self) -> tuple[str, ...]:
        """The sides that the dataset decides itself; empty where documents are split by hash."""
        return tuple(split.side for split in self.splits if split.side is not None)


_OWN = (Split("train", "train"), Split("validation", "validation"))
_WIKITEXT = (*_OWN, Split("test", "test"))

HUB: dict[str, HubCorpus] = {
    "tinystories": HubCorpus(
        repository="roneneldan/TinyStories",
        splits=(Split("train", None),),
        held_out=0.005,
        about="stories in small words; 0.5% of its train are held out, as in MS",
    ),
    "tinystories-own": HubCorpus(
        repository="roneneldan/TinyStories",
        splits=_OWN,
        about="the same with the dataset's own validation",
    ),
    "openwebtext": HubCorpus(
        repository="Skylion007/openwebtext",
        splits=(Split("train", None),),
        about="web pages; 5% of the documents are held out",
    ),
    "wikitext-103": HubCorpus(
        repository="Salesforce/wikitext",
        config="wikitext-103-raw-v1",
        splits=_WIKITEXT,
        joined="articles",
        about="Wikipedia articles; its own train, validation and test",
    ),
    "wikitext-103-lines": HubCorpus(
        repository="Salesforce/wikitext",
        config="wikitext-103-v1",
        splits=_WIKITEXT,
        joined="lines",
        about="as MS evaluates it: with <unk>, every non-empty line a document",
    ),
    "c4": HubCorpus(
        repository="allenai/c4",
        config="en",
        splits=(Split("validation", "validation"),),
        documents=5000,
        about="for evaluation: the first 5,000 validation documents; c4[documents=N]",
    ),
    "lambada": HubCorpus(
        repository="EleutherAI/lambada_openai",
        config="default",
        splits=(Split("test", "validation"),),
        about="for evaluation: passages of novels, the test split",
    ),
}
"""The corpora by name. MS: arXiv 2605.24425, whose released code names these repositories."""


def parse(name: str) -> HubDocuments | None:
    """The corpus that `tinystories` or `c4[documents=20000]` names; None if it names none.

    Options, separated by commas: `documents` (the first so many of each split), `revision` (a
    commit or tag of the dataset).

    Raises:
        UnknownNameError, ConfigError: an option that does not exist, or a value it cannot have.
    """
    match = re.fullmatch(r"([^\[\]/\\]+)(?:\[(.*)\])?", name)
    if not match or match[1] not in HUB:
        return None
    corpus, documents, revision = HUB[match[1]], HUB[match[1]].documents, None
    for option in (match[2] or "").split(",") if match[2] is not None else ():
        key, equals, value = (part.strip() for part in option.partition("="))
        if key not in ("documents", "revision"):
            raise unknown(f"option of corpus {match[1]!r}", key, ("documents", "revision"))
        if key == "revision" and re.fullmatch(r"[\w./-]+", value):
            revision = value
        elif key == "documents" and re.fullmatch(r"[1-9][0-9]{0,11}", value):
            documents = int(value)
        else:
            kind = "a whole number of at least 1" if key == "documents" else "a commit or tag"
            shown = f"{key}{equals}{value}"
            raise ConfigError(f"corpus {name!r}: {shown!r} must be {key}=N with {kind}")
    return HubDocuments(name=match[1], corpus=corpus, limit=documents, pinned=revision)


@dataclass(kw_only=True)
class HubDocuments:
    """The documents of a named corpus; iterating streams them."""

    name: str
    corpus: HubCorpus
    limit: int | None
    pinned: str | None
    text_field: str = "text"
    _revision: str | None = field(default=None, init=False)

    @property
    def mirror(self) -> Path | None:
        """The local copy of the repository, if `$POLYAK_HUB` is set.

        Raises:
            DataError: it is set, and holds no such copy.
        """
        root = os.environ.get(MIRROR)
        if not root:
            return None
        folder = Path(root).expanduser() / self.corpus.repository
        if not folder.is_dir():
            raise DataError(
                f"${MIRROR} is {root}, but it holds no folder {self.corpus.repository}; make one "
                f"with {_download(self.corpus.repository, '$' + MIRROR)}, or unset {MIRROR}"
            )
        return folder

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what is read: of a local copy's files, else of the hub's address.

        The hub is not contacted, so the revision is not part of it unless it is pinned.
        """
        asked = [self.corpus.repository, self.corpus.config, self.corpus.joined, self.text_field]
        plan = json.dumps([*asked, self.corpus.splits, self.limit, self.pinned])
        if self.mirror is None:
            return fingerprint_of("hub 1", [(plan, "")])
        return fingerprint_of("hub copy 1", [(plan, self.connect())])

    def connect(self) -> str:
        """The revision that is read: the commit on the hub, or the hash of a local copy's files.

        Raises:
            HubError: the hub cannot be reached.
            DataError: it does not have the dataset or the revision.
        """
        if self._revision is None:
            folder = self.mirror
            self._revision = _commit(self) if folder is None else self._hash(folder)
        return self._revision

    def describe(self) -> dict[str, Any]:
        """What the manifest says about where the documents come from."""
        return {
            "repository": self.corpus.repository,
            "config": self.corpus.config,
            "splits": {split.name: split.side or "by hash" for split in self.corpus.splits},
            "documents": self.limit,
            "revision": self.connect(),
        }

    def __iter__(self) -> Iterator[Document]:
        return iter(self.reader(None))

    def reader(self, position: Any) -> HubReader:
        """The documents from a `HubReader.position` on."""
        return HubReader(self, position)

    def _hash(self, folder: Path) -> str:
        """SHA-256 over the names and contents of the files that make up the splits."""
        with _speaking(self):
            builder = _datasets().load_dataset_builder(str(folder), self.corpus.config)
            digest = sha256()
            for split in self.corpus.splits:
                for found in (builder.config.data_files or {}).get(split.name, ()):
                    path = Path(str(found))
                    name = os.path.relpath(path, Path(builder.base_path).resolve())
                    entry = [split.name, Path(name).as_posix(), sha256_of(path)]
                    digest.update(json.dumps(entry).encode())
        return digest.hexdigest()

    def open(self, split: str) -> Any:
        """One split as a `datasets.IterableDataset`."""
        revision, folder = self.connect(), self.mirror
        with _speaking(self):
            datasets = _datasets()
            torch, datasets.config.TORCH_AVAILABLE = datasets.config.TORCH_AVAILABLE, False
            try:  # it would import torch for nothing
                return datasets.load_dataset(
                    self.corpus.repository if folder is None else str(folder),
                    self.corpus.config,
                    split=split,
                    streaming=True,
                    revision=revision if folder is None else None,
                )
            finally:
                datasets.config.TORCH_AVAILABLE = torch


class HubReader:
    """Streams the documents of a corpus; see `documents.Reader`."""

    def __init__(self, source: HubDocuments, position: Any) -> None:
        start = position or {"split": 0, "documents": 0, "state": None, "pending": []}
        self._source = source
        self._split: int = start["split"]
        self._documents: int = start["documents"]
        self._pending: list[str] = list(start["pending"])
        self._state: Any = start["state"]
        self._dataset: Any = None

    def position(self) -> dict[str, Any]:
        """See `documents.Reader.position`."""
        return {
            "split": self._split,
            "documents": self._documents,
            "state": self._state if self._dataset is None else self._dataset.state_dict(),
            "pending": self._pending,
        }

    def before(self) -> None:
        """Unknown: a document may come from many records."""
        return

    def __iter__(self) -> Iterator[Document]:
        source = self._source
        limit = source.limit
        while self._split < len(source.corpus.splits):
            split, side = source.corpus.splits[self._split]
            self._dataset = source.open(split)
            if self._state is not None:
                self._dataset.load_state_dict(self._state)
            texts = _JOIN[source.corpus.joined](self._records(split), self._pending)
            while limit is None or self._documents < limit:
                text = next(texts, None)
                if text is None:
                    break
                self._documents += 1
                yield Document(f"{split}:{self._documents}", text, side)
            if limit is not None and self._documents < limit != source.corpus.documents:
                warnings.warn(
                    f"corpus {source.name!r}: the {split} split has only {self._documents} "
                    f"documents, fewer than documents={limit}",
                    stacklevel=2,
                )
            self._split, self._documents, self._pending = self._split + 1, 0, []
            self._dataset = self._state = None

    def _records(self, split: str) -> Iterator[str]:
        with _speaking(self._source):
            for number, record in enumerate(self._dataset):
                where = f"corpus {self._source.name!r}, {split} split, record {number} from here"
                yield text_of(record, self._source.text_field, where)


def _plain(records: Iterator[str], pending: list[str]) -> Iterator[str]:
    return records


def _lines(records: Iterator[str], pending: list[str]) -> Iterator[str]:
    return (line for line in records if line.strip())


_HEADING = re.compile(r" = [^=].* = \n?")


def _articles(records: Iterator[str], pending: list[str]) -> Iterator[str]:
    """Articles begin with a line ` = Title = ` after an empty one.

    `pending` holds the lines read that belong to no finished article, at every `yield` too.
    """
    for line in records:
        if _HEADING.fullmatch(line) and (not pending or not pending[-1].strip()):
            text = "".join(pending)
            pending[:] = [line]
            if text.strip():
                yield text
        else:
            pending.append(line)
    text = "".join(pending)
    pending.clear()
    if text.strip():
        yield text


_JOIN: dict[str | None, Callable[[Iterator[str], list[str]], Iterator[str]]] = {
    None: _plain,
    "lines": _lines,
    "articles": _articles,
}


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as problem:
        raise MissingExtraError(
            "corpora of the Hugging Face hub need datasets, which is not installed; "
            "pip install 'polyak[data]'"
        ) from problem
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    return datasets


def _commit(source: HubDocuments) -> str:
    """The commit of a dataset on the hub, asked for once and without retries."""
    _datasets()
    from huggingface_hub import HfApi

    with _speaking(source):
        found = HfApi().dataset_info(
            source.corpus.repository, revision=source.pinned, timeout=_PATIENCE
        )
        return str(found.sha)


@contextlib.contextmanager
def _speaking(source: HubDocuments) -> Iterator[None]:
    """Turn what `datasets` and the network raise into one line that says what to do."""
    try:
        yield
    except (DataError, MissingExtraError):
        raise
    except Exception as problem:  # each layer below has error classes of its own
        reason = " ".join(str(problem).split())[:300] or type(problem).__name__
        repository = source.corpus.repository
        if source.mirror is not None:
            raise DataError(
                f"corpus {source.name!r}: {source.mirror} is no readable copy of the dataset "
                f"{repository}: {reason}"
            ) from problem
        missing = ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError")
        if type(problem).__name__ in missing:
            at = f" at revision {source.pinned!r}" if source.pinned else ""
            raise DataError(f"the hub has no dataset {repository}{at}: {reason}") from problem
        raise HubError(
            f"cannot read corpus {source.name!r} from the Hugging Face hub ({repository}): "
            f"{reason}; go online and repeat the command, or fetch a copy elsewhere with "
            f"{_download(repository, 'DIR')} and set {MIRROR}=DIR"
        ) from problem


def _download(repository: str, root: str) -> str:
    return f"'hf download {repository} --repo-type dataset --local-dir {root}/{repository}'"
