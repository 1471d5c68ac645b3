"""Compress a language model and measure its loss in quality.

python main.py fit                                        the embedded model, NoWag-P 50 %, perplexity
python main.py fit --config configs/method/nowag_vq_2bit_small.yaml
python main.py fit --config configs/method/nowag_p_2_4.yaml --config configs/finetuning/embedded.yaml
python main.py fit --model.path <folder or hub id> --config configs/data/wikitext2_c4.yaml
python main.py validate --model.path <folder or hub id>   perplexity of a dense or compressed model
python main.py compare <run> <run> ... [--output FILE]    finished runs side by side
python main.py evaluate --model.path <folder or hub id>   zero-shot tasks of lm-evaluation-harness (the extra `eval`)
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # The imports take seconds: until `run_program` has begun, Ctrl-C ends them without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Before Lightning, whose import takes seconds.
    from nowag_pl.run.early import refuse_changed_settings

    refuse_changed_settings(sys.argv[1:])

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LRSchedulerTypeTuple
from torch.optim import Optimizer

from callbacks.calibration import ModelCalibration
from callbacks.compression import ModelCompression
from callbacks.export import ModelExport
from callbacks.finetuning import ModelFinetuning
from callbacks.inspection import ModelInspection
from callbacks.preflight import ModelPreflight
from callbacks.report import ModelReport
from callbacks.rotation import ModelRotation
from nowag_pl.lit.command_line import StageCLI, as_plain, quiet_libraries, run_program
from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.suggestions import HelpFormatter, SuggestingParser
from nowag_pl.lit.trainer import CompressionTrainer
from nowag_pl.run.layout import CHECKPOINT

CALLBACKS = {
    "preflight": ModelPreflight,
    "rotation": ModelRotation,
    "calibration": ModelCalibration,
    "compression": ModelCompression,
    "finetuning": ModelFinetuning,
    "export": ModelExport,
    "report": ModelReport,
    "inspection": ModelInspection,
}
TRAINER_DEFAULTS = {
    "max_epochs": 0,
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
}
CHECKPOINT_DEFAULTS = {
    "checkpoint.filename": Path(CHECKPOINT).stem,
    "checkpoint.save_on_train_epoch_end": True,
    "checkpoint.enable_version_counter": False,
}


class CompressionCLI(StageCLI):
    """The command line with a group for each stage."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups of the stages, of checkpoints, and the run directory."""
        for group, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, group)
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(CHECKPOINT_DEFAULTS)
        parser.set_defaults({"compression.compressor": {"class_path": "nowag_pl.NoWagPruner"}})
        parser.set_defaults({"model.objective": {"class_path": "nowag_pl.lit.objectives.NextToken"}})
        parser.add_optimizer_args((Optimizer,), "optimizer")
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple, "lr_scheduler")
        for name in ("optimizer", "lr_scheduler"):
            parser.link_arguments(name, f"model.{name}", compute_fn=as_plain)
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="folder of artefacts, logs and report; the same command continues an interrupted run in it. "
            "null: runs/<model>-<method>",
        )
        parser.link_arguments("run_dir", "model.run_dir")
        parser.link_arguments("compression.enabled", "calibration.enabled")
        parser.link_arguments("compression.enabled", "rotation.enabled")

    def after_fit(self) -> None:
        """Show the figures after the progress bars."""
        assert isinstance(self.trainer, CompressionTrainer)
        for callback in self.trainer.callbacks:
            if isinstance(callback, ModelReport):
                callback.show()

    after_validate = after_fit


def main(args: ArgsType = None) -> CompressionCLI:
    """Parse the command line and run it."""
    quiet_libraries()
    usages = {name: f"main.py {name} [--config FILE ...] [--GROUP.NAME VALUE ...]" for name in StageCLI.subcommands()}
    return CompressionCLI(
        LitCausalLM,
        TokenDataModule,
        trainer_class=CompressionTrainer,
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_class=SuggestingParser,
        parser_kwargs={
            "description": __doc__,
            "formatter_class": HelpFormatter,
            **{name: {"usage": usage} for name, usage in usages.items()},
        },
        auto_configure_optimizers=False,
        args=args,
    )


if __name__ == "__main__":
    run_program(main)
