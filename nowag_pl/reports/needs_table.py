"""Whether a run's needs fit this machine: a table, and the option to change for each thing that does not."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from nowag_pl.needs import StageNeeds
from nowag_pl.run.wording import readable

LIBRARY_BYTES = 2**27  # that libraries hold in each process, and parts of files that are being read
_log = logging.getLogger("nowag_pl")


@dataclass(frozen=True)
class Available:
    """The free memory and disk of this machine, in bytes.

    Attributes:
        device: free memory of the device; None if it is host memory.
        host: host memory that is available without swapping.
        disk: free space on the file system of the run directory.
    """

    device: int | None
    host: int
    disk: int

    @classmethod
    def here(cls, folder: Path, device: torch.device) -> "Available":
        """Look at this process's device, this machine and the file system of a folder, which need not exist."""
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        return cls(free, psutil.virtual_memory().available, psutil.disk_usage(str(existing)).free)


def show(stages: Sequence[StageNeeds], folder: Path, device: torch.device, num_processes: int = 1) -> None:
    """Print the needs with the available memory and disk, and warn if they do not fit.

    Args:
        stages: needs of the stages of one run.
        folder: run directory.
        device: of this process.
        num_processes: processes on this machine.
    """
    available = Available.here(folder, device)
    Console(stderr=True).print(table(stages, available, num_processes))
    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    for sentence in shortages(stages, available, num_processes, on_disk):
        _log.warning("Warning: %s", sentence)


def fits(needs: StageNeeds, available: Available, num_processes: int = 1) -> bool:
    """Tell whether a stage has the memory that it may need."""
    on_device = available.device is None or needs.device <= available.device
    return on_device and host_bytes(needs, available, num_processes) <= available.host


def host_bytes(needs: StageNeeds, available: Available, num_processes: int) -> int:
    """Return the host memory of a stage, including its device memory if the device is the host."""
    each = needs.host + LIBRARY_BYTES + max(needs.built, needs.device if available.device is None else 0)
    return num_processes * each + needs.shared_host


def shortages(
    stages: Sequence[StageNeeds], available: Available, num_processes: int = 1, on_disk: int = 0
) -> list[str]:
    """Return a sentence for each thing that does not fit, with the option to change.

    Args:
        stages: needs of the stages of one run.
        available: free memory and disk.
        num_processes: processes that share host memory and disk.
        on_disk: bytes that an earlier process of the same run has written already.
    """
    found = []
    for needs in stages:
        if available.device is not None and needs.device > available.device:
            found.append(_shortage(needs.stage, needs.device, "device memory", available.device, needs.device_option))
        host = host_bytes(needs, available, num_processes)
        if host > available.host:
            options = [needs.host_option, needs.device_option if available.device is None else ""]
            option = " or ".join(filter(None, options))
            found.append(_shortage(needs.stage, host, "host memory", available.host, option))
    disk = sum(needs.disk for needs in stages) - on_disk
    if disk > available.disk:
        options = [needs.disk_option for needs in stages if needs.disk_option]
        option = ", ".join(dict.fromkeys([*options, "run_dir on another disk"]))
        found.append(_shortage("the run", disk, "disk", available.disk, option))
    return found


def _shortage(stage: str, needed: int, what: str, available: int, option: str) -> str:
    remedy = f"; change {option}" if option else ""
    return f"{stage} may need {readable(needed)} of {what}, but {readable(available)} are free{remedy}"


def table(stages: Sequence[StageNeeds], available: Available, num_processes: int) -> Table:
    """Lay out the needs; the last row holds the available memory and disk."""
    laid_out = Table(title="Expected at most, in addition to the present use of the process")
    for column in ("stage", "device memory", "host memory", "disk"):
        laid_out.add_column(column, justify="left" if column == "stage" else "right")
    on_device = available.device is not None
    for needs in stages:
        host = readable(host_bytes(needs, available, num_processes))
        laid_out.add_row(needs.stage, readable(needs.device) if on_device else "", host, readable(needs.disk))
    laid_out.add_section()
    free = readable(available.device) if available.device is not None else "(is host memory)"
    laid_out.add_row("available", free, readable(available.host), readable(available.disk))
    return laid_out
