"""`World`: the processes that train together, one for each device.

`torchrun` starts them and tells each its place through the environment; without torchrun there
is one, and nothing here communicates. What the processes tell each other about the run (sums,
flags, JSON) goes over gloo on the CPU; gradients and weights go over nccl on CUDA. Nothing is
pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from polyak.errors import ConfigError, PolyakError, RunError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others. One that dies ends the job at once, through torchrun;
this is for a network that stalls."""
_PATIENCE = 3.0
"""Seconds in which the first process may report an error before another one reports its own."""
_LET_GO = 0.2
"""Seconds for the threads of gloo to let go of what they used."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place among those that train together; a context that ends the group.

    In the context, processes other than the first print nothing and warn of nothing. An error
    that leaves it is told once: by the first process if it has one, else by the process that has.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _store: Store | None = None
    _turns: list[int] = field(default_factory=list)
    _exits: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @classmethod
    def start(cls, device: str = "auto") -> World:
        """Join the processes that torchrun started, or be the only one.

        Args:
            device: `cpu`, `cuda`, or `auto`: CUDA if there is.

        Raises:
            ConfigError: CUDA is asked for and there is none, or less of it than processes; or
                torchrun's variables are incomplete.
            RunError: the processes do not find each other.
        """
        cuda = torch.cuda.is_available()
        if device == "cuda" and not cuda:
            raise ConfigError("device='cuda': torch sees no CUDA device; use device='cpu'")
        kind = "cuda" if cuda and device != "cpu" else "cpu"
        rank, size, local = _place()
        if size == 1:
            return cls(device=torch.device(kind))
        if kind == "cuda":
            if local >= torch.cuda.device_count():
                raise ConfigError(
                    f"LOCAL_RANK={local}, but torch sees {torch.cuda.device_count()} CUDA devices "
                    "here; start torchrun with --nproc-per-node of at most that"
                )
            torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        try:
            store, _, _ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
            dist.init_process_group(
                backend,
                store=PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
            )
        except (RuntimeError, ValueError) as error:  # torch's network errors are RuntimeErrors
            reason = " ".join(str(error).split())
            raise RunError(
                f"process {rank} of {size} does not reach the others: {reason}"
            ) from error
        place = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
        return cls(rank=rank, size=size, device=place, _store=PrefixStore("polyak", store))

    @property
    def main(self) -> bool:
        """Whether this is the first process, the one that prints and writes."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """The rows of a global batch that are this process's: equal, contiguous parts.

        Raises:
            ConfigError: the processes do not divide the batch; the nearest size that they do
                divide is offered.
        """
        if batch_size % self.size:
            nearest = max(1, round(batch_size / self.size)) * self.size
            raise ConfigError(
                f"batch_size={batch_size} cannot be shared equally by {self.size} processes; "
                f"set training.batch_size to {nearest}, or start another number of processes"
            )
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum(self, value: float) -> float:
        """The sum of every process's value, in float64; the same number on all."""
        return self.sums([value])[0]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums of several values at the price of one."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one process."""
        return self.sum(float(flag)) > 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum(0.0)  # an empty sum would wait for nobody

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process runs the body, then all others do; it may take hours.

        For what the first writes and the others then find, as a prepared corpus.
        """
        self._turns.append(len(self._turns))
        key = f"turn-{self._turns[-1]}"
        while not self.main and self._store is not None and not self._store.check([key]):
            time.sleep(0.1)
        yield
        if self.main and self._store is not None:
            self._store.set(key, "")

    def broadcast(self, value: Any) -> Any:
        """The first process's value, which must be JSON; others' is ignored."""
        return self.gather(value if self.main else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank, on every process; values must be JSON."""
        if self.size == 1:
            return [json.loads(json.dumps(value))]  # as with several: lists, not tuples
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(content)]))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(content)] = content
        found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return [
            json.loads(bytes(entry[: int(length)].tolist()))
            for entry, length in zip(found, lengths, strict=True)
        ]

    def agree(self, problem: PolyakError | None) -> None:
        """Fail together: every process calls it, and if one has a problem, all raise it.

        Raises:
            RunError: the problem of the first process that has one; with several processes it
                says which, unless all have the same.
        """
        if self.size == 1:
            if problem is not None:
                raise problem
            return
        found = self.gather(None if problem is None else str(problem))
        bad = [rank for rank, text in enumerate(found) if text is not None]
        if bad:
            same = all(text == found[0] for text in found)
            raise RunError(found[0] if same else f"process {bad[0]}: {found[bad[0]]}") from problem

    def close(self) -> None:
        """Leave the group; to be called by every process once all is done."""
        self._exits.close()
        if self._store is not None and dist.is_initialized():
            # Gloo's threads drop their last tensors a moment after the operation is done, which
            # needs the interpreter: at its end they would abort the process (pytorch PR 179291).
            self.barrier()
            time.sleep(_LET_GO)
            dist.destroy_process_group()

    def __enter__(self) -> World:
        if not self.main:
            nowhere = self._exits.enter_context(open(os.devnull, "w", encoding="utf-8"))
            self._exits.enter_context(contextlib.redirect_stdout(nowhere))
            self._exits.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or self._store is None:
            self.close()
            return
        # The group is left as it is: the others may be waiting in it, and the end of this process
        # is what tells them and torchrun. Leaving it properly could wait for them for ever.
        self._exits.close()
        lost = _lost_the_others(error)
        told = self._told(wait=lost or (isinstance(error, PolyakError) and not self.main))
        if told and (lost or isinstance(error, PolyakError)):
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # to the end
        elif lost:
            raise RunError(
                f"process {self.rank} of {self.size} stopped: it lost the connection to another "
                "one, which ended without a word, or the network failed"
            ) from error
        elif isinstance(error, PolyakError) and not self.main:
            raise type(error)(f"process {self.rank} of {self.size}: {error}") from error

    def _told(self, *, wait: bool) -> bool:
        """Whether another process tells an error already; if none does, this one is to tell it."""
        assert self._store is not None
        until = time.monotonic() + (_PATIENCE if wait else 0)
        with contextlib.suppress(RuntimeError):  # the store can be gone with its process
            while wait and time.monotonic() < until:
                if self._store.check(["error"]):
                    return True
                time.sleep(0.05)
            self._store.set("error", str(self.rank))
        return False


def _place() -> tuple[int, int, int]:
    """Rank, number of processes and rank on this machine, from torchrun's variables."""
    given = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if not given.keys() & {"RANK", "LOCAL_RANK"}:
        return 0, 1, 0  # WORLD_SIZE alone is set by schedulers too
    missing = [name for name in _VARIABLES if name not in given]
    if missing:
        raise ConfigError(
            f"{', '.join(given)} are set but {', '.join(missing)} not; start with torchrun, "
            "or unset them to train in one process"
        )
    try:
        rank, size, local = (int(given[name]) for name in _VARIABLES)
    except ValueError:
        rank, size, local = -1, -1, -1
    if not (0 <= rank < size and local >= 0):
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(f"{shown}: not a place among processes; start with torchrun")
    return rank, size, local


def _lost_the_others(error: BaseException) -> bool:
    """Whether an error is how a collective ends when another process is gone or silent."""
    if isinstance(error, dist.DistError):
        return True
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out")
    text = str(error).lower()
    return (
        isinstance(error, RuntimeError)
        and ("gloo" in text or "nccl" in text)
        and any(sign in text for sign in signs)
    )
