"""A Trainer whose `fit` compresses, finetunes if asked to, and validates after each of these."""

from pathlib import Path
from typing import Any, Literal, cast
from zipfile import is_zipfile

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from torch import nn

from nowag_pl.files import write_json
from nowag_pl.lit.datamodule import default_seq_len
from nowag_pl.lit.evaluation import (
    EVALUATION_FILE,
    PAPER_TASKS,
    TaskSettings,
    evaluate_tasks,
    evaluation_table,
    task_manager,
)
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.preflight import show, trains_end_to_end
from nowag_pl.pipeline.sizes import ModelSizes
from nowag_pl.pipeline.whole_needs import questions_needs
from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore

Phase = Literal["one_shot", "blockwise", "finetuned"]
_KEYWORDS = ("best", "last", "hpc")  # what Lightning finds itself
CHECKPOINT = Path("training") / "last.ckpt"  # of end-to-end training, in the run directory


class CompressionTrainer(Trainer):
    """Lightning's Trainer with a `fit` that validates before and after training, and may have no epochs at all.

    The callbacks that compress and finetune do so while a validation is set up: there the processes are up, nothing is
    wrapped, and no gradients or optimizer states are allocated. With `max_epochs=0` that is all.

    Attributes:
        compressing: whether this is a `fit`.
        phase: what the running validation measures.
    """

    compressing = False
    phase: Phase = "one_shot"

    def fit(  # type: ignore[override]
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Run the compression stages and validate; finetune blocks and validate; train end to end and validate.

        Raises:
            ValueError: something is asked for that no training would do.
        """
        self._check_training(model, ckpt_path)
        self.compressing = True
        self.validate(model, val_dataloaders, datamodule=datamodule)
        if finetunes_blocks(self):
            self.phase = "blockwise"
            cast(Any, model).release()
            self.validate(model, val_dataloaders, datamodule=datamodule)
        if not trains_end_to_end(self):
            return
        self.phase = "finetuned"
        self._claim_training(model)
        ckpt_path = ckpt_path or self._last_checkpoint(model)
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
        self.validate(model, val_dataloaders, datamodule=datamodule)

    def _check_training(self, model: LightningModule, ckpt_path: str | None) -> None:
        """Refuse before hours of compression what would be refused, or left out, behind it."""
        wanted = {
            "ckpt_path": ckpt_path,
            "trainer.max_steps": self.max_steps > 0,
            "model.distillation": getattr(model, "distillation", None),
        }
        for name, value in wanted.items():
            if value and self.max_epochs == 0:
                raise ValueError(f"Expected trainer.max_epochs of at least 1 with {name}, but got 0.")
        if self.max_epochs != 0 and isinstance(model, LitCausalLM):
            model.check_training()

    def _claim_training(self, model: LightningModule) -> None:
        """Enter in the manifest what the end-to-end training depends on, or check that it is what it was."""
        run_dir, settings = getattr(model, "run_dir", None), getattr(model, "training_settings", None)
        if run_dir is None or settings is None:
            return
        names = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val")
        described = {name: getattr(self, name) for name in names} | settings()
        ArtefactStore(Path(run_dir), Ranks.current()).claim("training", described, CHECKPOINT.parent.name)

    def _last_checkpoint(self, model: LightningModule) -> str | None:
        """Return where an earlier process of the same training stopped."""
        run_dir = getattr(model, "run_dir", None)
        path = Path(run_dir) / CHECKPOINT if run_dir else None
        found = self.strategy.broadcast(str(path) if path is not None and path.exists() else None)
        if found:
            rank_zero_info(f"Going on with the training in {found}")
        return found

    def validate(self, *args: Any, verbose: bool = False, **kwargs: Any) -> Any:
        """Measure the perplexity of a dense or compressed model.

        The report callback shows the figures, so Lightning's own table is left out.

        Raises:
            ValueError: a part of the windows would be measured.
        """
        limit = self.limit_val_batches
        if limit is not None and (isinstance(limit, int) or limit < 1):
            raise ValueError(
                "Expected no trainer.limit_val_batches, trainer.overfit_batches or trainer.fast_dev_run: perplexities "
                "are those of whole texts. data.max_eval_windows takes fewer windows, and says so."
            )
        return super().validate(*args, verbose=verbose, **kwargs)

    def evaluate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        tasks: list[str] = list(PAPER_TASKS),  # noqa: B006 - what --help shows; it is only read
        num_fewshot: int | None = None,
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
            num_fewshot: solved examples before each question. null: each task's own number, mostly 0.
            limit: use only the first examples of each task, to try something out. null: all.
            batch_size: sequences that pass the model together.
            include_path: folder with task definitions (YAML) of your own.

        Returns:
            What is written, see :func:`nowag_pl.lit.evaluation.evaluate_tasks`; nothing on ranks above zero.

        Raises:
            ValueError: the harness is not installed, a task is unknown, or a number is out of its range.
        """
        settings = TaskSettings(tuple(tasks), num_fewshot, limit, batch_size, include_path)
        manager = task_manager(settings)
        if not self.is_global_zero:
            return {}
        module = cast(LitCausalLM, model)
        seq_len = default_seq_len(module.checkpoint)
        needs = questions_needs(ModelSizes.as_it_is(module.checkpoint), seq_len, batch_size)
        show([needs], Path(module.run_dir or self.default_root_dir), self.strategy.root_device)
        module.configure_model()
        whole = cast(nn.Module, module.model).to(self.strategy.root_device)
        evaluation = {"model": module.checkpoint.path, "dtype": str(module.checkpoint.dtype).removeprefix("torch.")}
        evaluation |= evaluate_tasks(whole, module.checkpoint.tokenizer, settings, manager)
        Console().print(evaluation_table(evaluation))
        if module.run_dir is not None:
            write_json(Path(module.run_dir) / EVALUATION_FILE, evaluation)
            rank_zero_info(f"Figures written to {Path(module.run_dir) / EVALUATION_FILE}")
        return evaluation


def check_checkpoint(ckpt_path: str | None) -> None:
    """Raise ValueError where a checkpoint to go on from is not there, or is another file.

    Args:
        ckpt_path: what Lightning takes: a file, a folder, an address, or a word.
    """
    if ckpt_path is None or ckpt_path in _KEYWORDS or "://" in ckpt_path:
        return
    path = Path(ckpt_path)
    if not path.exists() or (path.is_file() and not is_zipfile(path)):
        state = "is another file, or damaged" if path.exists() else "is not there"
        raise ValueError(f"Expected ckpt_path to be a checkpoint of Lightning, but {path} {state}.")


def finetunes_blocks(trainer: Trainer) -> bool:
    """Tell whether a fit finetunes one block after the other."""
    return any(getattr(callback, "finetunes_blocks", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def is_compressing(trainer: Trainer, stage: str) -> bool:
    """Tell whether a callback's `setup` belongs to a `fit`, also where that only validates."""
    return stage == "fit" or getattr(trainer, "compressing", False)


def validated_phase(trainer: Trainer) -> Phase | None:
    """Return what a validation measured, or None for those that run inside training."""
    return getattr(trainer, "phase", "one_shot") if trainer.state.fn == TrainerFn.VALIDATING else None
