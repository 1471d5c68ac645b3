"""The causal language model under Lightning: training, and perplexity validation."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property
from math import ceil, inf, isnan
from textwrap import shorten
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from nowag_pl.data.tokens import tokens_digest
from nowag_pl.lit.metrics import Divergence, Perplexity
from nowag_pl.lit.sharding import gathered_state, ignore_buffers_in_ddp, local_part, shard
from nowag_pl.models.checkpoint import EMBEDDED, Checkpoint
from nowag_pl.models.format.saving import is_compressed, load_compressed
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear
from nowag_pl.pipeline.block_needs import MEASURED_TOKENS
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages.compression_run import CompressedModel, CompressionRun
from nowag_pl.stages.hidden import HiddenStream, streamed
from nowag_pl.stages.teacher import Distillation, Teacher


class DenseReference(Protocol):
    """What validation compares a compressed model with."""

    def logits(self, name: str, indices: Tensor, positions: slice) -> Tensor:
        """Return the dense model's logits `[batch, positions, vocabulary]` for windows of an evaluation text."""


class LitCausalLM(LightningModule):
    """A causal language model: dense, compressed, or to be trained from scratch.

    Args:
        path: "embedded" for the small model that ships with nowag_pl, a local folder in Hugging Face format (dense,
            or compressed by this package), or a Hugging Face id. Only safetensors are read.
        dtype: type of the weights: "auto" for the checkpoint's own, or "float32", "bfloat16", "float16".
        random_init: start from random weights instead of the checkpoint's, to train from scratch.
        learning_rate: highest learning rate of AdamW when trainer.max_epochs > 0.
        weight_decay: decay of AdamW for matrices; vectors (norms, biases, scales) are not decayed.
        warmup_fraction: share of the steps in which the learning rate rises, before it falls along a cosine.
        distillation: train a compressed model towards the dense model's predictions. null: towards the next token.
        verify: compare each weight file with its checksum, where the model has them, as exported ones do.
        run_dir: folder of artefacts and report; without it nothing can be compressed.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        path: str = EMBEDDED,
        dtype: str = "auto",
        random_init: bool = False,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.1,
        warmup_fraction: float = 0.05,
        distillation: Distillation | None = None,
        verify: bool = True,
        run_dir: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < learning_rate < inf:
            raise ValueError(f"Expected model.learning_rate above 0, but got {learning_rate}.")
        if not 0 <= weight_decay < inf:
            raise ValueError(f"Expected model.weight_decay of at least 0, but got {weight_decay}.")
        if not 0 <= warmup_fraction < 1:
            raise ValueError(f"Expected model.warmup_fraction of at least 0 and below 1, but got {warmup_fraction}.")
        self.run_dir = run_dir
        self.checkpoint = Checkpoint(path, dtype, verify)
        self.verify = verify
        self.random_init = random_init
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.distillation = distillation
        self.teacher: Teacher | None = None
        self.model: nn.Module | None = None
        self.compressed: CompressedModel | None = None  # set by what compresses
        self.reference: DenseReference | None = None  # set by what compares with the dense model
        self.eval_metrics: dict[str, dict[str, float]] = {}  # of the last validation, by text
        self._dtypes: dict[str, tuple[torch.dtype, torch.dtype]] = {}  # stored and held otherwise; while in float32
        self._streams: dict[str, tuple[StreamedModel, HiddenStream]] = {}  # evaluation windows behind the last block
        self._perplexity: dict[str, Perplexity] = {}
        self._dense_perplexity: dict[str, Perplexity] = {}
        self._divergence: dict[str, Divergence] = {}

    @cached_property
    def run(self) -> CompressionRun:
        """The stages over this module's dense checkpoint, in its run directory.

        Raises:
            ValueError: there is no run directory, or no dense model to compress.
        """
        if self.run_dir is None:
            raise ValueError("Expected a run_dir for the artefacts of a compression, but got none.")
        if self.random_init or is_compressed(self.checkpoint.folder):
            state = "has random weights" if self.random_init else "is compressed already"
            raise ValueError(
                f"Expected a dense model to compress, but {self.checkpoint.path} {state}. Set compression.enabled "
                "to false to train or measure it as it is."
            )
        return CompressionRun(self.checkpoint, self.run_dir, self.trainer.strategy.root_device)

    @property
    def is_compressed_here(self) -> bool:
        """Whether the model was compressed by this module's run, from which it can be compared and reported."""
        return self.compressed is not None

    def training_settings(self) -> dict[str, Any]:
        """Return the JSON values, beside the Trainer's, that the result of end-to-end training depends on."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        own = ("random_init", "learning_rate", "weight_decay", "warmup_fraction")
        settings = {name: getattr(self, name) for name in own}
        settings["distillation"] = dataclasses.asdict(self.distillation) if self.distillation else None
        settings["batch_size"] = data.train_batch_size * self.trainer.world_size
        settings["tokens_sha256"] = tokens_digest(data.train_windows)
        return settings | (self.run.settings if self.is_compressed_here else {"model": self.checkpoint.path})

    def setup(self, stage: str) -> None:
        """Check the precision, and record what the dense model says of the training text if it is to teach."""
        precision = str(self.trainer.precision)
        if (precision.endswith("-true") and precision != "32-true") or precision == "transformer-engine":
            raise ValueError(
                f"Expected trainer.precision of 32-true, bf16-mixed or 16-mixed, but got {precision}: the weights have "
                "the type that model.dtype says."
            )
        if self.distillation is None or self.trainer.state.fn != TrainerFn.FITTING or self.teacher is not None:
            return
        if not self.is_compressed_here:
            raise ValueError("Expected compression.enabled with model.distillation: the dense model is the teacher.")
        windows = self.trainer.datamodule.train_windows  # type: ignore[attr-defined]
        self.teacher = self.run.teacher(windows, self.distillation)

    def release(self) -> None:
        """Let go of the model, so that it can be built anew from newer artefacts."""
        self.model = None
        self._dtypes = {}

    def configure_model(self) -> None:
        """Build the model for training, or sharded; else it is streamed, a block at a time."""
        if self._is_streamed:
            return
        if self.model is None:
            self.model = self._build()
            if self._is_sharded:
                if self.trainer.max_epochs != 0:
                    self._widen()
                assert self.device_mesh is not None
                shard(self.model, self.device_mesh["data_parallel"], self.checkpoint.dtype)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._widen()

    @property
    def _is_streamed(self) -> bool:
        """Whether validation reads a block at a time: not within and after training, nor where blocks are sharded."""
        validating = self._trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING
        return validating and self.model is None and not self._is_sharded and not self.random_init

    @property
    def _is_sharded(self) -> bool:
        return self._trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)

    def _build(self) -> nn.Module:
        if self.compressed is not None:
            return self.compressed.assemble()
        if self.random_init:
            return self.checkpoint.build()
        if is_compressed(self.checkpoint.folder):
            return load_compressed(self.checkpoint.folder, self.checkpoint.dtype, self.verify)
        return self.checkpoint.load()

    def _widen(self) -> None:
        """Hold what is trained in float32; in a compressed model embeddings and head are not.

        Without mixed precision everything is held in float32, so that all of the model computes in one type.
        """
        if self._dtypes:
            return
        assert self.model is not None
        linears = {name: module for name, module in self.model.named_modules() if isinstance(module, CompressedLinear)}
        stored = {
            f"{name}.{key}": dtype for name, linear in linears.items() for key, dtype in linear.stored_dtypes.items()
        }
        for name, parameter in self.model.named_parameters():
            self._dtypes[name] = stored.get(name, parameter.dtype), parameter.dtype
            parameter.requires_grad_(not linears or name in stored or parameter.ndim < 2)
            if parameter.requires_grad or self.trainer.precision == "32-true":
                parameter.data = parameter.data.float()
        ignore_buffers_in_ddp(self)

    def _narrow(self) -> None:
        """Round what was trained to the types in which it is stored, so that what is measured is what is saved."""
        assert self.model is not None
        for name, parameter in self.model.named_parameters():
            stored, held = self._dtypes[name]
            rounded = parameter.data.to(stored)
            if self._is_sharded:
                parameter.data.copy_(rounded)
            else:
                parameter.data = rounded.to(held)
        self._dtypes = {}

    def whole_model(self) -> nn.Module:
        """Return the model with whole parameters, those of a sharded one on rank zero only; all ranks must call."""
        assert self.model is not None
        if not self._is_sharded:
            return self.model
        state = gathered_state(self.model)
        if not self.trainer.is_global_zero:
            return self.model
        model = self._build()
        model.load_state_dict(state)
        return model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits.

        Args:
            tokens: `[batch, seq_len]`.

        Returns:
            `[batch, seq_len, vocabulary]`.
        """
        assert self.model is not None
        return self.model(input_ids=tokens, use_cache=False).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Divergence from the dense model, or next-token loss; in nats per token."""
        tokens = batch["tokens"]
        logits = self(tokens)
        if self.teacher is not None:
            losses = self.teacher.loss(batch["index"], logits)
        else:
            losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
            losses = losses.unflatten(0, (len(tokens), -1))
        loss = (losses.mean(dim=1) * batch["weight"]).sum()
        if not loss.isfinite():
            raise self._diverged(f"a loss of {float(loss)}")
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        return loss

    def on_train_epoch_end(self) -> None:
        """Refuse what has diverged, before it is saved."""
        for name, parameter in self.named_parameters():
            if not bool(local_part(parameter).isfinite().all()):
                raise self._diverged(f"values that are not finite in {name}")

    def _diverged(self, what: str) -> ValueError:
        return ValueError(
            f"Expected end-to-end training to stay finite, but got {what} after {self.global_step} steps. "
            f"Try a smaller model.learning_rate than {self.learning_rate}."
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state as torch does.

        Raises:
            ValueError: it is of another model or method.
        """
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            _, _, problems = str(error).partition("\n")
            problem = shorten(problems, 200, placeholder=" ...")
            raise ValueError(f"Expected a checkpoint of this model and method, but got: {problem}") from error

    def check_training(self) -> None:
        """Raise ValueError, before anything is computed, where end-to-end training would be refused."""
        if self.distillation is not None:
            self.distillation.check(self.checkpoint.vocab_size)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a linear warm-up and a cosine decay."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]  # FSDP2 cannot store empty ones
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        scheduler = OneCycleLR(
            optimizer,
            max_lr=self.learning_rate,
            total_steps=self._num_steps(),
            pct_start=self.warmup_fraction,
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _num_steps(self) -> int:
        """Return the optimizer steps of the whole training.

        Lightning's own estimate loads the training data before a checkpoint is read, which then loses its place in it.
        """
        trainer, limit = self.trainer, self.trainer.limit_train_batches
        batches = len(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        batches = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
        steps = ceil(batches / trainer.accumulate_grad_batches)
        limits = {steps * (trainer.max_epochs or 0), trainer.max_steps}
        if not any(limit > 0 for limit in limits):
            raise ValueError(
                "Expected trainer.max_epochs or trainer.max_steps above 0, to know the learning rate's end."
            )
        return min(limit for limit in limits if limit > 0)

    def on_fit_start(self) -> None:
        """Switch dropout and the like to training."""
        self.train()

    def on_fit_end(self) -> None:
        """Round what was trained."""
        self._narrow()

    def on_validation_start(self) -> None:
        """Make the metrics of each evaluation text."""
        self._streams = {}
        if self.model is None:
            self._stream()
        for name in self._eval_names:
            self._perplexity[name] = Perplexity().to(self.device)
            self._dense_perplexity[name] = Perplexity().to(self.device)
            self._divergence[name] = Divergence().to(self.device)

    def _stream(self) -> None:
        """Move the evaluation windows through the blocks."""
        if self.compressed is not None:
            model, load_block = self.run.model, self.compressed.load_block
        else:
            model = StreamedModel(self.checkpoint, self.trainer.strategy.root_device)
            load_block = model.load_block
        data, ranks = self.trainer.datamodule, Ranks.current()  # type: ignore[attr-defined]
        for name, windows in data.eval_windows.items():
            stream = streamed(model, load_block, f"Model on {name}", windows, data.eval_batch_size, ranks)
            self._streams[name] = model, stream

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add windows to the metrics of their text."""
        name, real = self._eval_names[dataloader_idx], batch["weight"] > 0
        tokens, index = batch["tokens"][real], batch["index"][real]
        if name in self._streams:
            if not real.any():  # fewer windows than ranks
                return
            model, stream = self._streams[name]
            hidden = stream.take((index // self.trainer.world_size).tolist())
            for positions in _chunks(tokens):
                self._measure(name, index, tokens, positions, model.head(hidden[:, positions]))
            return
        training = self.trainer.state.fn == TrainerFn.FITTING
        with nullcontext() if training else torch.autocast(self.device.type, enabled=False):
            logits = self(batch["tokens"])[real]  # what is reported is the model in its own type
        for positions in _chunks(tokens):
            self._measure(name, index, tokens, positions, logits[:, positions])

    def _measure(self, name: str, index: Tensor, tokens: Tensor, positions: slice, logits: Tensor) -> None:
        """Add the logits of some positions of some windows to the metrics of their text."""
        self._perplexity[name].update(logits, tokens[:, positions])
        if self.reference is not None:
            reference_logits = self.reference.logits(name, index, positions).to(logits.device)
            self._dense_perplexity[name].update(reference_logits, tokens[:, positions])
            self._divergence[name].update(reference_logits, logits)

    def on_validation_epoch_end(self) -> None:
        """Reduce the metrics over the ranks and log them."""
        self._streams = {}
        for name in self._eval_names:
            values = {"perplexity": self._perplexity[name].compute()}
            if self.reference is not None:
                values["dense_perplexity"] = self._dense_perplexity[name].compute()
                values |= self._divergence[name].compute()
            self.eval_metrics[name] = {key: float(value) for key, value in values.items()}
            if getattr(self.trainer, "phase", None) == "finetuned" and isnan(values["perplexity"]):
                raise self._diverged(f"a perplexity of nan on {name}")
            self.log_dict({f"{key}/{name}": value.float() for key, value in values.items()}, rank_zero_only=True)

    @property
    def _eval_names(self) -> list[str]:
        return self.trainer.datamodule.eval_names  # type: ignore[attr-defined]


def _chunks(tokens: Tensor) -> Iterator[slice]:
    """Yield positions of windows `[batch, seq_len]` whose logits are in memory together; they overlap by one.

    The last position of a chunk predicts the first token of the next, which is measured there.
    """
    batch, seq_len = tokens.shape
    size = max(MEASURED_TOKENS // max(batch, 1), 1)
    for start in range(0, seq_len - 1 if batch else 0, size):
        yield slice(start, start + size + 1)
