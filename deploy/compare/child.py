"""One run of a comparison, in a process of its own.

Its settings arrive as one line of JSON on standard input; the rounds that are done, and what went wrong, leave as
lines of JSON on standard output. When standard input ends, the run stops as after Ctrl-C, so it never outlives the
comparison.
"""

from __future__ import annotations

import _thread
import json
import os
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any

from deploy.launch import launch
from deploy.settings import validate
from protocol.errors import CarryoverError, RunFailed


def main() -> int:
    """Run; the exit status, as that of ``carryover train``."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the training function prints is no answer

    def tell(**what: Any) -> None:
        with suppress(BrokenPipeError):  # nobody listens any more: standard input has ended too
            answers.write(json.dumps(what) + "\n")

    settings = validate(json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_stop_at_the_end_of_input, daemon=True).start()
    try:
        launch(settings.train, settings, observe=lambda row: tell(round=row["version"]))
    except KeyboardInterrupt:
        return 130
    except CarryoverError as error:
        tell(failure=str(error))
        traceback.print_exc()
        if isinstance(error, RunFailed):
            sys.stderr.write(error.details)
        return 1
    return 0


def _stop_at_the_end_of_input() -> None:
    while os.read(0, 1):  # unbuffered, since a buffer's lock would be held while Python shuts down
        pass
    _thread.interrupt_main()


if __name__ == "__main__":
    sys.exit(main())
