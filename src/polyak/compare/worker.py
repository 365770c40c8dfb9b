"""One run in its own process: `python -m polyak.compare.worker SPEC.json`.

A process of its own gives every run a clean measurement of its peak memory, and a crash of one
run leaves the others alone. Progress goes to what was standard output as JSON lines; the last
line is {"result": …} or {"error": …}. Whatever else is printed, by a user's rule for example,
goes to the run's log. Told to stop, by a line on standard input or by SIGTERM, it saves a
checkpoint first; other signals, which a terminal or scheduler sends to the whole group, are left
to the parent. It ends when the one that started it does.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

from polyak.output import outlast
from polyak.signals import STOPPED, StopSignals, leave_to_parent


def main(spec_file: str) -> int:
    """Train the run that the spec describes; the exit code is 0, or 1 after an error."""
    leave_to_parent(but=("SIGTERM",))
    channel = _take_stdout()
    outlast()
    with StopSignals() as stop:  # as long as this process lasts: there is no moment without it
        threading.Thread(target=_heed_parent, args=(stop,), daemon=True).start()
        return _train(spec_file, channel, stop)


def _train(spec_file: str, channel: TextIO, stop: StopSignals) -> int:
    def emit(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    from polyak.errors import PolyakError, StoppedError
    from polyak.files import read_json
    from polyak.training.config.run import RunConfig
    from polyak.training.loop import train
    from polyak.training.processes.allocator import keep_freed_memory

    keep_freed_memory()
    spec = read_json(Path(spec_file))
    try:
        config = RunConfig.from_dict(spec["config"])
        folder = Path(spec["folder"])
        if stop.requested is not None:  # while torch was imported: there is nothing to save
            return STOPPED
        emit(result=train(config, folder, progress=lambda at: emit(**at), signals=stop))
    except StoppedError as error:  # by the parent, which is ending and listens no more
        print(error, file=sys.stderr)
        return STOPPED
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


def _heed_parent(stop: StopSignals) -> None:
    """A line from the parent asks for a stop.

    Standard input ends when the parent does, however it ends; then nobody wants this run.
    """
    while os.read(0, 4096):
        stop.ask("the end of the comparison")
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
