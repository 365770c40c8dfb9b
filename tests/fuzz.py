"""Damaged inputs by the thousand: made from real small files, read in a forked process.

A `Reader` takes a folder that is a copy of a small real one in which some file was damaged. The
process that reads has a bound on its memory and reports each input before it begins, so that the
parent knows which one a signal or a hang belongs to. The n-th input of a reader is always the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyak.errors import PolyakError

MEMORY = 2 << 30
"""Bytes that reading may take beyond what the process has."""
LONGEST = 60.0
"""Seconds for one input."""


@dataclass(frozen=True)
class Reader:
    """Something that reads a folder.

    Attributes:
        name: shown with what fails.
        source: the folder that is copied.
        files: those in it of which one is damaged for each input.
        read: what is done with the copy.
        alone: of the folder's own entries, leave only the one that is damaged.
    """

    name: str
    source: Path
    files: tuple[str, ...]
    read: Callable[[Path], object]
    alone: bool = False


def fuzz(reader: Reader, count: int, scratch: Path) -> list[str]:
    """What went wrong in so many inputs, as text; empty if nothing did."""
    faults: list[str] = []
    start = 0
    while start < count:
        log = scratch / f"{reader.name}.log"
        log.write_text("")
        child = os.fork()
        if child == 0:
            _child(reader, range(start, count), scratch, log)
        status = _wait(child, log)
        lines = log.read_text(encoding="utf-8").splitlines()
        begun = [int(line.split()[1]) for line in lines if line.startswith("begin ")]
        faults += [json.loads(line[6:]) for line in lines if line.startswith("fault ")]
        if status == 0:
            break
        last = begun[-1] if begun else start
        faults.append(f"{reader.name} input {last}: ended the process with {status}")
        start = last + 1
    return faults


def _wait(child: int, log: Path) -> int:
    """The exit status; a process that is at one input for too long is killed."""
    seen, since = -1, time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        size = log.stat().st_size
        if size != seen:
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > LONGEST:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


def _child(reader: Reader, numbers: Sequence[int], scratch: Path, log: Path) -> None:
    code = 1
    try:
        warnings.simplefilter("ignore")
        limit = _address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        with log.open("a", encoding="utf-8", buffering=1) as lines:
            for number in numbers:
                lines.write(f"begin {number}\n")
                fault = _one(reader, number, scratch / reader.name)
                if fault is not None:
                    lines.write(f"fault {json.dumps(fault)}\n")
        code = 0
    finally:
        os._exit(code)


def _one(reader: Reader, number: int, folder: Path) -> str | None:
    made = damaged(reader, number, folder)
    began = time.monotonic()
    try:
        reader.read(folder)
    except PolyakError as error:
        if "\n" in str(error) or len(str(error)) > 2000:
            return f"{reader.name} input {number} ({made}): not one line: {str(error)[:300]!r}"
    except BaseException as error:  # anything else, MemoryError and a panic of Rust too
        where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        return (
            f"{reader.name} input {number} ({made}): {type(error).__name__}: {str(error)[:200]}"
            f"\n{where}"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    took = time.monotonic() - began
    return f"{reader.name} input {number} ({made}): took {took:.0f} s" if took > 20 else None


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- what is damaged, and how ------------------------------------------------------------------


def damaged(reader: Reader, number: int, folder: Path) -> str:
    """Make input `number` in `folder`; says which file was damaged how."""
    draw = random.Random(f"{reader.name} {number}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(reader.source, folder, symlinks=True)
    name = draw.choice(reader.files)
    path = folder / name
    for other in folder.iterdir() if reader.alone else ():
        if other.name != name.split("/")[0]:
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    content = path.read_bytes()
    kinds = [_flips, _cut, _doubled, _inserted]
    if name.endswith((".json", ".jsonl")):
        kinds += [_json] * 8
    elif name.endswith(".safetensors"):
        kinds += [_header] * 4
    elif name.endswith(".toml"):
        kinds += [_words] * 4
    elif draw.random() < 0.03:
        path.unlink()
        path.symlink_to("/etc/passwd")
        return f"{name}: a link out"
    change = draw.choice(kinds)
    try:
        path.write_bytes(change(content, draw))
    except (RecursionError, ValueError):  # too deep to be written, or not of its own form
        path.write_bytes(_flips(content, draw))
    return f"{name}: {change.__name__[1:]}"


def _flips(content: bytes, draw: random.Random) -> bytes:
    made = bytearray(content or b"x")
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        made[draw.randrange(len(made))] = draw.randrange(256)
    return bytes(made)


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _doubled(content: bytes, draw: random.Random) -> bytes:
    start, stop = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:stop] + content[start:]


def _inserted(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    more = (
        b"\0",
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 5000,
        b"\x1b[31m",
        b"\n",
        b'"',
        b"\xef\xbb\xbf",
    )
    return content[:at] + draw.choice(more) + content[at:]


def _odd(draw: random.Random) -> Any:
    """A value that belongs nowhere."""
    return draw.choice(
        (
            None,
            True,
            -1,
            0,
            1,
            2**31,
            2**63,
            10**12,
            10**400,
            -(10**30),
            1e308,
            -0.5,
            float("nan"),
            float("inf"),
            "",
            "x",
            "O",
            "object",
            "<u8",
            "../../../../etc/passwd",
            "/etc/passwd",
            "/dev/zero",
            "a\0b",
            "..",
            "\x1b[2J\x07",
            "\u202e",
            "\ud800",
            "x" * 100_000,
            [],
            {},
            [[]],
            {"a": 1},
            [1] * 50_000,
            {str(n): n for n in range(3000)},
        )
    )


def _deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values stand inside another; of long lists the ends alone."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in list(value.items())[:80]:
            found += _places(inner, (*path, key))
    elif isinstance(value, list):
        for place in {*range(min(len(value), 4)), *([len(value) - 1] if value else [])}:
            found += _places(value[place], (*path, place))
    return found


def mutated(value: Any, draw: random.Random) -> Any:
    """A JSON value with something inside it replaced, removed, moved or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        *above, last = draw.choice(_places(value)) or (None,)
        if last is None:
            if draw.random() < 0.2:
                return _odd(draw)
            continue
        inside = value
        for step in above:
            inside = inside[step]
        try:
            action = draw.randrange(8)
            if action == 0:
                del inside[last]
            elif action == 1:
                others = draw.choice(_places(value))
                other = value
                for step in others:
                    other = other[step]
                inside[last] = json.loads(json.dumps(other))
            elif action == 2 and isinstance(inside, dict):
                inside[draw.choice(("", "x", "../x", "__class__", "format"))] = inside.pop(last)
            elif action == 3 and isinstance(inside[last], int | float):
                inside[last] = draw.choice((-1, 0, 2)) * inside[last] + draw.choice((0, 1, 2**40))
            elif action == 4:
                inside[last] = _deep(draw.choice((5, 99, 900)))
            else:
                inside[last] = _odd(draw)
        except (KeyError, IndexError, TypeError, RecursionError):
            continue
    return value


