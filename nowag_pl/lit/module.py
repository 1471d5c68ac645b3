"""The causal language model under Lightning: training, and perplexity validation."""

from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from nowag_pl.lit.metrics import Divergence, Perplexity
from nowag_pl.models.checkpoint import is_compressed, load_compressed
from nowag_pl.models.loading import EMBEDDED, Checkpoint
from nowag_pl.modules import CompressedLinear
from nowag_pl.pipeline.run import CompressionRun


class DenseReference(Protocol):
    """What validation compares a compressed model with."""

    def logits(self, name: str, indices: Tensor) -> Tensor:
        """Return the dense model's logits `[batch, seq_len, vocabulary]` for windows of an evaluation text."""


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
        run_dir: folder of artefacts and report; without it nothing can be compressed.
    """

    def __init__(
        self,
        path: str = EMBEDDED,
        dtype: str = "auto",
        random_init: bool = False,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.1,
        warmup_fraction: float = 0.05,
        run_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.run_dir = run_dir
        self.checkpoint = Checkpoint(path, dtype)
        self.random_init = random_init
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.model: nn.Module | None = None
        self.assemble: Callable[[], nn.Module] | None = None  # set by what compresses
        self.reference: DenseReference | None = None  # set by what compares with the dense model
        self.eval_metrics: dict[str, dict[str, float]] = {}  # of the last validation, by text
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
        return self.assemble is not None

    def configure_model(self) -> None:
        """Build the model: compressed by this run, stored compressed, dense, or random."""
        if self.model is not None:
            return
        if self.assemble is not None:
            self.model = self.assemble()
        elif self.random_init:
            self.model = self.checkpoint.build()
        elif is_compressed(self.checkpoint.folder):
            self.model = load_compressed(self.checkpoint.folder, self.checkpoint.dtype)
        else:
            self.model = self.checkpoint.load()

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
        """Next-token loss."""
        tokens = batch["tokens"]
        logits = self(tokens)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a linear warm-up and a cosine decay."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        scheduler = OneCycleLR(
            optimizer,
            max_lr=self.learning_rate,
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=self.warmup_fraction,
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Switch dropout and the like to training."""
        self.train()

    def on_fit_end(self) -> None:
        """Round what is stored in 16 bits, so that what is measured is what is saved."""
        for module in self.modules():
            if isinstance(module, CompressedLinear):
                module.load_state_dict(module.storage())

    def on_validation_start(self) -> None:
        """Make the metrics of each evaluation text."""
        for name in self._eval_names:
            self._perplexity[name] = Perplexity().to(self.device)
            self._dense_perplexity[name] = Perplexity().to(self.device)
            self._divergence[name] = Divergence().to(self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add windows to the metrics of their text."""
        name, tokens = self._eval_names[dataloader_idx], batch["tokens"]
        logits = self(tokens)
        if (batch["index"] < 0).any():
            return  # a rank without windows takes part, but counts nothing
        self._perplexity[name].update(logits, tokens)
        if self.reference is not None:
            reference_logits = self.reference.logits(name, batch["index"]).to(logits.device)
            self._dense_perplexity[name].update(reference_logits, tokens)
            self._divergence[name].update(reference_logits, logits)

    def on_validation_epoch_end(self) -> None:
        """Reduce the metrics over the ranks and log them."""
        for name in self._eval_names:
            values = {"perplexity": self._perplexity[name].compute()}
            if self.reference is not None:
                values["dense_perplexity"] = self._dense_perplexity[name].compute()
                values |= self._divergence[name].compute()
            self.eval_metrics[name] = {key: float(value) for key, value in values.items()}
            self.log_dict({f"{key}/{name}": value.float() for key, value in values.items()}, rank_zero_only=True)

    @property
    def _eval_names(self) -> list[str]:
        return self.trainer.datamodule.eval_names  # type: ignore[attr-defined]
