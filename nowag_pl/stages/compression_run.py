"""One run: a model, a run directory, and the stages that have been asked for."""

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nowag_pl.compressors import Compressor, needs_full_second_moment
from nowag_pl.compressors.budget import Budget, settings_of, titles
from nowag_pl.data.tokens import tokens_digest
from nowag_pl.files import read_json
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.saving import save_streamed
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear
from nowag_pl.run.fingerprint import fingerprint
from nowag_pl.run.memory import measured_memory
from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages import calibration, compression
from nowag_pl.stages import finetuned as finetuning
from nowag_pl.stages.budget.spread import FILE as BUDGET_FILE
from nowag_pl.stages.budget.spread import STAGE as BUDGET_STAGE
from nowag_pl.stages.budget.spread import compress_within_budget
from nowag_pl.stages.calibration import CalibrationMode
from nowag_pl.stages.teacher import DenseReference, Teacher, TeacherSettings


class CompressionRun:
    """The stages of one run over one model, each written into the run directory and skipped where it is there.

    Args:
        checkpoint: dense model.
        folder: run directory.
        device: where computations happen.
        ranks: processes of the run; None: those of the default process group.

    Raises:
        ValueError: the run directory belongs to another model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: str | Path,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self.store = ArtefactStore(Path(folder), ranks or Ranks.current())
        self.method: str | None = None
        self._settings: dict[str, dict[str, Any]] = {}  # of the stages so far
        self.calibration: dict[str, Any] = {}
        self.peak_memory: dict[str, int] = {}  # bytes, by stage, in this process
        self._windows: Tensor | None = None
        self._mode: CalibrationMode = "dense"
        self._batch_size = 1
        dtype = str(checkpoint.dtype).removeprefix("torch.")
        self.store.claim("model", {"fingerprint": fingerprint(checkpoint), "dtype": dtype})

    @cached_property
    def model(self) -> StreamedModel:
        """The dense model, streamed."""
        return StreamedModel(self.checkpoint, self.device)

    @property
    def num_parameters(self) -> int:
        """Parameters of the dense model, tied ones once."""
        return sum(p.numel() for module in (self.model.skeleton, *self.model.blocks) for p in module.parameters())

    def calibrate(self, windows: Tensor, mode: CalibrationMode, seed: int, batch_size: int) -> None:
        """Gather second moments, or, where they are not dense ones, get ready to do so while compressing.

        Args:
            windows: calibration sequences `[num_sequences, seq_len]`, the same on every rank.
            mode: as for :class:`~callbacks.calibration.ModelCalibration`.
            seed: how the windows were drawn; for the manifest.
            batch_size: sequences that pass a block together.
        """
        self.calibration = {
            "num_sequences": len(windows),
            "num_tokens": windows.numel(),
            "sha256": tokens_digest(windows),
        }
        settings = {"num_sequences": len(windows), "seq_len": windows.shape[1], "mode": mode, "seed": seed}
        settings |= {"tokens_sha256": self.calibration["sha256"]}
        self.store.claim("calibration", settings, calibration.STAGE)
        self._settings["calibration"] = settings
        self._windows, self._mode, self._batch_size = windows, mode, batch_size
        if mode == "dense":
            with self.measuring("calibration"):
                calibration.calibrate(self.model, windows, self.store, batch_size)

    def compress(self, compressor: Compressor, budget: Budget | None = None) -> None:
        """Compress every linear of every block.

        Args:
            compressor: the method.
            budget: how its bits are spread over the linears; None: its settings are the same everywhere.

        Raises:
            RuntimeError: `calibrate` was not called before.
            ValueError: there is nothing among which the budget can choose.
        """
        if self._windows is None:
            raise RuntimeError("Expected calibrate before compress.")
        described = compression.describe(compressor)
        self.method = repr(compressor)
        if budget is not None:
            settings = settings_of(compressor, budget)
            described["budget"] = {"settings": titles(settings), "num_sequences": budget.num_sequences}
            self.method += f", bits spread over linears by sensitivity ({len(settings)} settings)"
        self._settings["compression"] = described
        self.store.claim("compression", described, compression.STAGE)
        if budget is not None:
            claimed = {**self._settings["calibration"], **described}
            self.store.claim("budget", claimed, BUDGET_STAGE)
            with self.measuring("compression"):
                compress_within_budget(
                    self.model, settings, self._windows, budget.num_sequences, self.store, self._batch_size, self._mode
                )
            return
        full = needs_full_second_moment(compressor)
        stream = calibration.calibration_stream(
            self.model, self._windows, self.store, compression.STAGE, self._batch_size, self._mode, full
        )
        with self.measuring("compression"):
            compression.compress(self.model, compressor, self.store, stream, self._mode)

    @property
    def budget(self) -> dict[str, Any] | None:
        """What the budget has decided, but for the setting of each linear, which :meth:`statistics` has; or None."""
        decision = self._decision
        return decision and {name: decision[name] for name in ("taken", "uniform", "spread", "settings")}

    @property
    def _decision(self) -> dict[str, Any] | None:
        has_budget = "budget" in self._settings.get("compression", {})
        return read_json(self.store.folder / BUDGET_FILE) if has_budget else None

    def measuring(self, stage: str) -> AbstractContextManager[None]:
        """Return a context in which the peak memory of a stage is measured."""
        return measured_memory(self.peak_memory, stage, self.device)

    def claim_finetuning(self, train: Tensor, held_out: Tensor, settings: Any) -> None:
        """Enter in the manifest what the finetuned blocks depend on, or check it.

        Args:
            train: sequences to train on.
            held_out: sequences that decide.
            settings: a dataclass.

        Raises:
            RuntimeError: `compress` was not called before.
            ValueError: the run directory holds blocks that were finetuned in another way.
        """
        if self.method is None:
            raise RuntimeError("Expected compress before finetuning.")
        described = {
            **dataclasses.asdict(settings),
            "train_sha256": tokens_digest(train),
            "held_out_sha256": tokens_digest(held_out),
        }
        del described["activations"]  # makes no difference to the result
        self.store.claim("finetuning", described | self.settings, finetuning.STAGE)
        self._settings["finetuning"] = described

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of all stages so far as JSON values, such as "calibration.seed"."""
        return {
            f"{stage}.{name}": value for stage, settings in self._settings.items() for name, value in settings.items()
        }

    def compressed(self, finetuned: bool = False) -> "CompressedModel":
        """Return the compressed model, with its blocks as finetuning left them or as compression did."""
        return CompressedModel(self, finetuned)

    def reference(self, windows: Mapping[str, Tensor], batch_size: int) -> DenseReference:
        """Return the dense model's predictions on evaluation windows, computing those that are not there."""
        return DenseReference(self.model, self.store, windows, batch_size)

    def teacher(self, windows: Tensor, settings: TeacherSettings) -> Teacher:
        """Return what teaches a compressed model on training windows, computing what is not there."""
        return Teacher(self.model, self.store, windows, settings)

    def statistics(self) -> list[dict[str, Any]]:
        """Return loss, bits and sparsity of every compressed linear, in the model's order."""
        rows, decision = [], self._decision
        for index in range(len(self.model)):
            statistics = self.store.read_metadata(compression.STAGE, index)["statistics"]
            for name, row in statistics.items():
                rows.append({"name": f"{self.model.block_name(index)}.{name}", "block": index, **row})
                if decision is not None:
                    rows[-1]["setting"] = decision["settings"][decision["selection"][index][name]]
        return rows

    def finetuning_statistics(self) -> list[dict[str, Any]]:
        """Return held-out error before and after, and epochs, of every finetuned block."""
        rows = (self.store.read_metadata(finetuning.STAGE, index) for index in range(len(self.model)))
        return [{key: row[key] for key in ("before", "after", "epochs", "seconds")} for row in rows]

    def stage_seconds(self) -> dict[str, float]:
        """Return the time that the artefacts took, also those of an earlier, interrupted process."""
        stages = {
            "calibration": calibration.STAGE,
            "compression": compression.STAGE,
            "finetuning": finetuning.STAGE,
        }
        seconds = {
            name: sum(
                self.store.read_metadata(stage, index)["seconds"]
                for index in range(len(self.model))
                if self.store.path(stage, index).is_file()
            )
            for name, stage in stages.items()
        }
        if (decision := self._decision) is not None:
            seconds["budget"] = decision["seconds"]
        return seconds


