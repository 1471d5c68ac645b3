"""The causal language model under Lightning: training, and validation on texts."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from nowag_pl.functional.chunks import CHUNK_BYTES, LOSS_BYTES, position_chunks
from nowag_pl.lit.batches import ResumableLoader
from nowag_pl.lit.building import begin_run, build_sharded, build_whole, empty_copy
from nowag_pl.lit.datamodule import TokenDataModule, data_of
from nowag_pl.lit.objectives import NextToken, Objective
from nowag_pl.lit.optimizers import OWN_SCHEDULE, OptimizerSettings, num_steps
from nowag_pl.lit.precision import Types, check_precision, narrow, widen
from nowag_pl.lit.sharded_saving import SAVE, save_sharded
from nowag_pl.lit.sharding import ignore_buffers_in_ddp, reshard
from nowag_pl.lit.text_module import TextModule
from nowag_pl.lit.validation import DenseReference, Head, StreamedTexts, Validation
from nowag_pl.models.adapters import AdapterSettings, add_adapters, train_adapters_alone
from nowag_pl.models.checkpoint import EMBEDDED, Checkpoint
from nowag_pl.models.heads import PositionLoss, chunked_losses, last_hidden, logits_of, recompute_activations
from nowag_pl.models.shards import local_part
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages.compression_run import CompressedModel, CompressionRun
from nowag_pl.stages.plan import ExportFormat, Plan

_NEXT_TOKEN = NextToken()


class LitCausalLM(TextModule):
    """A causal language model: dense, compressed, or to be trained from scratch.

    Args:
        path: "embedded" for the small model that ships with nowag_pl, a local folder in Hugging Face format (dense,
            or compressed by this package), a GGUF file, "smollm2", or a Hugging Face id. Only safetensors and GGUF
            are read.
        dtype: type of the weights: "auto" for the checkpoint's own, or "float32", "bfloat16", "float16".
        random_init: start from random weights instead of the checkpoint's, to train from scratch.
        learning_rate: highest learning rate of AdamW when trainer.max_epochs > 0.
        weight_decay: decay of AdamW for matrices; vectors (norms, biases, scales) are not decayed.
        warmup_fraction: share of the steps in which the learning rate rises, before it falls along a cosine.
        optimizer: class_path and init_args of an optimizer in place of AdamW, over all trained values. On the command
            line: --optimizer.
        lr_scheduler: class_path and init_args of a scheduler in place of warm-up and cosine, which goes on after every
            step. On the command line: --lr_scheduler.
        objective: loss of the training, by class_path and init_args: nowag_pl.lit.objectives.NextToken, or
            nowag_pl.lit.objectives.Distillation to train a compressed model on the dense model's predictions, or
            nowag_pl.lit.objectives.PolicyGradient to train on rewards of its own answers.
        adapters: train low-rank adapters (LoRA, the extra `lora`) in the place of the model's own values. They are
            written to <run_dir>/adapter. null: none.
        verify: compare each weight file with its checksum, if the model has checksums, as exports do.
        recompute: keep the inputs of blocks alone in a training, and compute their other activations again for the
            gradients: a third slower, and far less memory.
        run_dir: folder of artefacts and report; required for compression.
    """

    def __init__(  # noqa: PLR0913 - each is an option of the command line
        self,
        path: str = EMBEDDED,
        dtype: str = "auto",
        random_init: bool = False,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.1,
        warmup_fraction: float = 0.05,
        optimizer: dict[str, Any] | None = None,
        lr_scheduler: dict[str, Any] | None = None,
        objective: Objective = _NEXT_TOKEN,
        adapters: AdapterSettings | None = None,
        verify: bool = True,
        recompute: bool = False,
        run_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.checkpoint = Checkpoint(path, dtype, verify)
        self.random_init, self.verify, self.run_dir = random_init, verify, run_dir
        self.optimizer_settings = OptimizerSettings(
            learning_rate, weight_decay, warmup_fraction, optimizer, lr_scheduler
        )
        self.objective, self.adapters, self.recompute = objective, adapters, recompute
        self.plan = Plan()
        self.model: nn.Module | None = None
        self.compressed: CompressedModel | None = None  # set by the stages that compress and finetune
        self.reference: DenseReference | None = None  # set by the stage that compares with the dense model
        self.eval_metrics: dict[str, dict[str, float]] = {}  # of the last validation, by text
        self._types: dict[str, Types] = {}  # of all parameters, while trained ones are in float32
        self._trained = False
        self._validation: Validation  # while one runs

    @cached_property
    def run(self) -> CompressionRun:
        """The stages over this module's dense checkpoint, in its run directory."""
        return begin_run(self.checkpoint, self.run_dir, self.random_init, self.plan, self.trainer.strategy.root_device)

    @property
    def is_compressed_here(self) -> bool:
        """Whether the model was compressed by this module's run, from which it can be compared and reported."""
        return self.compressed is not None

    @property
    def is_sharded(self) -> bool:
        """Whether every process holds a part of the parameters."""
        return self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)

    @property
    def whole(self) -> nn.Module:
        """The model in memory."""
        if self.model is None:
            raise RuntimeError("Expected configure_model before the model is used.")
        return self.model

    def setup(self, stage: str) -> None:
        """Check the precision, and let the objective get ready for training."""
        check_precision(str(self.trainer.precision))
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.objective.prepare(self)

    def own_train_dataloader(self) -> ResumableLoader | None:
        """Return the objective's batches, if it has any."""
        return self.objective.train_dataloader(self)

    def release(self) -> None:
        """Release the model, so that it can be built again from newer artefacts."""
        self.model, self._types = None, {}

    def configure_model(self) -> None:
        """Build the model for training, or sharded; otherwise a validation reads a block at a time."""
        function = self.trainer.state.fn if self._trainer is not None else None
        streams = function == TrainerFn.VALIDATING and not self.is_sharded and not self.random_init
        if self.model is None and not streams:
            self.model = self._build_sharded(self._prepare_shards) if self.is_sharded else self._build()
            if self.adapters is not None and function == TrainerFn.FITTING:
                self._add_adapters(self.adapters, self.model)
        if self.model is not None and function == TrainerFn.FITTING:
            if not self._types:
                self._widen(self.model)
            if self.recompute:
                # A transformers model, whose type only the models may name.
                whole: Any = self.model
                recompute_activations(whole)

    def _add_adapters(self, settings: AdapterSettings, model: Any) -> None:
        """Put adapters over a transformers model."""
        if self.is_sharded:
            raise ValueError("Expected a model that is whole on every device with model.adapters, but it is sharded.")
        add_adapters(model, settings)

    def starting_model(self) -> nn.Module:
        """Return another copy of the model as it was before end-to-end training, without gradients.

        Raises:
            ValueError: it had random weights.
        """
        if self.random_init:
            raise ValueError("Expected a trained model to compare with, but model.random_init gives random weights.")
        if self.is_sharded:
            return self._build_sharded(lambda model: widen(model, everything=False)).requires_grad_(False).eval()
        model = self._build()
        widen(model, everything=self.trainer.precision == "32-true")
        return model.requires_grad_(False).eval().to(self.device)

    def _build(self) -> nn.Module:
        return build_whole(self.checkpoint, self.compressed, self.random_init, self.verify)

    def _build_sharded(self, prepare: Callable[[nn.Module], object]) -> nn.Module:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        return build_sharded(self.checkpoint, self.compressed, self.random_init, mesh, prepare)

    def _prepare_shards(self, model: nn.Module) -> None:
        """Hold in float32 what is trained, and nothing else: FSDP2 computes in the model's own type."""
        if self.trainer.max_epochs == 0:
            model.requires_grad_(False)
        else:
            self._types = widen(model, everything=False)

    def _widen(self, model: nn.Module) -> None:
        self._types = widen(model, everything=self.trainer.precision == "32-true")
        if self.adapters is not None:
            train_adapters_alone(model)
        ignore_buffers_in_ddp(self)

    def save(self, folder: Path, format: ExportFormat) -> None:
        """Write the model in memory as a folder, a sharded one block by block; all ranks must call it.

        Raises:
            OSError: the folder cannot be written.
        """
        assert self.model is not None
        if self.is_sharded:
            copy = empty_copy(self.checkpoint, self.compressed)
            save_sharded(self.model, copy, folder, format, Ranks.current())
        elif self.trainer.is_global_zero:
            # A transformers model, whose type only the models may name.
            model: Any = self.model
            SAVE[format](model, folder, source=self.checkpoint.path)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `[batch, seq_len, vocabulary]` for tokens `[batch, seq_len]`."""
        assert self.model is not None
        return self.model(input_ids=tokens, use_cache=False).logits

    def losses(self, tokens: Tensor, loss: PositionLoss, logit_bytes: int = LOSS_BYTES) -> Tensor:
        """Return the loss of every position that predicts a token; see :class:`TextModule`."""
        # A transformers model, whose type only the models may name.
        model: Any = self.model
        shape = (len(tokens), tokens.shape[1] - 1)
        parts = [*position_chunks(*shape, self.checkpoint.vocab_size, CHUNK_BYTES, logit_bytes)]
        return chunked_losses(model, last_hidden(model, tokens), parts, loss)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a linear warm-up and a cosine decay, or what was chosen in their place."""
        optimizer = self.optimizer_settings.make_optimizer(self.parameters())
        scheduler: Any = self.optimizer_settings.make_scheduler(optimizer, num_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the objective."""
        if state := self.objective.state_dict():
            checkpoint["objective"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the objective; keep this training's schedule, which may be over more epochs than before."""
        if state := checkpoint.get("objective"):
            self.objective.load_state_dict(state)
        for state in checkpoint.get("lr_schedulers", ()):
            for name in OWN_SCHEDULE:
                state.pop(name, None)

    def on_fit_start(self) -> None:
        """Switch dropout and the like to training."""
        self._trained = True
        self.train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the objective's loss, whose mean over the ranks is that of the step."""
        loss = self.objective.loss(self, batch)
        if not loss.isfinite():
            raise self._diverged(f"a loss of {float(loss)}")
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        return loss

    def on_train_epoch_end(self) -> None:
        """Refuse a model that has diverged, before it is saved."""
        for name, parameter in self.named_parameters():
            if not bool(local_part(parameter).isfinite().all()):
                raise self._diverged(f"values that are not finite in {name}")

    def on_fit_end(self) -> None:
        """Round trained values to the types in which they are stored."""
        assert self.model is not None
        reshard(self.model)
        narrow(self.model, self._types, self.is_sharded)
        self._types = {}

    def _diverged(self, found: str) -> ValueError:
        return ValueError(
            f"Expected end-to-end training to stay finite, but got {found} after {self.global_step} steps. "
            f"Try a smaller {self.optimizer_settings.rate}."
        )

    def on_validation_start(self) -> None:
        """Begin to measure; if the model is not in memory, move the evaluation texts through its blocks."""
        data = data_of(self.trainer)
        streamed = self._streamed(data) if self.model is None else None
        self._validation = Validation(data, self.device, self.reference, streamed)

    def _streamed(self, data: TokenDataModule) -> StreamedTexts:
        if self.compressed is not None:
            return StreamedTexts(self.run.model, self.compressed.load_block, data)
        model = StreamedModel(self.checkpoint, self.trainer.strategy.root_device)
        return StreamedTexts(model, model.load_block, data)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add windows to the metrics of their text."""
        self._validation.add(dataloader_idx, batch, self._measured)

    def _measured(self, tokens: Tensor) -> Head:
        """Return the head; after training in the model's own type, so that the figures are those of the saved model."""
        assert self.model is not None
        # A transformers model, whose type only the models may name.
        model: Any = self.model
        with self._own_precision():
            hidden = last_hidden(model, tokens)

        def head(positions: slice) -> Tensor:
            with self._own_precision():
                return logits_of(model, hidden[:, positions])

        return head

    def _own_precision(self) -> AbstractContextManager[Any]:
        in_training = self.trainer.state.fn == TrainerFn.FITTING
        return nullcontext() if in_training else torch.autocast(self.device.type, enabled=False)

    def on_validation_epoch_end(self) -> None:
        """Reduce the metrics over the ranks and log them."""
        for name, values in self._validation.compute().items():
            self.eval_metrics[name] = {key: float(value) for key, value in values.items()}
            if self._trained and isnan(values["perplexity"]):
                raise self._diverged(f"a perplexity of nan on {name}")
            self.log_dict({f"{key}/{name}": value.float() for key, value in values.items()}, rank_zero_only=True)
        del self._validation
