"""One run: a model, a run directory, a plan, and the stages of it that are done so far.

Where compression happens, from top to bottom: :meth:`CompressionRun.calibrate` gathers second moments,
:meth:`CompressionRun.compress` compresses block after block, :mod:`nowag_pl.lit.blockwise` finetunes, and
:class:`CompressedModel` is their result.
"""

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nowag_pl.compressors.budget import Budget, settings_of, titles
from nowag_pl.data.tokens import BosPlace, tokens_digest
from nowag_pl.files import read_sealed_json
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.compressed_head import compressed_head, head_name
from nowag_pl.models.format.exl3 import save_streamed_exl3
from nowag_pl.models.format.saving import save_streamed
from nowag_pl.models.rotation import check_rotatable
from nowag_pl.models.selection import Selection, find_gates, find_linears
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear
from nowag_pl.run.fingerprint import check_finite, fingerprint
from nowag_pl.run.layout import (
    BUDGET,
    COMPRESSED,
    DECISION,
    FINETUNED,
    GUIDANCE,
    HEAD,
    MOMENTS,
    OUTPUT_MOMENTS,
    ROTATION,
    TRAINING,
)
from nowag_pl.run.manifest import Claim
from nowag_pl.run.memory import measured_memory
from nowag_pl.run.places import check_apart
from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages import finetuned
from nowag_pl.stages.assignment import Assignment, assignment_of, describe, selection_of, title
from nowag_pl.stages.budget.candidates import Choices
from nowag_pl.stages.budget.spread import Budgeted, compress_within_budget
from nowag_pl.stages.calibration import calibrate, moment_source, unseen_experts
from nowag_pl.stages.compression import compress, read_block
from nowag_pl.stages.damage import Damage
from nowag_pl.stages.guidance import read_guidance, write_guidance
from nowag_pl.stages.head import compress_head, head_method, read_head
from nowag_pl.stages.plan import CalibrationSettings, CompressionSettings, ExportFormat, FinetuningSettings, Plan
from nowag_pl.stages.rotation import Tokens, write_rotated
from nowag_pl.stages.stored_rows import CompressedRows
from nowag_pl.stages.teacher import DenseReference, Teacher, TeacherSettings


