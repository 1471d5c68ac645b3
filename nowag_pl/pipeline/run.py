"""One run: a model, a run directory, and the stages that have been asked for."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nowag_pl.compressors import Compressor
from nowag_pl.data.tokens import tokens_digest
from nowag_pl.models.assembly import assemble
from nowag_pl.models.loading import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear
from nowag_pl.pipeline import calibration, compression
from nowag_pl.pipeline.fingerprint import fingerprint
from nowag_pl.pipeline.ranks import Ranks
from nowag_pl.pipeline.reference import DenseReference
from nowag_pl.pipeline.store import ArtefactStore
from nowag_pl.pipeline.stream import HiddenStream

CalibrationMode = Literal["dense", "propagated"]


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
        self.calibration: dict[str, Any] = {}
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
        """Gather second moments, or, in "propagated" mode, get ready to do so while compressing.

        Args:
            windows: calibration sequences `[num_sequences, seq_len]`, the same on every rank.
            mode: "dense" for the inputs that linears have in the dense model, "propagated" for those they have behind
                compressed blocks.
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
        self._windows, self._mode, self._batch_size = windows, mode, batch_size
        if mode == "dense":
            calibration.calibrate(self.model, windows, self.store, batch_size)

    def compress(self, compressor: Compressor) -> None:
        """Compress every linear of every block.

        Raises:
            RuntimeError: `calibrate` was not called before.
        """
        if self._windows is None:
            raise RuntimeError("Expected calibrate before compress.")
        self.store.claim("compression", compression.describe(compressor), compression.STAGE)
        self.method = repr(compressor)
        stream = None
        if self._mode == "propagated" and self.store.missing(compression.STAGE, len(self.model)):
            stream = HiddenStream(self.model, self.store.ranks.share(self._windows), self._batch_size)
        compression.compress(self.model, compressor, self.store, stream)

    def assemble(self) -> nn.Module:
        """Build the whole model from the newest artefacts."""
        linears: dict[str, CompressedLinear] = {}
        for index in range(len(self.model)):
            block = compression.read_block(self.store, index)
            linears |= {f"{self.model.block_name(index)}.{name}": linear for name, linear in block.items()}
        return assemble(self.checkpoint, linears)

    def reference(self, windows: Mapping[str, Tensor], batch_size: int) -> DenseReference:
        """Return the dense model's predictions on evaluation windows, computing those that are not there."""
        return DenseReference(self.model, self.store, windows, batch_size)

    def statistics(self) -> list[dict[str, Any]]:
        """Return loss, bits and sparsity of every compressed linear, in the model's order."""
        rows = []
        for index in range(len(self.model)):
            statistics = self.store.read_metadata(compression.STAGE, index)["statistics"]
            for name, row in statistics.items():
                rows.append({"name": f"{self.model.block_name(index)}.{name}", "block": index, **row})
        return rows

    def stage_seconds(self) -> dict[str, float]:
        """Return the time that the artefacts took, also those of an earlier, interrupted process."""
        return {
            name: sum(self.store.read_metadata(stage, index)["seconds"] for index in range(len(self.model)))
            for name, stage in {"calibration": calibration.STAGE, "compression": compression.STAGE}.items()
        }
