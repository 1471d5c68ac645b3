"""When blocks are finetuned: while the validation after one-shot compression is set up, before anything is wrapped."""

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator

from nowag_pl.lit.blockwise import finetune_blocks
from nowag_pl.lit.phases import PhasedTrainer, block_precision, is_compressing
from nowag_pl.lit.stage import Stage, data_of, module_of
from nowag_pl.stages.plan import FinetuningSettings, Plan


class ModelFinetuning(Stage):
    """Finetune the compressed blocks one after the other to reproduce the dense blocks' outputs.

    Inputs are the outputs of the compressed and finetuned blocks before it. Everything continuous is trained: kept
    weights, codebooks, scales, norms, biases. The result of the epoch with the lowest error on the held-out sequences
    is kept, or the untrained block if no epoch was better.

    Args:
        enabled: Finetune blocks.
        num_sequences: number of training sequences of data.seq_len tokens, from the first part of the calibration text.
        num_held_out: number of sequences that choose the epoch, from the rest of that text.
        seed: seed of the places of the sequences in the text, and of their order in training.
        targets: "block" for the outputs of the dense block on the same inputs; "parts" for those of its attention and
            its MLP, each for itself; "model" for the hidden states of the dense model.
        max_epochs: largest number of passes over the training sequences.
        learning_rate: learning rate of AdamW at the start.
        batch_size: sequences per step on all devices together.
        accumulate_grad_batches: batches whose gradients are added up before a step.
        gradient_clip_val: largest norm of a gradient; a larger one is scaled down to it.
        plateau_patience: epochs without a lower held-out error before the learning rate is halved.
        stop_patience: epochs without a lower held-out error before training of a block ends.
        activations: place of the hidden states while a block uses them: "memory" for host memory, "disk" for mapped
            files.
        precision: precision of the computation; "auto" for bf16-mixed if the device supports it, else 32-true.
    """

    def __init__(  # noqa: PLR0913 - each is an option of the command line
        self,
        enabled: bool = False,
        num_sequences: int = 96,
        num_held_out: int = 32,
        seed: int = 0,
        targets: Literal["block", "parts", "model"] = "block",
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
        self.enabled = enabled
        self.settings = FinetuningSettings(
            num_sequences=num_sequences,
            num_held_out=num_held_out,
            targets=targets,
            max_epochs=max_epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            accumulate_grad_batches=accumulate_grad_batches,
            gradient_clip_val=gradient_clip_val,
            plateau_patience=plateau_patience,
            stop_patience=stop_patience,
            seed=seed,
            activations=activations,
            precision=precision,
        )
        self._done = False

    def announce(self, plan: Plan) -> None:
        """Enter the finetuning, if there is any."""
        if self.enabled:
            plan.finetuning = self.settings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finetune, once, after one-shot compression was measured, and let the module build its model from it."""
        is_turn = isinstance(trainer, PhasedTrainer) and trainer.phase != "one_shot"
        if not self.enabled or self._done or not is_turn or not is_compressing(trainer, stage):
            return
        module = module_of(pl_module)
        settings = module.plan.finetuning or self.settings
        train, held_out = data_of(trainer).finetuning_windows(
            settings.num_sequences, settings.num_held_out, settings.seed
        )
        finetune_blocks(module.run, train, held_out, settings, self._trainer_settings(trainer), trainer.loggers)
        module.compressed = module.run.compressed(finetuned=True)
        self._done = True

    def _trainer_settings(self, trainer: Trainer) -> dict[str, Any]:
        """Return the settings that the blocks' Trainers take over from this one."""
        on_cuda = isinstance(trainer.accelerator, CUDAAccelerator)
        # By its name: of an object Lightning believes that it computes on CUDA, whose autocast does nothing on a CPU.
        on_cpu = isinstance(trainer.accelerator, CPUAccelerator)
        return {
            "accelerator": "cpu" if on_cpu else trainer.accelerator,
            "devices": trainer.device_ids if on_cuda else trainer.num_devices,
            "num_nodes": trainer.num_nodes,
            "precision": block_precision(trainer.accelerator, self.settings.precision),
        }
