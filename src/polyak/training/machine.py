"""The machine and the versions that a result comes from, and the memory a process has held."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from polyak import formats
from polyak.data.encode import available_cores


def environment() -> dict[str, Any]:
    """Versions and hardware of this process."""
    from importlib.metadata import version

    import numpy
    import torch

    from polyak.version import __version__

    return {
        "versions": {
            "polyak": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "tokenizers": version("tokenizers"),
        },
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, system and accelerator."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "memory_bytes": machine_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def peak_memory_bytes() -> int | None:
    """Largest memory this process has held: allocated on CUDA, else resident; None if unknown."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    # On Linux not getrusage: a process inherits what its parent held when it was started.
    with contextlib.suppress(OSError, IndexError, ValueError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def process_age() -> float | None:
    """Seconds since this process began; None where the system does not say (only Linux does)."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        status = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
        ticks = int(status.rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine_memory() -> int | None:
    """Bytes of memory; None where the system does not say, as on Windows."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def heading(kind: str, command: str, **more: Any) -> dict[str, Any]:
    """How every results.json begins: what it is, and when and on what it was made.

    Args:
        kind: of the results; `polyak.formats` knows its format.
        command: the command line that repeats it.
        more: comes after `kind`.
    """
    return {
        "format": formats.current(kind),
        "kind": kind,
        **more,
        "created": now(),
        "command": command,
        "commit": commit(),
        **environment(),
    }


def now() -> str:
    """The time, ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit() -> str | None:
    """The commit of the source tree polyak runs from; None when it is installed from a wheel."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__],
            capture_output=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() if found.returncode == 0 and tracked.returncode == 0 else None
