"""One run in its own process: `python -m polyak.compare.worker SPEC.json`.

A process of its own gives every run a clean measurement of its peak memory, and a crash of one
run leaves the others alone. Progress goes to what was standard output as JSON lines; the last
line is {"result": …} or {"error": …}. Whatever else is printed, by a user's rule for example,
goes to the run's log. The process ends when the one that started it does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO


def main(spec_file: str) -> int:
    """Train the run that the spec describes; the exit code is 0, or 1 after an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    channel = _take_stdout()
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def emit(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    from polyak.errors import PolyakError
    from polyak.training.config.run import RunConfig
    from polyak.training.loop import train
    from polyak.training.processes.allocator import keep_freed_memory

    keep_freed_memory()
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    try:
        config = RunConfig.from_dict(spec["config"])
        emit(result=train(config, Path(spec["folder"]), progress=lambda at: emit(**at)))
    except Exception as error:
        kind = "" if isinstance(error, PolyakError) else f"{type(error).__name__}: "
        if kind:
            traceback.print_exc()  # into the run's log
        emit(error=kind + " ".join(str(error).split()))
        return 1
    return 0


def _take_stdout() -> TextIO:
    """The pipe to the parent, for this module alone; printing goes to standard error from now."""
    sys.stdout.flush()
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return channel


def _end_with_parent() -> None:
    """Standard input ends when the parent does, however it ends; then nobody wants this run."""
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
