"""A Trainer whose `fit` compresses, finetunes if asked to, and validates after each of these."""

import dataclasses
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console

from nowag_pl.files import write_sealed_json
from nowag_pl.lit.checkpoint_io import WholeCheckpoints, is_sharded, local_path, newest_whole
from nowag_pl.lit.claims import ClaimsCheck
from nowag_pl.lit.datamodule import TokenDataModule, default_seq_len
from nowag_pl.lit.evaluation import (
    PAPER_TASKS,
    TaskSettings,
    evaluate_tasks,
    evaluation_table,
    task_manager,
)
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.objectives import NextToken
from nowag_pl.lit.phases import (
    Phase,
    PhasedTrainer,
    block_precision,
    is_compressing,
    trains_end_to_end,
    validated_phase,
)
from nowag_pl.lit.precision import check_precision
from nowag_pl.lit.rank_logs import log_by_rank
from nowag_pl.lit.settings import training_settings
from nowag_pl.lit.stage import Stage, module_of
from nowag_pl.needs import questions
from nowag_pl.reports.needs_table import show
from nowag_pl.run.layout import CHECKPOINT, EVALUATION
from nowag_pl.run.lock import writing
from nowag_pl.run.places import check_apart
from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.compression_run import training_claim
from nowag_pl.stages.plan import Plan
from nowag_pl.stages.sizes import ModelSizes

__all__ = ["CompressionTrainer", "Phase", "check_checkpoint", "is_compressing", "validated_phase"]

LAST = "last"  # the checkpoint in the run directory
_ELSEWHERE = ("best", "hpc")  # other words of Lightning's, which mean nothing when a process begins


