"""The command line, but for its groups: subcommands, the run directory, and how a program ends."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from nowag_pl.functional.ranges import check_whole
from nowag_pl.lit.checkpoint_io import local_path
from nowag_pl.lit.messages import calm
from nowag_pl.lit.parser_messages import explained
from nowag_pl.lit.phases import PhasedTrainer
from nowag_pl.lit.preemption import Preemption, begin, is_asked_to_stop, received_signal
from nowag_pl.lit.progress_lines import ProgressLines
from nowag_pl.lit.suggestions import SuggestingParser, suggestion
from nowag_pl.lit.trainer import check_checkpoint
from nowag_pl.reports.compare import compare
from nowag_pl.run.layout import CHECKPOINT
from nowag_pl.run.places import check_apart
from nowag_pl.run.progress import has_terminal

_COMPARE = "Compare finished runs: a table here, and the same with figures in one HTML file."


class StageCLI(LightningCLI):
    """LightningCLI with the subcommands of this project and a run directory."""

    def __init__(self, *settings: Any, args: ArgsType = None, **more: Any) -> None:
        """Note the subcommand, whose parser alone is filled."""
        words = sys.argv[1:] if args is None else args
        # Elsewhere than in the first place, a command follows a file that may hold settings of several.
        first = words[0] if isinstance(words, list) and words else None
        self._only = first if first in (*self.subcommands(), "compare") else None
        super().__init__(*settings, args=args, **more)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands that take a model, each with the arguments that the command line does not offer."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "verbose", "weights_only"},
            "evaluate": {"model", "datamodule"},
        }

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add `compare`, which needs no model and so no Trainer."""
        super()._add_subcommands(parser, **kwargs)
        compare_parser = SuggestingParser(description=_COMPARE)
        compare_parser.add_argument("run_dirs", nargs="+", help="run directories, each with a report.json")
        compare_parser.add_argument("--output", default="compare.html", help="HTML file to write")
        commands = parser._subcommands_action
        assert commands is not None
        commands.add_subcommand("compare", compare_parser, help=_COMPARE)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Fill the parser of the subcommand, and those of others if none is named: each takes a tenth of a second."""
        if self._only in (None, subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; a command that needs no model ends here, as --help does."""
        super().parse_arguments(parser, args)
        _check_groups(self.config[self.config.subcommand])
        if self.config.subcommand == "compare":
            compare(self.config.compare.run_dirs, self.config.compare.output)
            parser.exit()
        # Before Lightning opens it, whose message names neither the option nor the file.
        check_checkpoint(self.config[self.config.subcommand].get("ckpt_path"))

    def before_instantiate_classes(self) -> None:
        """Settle the run directory, and put checkpoints and logs into it."""
        config = self.config[self.subcommand]
        if config.run_dir is None:
            config.run_dir = str(Path("runs") / run_name(config, str(self.subcommand)))
        check_run_dir(config.run_dir, config.model.path, reads_only=self.subcommand != "fit")
        config.model.run_dir = config.run_dir
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str((Path(config.run_dir) / CHECKPOINT).parent)
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = config.run_dir

    def instantiate_classes(self) -> None:
        """Make everything; a class that a configuration names may refuse its options in any way.

        Raises:
            ValueError: it does.
        """
        try:
            super().instantiate_classes()
        except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
            raise ValueError(f"Expected options of which everything can be made, but got: {reason}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callback that stops a training in good order, and leave checkpoints out where none are asked for."""
        config = self.config_init[self.subcommand]
        if (lines := not has_terminal()) and config.trainer.enable_progress_bar is None:
            kwargs["enable_progress_bar"] = False
        trainer = super().instantiate_trainer(**kwargs, enable_checkpointing=None)
        assert isinstance(trainer, PhasedTrainer)
        if lines:
            trainer.callbacks.append(ProgressLines())
        if config.trainer.enable_checkpointing is False:
            trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, ModelCheckpoint)]
        trainer.callbacks.insert(0, Preemption(Path(config.run_dir) / CHECKPOINT))
        return trainer