def _json(content: bytes, draw: random.Random) -> bytes:
    """Of a JSON file the value, of JSON lines that of one line, also behind a check sum."""
    if content[:16].isalnum() and content[16:18] == b" {":
        body = json.dumps(mutated(json.loads(content[17:]), draw)).encode()
        return hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body
    if content.rstrip().count(b"\n") and not content.startswith((b"{\n", b"[\n")):
        lines = content.split(b"\n")
        place = draw.randrange(len(lines) - 1)
        lines[place] = _json(lines[place], draw)
        return b"\n".join(lines)
    return json.dumps(mutated(json.loads(content), draw)).encode()


def _header(content: bytes, draw: random.Random) -> bytes:
    """The header of safetensors."""
    size = int.from_bytes(content[:8], "little")
    if draw.random() < 0.15:
        size = draw.choice((0, 1, 2**31, 2**63, size + 1, size - 1))
        return size.to_bytes(8, "little") + content[8:]
    header = mutated(json.loads(content[8 : 8 + size]), draw)
    if draw.random() < 0.4 and isinstance(header, dict) and header:
        entry = header[draw.choice(list(header))]
        if isinstance(entry, dict):
            entry["dtype"] = draw.choice(("F64", "I64", "BOOL", "U8", "F16", "BF16", "O", ""))
            if draw.random() < 0.5:
                entry["shape"] = draw.choice(([2**40], [1] * 70, [0], [2**32, 2**32], [-1]))
    made = json.dumps(header).encode()
    return len(made).to_bytes(8, "little") + made + content[8 + size :]


def _words(content: bytes, draw: random.Random) -> bytes:
    """A value of TOML."""
    lines = content.decode().split("\n")
    places = [n for n, line in enumerate(lines) if "=" in line]
    if not places:
        return content
    place = draw.choice(places)
    odd = draw.choice(
        (
            *("1", "-1", "true", "nan", "inf", '"x"', '""', "[]", "[[1]]", "{a = 1}", "1e400"),
            *("9" * 5000, "1979-05-27", '"\\u001b[2J"', "0x" + "f" * 500, "10000000000000"),
            *("[" * 20_000 + "]" * 20_000, "'''" + "x" * 100_000 + "'''", '"none"', '"../x.toml"'),
        )
    )
    key = lines[place].partition("=")[0]
    lines[place] = f"{key} = {odd}"
    return "\n".join(lines).encode()
