"""Whether two folders hold the same results: `python scripts/compare_folders.py A B`.

For a change that must not change what is measured: the same command is run before and after it,
and the two folders (a run, a comparison, a study, or a folder of such) are compared. Weights and
every other file byte for byte; JSON value by value, numbers to the last digit, after leaving out
what two runs of the same code never share: commands, times, speeds, memory, machines, versions,
commits and paths. One line is printed for each difference; the exit code is 1 if there is any.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEFT_OUT = re.compile(
    r"command|commit|created|updated|began|machine|environment|versions?|tokenizers_version|cpu"
    r"|folder|path|out|took|(.*_)?seconds(_.*)?|\w+_per_second|relative_speed|peak_fraction"
    r"|memory_bytes|peak_memory_bytes|peak_bytes|relative_peak"
)
"""Names whose values are left out wherever they stand."""
UNCOMPARED = {".lock", "log.txt", "report.html", "speeds.json"}
"""Files of which all, or an unknown part, is times; pages are drawn from results.json."""
HASHED = {"bytes", "sha256"}
"""What a checkpoint's manifest says of its state.json, which holds times."""
SHOWN = 60  # characters of a value


def files(folder: Path) -> set[str]:
    """Relative names of the files that are compared."""
    every = (path for path in folder.rglob("*") if path.is_file() and path.name not in UNCOMPARED)
    return {path.relative_to(folder).as_posix() for path in every}


def kept(value: Any) -> Any:
    """A JSON value without what is left out."""
    if isinstance(value, dict):
        return {key: kept(inner) for key, inner in value.items() if not LEFT_OUT.fullmatch(key)}
    return [kept(inner) for inner in value] if isinstance(value, list) else value


def read(path: Path) -> Any:
    """What a file's comparison is of: JSON without what is left out, or bytes."""
    if path.suffix == ".jsonl":
        return [kept(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix != ".json":
        return path.read_bytes()
    content = kept(json.loads(path.read_bytes()))
    if path.name == "manifest.json" and isinstance(content, dict):
        for name, entry in (content.get("files") or {}).items():
            if name.endswith("state.json"):
                content["files"][name] = {k: v for k, v in entry.items() if k not in HASHED}
    return content


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Every place where two JSON values differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            at = f"{where}.{key}" if where else key
            if key not in a or key not in b:
                yield f"{at}: only in {'A' if key in a else 'B'}"
            else:
                yield from differences(a[key], b[key], at)
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            yield f"{where}: {len(a)} values in A, {len(b)} in B"
        for place, (left, right) in enumerate(zip(a, b, strict=False)):
            yield from differences(left, right, f"{where}[{place}]")
    elif isinstance(a, bytes) and isinstance(b, bytes):
        if a != b:
            yield "bytes differ"
    elif type(a) is not type(b) or a != b:
        yield f"{where}: {str(a)[:SHOWN]} in A, {str(b)[:SHOWN]} in B"


def compare(a: Path, b: Path) -> Iterator[str]:
    """One line for each difference between two folders."""
    here, there = files(a), files(b)
    yield from (f"{name}: only in A" for name in sorted(here - there))
    yield from (f"{name}: only in B" for name in sorted(there - here))
    for name in sorted(here & there):
        yield from (f"{name}: {line}" for line in differences(read(a / name), read(b / name)))


def main(arguments: list[str]) -> int:
    """Print what differs; 0 if nothing does, 1 if something does, 2 if nothing can be compared."""
    folders = [Path(argument) for argument in arguments]
    missing = [folder for folder in folders if not folder.is_dir()]
    if len(folders) != 2 or missing:
        print(f"no such folder: {missing[0]}" if missing else "usage: compare_folders.py A B")
        return 2
    if not files(folders[0]):
        print(f"nothing to compare in {folders[0]}")
        return 2
    found = list(compare(*folders))
    print("\n".join(found) or f"equal: {len(files(folders[0]))} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