def _check_groups(config: Mapping[str, Any]) -> None:
    """Refuse what no class would: a group of options that is null, a seed that no generator takes, a remote folder.

    Raises:
        ValueError: there is one; the message names it.
    """
    for group in ("model", "data", "trainer", "checkpoint", "calibration", "compression", "finetuning", "report"):
        if group in config and config[group] is None:
            raise ValueError(f"Expected {group} to hold options, but got null.")
    seed = config.get("seed_everything")
    if seed is not None and not isinstance(seed, bool):
        check_whole("seed_everything", seed, 0, 2**32 - 1)
    if "checkpoint" in config and config["checkpoint"].dirpath is not None:
        local_path(config["checkpoint"].dirpath, "checkpoint.dirpath to be a folder")


def check_run_dir(run_dir: str, model_path: str, reads_only: bool = False) -> None:
    """Refuse a folder in which artefacts cannot be kept, or would lie among the weights of the model.

    Args:
        run_dir: the folder.
        model_path: a model, perhaps a local one.
        reads_only: whether the command leaves everything in the folder as it is, and writes beside it.

    Raises:
        ValueError: it is empty, a file, holds the model, or lies in it.
    """
    if not run_dir:
        raise ValueError("Expected run_dir to name a folder, but got ''.")
    if Path(run_dir).is_file():
        raise ValueError(f"Expected run_dir to name a folder, but {run_dir} is a file.")
    if Path(model_path).expanduser().exists():
        check_apart(Path(run_dir), [("model.path", Path(model_path))], may_hold=reads_only)


def run_name(config: Any, subcommand: str) -> str:
    """Name a run after its model and method.

    Args:
        config: parsed settings of the subcommand.
        subcommand: its name, which stands for the method of those that compress nothing.
    """
    model, compression = Path(config.model.path).name, config.compression
    if subcommand != "fit":
        method = subcommand
    elif not compression.enabled:
        method = "dense"
    else:
        method = _method_name(compression.compressor.class_path, compression.compressor.get("init_args") or {})
        method += "-budget" if compression.budget else ""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{model}-{method}").strip("_")


def _method_name(class_path: str, settings: Mapping[str, Any]) -> str:
    """Name a method by its class and the settings that are not the class's defaults."""
    module, _, name = class_path.rpartition(".")
    make = getattr(import_module(module), name)
    chosen, defaults = dict(settings), {}
    # Settings that do not fit are refused where they are used, with the linear that they do not fit.
    with suppress(TypeError, ValueError):
        defaults, chosen = make().describe(), make(**settings).describe()
    changed = {key: value for key, value in chosen.items() if value is not None and value != defaults.get(key)}
    return "-".join([name, *(f"{key}_{value}" for key, value in changed.items())])


def as_plain(chosen: Namespace | None) -> dict[str, Any] | None:
    """Return a class that was chosen on the command line as a dictionary with "class_path" and "init_args"."""
    return None if chosen is None else chosen.as_dict()


def quiet_libraries() -> None:
    """Show our own messages, and leave out the warnings of libraries on which a user cannot act."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("nowag_pl").setLevel(logging.INFO if _is_rank_zero() else logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    calm()
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    # The values are reduced over the ranks already.
    warnings.filterwarnings("ignore", "It is recommended to use .*sync_dist=True")
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    # Nothing writes into what a compressed linear returns; each process would say it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    set_parsing_settings(add_print_completion_argument=True)


def _is_rank_zero() -> bool:
    """Tell whether this is the first process; Lightning says so on a function of its own."""
    return getattr(rank_zero_only, "rank", 0) == 0


def run_program(main: Callable[[], Any]) -> None:
    """Run a command and end the process with a message and an exit code, in place of a traceback.

    Args:
        main: the command.
    """
    begin()
    try:
        main()
    except (SIGTERMException, Exception) as error:
        # A signal inside of compiled code may arrive here as an exception of a library.
        if isinstance(error, SIGTERMException) or is_asked_to_stop():
            stopped_by = received_signal()
            print(f"Stopped by {stopped_by.name}; the same command goes on from here.", file=sys.stderr)  # noqa: T201
            sys.exit(128 + stopped_by)
        told = isinstance(error, ValueError | OSError | MisconfigurationException)
        if not told or os.environ.get("NOWAG_PL_TRACEBACK"):
            raise
        sys.exit(f"error: {_message(error)}\n(NOWAG_PL_TRACEBACK=1 shows where)")


def _message(error: Exception) -> str:
    """Return the message of an error, without the number of the operating system's, and with the nearest name."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror + (f": {error.filename}" if error.filename else "")
    found = suggestion(message)
    message = explained(message)
    return f"{message}\ndid you mean {found}?" if found else message
