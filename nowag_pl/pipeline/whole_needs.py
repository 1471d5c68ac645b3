"""What the stages that hold the whole model will need: end-to-end training, sharded validation, questions.

The formulas are those of docs/reproduction.md, "Memory and disk". All figures are upper bounds in bytes.
"""

from dataclasses import dataclass

from nowag_pl.pipeline.block_needs import StageNeeds, measuring_bytes
from nowag_pl.pipeline.sizes import ModelSizes

LOSS_BYTES = 24  # per logit: itself, its log-probability, gradients and copies in float32
DISTILLATION_BYTES = 40  # and the same of the teacher


@dataclass(frozen=True)
class Holding:
    """How processes hold a model that is there as a whole.

    Attributes:
        num_ranks: processes of all nodes.
        sharded: whether parameters, gradients and states of the optimizer are divided among them (FSDP2).
        mixed: whether it computes in 16 bits with weights in float32.
    """

    num_ranks: int = 1
    sharded: bool = False
    mixed: bool = False

    def model(self, sizes: ModelSizes) -> int:
        """Return the parameters, masks and codes of a model whose trained values are in float32."""
        frozen = sizes.itemsize if self.mixed else 4
        return 4 * trained_values(sizes) + frozen * frozen_values(sizes) + packed_bytes(sizes)

    def share(self, sizes: ModelSizes, divisible: int) -> int:
        """Return what one process holds of divisible bytes, with the masks, codes and groups that it holds whole."""
        if not self.sharded or self.num_ranks == 1:
            return divisible + packed_bytes(sizes)
        gathered = 4 * (2 if not sizes.compressed else 1) * (sizes.skeleton + 2 * sizes.compressed_block)
        return -(-divisible // self.num_ranks) + packed_bytes(sizes) + gathered // sizes.itemsize


@dataclass(frozen=True)
class Training:
    """What decides the needs of an end-to-end training, beside the model.

    Attributes:
        seq_len: tokens in a window.
        batch_size: windows of a step on each device.
        eval_batch_size: windows of a validation in between.
        distilled: whether the dense model's predictions are learned.
        num_checkpoints: checkpoints on disk at once.
    """

    seq_len: int
    batch_size: int
    eval_batch_size: int
    distilled: bool = False
    num_checkpoints: int = 1


def trained_values(sizes: ModelSizes) -> int:
    """Return how many values are trained at most: of a compressed model, those in its blocks."""
    return sizes.values + (sizes.others + (0 if sizes.compressed else sizes.skeleton)) // sizes.itemsize


def packed_bytes(sizes: ModelSizes) -> int:
    """Return the size of masks and codes: what is stored but for values, of which none has less than 16 bits."""
    return max(sizes.compressed - 2 * sizes.values, 0)


def frozen_values(sizes: ModelSizes) -> int:
    """Return how many are not: embeddings and head of a compressed model."""
    return sizes.skeleton // sizes.itemsize if sizes.compressed else 0


def kept_activations(sizes: ModelSizes, num_tokens: int) -> int:
    """Return what all blocks keep for the gradients of a batch; none is computed twice."""
    return sizes.num_blocks * num_tokens * 4 * (13 * sizes.hidden + 5 * sizes.widest)


def training_needs(sizes: ModelSizes, training: Training, holding: Holding) -> StageNeeds:
    """Return the needs of training end to end.

    Every trained value has a gradient and two moments in float32 beside it. Restored weights are kept until their
    gradients are there, whole on every rank, as are activations.
    """
    trained, model = trained_values(sizes), holding.model(sizes) - packed_bytes(sizes)
    buckets = 4 * trained if holding.num_ranks > 1 and not holding.sharded else 0  # of DDP
    states = holding.share(sizes, model + 12 * trained + buckets)
    tokens = training.batch_size * training.seq_len
    per_logit = DISTILLATION_BYTES if training.distilled else LOSS_BYTES
    weights = round(sizes.keeping * sizes.weights) if sizes.compressed else 2 * trained * holding.mixed
    step = weights + kept_activations(sizes, tokens) + per_logit * tokens * sizes.vocabulary
    validation = _forward(sizes, training.eval_batch_size * training.seq_len, 4, sizes.is_compressed_here)
    checkpoint = model + packed_bytes(sizes) + 8 * trained
    batch = "data.train_batch_size (with trainer.accumulate_grad_batches)"
    batch = batch if step > validation else "data.eval_batch_size"
    return StageNeeds(
        "training",
        device=(sizes.skeleton if sizes.is_compressed_here else 0) + states + max(step, validation),
        built=holding.model(sizes) if holding.sharded else sizes.skeleton + sizes.compressed + sizes.others,
        shared_host=0 if holding.sharded else checkpoint * 9 // 8 * (training.num_checkpoints > 0),
        disk=training.num_checkpoints * checkpoint,
        device_option=f"{batch}, data.seq_len, or trainer.strategy=fsdp2 on more devices",
        host_option="fewer trainer.devices on this machine"
        if holding.sharded
        else "trainer.enable_checkpointing=false",
        disk_option="checkpoint.save_top_k" if training.num_checkpoints > 1 else "trainer.enable_checkpointing=false",
    )


def whole_validation_needs(
    sizes: ModelSizes, seq_len: int, batch_size: int, holding: Holding, widened: bool
) -> StageNeeds:
    """Return the needs of measuring a model that is there as a whole.

    Args:
        sizes: sizes of the model.
        seq_len: tokens in a window.
        batch_size: windows that pass the model together.
        holding: how processes hold it.
        widened: whether trained values are in float32.
    """
    own = sizes.skeleton + sizes.compressed + sizes.others
    model = holding.model(sizes) if widened else own
    divisible = model - packed_bytes(sizes)
    return StageNeeds(
        "validation",
        device=(sizes.skeleton if sizes.is_compressed_here else 0)
        + holding.share(sizes, divisible)
        + _forward(sizes, batch_size * seq_len, sizes.itemsize, sizes.is_compressed_here),
        built=model,
        device_option="data.eval_batch_size, or trainer.strategy=fsdp2 on more devices",
        host_option="fewer trainer.devices on this machine",
    )


def questions_needs(sizes: ModelSizes, seq_len: int, batch_size: int) -> StageNeeds:
    """Return the needs of asking a whole model questions.

    Args:
        sizes: sizes of the model.
        seq_len: tokens of the longest question with its answer.
        batch_size: questions that pass the model together.
    """
    model = sizes.skeleton + sizes.compressed + sizes.others
    return StageNeeds(
        "questions",
        device=model + _forward(sizes, batch_size * seq_len, sizes.itemsize),
        built=model,
        device_option="batch_size",
    )


def _forward(sizes: ModelSizes, num_tokens: int, itemsize: int, compared: bool = False) -> int:
    """Return what a forward without gradients holds beside the model: activations, or logits and what is measured."""
    weight = round((itemsize + sizes.restoring) * sizes.largest_linear)
    logits = itemsize * num_tokens * sizes.vocabulary + measuring_bytes(sizes, num_tokens, compared)
    return max(weight + sizes.activations(num_tokens) * itemsize // sizes.itemsize, logits)
