"""One run in its own process: `python -m polyak.study.worker SPEC.json`.

A process of its own gives every run a clean measurement of its peak memory, and a crash of one
run leaves the others alone. Progress goes to standard output as JSON lines; the last line is
{"result": …} or {"error": …}.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from pathlib import Path
from typing import Any


def emit(**message: Any) -> None:
    """One JSON line to the process that started this one."""
    print(json.dumps(message), flush=True)


def main(spec_file: str) -> int:
    """Train the run that the spec describes; the exit code is 0, or 1 after an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    from polyak.errors import PolyakError
    from polyak.training.loop import train
    from polyak.training.run_config import RunConfig

    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    try:
        config = RunConfig.from_dict(spec["config"])
        emit(result=train(config, Path(spec["folder"]), progress=lambda at: emit(**at)))
    except PolyakError as error:
        emit(error=str(error))
        return 1
    except Exception as error:
        traceback.print_exc()  # into the run's log
        emit(error=f"{type(error).__name__}: {error}".splitlines()[0])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
