"""SIGTERM, by which clusters take a machine back, and Ctrl-C: training saves and stops, all else stops at once."""

import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from nowag_pl.run.orphans import end_with_starter

_log = logging.getLogger("nowag_pl")


class _Request:
    """The state of this process's signal handler."""

    received = 0  # number of the signal
    trainers: list[Trainer] = []  # noqa: RUF012 - those in training, the innermost last
    launcher: Any = None  # of the processes that this one has started


def handle_signal(signum: int, frame: Any) -> None:
    """Ask a running training to save and stop; stop at once where there is none, as artefacts are always whole."""
    _Request.received = signum
    if signum == signal.SIGINT:  # a terminal sends it to all processes; the second ends the program as it is
        signal.signal(signal.SIGINT, signal.default_int_handler)
    elif _Request.launcher is not None:
        launcher, _Request.launcher = _Request.launcher, None
        launcher.kill(signal.SIGTERM)
    if not _Request.trainers:
        raise SIGTERMException()


def install() -> None:
    """Handle SIGTERM from now on, also where Lightning has put a handler of its own."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handle_signal)


def begin() -> None:
    """Handle SIGTERM and Ctrl-C in a program that has just begun."""
    _Request.received = 0
    end_with_starter()
    install()
    signal.signal(signal.SIGINT, handle_signal)
    sys.unraisablehook = _unraisable


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Say nothing of a stop that Python cannot raise in `__del__`; it comes at the next place, see `stop_if_asked`."""
    if not isinstance(unraisable.exc_value, SIGTERMException):
        sys.__unraisablehook__(unraisable)


def is_asked_to_stop() -> bool:
    """Tell whether a signal has come that stops this process."""
    return bool(_Request.received)


def received_signal() -> signal.Signals:
    """Return the signal that has stopped this process."""
    return signal.Signals(_Request.received or signal.SIGTERM)


def stop_if_asked() -> None:
    """Stop here where a signal came and its exception was lost: Python ignores those that are raised in `__del__`."""
    if _Request.received:
        raise SIGTERMException()


class Preemption(Callback):
    """Save and stop when SIGTERM came: all ranks after the same step.

    Lightning's own handler talks to the other ranks from inside of the signal, which can hang.

    Args:
        path: checkpoint to write.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._saved_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know the processes to tell."""
        if getattr(trainer.strategy.launcher, "procs", None):
            _Request.launcher = trainer.strategy.launcher
        install()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put our handler over Lightning's."""
        install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put our handler over Lightning's, and let it wait for the end of a step."""
        _Request.trainers.append(trainer)
        install()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save and stop, but for the last step of an epoch, which ends first: from inside it Lightning cannot go on."""
        if not trainer.is_last_batch and self._is_wanted(trainer):
            self._save(trainer)
            raise SIGTERMException()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch; a checkpoint callback may save again after the validation."""
        if self._is_wanted(trainer):
            self._save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs where their state is saved; a later signal waits for the next step."""
        if self._saved_step == trainer.global_step:
            raise SIGTERMException()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is nothing to save."""
        self._leave(trainer)
        if self._is_wanted(trainer):
            raise SIGTERMException()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Training has ended here as well."""
        self._leave(trainer)

    @staticmethod
    def _is_wanted(trainer: Trainer) -> bool:
        """Agree with the other ranks whether to stop."""
        return trainer.strategy.reduce_boolean_decision(bool(_Request.received), all=False)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self._path)
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            _log.warning("Training is saved in %s; the same command goes on from there.", self._path)

    @staticmethod
    def _leave(trainer: Trainer) -> None:
        if trainer in _Request.trainers:
            _Request.trainers.remove(trainer)
