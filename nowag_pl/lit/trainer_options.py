"""Options of Lightning's Trainer that are refused before anything is computed, each by its name."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from nowag_pl.functional.ranges import check_real, check_whole

# The smallest number of each; null leaves it to Lightning.
_LEAST = {
    "num_nodes": 1,
    "min_epochs": 0,
    "max_steps": -1,
    "min_steps": 0,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
    "reload_dataloaders_every_n_epochs": 0,
}
# Libraries hold them in 32 bits.
_MOST = {"num_nodes": 10_000}
_MOST_OF_OTHERS = 2**31 - 1
_PLACES = ("accelerator", "strategy", "devices")
# Names that a training logs, but for those of the texts.
_LOGGED = ("train/loss", "epoch", "step")


def check_options(options: Mapping[str, Any]) -> None:
    """Check the numbers among the options of a Trainer.

    Args:
        options: by name, such as "max_epochs".

    Raises:
        ValueError: one is out of its range; the message names it.
    """
    for name, least in _LEAST.items():
        if options[name] is not None:
            check_whole(f"trainer.{name}", options[name], least, _MOST.get(name, _MOST_OF_OTHERS))
    if options["max_epochs"] is not None:
        has_end = options["max_steps"] > 0
        check_whole("trainer.max_epochs", options["max_epochs"], -1 if has_end else 0, _MOST_OF_OTHERS)
    if options["gradient_clip_val"] is not None:
        check_real("trainer.gradient_clip_val", options["gradient_clip_val"])
    for name in ("limit_train_batches", "val_check_interval"):
        _check_share(f"trainer.{name}", options[name])
    devices = options["devices"]
    is_number = isinstance(devices, int | str) and re.fullmatch(r"-?\d+", str(devices))
    if is_number and int(devices) < 1 and int(devices) != -1:
        raise ValueError(f"Expected trainer.devices of at least 1, or -1 for all, but got {devices}.")
    if is_number:
        check_whole("trainer.devices", int(devices), -1, _MOST_OF_OTHERS)


def _check_share(name: str, value: object) -> None:
    """Check a number of batches, which the parser may have turned into a float, or a share of them."""
    if isinstance(value, float) and not (value > 1 and value.is_integer()):
        check_real(name, value, most=1.0, above=True)
    elif isinstance(value, int):
        check_whole(name, value, 1)


@contextmanager
def naming_options(options: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> Iterator[None]:
    """Say which options may be at fault where Lightning refuses them in a way of its own.

    Args:
        options: of the Trainer, by name.
        parameters: of its constructor, for the defaults.

    Raises:
        ValueError: Lightning refuses an option.
    """
    try:
        yield
    except SIGTERMException:
        raise
    except Exception as error:  # it raises a dozen types
        reason = str(error).strip().partition("\n")[0][:300].rstrip(".")
        given = {name: value for name, value in options.items() if value != parameters[name].default}
        named = {name: value for name, value in given.items() if name in reason or f"{value}" in reason}
        named = named or {name: given[name] for name in _PLACES if name in given}
        shown = ", ".join(f"trainer.{name}={str(value)[:60]}" for name, value in named.items())
        raise ValueError(f"Expected options that the Trainer takes, but got {shown or 'others'}: {reason}.") from error


def check_callbacks(
    callbacks: Iterable[Callback], texts: Iterable[str], compresses: bool, logged: Iterable[str] = ()
) -> None:
    """Check that what callbacks of a training look at is measured, and that checkpoints go to a folder of this machine.

    Args:
        callbacks: of the Trainer.
        texts: names of the evaluation texts.
        compresses: whether the model is compared with a dense one.
        logged: names that the objective logs.

    Raises:
        ValueError: a callback looks at another name, or a folder cannot be written; the message names the option.
    """
    metrics = ("perplexity", *(("dense_perplexity", "kl_divergence", "top1_agreement") if compresses else ()))
    known = [*_LOGGED, *logged, *(f"{metric}/{text}" for text in texts for metric in metrics)]
    for callback in callbacks:
        if isinstance(callback, EarlyStopping | ModelCheckpoint) and callback.monitor not in (None, *known):
            option = "checkpoint.monitor" if isinstance(callback, ModelCheckpoint) else "monitor of EarlyStopping"
            raise ValueError(f"Expected {option} to be one of {known}, but got {callback.monitor!r}.")
        if isinstance(callback, ModelCheckpoint):
            _check_place(callback)


def _check_place(callback: ModelCheckpoint) -> None:
    """Check where checkpoints go, and their name."""
    # Names of metrics in braces may hold a slash, as in "{perplexity/wiki}".
    plain = re.sub(r"\{[^}]*\}", "", callback.filename or "")
    if Path(plain).name != plain:
        raise ValueError(f"Expected checkpoint.filename to be a name without folders, but got {callback.filename!r}.")
    if callback.dirpath is not None:
        folder = Path(callback.dirpath)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"Expected checkpoint.dirpath to be a folder that can be written, but got {folder}: {error.strerror}."
            ) from error
