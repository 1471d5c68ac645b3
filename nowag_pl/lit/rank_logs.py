"""What each process of a run says, in a file of its own: of several, only the first one speaks on the screen."""

import logging
from pathlib import Path

from nowag_pl.run.layout import LOGS

_log = logging.getLogger("nowag_pl")


def log_by_rank(run_dir: Path, rank: int, world_size: int) -> None:
    """Write this process's messages to <run_dir>/logs/rank_000.log as well, where there are several.

    Args:
        run_dir: the run directory.
        rank: number of this process.
        world_size: number of processes.
    """
    if world_size == 1:
        return
    path = run_dir / LOGS / f"rank_{rank:03d}.log"
    if any(isinstance(each, RankLog) for each in _log.handlers):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RankLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank}: %(message)s"))
    _log.addHandler(handler)
    if rank:
        # Its messages go into the file alone; what is wrong goes to the screen, too.
        for each in logging.getLogger().handlers:
            each.setLevel(max(each.level, logging.ERROR))
        _log.setLevel(logging.INFO)


class RankLog(logging.FileHandler):
    """The log of one process."""
