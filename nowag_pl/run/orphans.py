"""End a process that waits for one that is no more: the first process of a run starts the others, and they need it."""

import os
import threading
import time

_STARTER = "NOWAG_PL_STARTER"  # number of the process that starts others, which inherit it
_SECONDS = 1.0
_LOST = 1  # exit code


def end_with_starter() -> None:
    """End this process when the one that has started it ends, now or later; the first process only leaves its number.

    Before processes have met, nothing else tells them that the first one was killed. Processes that another program
    starts, such as torchrun, are ended by that.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[_STARTER] = str(os.getpid())
    elif starter := os.environ.get(_STARTER):
        threading.Thread(target=_watch, args=(int(starter),), daemon=True).start()


def _watch(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(_SECONDS)
    os._exit(_LOST)
