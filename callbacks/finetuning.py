"""When blocks are finetuned: while the validation after one-shot compression is set up, before anything is wrapped."""

from math import ceil
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator

from nowag_pl.lit.blockwise import BlockwiseSettings, finetune_blocks
from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.trainer import is_compressing
from nowag_pl.pipeline.block_needs import StageNeeds, finetuning_needs, num_streams
from nowag_pl.pipeline.sizes import ModelSizes


class ModelFinetuning(Callback):
    """Finetune every compressed block to do what the dense block does, one after the other.

    Inputs are the hidden states that the compressed and finetuned blocks before it produce. Everything continuous is
    trained: kept weights, codebooks, scales, norms, biases. Of all epochs and the block as it was, the one with the
    lowest error on the held-out sequences is kept.

    Args:
        enabled: whether to finetune blocks.
        num_sequences: training sequences of data.seq_len tokens each, from the first part of the calibration text.
        num_held_out: sequences that decide, from the rest of that text.
        seed: which places, and the order in which they are trained on.
        targets: "block" for what the dense block makes of the same inputs; "model" for the hidden states of the dense
            model.
        max_epochs: passes over the training sequences at most.
        learning_rate: learning rate of AdamW at the start.
        batch_size: sequences per step on all devices together.
        accumulate_grad_batches: batches whose gradients are added up before a step.
        gradient_clip_val: largest norm of a gradient; a larger one is scaled down to it.
        plateau_patience: epochs without a lower held-out error before the learning rate is halved.
        stop_patience: epochs without a lower held-out error before a block is done.
        activations: where hidden states are while a block uses them: "memory" for host memory, "disk" for mapped files.
        precision: precision of the computation; "auto" for bf16-mixed where the device has it, else 32-true.
    """

    def __init__(  # noqa: PLR0913 - each is an option of the command line
        self,
        enabled: bool = False,
        num_sequences: int = 96,
        num_held_out: int = 32,
        seed: int = 0,
        targets: Literal["block", "model"] = "block",
        max_epochs: int = 5,
        learning_rate: float = 1e-4,
        batch_size: int = 8,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float = 1.0,
        plateau_patience: int = 0,
        stop_patience: int = 3,
        activations: Literal["memory", "disk"] = "memory",
        precision: Literal["auto", "32-true", "bf16-mixed"] = "auto",
    ) -> None:
        for name, value in {"num_sequences": num_sequences, "num_held_out": num_held_out}.items():
            if value < 1:
                raise ValueError(f"Expected finetuning.{name} of at least 1, but got {value}.")
        self.enabled = enabled
        self.num_sequences = num_sequences
        self.num_held_out = num_held_out
        self.seed = seed
        self.precision = precision
        self.settings = BlockwiseSettings(
            targets,
            max_epochs,
            learning_rate,
            batch_size,
            accumulate_grad_batches,
            gradient_clip_val,
            plateau_patience,
            stop_patience,
            seed,
            activations,
        )
        self._done = False

    @property
    def finetunes_blocks(self) -> bool:
        """Whether the Trainer shall make room for this and validate afterwards."""
        return self.enabled

    def needs(self, sizes: ModelSizes, trainer: Trainer) -> list[StageNeeds]:
        """Return what the stage will need."""
        if not self.enabled:
            return []
        settings, data = self.settings, cast(TokenDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        num_sequences, streams = self.num_sequences + self.num_held_out, num_streams(settings.targets)
        batch_size = ceil(settings.batch_size / trainer.world_size)
        in_memory = settings.activations == "memory"
        return [finetuning_needs(sizes, num_sequences, data.seq_len, batch_size, in_memory, streams)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finetune, once, and let the module build its model from the result."""
        module = cast(LitCausalLM, pl_module)
        if not self.enabled or self._done or not is_compressing(trainer, stage):
            return
        if not module.is_compressed_here:
            raise ValueError("Expected compression.enabled with finetuning.enabled: there is nothing to finetune.")
        if getattr(trainer, "phase", None) == "one_shot":
            return
        data = cast(TokenDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        train, held_out = data.finetuning_windows(self.num_sequences, self.num_held_out, self.seed)
        finetune_blocks(module.run, train, held_out, self.settings, self._trainer_settings(trainer))
        module.compressed = module.run.compressed(finetuned=True)
        self._done = True

    def _trainer_settings(self, trainer: Trainer) -> dict[str, Any]:
        """Return what the blocks' Trainers take over from this one."""
        on_cuda = isinstance(trainer.accelerator, CUDAAccelerator)
        precision = self.precision
        if precision == "auto":
            precision = "bf16-mixed" if on_cuda and torch.cuda.is_bf16_supported() else "32-true"
        return {
            "accelerator": trainer.accelerator,
            "devices": trainer.device_ids if on_cuda else trainer.num_devices,
            "num_nodes": trainer.num_nodes,
            "precision": precision,
        }
