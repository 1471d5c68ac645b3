"""When a run's needs are shown and its method is checked: while a fit is set up, before the first stage."""

import logging
from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from nowag_pl.compressors import Compressor
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.trainer import is_compressing
from nowag_pl.pipeline.preflight import Available, ModelSizes, StageNeeds, host_bytes, readable, shortages

_log = logging.getLogger("nowag_pl")


class ModelPreflight(Callback):
    """Show what each stage will need and what there is, warn where it is too little, refuse what does not fit a linear.

    What a stage needs is said by the callback that runs it, in `needs`.

    Args:
        enabled: whether to do so; on the command line, compression.enabled says it.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._done = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look ahead, once, if this run compresses.

        Raises:
            ValueError: the method does not fit the shape of a linear; the message names it.
        """
        if not self.enabled or self._done or not is_compressing(trainer, stage):
            return
        self._done = True
        module = cast(LitCausalLM, pl_module)
        sizes = ModelSizes.of(module.run.model, _compressor(trainer))
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        stages = [
            needs for callback in callbacks if hasattr(callback, "needs") for needs in callback.needs(sizes, trainer)
        ]
        if not trainer.is_global_zero:
            return
        folder = Path(module.run.store.folder)
        available = Available.here(folder, module.run.device)
        num_processes = max(trainer.num_devices, 1)
        Console(stderr=True).print(_table(stages, available, num_processes))
        on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for sentence in shortages(stages, available, num_processes, on_disk):
            _log.warning("Warning: %s", sentence)


def _compressor(trainer: Trainer) -> Compressor:
    """Return the method of the callback that compresses."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback.compressor for callback in callbacks if hasattr(callback, "compressor"))


def _table(stages: list[StageNeeds], available: Available, num_processes: int) -> Table:
    """Lay out the needs, with what is available in the last row."""
    table = Table(title="Expected at most, beside what the process has now")
    for column in ("stage", "device memory", "host memory", "disk"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    on_device = available.device is not None
    for needs in stages:
        host = readable(host_bytes(needs, available, num_processes))
        table.add_row(needs.stage, readable(needs.device) if on_device else "", host, readable(needs.disk))
    table.add_section()
    table.add_row(
        "available",
        readable(available.device) if available.device is not None else "(is host memory)",
        readable(available.host),
        readable(available.disk),
    )
    return table