class CompressionRun:
    """The stages of one run over one model, each written into the run directory and skipped if it is there.

    Args:
        checkpoint: dense model.
        folder: run directory.
        plan: the stages of the run and their settings.
        device: device of the computations.
        ranks: processes of the run; None: those of the default process group.

    Raises:
        ValueError: the run directory belongs to another model, holds this one or lies in it, or another process writes
            in it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: str | Path,
        plan: Plan,
        device: torch.device | str = "cpu",
        ranks: Ranks | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.device = torch.device(device)
        self.store = ArtefactStore(Path(folder), ranks or Ranks.current())
        self.method: str | None = None
        self.calibration: dict[str, Any] = {}
        self.bos: BosPlace = "stream"
        self.peak_memory: dict[str, int] = {}  # bytes, by stage, in this process
        self.damage: dict[str, Damage] = {}  # by phase, where it was measured
        self._settings: dict[str, dict[str, Any]] = {}  # of the stages so far
        self._windows: Tensor | None = None
        self._prepared: StreamedModel | None = None  # rotated, or with a compressed head
        places = {checkpoint.folder, *(file.resolve().parent for file in checkpoint.weight_map.values())}
        check_apart(Path(folder), [("model.path", place) for place in sorted(places)])
        dtype = str(checkpoint.dtype).removeprefix("torch.")
        self.store.claim("model", {"fingerprint": fingerprint(checkpoint), "dtype": dtype})

    @cached_property
    def dense(self) -> StreamedModel:
        """The dense model as it was given, streamed.

        Raises:
            ValueError: a pattern of the plan matches no linear.
        """
        return StreamedModel(self.checkpoint, self.device, selection_of(self.plan.compression))

    @property
    def model(self) -> StreamedModel:
        """The model whose blocks are compressed, streamed: as given, until it is rotated or its head compressed."""
        return self._prepared or self.dense

    @property
    def assignment(self) -> Assignment:
        """The method of every linear, before a budget chooses.

        Raises:
            ValueError: a pattern of the plan matches no linear.
        """
        return assignment_of(self._compression, self.model.linear_names)

    @property
    def _compression(self) -> CompressionSettings:
        if self.plan.compression is None:
            raise RuntimeError("Expected a plan with a compression, but it has none.")
        return self.plan.compression

    @property
    def _calibration(self) -> CalibrationSettings:
        if self.plan.calibration is None:
            raise RuntimeError("Expected a plan with a calibration, but it has none.")
        return self.plan.calibration

    @property
    def num_parameters(self) -> int:
        """Parameters of the dense model, tied ones once."""
        return sum(p.numel() for module in (self.dense.skeleton, *self.dense.blocks) for p in module.parameters())

    def check_finite(self) -> None:
        """Raise ValueError that names the first tensor of the dense model that holds NaN or infinity."""
        problem = None
        if self.store.ranks.is_zero:
            # What is wrong has to reach the other ranks, which wait for it.
            try:
                check_finite(self.checkpoint)
            except ValueError as error:
                problem = str(error)
        if problem := self.store.ranks.broadcast(problem):
            raise ValueError(problem)

    def check_claims(self, texts: "Texts", training: Mapping[str, Any] | None = None) -> None:
        """Check, before anything is written or computed, that the run directory holds no run with other settings.

        Args:
            texts: what every stage of the plan reads.
            training: settings of the end-to-end training that follows; None where there is none.

        Raises:
            ValueError: it does; the message names the settings.
        """
        calibration, compression = (
            self._describe_calibration(texts.calibration, texts.bos),
            self._describe_compression(),
        )
        sections = {"calibration": calibration, "compression": compression}
        claims = [*self._rotation_claims(texts.calibration), *self._calibration_claims(calibration)]
        if (head := self._describe_head()) is not None:
            claims.append(Claim("head", head, HEAD))
        claims.append(Claim("compression", compression, COMPRESSED))
        if "budget" in compression:
            claims.append(Claim("budget", calibration | compression, BUDGET))
        if self.plan.finetuning is not None and texts.finetuning is not None:
            finetuning = _describe_finetuning(self.plan.finetuning, *texts.finetuning)
            claims.append(Claim("finetuning", finetuning | flat(sections), FINETUNED))
            sections["finetuning"] = finetuning
        if training is not None:
            claims.append(training_claim(training, flat(sections)))
        self.store.check(claims)

    def _rotation_claims(self, windows: Tensor) -> list[Claim]:
        if self.plan.rotation is None:
            return []
        described: dict[str, Any] = {**dataclasses.asdict(self.plan.rotation), "tokens_sha256": tokens_digest(windows)}
        if self._calibration.guidance is not None:
            described["guidance"] = dataclasses.asdict(self._calibration.guidance)
        return [Claim("rotation", described, ROTATION)]

    def check_rotation(self) -> None:
        """Raise ValueError if the plan has a rotation and the model is built in a way that does not allow one."""
        if self.plan.rotation is not None:
            check_rotatable(self.dense)

    def rotate(self, windows: Tensor, bos: BosPlace = "stream") -> None:
        """Rotate the model, if the plan says so, before it is calibrated and compressed.

        Args:
            windows: calibration sequences `[num_sequences, seq_len]`, the same on every rank.
            bos: place of the beginning-of-sequence token in all texts of the run.

        Raises:
            ValueError: the model is built in a way that does not allow it.
        """
        settings, calibration = self.plan.rotation, self._calibration
        if settings is None:
            return
        self.check_finite()
        self.check_rotation()
        described = self._describe_calibration(windows, bos)
        for claim in (*self._rotation_claims(windows), *self._calibration_claims(described)):
            self.store.claim(*claim)
        with self.measuring("rotation"):
            # Orthogonal matrices change no squared gradient, averaged over outputs: the compression takes the same.
            write_guidance(self.dense, self.store, windows, calibration)
            weights = read_guidance(self.store, calibration.guidance)
            tokens = Tokens(windows, calibration.batch_size, weights)
            folder = write_rotated(self.dense, self.store, tokens, settings)
        dtype = str(self.checkpoint.dtype).removeprefix("torch.")
        selection = selection_of(self.plan.compression)
        self._prepared = StreamedModel(Checkpoint(str(folder), dtype), self.device, selection)

    def compress_head(self) -> None:
        """Compress the head, if the plan says so, before the model is calibrated: embeddings may be tied to it.

        Raises:
            ValueError: the model has no head, or the method does not fit it.
        """
        settings, model = self.plan.compression, self.model
        if settings is None or settings.head is None or compressed_head(model.skeleton) is not None:
            return
        method = head_method(settings.head, settings.compressor)
        self.store.claim("head", self._describe_head() or {}, HEAD)
        with self.measuring("compression"):
            head = compress_head(model, self.store, method)
        self._prepared = StreamedModel(model.checkpoint, self.device, selection_of(settings), head.to(self.device))

    def _describe_head(self) -> dict[str, Any] | None:
        """Return how the head is compressed, as JSON values; None if it is not."""
        settings = self.plan.compression
        if settings is None or settings.head is None:
            return None
        described = head_method(settings.head, settings.compressor).describe()
        if self.plan.rotation is not None:
            described["rotation_of_model"] = dataclasses.asdict(self.plan.rotation)
        return described

    def _describe_calibration(self, windows: Tensor, bos: BosPlace) -> dict[str, Any]:
        """Return all that reaches second moments, but for the batch size, which makes no difference."""
        described = dataclasses.asdict(self._calibration)
        del described["batch_size"]
        if described["guidance"] is None:
            del described["guidance"]
        if not self.dense.has_experts:
            del described["expert_shrinkage"]
        if self.plan.rotation is not None:
            described["rotation"] = dataclasses.asdict(self.plan.rotation)
        if (head := self._describe_head()) is not None:
            described["head"] = head
        described |= {"num_sequences": len(windows), "seq_len": windows.shape[1], "bos": bos}
        described["tokens_sha256"] = tokens_digest(windows)
        selection = selection_of(self.plan.compression)
        if selection is not None and selection != Selection():
            # Moments of other linears are not there.
            described["linears"] = {"targets": selection.targets, "ignore": selection.ignore}
        return described

    def _calibration_claims(self, described: Mapping[str, Any]) -> list[Claim]:
        claims = [Claim("calibration", described, MOMENTS)]
        if (guidance := described.get("guidance")) is not None:
            # Gradients are those of the dense model, and their power is taken when they are used.
            of_gradients = {name: value for name, value in described.items() if name not in ("mode", "guidance")}
            of_gradients["labels"] = guidance["labels"]
            claims.insert(0, Claim("guidance", of_gradients, GUIDANCE))
            if self._needs_output_moment:
                claims.insert(1, Claim("output_moments", of_gradients, OUTPUT_MOMENTS))
        return claims

    def _describe_compression(self) -> dict[str, Any]:
        settings = self._compression
        described = describe(settings)
        if settings.budget is not None:
            candidates = self._budget_settings
            described["budget"] = {"settings": titles(candidates), "num_sequences": settings.budget.num_sequences}
            if settings.budget.bits_per_weight is not None:
                described["budget"]["bits_per_weight"] = settings.budget.bits_per_weight
        return described

    def calibrate(self, windows: Tensor, bos: BosPlace = "stream") -> None:
        """Gather second moments, unless they are gathered while linears are compressed.

        Mean squares of the dense model need no compression. Full second moments are too large to be stored, and those
        after compressed blocks need these blocks.

        Args:
            windows: calibration sequences `[num_sequences, seq_len]`, the same on every rank.
            bos: place of the beginning-of-sequence token in all texts of the run.
        """
        settings = self._calibration
        self.check_guidance()
        self.check_finite()
        self.compress_head()
        described = self._describe_calibration(windows, bos)
        self.bos = bos
        self.calibration = {
            "num_sequences": len(windows),
            "num_tokens": windows.numel(),
            "sha256": described["tokens_sha256"],
        }
        for claim in self._calibration_claims(described):
            self.store.claim(*claim)
        self._settings["calibration"] = described
        self._windows = windows
        if settings.guidance is not None:
            with self.measuring("calibration"):
                write_guidance(self.model, self.store, windows, settings, self._needs_output_moment)
        if settings.mode == "dense" and not self._needs_full_second_moment:
            with self.measuring("calibration"):
                calibrate(self.model, self.store, windows, settings)

    @property
    def _needs_full_second_moment(self) -> bool:
        methods = [*self.assignment.methods, *self._budget_settings]
        return any(method.full_second_moment for method in methods)

    @property
    def _needs_output_moment(self) -> bool:
        return any(method.output_moment for method in [*self.assignment.methods, *self._budget_settings])

    def check_guidance(self) -> None:
        """Check the guidance and the mode of the calibration.

        Raises:
            ValueError: a method needs gradients of the final loss and the plan has no guidance; or the model has
                experts, whose tokens change with what is compressed before them, and each of which lacks most tokens.
        """
        if self.dense.has_experts and (self._calibration.guidance is not None or self._calibration.mode == "corrected"):
            option = "mode=corrected" if self._calibration.mode == "corrected" else "guidance"
            raise ValueError(f"Expected a model without experts for calibration.{option}, but got one with experts.")
        if self._needs_output_moment and self._calibration.guidance is None:
            raise ValueError("Expected calibration.guidance with update 'two_sided', but got none.")

    @property
    def _budget_settings(self) -> list[Any]:
        budget = self._compression.budget
        return [] if budget is None else settings_of(self._compression.compressor, budget)

    def compress(self) -> None:
        """Compress every selected linear of every block.

        Raises:
            RuntimeError: `calibrate` was not called before.
            ValueError: the budget has nothing to choose from.
        """
        if self._windows is None:
            raise RuntimeError("Expected calibrate before compress.")
        settings = self._compression
        described = self._describe_compression()
        self.method = title(settings)
        if settings.budget is not None:
            self.method += f", bits spread over linears by sensitivity ({len(self._budget_settings)} settings)"
        self._settings["compression"] = described
        self.store.claim("compression", described, COMPRESSED)
        with self.measuring("compression"):
            if settings.budget is not None:
                self.store.claim("budget", {**self._settings["calibration"], **described}, BUDGET)
                compress_within_budget(self._budgeted(settings.budget, self._windows), self.store)
            else:
                full = self.assignment.full_second_moment
                source = moment_source(self.model, self.store, COMPRESSED, self._windows, self._calibration, full)
                compress(self.model, self.store, source, self.assignment)

    def _budgeted(self, budget: Budget, windows: Tensor) -> Budgeted:
        candidates, assignment = self._budget_settings, self.assignment
        fixed = {name: len(candidates) + number - 1 for name, number in assignment.numbers.items()}
        choices = Choices(candidates, assignment.methods[1:], fixed)
        return Budgeted(self.model, choices, windows, self._calibration, budget)

    @property
    def budget(self) -> dict[str, Any] | None:
        """The decision of the budget without the setting of each linear, which :meth:`statistics` has; or None."""
        decision = self._decision
        return decision and {name: decision[name] for name in ("taken", "uniform", "spread", "settings")}

    @property
    def _decision(self) -> dict[str, Any] | None:
        has_budget = "budget" in self._settings.get("compression", {})
        if not has_budget:
            return None
        try:
            return read_sealed_json(self.store.folder / DECISION)
        except ValueError as error:
            folders = f"{self.store.folder / BUDGET} and {self.store.folder / COMPRESSED}"
            raise ValueError(f"{error} Delete {folders}, and run the same command again.") from error

    def measuring(self, stage: str) -> AbstractContextManager[None]:
        """Return a context in which the peak memory of a stage is measured."""
        return measured_memory(self.peak_memory, stage, self.device)

    def claim_finetuning(self, train: Tensor, held_out: Tensor, settings: FinetuningSettings) -> None:
        """Enter the settings that finetuned blocks depend on in the manifest, or check them.

        Args:
            train: sequences to train on.
            held_out: sequences that choose the epoch.
            settings: settings of the finetuning.

        Raises:
            RuntimeError: `compress` was not called before.
            ValueError: the run directory holds blocks that were finetuned in another way.
        """
        if self.method is None:
            raise RuntimeError("Expected compress before finetuning.")
        described = _describe_finetuning(settings, train, held_out)
        self.store.claim("finetuning", described | self.settings, FINETUNED)
        self._settings["finetuning"] = described

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of all stages so far as JSON values, such as "calibration.seed"."""
        return flat(self._settings)

    def compressed(self, finetuned: bool = False) -> "CompressedModel":
        """Return the compressed model, with its blocks as finetuning left them or as compression did."""
        return CompressedModel(self, finetuned)

    def reference(self, windows: Mapping[str, Tensor], batch_size: int) -> DenseReference:
        """Return the dense model's predictions on evaluation windows, computing those that are not there."""
        return DenseReference(self.dense, self.store, windows, batch_size)

    def teacher(self, windows: Tensor, settings: TeacherSettings) -> Teacher:
        """Return the dense predictions on training windows for distillation, computing those not stored yet."""
        return Teacher(self.dense, self.store, windows, settings)

    def statistics(self) -> list[dict[str, Any]]:
        """Return loss, bits and sparsity of every linear, in the model's order; those that stayed dense are exact."""
        rows, decision = [], self._decision
        bits = 8 * self.checkpoint.dtype.itemsize
        for index, block in enumerate(self.model.blocks):
            statistics = self.store.read_metadata(COMPRESSED, index)["statistics"]
            for name, linear in find_linears(block).items():
                shape, dense_bytes = list(linear.weight.shape), linear.weight.numel() * bits // 8
                exact = {"shape": shape, "loss": 0.0, "bits_per_weight": bits, "sparsity": 0.0, "bytes": dense_bytes}
                row = statistics.get(name, exact | {"dense": True})
                rows.append({"name": f"{self.model.block_name(index)}.{name}", "block": index, **row})
                if decision is not None and name in decision["selection"][index]:
                    rows[-1]["setting"] = decision["settings"][decision["selection"][index][name]]
        return rows

    def head_statistics(self) -> dict[str, Any] | None:
        """Return name, shape, loss, bits and bytes of the compressed head; None if it is dense."""
        settings = self.plan.compression
        if settings is None or settings.head is None:
            return None
        return dict(self.store.read_metadata(HEAD, 0)["statistics"])

    def expert_statistics(self) -> dict[str, Any] | None:
        """Return what is known of experts, or None where there are none.

        Returns:
            "dense": what stands beside experts and is never compressed, such as routers, by name in the model.
            "tokens": "block", "name" of the experts, and "tokens", the calibration tokens that each of them saw.
            "unseen": names of experts that saw none.
        """
        if not self.model.has_experts:
            return None
        dense, tokens, unseen = [], [], []
        for index, block in enumerate(self.model.blocks):
            title = self.model.block_name(index)
            dense += [f"{title}.{name}" for name in find_gates(block)]
            counts = self.store.read_metadata(MOMENTS, index).get("tokens_per_expert", {})
            tokens += [{"block": index, "name": name, "tokens": each} for name, each in counts.items()]
            unseen += [f"{title}.{name}" for name in unseen_experts(counts)]
        return {"dense": dense, "tokens": tokens, "unseen": unseen}

    def finetuning_statistics(self) -> list[dict[str, Any]]:
        """Return held-out error before, after each epoch ("curve") and after finetuning, of every finetuned block."""
        rows = (self.store.read_metadata(FINETUNED, index) for index in range(len(self.model)))
        # An artefact of an earlier version has no curve.
        return [
            {"curve": row.get("curve", []), **{key: row[key] for key in ("before", "after", "epochs", "seconds")}}
            for row in rows
        ]

    def later_phases(self) -> list[str]:
        """Return the phases after one-shot compression whose artefacts are there, of whichever process."""
        folder, numbers = self.store.folder, range(len(self.model))
        is_blockwise = all(self.store.path(FINETUNED, index).is_file() for index in numbers)
        is_trained = any((folder / TRAINING).glob("*.ckpt"))
        return ["blockwise"] * is_blockwise + ["finetuned"] * (is_blockwise or is_trained)

    def stage_seconds(self) -> dict[str, float]:
        """Return the time that the artefacts took, also those of an earlier, interrupted process."""
        stages = {"calibration": (GUIDANCE, MOMENTS), "compression": (COMPRESSED,), "finetuning": (FINETUNED,)}
        seconds = {
            name: sum(
                self.store.read_metadata(stage, index)["seconds"]
                for stage, index in product(folders, range(len(self.model)))
                if self.store.path(stage, index).is_file()
            )
            for name, folders in stages.items()
        }
        if (decision := self._decision) is not None:
            seconds["budget"] = decision["seconds"]
        return seconds