class CompressedModel:
    """What a run has made of its model, read from the run directory a block at a time or as a whole.

    Args:
        run: a run whose linears are compressed.
        finetuned: whether its blocks are those that finetuning left.
    """

    def __init__(self, run: CompressionRun, finetuned: bool) -> None:
        self._run = run
        self._finetuned = finetuned

    def load_block(self, index: int) -> nn.Module:
        """Read a block."""
        load = finetuning.load_finetuned_block if self._finetuned else finetuning.load_compressed_block
        return load(self._run.model, self._run.store, index)

    def assemble(self) -> nn.Module:
        """Build the whole model."""
        run = self._run
        linears: dict[str, CompressedLinear] = {}
        for index in range(len(run.model)):
            block = compression.read_block(run.store, index)
            linears |= {f"{run.model.block_name(index)}.{name}": linear for name, linear in block.items()}
        model = assemble(run.checkpoint, linears)
        for index in range(len(run.model)) if self._finetuned else ():
            state, _ = run.store.read(finetuning.STAGE, index)
            model.get_submodule(run.model.block_name(index)).load_state_dict(state)
        return model

    def save(self, folder: str | Path, dense: bool = False) -> None:
        """Write the model as a folder, a block at a time; `dense` as an ordinary model."""
        save_streamed(self._run.model, self.load_block, folder, dense)

    def check_fixed(self, model: nn.Module | None = None) -> None:
        """Check that training left masks and codes as they were.

        Args:
            model: whole model after training; None: the blocks of this one.

        Raises:
            RuntimeError: it has changed one.
        """
        run = self._run
        for index in range(len(run.model)):
            block = model.get_submodule(run.model.block_name(index)) if model is not None else self.load_block(index)
            finetuning.check_fixed(block, run.store, index)