class CompressionTrainer(PhasedTrainer):
    """Lightning's Trainer with a `fit` that validates before and after training, and may have no epochs at all.

    The callbacks that compress and finetune do so while a validation is set up: there the processes are up, nothing is
    wrapped, and no gradients or optimizer states are allocated. With `max_epochs=0` that is all.

    Lifecycle of a `fit`: every stage announces itself to the plan of the module, the plan is checked, one-shot
    compression and a validation, blockwise finetuning and a validation, end-to-end training and a validation.
    """

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Run the compression stages and validate; finetune blocks and validate; train end to end and validate.

        Args:
            model: a LitCausalLM.
            train_dataloaders: None; the data module gives them.
            val_dataloaders: None; the data module gives them.
            datamodule: text.
            ckpt_path: checkpoint from which end-to-end training goes on. null: the one in the run directory, if any.
            weights_only: checkpoints are always read without running code.

        Raises:
            ValueError: something is asked for that no training would do, model or data lie in the run directory, or
                another process writes in it.
        """
        module = module_of(model)
        check_precision(str(self.precision))
        check_checkpoint(None if ckpt_path is None else str(ckpt_path))
        self._announce(module)
        self._check_plan(module, ckpt_path)
        run_dir = None if module.run_dir is None else Path(module.run_dir)
        if run_dir is not None and isinstance(datamodule, TokenDataModule):
            check_apart(run_dir, datamodule.places)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = WholeCheckpoints()
        if not any(isinstance(callback, ClaimsCheck) for callback in self.callbacks):
            self.callbacks.insert(0, ClaimsCheck())
        if run_dir is not None:
            log_by_rank(run_dir, self.global_rank, self.world_size)
        with writing(run_dir if self.is_global_zero else None):
            self._fit_stages(module, train_dataloaders, val_dataloaders, datamodule, ckpt_path)

    def _fit_stages(
        self,
        module: LitCausalLM,
        train_dataloaders: Any,
        val_dataloaders: Any,
        datamodule: LightningDataModule | None,
        ckpt_path: str | Path | None,
    ) -> None:
        """Do the stages of a fit, one after the other."""
        self.compressing = True
        self.validate(module, val_dataloaders, datamodule=datamodule)
        if module.plan.finetuning is not None:
            self.phase = "blockwise"
            module.release()
            self.validate(module, val_dataloaders, datamodule=datamodule)
        if not trains_end_to_end(self):
            return
        self.phase = "finetuned"
        self._claim_training(module)
        ckpt_path = self._last_checkpoint(module) if ckpt_path in (None, LAST) else ckpt_path
        super().fit(module, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only=True)
        self.validate(module, val_dataloaders, datamodule=datamodule)

    def _announce(self, module: LitCausalLM) -> None:
        """Let every stage enter its settings in a fresh plan."""
        module.plan = Plan()
        for callback in self.callbacks:
            if isinstance(callback, Stage):
                callback.announce(module.plan)
        if (settings := module.plan.finetuning) is not None:
            precision = block_precision(self.accelerator, settings.precision)
            module.plan.finetuning = dataclasses.replace(settings, precision=precision)

    def _check_plan(self, module: LitCausalLM, ckpt_path: str | Path | None) -> None:
        """Refuse, before hours of compression, settings that would be refused or ignored after it."""
        wanted = {
            "ckpt_path": bool(ckpt_path),
            "trainer.max_steps": self.max_steps > 0,
            "model.objective": not isinstance(module.objective, NextToken),
        }
        for name, is_wanted in wanted.items():
            if is_wanted and self.max_epochs == 0:
                raise ValueError(f"Expected trainer.max_epochs of at least 1 with {name}, but got 0.")
        if str(ckpt_path) == LAST and (module.run_dir is None or not (Path(module.run_dir) / CHECKPOINT).exists()):
            raise ValueError(
                f"Expected {CHECKPOINT} in run_dir with ckpt_path=last, but it is not there. Without ckpt_path a "
                "training goes on where it was, or begins."
            )
        if module.plan.finetuning is not None and module.plan.compression is None:
            raise ValueError("Expected compression.enabled with finetuning.enabled, but there is nothing to finetune.")
        if not trains_end_to_end(self):
            return
        if self.accumulate_grad_batches > 1 and not module.objective.accumulates:
            raise ValueError(
                f"Expected trainer.accumulate_grad_batches of 1 with {type(module.objective).__name__}, but got "
                f"{self.accumulate_grad_batches}. sampling.batch_size is what fits in memory."
            )
        if module.objective.needs_dense and module.plan.compression is None:
            name = type(module.objective).__name__
            raise ValueError(
                f"Expected compression.enabled with model.objective of {name}, but the dense model, from which it "
                "learns, is known only where it is compressed."
            )
        module.objective.check(module.checkpoint)

    def _claim_training(self, module: LitCausalLM) -> None:
        """Enter the settings of the end-to-end training in the manifest, or check that they have not changed."""
        settings = training_settings(self, module)
        if module.run_dir is None or settings is None:
            return
        earlier = module.run.settings if module.is_compressed_here else {"model": module.checkpoint.path}
        ArtefactStore(Path(module.run_dir), Ranks.current()).claim(*training_claim(settings, earlier))

    def _last_checkpoint(self, module: LitCausalLM) -> str | None:
        """Return where an earlier process of the same training stopped."""
        path = None
        if module.run_dir is not None and self.is_global_zero:
            last = Path(module.run_dir) / CHECKPOINT
            path = newest_whole(last.parent, last.name)
        found: str | None = self.strategy.broadcast(None if path is None else str(path))
        if found:
            rank_zero_info(f"Going on with the training in {found}")
        return found

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = False,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Measure the perplexity of a dense or compressed model.

        The report callback shows the figures, so Lightning's own table is left out.

        Args:
            model: a LitCausalLM.
            dataloaders: None; the data module gives them.
            ckpt_path: null; trained models are measured by their export.
            verbose: print Lightning's table.
            datamodule: text.
            weights_only: checkpoints are always read without running code.

        Raises:
            ValueError: a part of the windows would be measured, or a checkpoint is asked for.
        """
        check_precision(str(self.precision))
        if ckpt_path is not None:
            raise ValueError(
                f"Expected no ckpt_path with validate, but got {ckpt_path}: a checkpoint lacks the model around it. "
                "Measure what the training wrote: --model.path=<run_dir>/export_finetuned."
            )
        limit = self.limit_val_batches
        is_asked_for = self.options["limit_val_batches"] is not None
        if is_asked_for or (limit is not None and (isinstance(limit, int) or limit < 1)):
            raise ValueError(
                "Expected no trainer.limit_val_batches, trainer.overfit_batches or trainer.fast_dev_run: perplexities "
                "are those of whole texts. data.max_eval_windows takes fewer windows, and says so."
            )
        if model is not None and not self.compressing:
            self._announce(module_of(model))
        return super().validate(model, dataloaders, None, verbose, datamodule, weights_only=True)

    def evaluate(  # noqa: PLR0913 - each is an option of the command line
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        tasks: list[str] = list(PAPER_TASKS),  # noqa: B006 - --help shows it; it is only read
        num_fewshot: int | dict[str, int] | None = None,
        chat_template: bool | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        include_path: str | None = None,
    ) -> dict[str, Any]:
        """Ask a dense or compressed model questions by lm-evaluation-harness (the extra `eval`), on one device.

        The figures are shown and written to <run_dir>/evaluation.json.

        Args:
            model: the model.
            datamodule: not used; the tasks bring their data.
            tasks: names of tasks or groups of the harness, such as mmlu; by default the zero-shot tasks of the paper.
            num_fewshot: solved examples before each question, of all tasks or by task, such as {mmlu: 5}. null: each
                task's own number, mostly 0.
            chat_template: write questions as the model's chat template does, solved examples as turns of the chat.
                null: if the model has one.
            limit: use only the first examples of each task, to try something out. null: all.
            batch_size: sequences that pass the model together.
            include_path: folder with task definitions (YAML) of your own.

        Returns:
            The figures, as in :func:`nowag_pl.lit.evaluation.evaluate_tasks`; nothing on ranks above zero.

        Raises:
            ValueError: the harness is not installed, a task is unknown, or a number is out of its range.
        """
        settings = TaskSettings(tuple(tasks), num_fewshot, chat_template, limit, batch_size, include_path)
        manager = task_manager(settings)
        if not self.is_global_zero:
            return {}
        module = module_of(model)
        run_dir = None if module.run_dir is None else Path(module.run_dir)
        with writing(run_dir):
            return self._evaluate(module, settings, manager, run_dir)

    def _evaluate(
        self, module: LitCausalLM, settings: TaskSettings, manager: Any, run_dir: Path | None
    ) -> dict[str, Any]:
        """Ask the questions, show the figures and write them."""
        seq_len = default_seq_len(module.checkpoint)
        needs = questions(ModelSizes.of(module.checkpoint), seq_len, settings.batch_size)
        show([needs], run_dir or Path(self.default_root_dir), self.strategy.root_device)
        module.configure_model()
        assert module.model is not None
        whole = module.model.to(self.strategy.root_device)
        evaluation = {"model": module.checkpoint.path, "dtype": str(module.checkpoint.dtype).removeprefix("torch.")}
        evaluation |= evaluate_tasks(whole, module.checkpoint.tokenizer, settings, manager)
        Console().print(evaluation_table(evaluation))
        if run_dir is not None:
            write_sealed_json(run_dir / EVALUATION, evaluation)
            rank_zero_info(f"Figures written to {run_dir / EVALUATION}")
        return evaluation


def check_checkpoint(ckpt_path: str | None) -> None:
    """Raise ValueError where a checkpoint to go on from is not there, is something else, or lies on another machine.

    Args:
        ckpt_path: as Lightning takes it: a file, a folder of a sharded model's checkpoint, or a word.
    """
    if ckpt_path is None or ckpt_path == LAST:
        return
    if ckpt_path in _ELSEWHERE and not Path(ckpt_path).exists():
        raise ValueError(f"Expected ckpt_path to be a file, a folder or {LAST!r}, but got {ckpt_path!r}.")
    path = local_path(ckpt_path)
    if not path.exists():
        raise ValueError(f"Expected ckpt_path to be a checkpoint of Lightning, but {path} is not there.")
    if path.is_dir() and not is_sharded(path):
        raise ValueError(f"Expected ckpt_path to be a checkpoint of Lightning, but {path} is a folder of other files.")
    if not path.is_dir() and not (path.is_file() and is_zipfile(path)):
        raise ValueError(f"Expected ckpt_path to be a checkpoint of Lightning, but {path} is another file, or damaged.")