class Texts(NamedTuple):
    """Token ids that the stages of a run read, the same on every rank.

    Attributes:
        calibration: sequences `[num_sequences, seq_len]`.
        finetuning: those that blocks are trained on, and those that are held out; None without that stage.
        bos: place of the beginning-of-sequence token.
    """

    calibration: Tensor
    finetuning: tuple[Tensor, Tensor] | None = None
    bos: BosPlace = "stream"


def flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return settings by section and name, such as "calibration.seed"."""
    return {f"{section}.{name}": value for section, settings in sections.items() for name, value in settings.items()}


def training_claim(settings: Mapping[str, Any], earlier: Mapping[str, Any]) -> Claim:
    """Return the claim of end-to-end training, which goes on where it gets more epochs.

    Args:
        settings: its own.
        earlier: those of the stages before it.
    """
    return Claim("training", {**settings, **earlier}, TRAINING, ("max_epochs",))


def _describe_finetuning(settings: FinetuningSettings, train: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Return all that reaches finetuned blocks, but for where hidden states lie, which makes no difference."""
    described = dataclasses.asdict(settings)
    del described["activations"]
    return described | {"train_sha256": tokens_digest(train), "held_out_sha256": tokens_digest(held_out)}


class CompressedModel:
    """The compressed model of a run, read from the run directory a block at a time or as a whole.

    Args:
        run: a run whose linears are compressed.
        finetuned: take its blocks after finetuning.
    """

    def __init__(self, run: CompressionRun, finetuned: bool) -> None:
        self._run = run
        self._finetuned = finetuned

    def load_block(self, index: int) -> nn.Module:
        """Read a block."""
        load = finetuned.load_finetuned_block if self._finetuned else finetuned.load_compressed_block
        return load(self._run.model, self._run.store, index)

    def assemble(self) -> nn.Module:
        """Build the whole model."""
        run = self._run
        linears: dict[str, CompressedLinear] = {}
        for index in range(len(run.model)):
            block = read_block(run.store, index)
            linears |= {f"{run.model.block_name(index)}.{name}": linear for name, linear in block.items()}
        if compressed_head(run.model.skeleton) is not None:
            linears[str(head_name(run.model.skeleton))] = read_head(run.store)
        model = assemble(run.model.checkpoint, linears)
        for index in range(len(run.model)) if self._finetuned else ():
            state, _ = run.store.read(FINETUNED, index)
            model.get_submodule(run.model.block_name(index)).load_state_dict(state)
        return model

    def rows(self) -> CompressedRows:
        """Return its tensors, of which each process may read some rows; every process must call it."""
        return CompressedRows(self._run.model, self._run.store, self._finetuned)

    @property
    def checkpoint(self) -> Checkpoint:
        """The model that was compressed: the one that was given, or that one rotated."""
        return self._run.model.checkpoint

    def save(self, folder: str | Path, format: ExportFormat = "packed") -> None:
        """Write the model as a folder, a block at a time."""
        if format == "exl3":
            save_streamed_exl3(self._run.model, self.load_block, folder)
        else:
            save_streamed(self._run.model, self.load_block, folder, format == "dense")

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
            finetuned.check_fixed(block, run.store, index)
