"""Compress a language model and measure what it lost.

python main.py fit                                        the embedded model, NoWag-P 50 %, perplexity
python main.py fit --config configs/method/nowag_vq_2bit_small.yaml
python main.py fit --config configs/method/nowag_p_2_4.yaml --config configs/finetuning/embedded.yaml
python main.py fit --model.path <folder or hub id> --config configs/data/wikitext2_c4.yaml
python main.py validate --model.path <folder or hub id>   perplexity of a dense or compressed model
python main.py compare <run> <run> ... [--output FILE]    finished runs beside each other
python main.py evaluate --model.path <folder or hub id>   questions of lm-evaluation-harness (the extra `eval`)
"""

import logging
import os
import re
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks.calibration import ModelCalibration
from callbacks.compression import ModelCompression
from callbacks.export import ModelExport
from callbacks.finetuning import ModelFinetuning
from callbacks.inspection import ModelInspection
from callbacks.preflight import ModelPreflight
from callbacks.report import ModelReport
from nowag_pl.lit.command_line import HelpFormatter, SuggestingParser, explained, suggestion
from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.preemption import Preemption, begin, received_signal
from nowag_pl.lit.trainer import CHECKPOINT, CompressionTrainer, check_checkpoint
from nowag_pl.reports.compare import compare
from nowag_pl.stages.compression import describe

CALLBACKS = {
    "preflight": ModelPreflight,
    "calibration": ModelCalibration,
    "compression": ModelCompression,
    "finetuning": ModelFinetuning,
    "report": ModelReport,
    "inspection": ModelInspection,
    "export": ModelExport,
}


class CompressionCLI(LightningCLI):
    """LightningCLI with a group for each stage and a run directory."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups of the stages."""
        for group, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, group)
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        defaults = {"filename": CHECKPOINT.stem, "save_on_train_epoch_end": True, "enable_version_counter": False}
        parser.set_defaults({f"checkpoint.{name}": value for name, value in defaults.items()})
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="folder of artefacts, logs and report; the same command goes on in it where it was. "
            "null: runs/<model>-<method>",
        )
        parser.link_arguments("run_dir", "model.run_dir")
        parser.link_arguments("compression.enabled", "calibration.enabled")
        parser.set_defaults({"compression.compressor": {"class_path": "nowag_pl.NoWagPruner"}})
        parser.set_defaults({"model.objective": {"class_path": "nowag_pl.lit.objectives.NextToken"}})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer what this project does."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "validate": {"model", "dataloaders", "datamodule", "verbose", "weights_only"},
            "evaluate": {"model", "datamodule"},
        }

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add `compare`, which needs no model and so no Trainer."""
        super()._add_subcommands(parser, **kwargs)
        description = "Compare finished runs: a table here, and the same with figures in one HTML file."
        compare_parser = SuggestingParser(description=description)
        compare_parser.add_argument("run_dirs", nargs="+", help="run directories, each with a report.json")
        compare_parser.add_argument("--output", default="compare.html", help="HTML file to write")
        commands = parser._subcommands_action
        assert commands is not None
        commands.add_subcommand("compare", compare_parser, help=description)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; what needs no model ends here, as --help does."""
        super().parse_arguments(parser, args)
        if self.config.subcommand == "compare":
            compare(self.config.compare.run_dirs, self.config.compare.output)
            parser.exit()
        check_checkpoint(self.config[self.config.subcommand].get("ckpt_path"))  # before Lightning opens it

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what stops a training in good order."""
        config = self.config_init[self.subcommand]
        trainer: Any = super().instantiate_trainer(**kwargs, enable_checkpointing=None)
        if config.trainer.enable_checkpointing is False:
            trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, ModelCheckpoint)]
        trainer.callbacks.insert(0, Preemption(Path(config.run_dir) / CHECKPOINT))
        return trainer

    def after_fit(self) -> None:
        """Show the figures when the progress bars are gone."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ModelReport):
                callback.show()

    after_validate = after_fit

    def before_instantiate_classes(self) -> None:
        """Settle the run directory."""
        config = self.config[self.subcommand]
        if config.run_dir is None:
            config.run_dir = str(Path("runs") / _run_name(config, str(self.subcommand)))
        _check_run_dir(config.run_dir, config.model.path)
        config.model.run_dir = config.run_dir
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str((Path(config.run_dir) / CHECKPOINT).parent)
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = config.run_dir


def _check_run_dir(run_dir: str, model_path: str) -> None:
    """Raise ValueError where artefacts cannot be kept, or would lie among the weights of the model."""
    if not run_dir:
        raise ValueError("Expected run_dir to name a folder, but got ''.")
    if Path(run_dir).is_file():
        raise ValueError(f"Expected run_dir to name a folder, but {run_dir} is a file.")
    if Path(run_dir).resolve() == Path(model_path).resolve():
        raise ValueError(f"Expected run_dir to be another folder than that of the model, but got {run_dir}.")


def _run_name(config: Any, subcommand: str) -> str:
    """Name a run after its model and method."""
    model = Path(config.model.path).name
    compressor = config.compression.compressor
    if subcommand != "fit":
        method = subcommand
    elif not config.compression.enabled:
        method = "dense"
    else:
        method = _method_name(compressor.class_path, dict(compressor.get("init_args") or {}))
        method += "-budget" if config.compression.budget else ""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{model}-{method}").strip("_")


def _method_name(class_path: str, settings: dict[str, Any]) -> str:
    """Name a method by its class and what is not the class's default."""
    module, _, name = class_path.rpartition(".")
    make = getattr(import_module(module), name)
    try:
        defaults, chosen = describe(make()), describe(make(**settings))
    except (TypeError, ValueError):  # settings that do not fit are refused where they are used
        defaults, chosen = {}, settings
    changed = {key: value for key, value in chosen.items() if value is not None and value != defaults.get(key)}
    return "-".join([name, *(f"{key}_{value}" for key, value in changed.items())])


def main(args: ArgsType = None) -> CompressionCLI:
    """Parse the command line and run it."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("nowag_pl").setLevel(logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "It is recommended to use .*sync_dist=True")  # values are reduced already
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    set_parsing_settings(add_print_completion_argument=True)
    return CompressionCLI(
        LitCausalLM,
        TokenDataModule,
        trainer_class=CompressionTrainer,
        trainer_defaults={
            "max_epochs": 0,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 10,
            "enable_model_summary": False,
        },
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_class=SuggestingParser,
        parser_kwargs={
            "description": __doc__,
            "formatter_class": HelpFormatter,
            **{
                name: {"usage": f"main.py {name} [--config FILE ...] [--GROUP.NAME VALUE ...]"}
                for name in CompressionCLI.subcommands()
            },
        },
        auto_configure_optimizers=False,
        args=args,
    )


if __name__ == "__main__":
    begin()
    try:
        main()
    except SIGTERMException:
        stopped_by = received_signal()
        print(f"Stopped by {stopped_by.name}; the same command goes on from here.", file=sys.stderr)  # noqa: T201
        sys.exit(128 + stopped_by)
    except (ValueError, OSError, MisconfigurationException) as error:
        if os.environ.get("NOWAG_PL_TRACEBACK"):
            raise
        message: object = error
        if isinstance(error, OSError) and error.strerror:  # without the number
            message = error.strerror + (f": {error.filename}" if error.filename else "")
        message = explained(str(message))
        if found := suggestion(message):
            message = f"{message}\ndid you mean {found}?"
        sys.exit(f"error: {message}\n(NOWAG_PL_TRACEBACK=1 shows where)")
