"""What the stages that hold one block at a time will need: device memory, host memory and disk.

The formulas are those of docs/reproduction.md, "Memory and disk". All figures are bytes; those of memory are upper
bounds, those of disk are what is written but for file headers.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Literal

from nowag_pl.compressors import Compressor
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.pipeline.sizes import ModelSizes, compressed_bytes

CHUNK_BYTES = 2**27  # intermediate results of work in chunks; distances of a chunk of points
MEASURED_TOKENS = 4096  # whose logits are in memory together; 2 GB in float32 for a vocabulary of 128,000


@dataclass(frozen=True)
class StageNeeds:
    """What one stage needs at its peak, in bytes.

    Attributes:
        stage: name of the stage.
        device: device memory of each process.
        host: host memory of each process.
        shared_host: host memory of all processes together.
        disk: written into the run directory.
        device_option: option that lowers `device`.
        host_option: option that lowers host memory.
        disk_option: option that lowers `disk`, beside another run_dir.
        built: host memory of each process in which is made what goes to the device, where they differ.
    """

    stage: str
    device: int
    host: int = 0
    shared_host: int = 0
    disk: int = 0
    device_option: str = ""
    host_option: str = ""
    disk_option: str = ""
    built: int = 0


def calibration_needs(sizes: ModelSizes, num_sequences: int, seq_len: int, batch_size: int) -> StageNeeds:
    """Return the needs of gathering second moments."""
    return StageNeeds(
        "calibration",
        device=sizes.skeleton + sizes.block + sizes.activations(batch_size * seq_len),
        shared_host=sizes.hidden_states(num_sequences, seq_len),
        disk=sizes.moments,
        device_option="calibration.batch_size or data.seq_len",
        host_option="calibration.num_sequences or data.seq_len",
    )


def compression_needs_in_mode(
    sizes: ModelSizes, calibration: StageNeeds, mode: Literal["dense", "propagated", "corrected"]
) -> StageNeeds:
    """Return the needs of compressing behind a calibration.

    Args:
        sizes: sizes of the model.
        calibration: needs of the calibration.
        mode: of the calibration, which says how often its sequences pass once more.
    """
    if mode == "dense" and not sizes.full_moments:
        return compression_needs(sizes)
    return corrected_needs(sizes, calibration) if mode == "corrected" else compression_needs(sizes, calibration)


def compression_needs(sizes: ModelSizes, stream: StageNeeds | None = None) -> StageNeeds:
    """Return the needs of compressing.

    Args:
        sizes: sizes of the model.
        stream: needs of the calibration whose sequences pass every block once more, for full second moments or those
            behind compressed blocks; None where second moments are there.
    """
    gathering = 0 if stream is None else stream.device + 8 * sizes.full_moments  # sums in float64
    compressing = sizes.skeleton + sizes.block + sizes.compressing + CHUNK_BYTES
    return StageNeeds(
        "compression",
        device=max(gathering, compressing),
        host=sizes.compressed_block + 4 * sizes.full_moments,
        shared_host=0 if stream is None else stream.shared_host,
        disk=sizes.compressed,
        device_option="model.dtype or another compressor",
        host_option="" if stream is None else stream.host_option,
    )


def corrected_needs(sizes: ModelSizes, stream: StageNeeds) -> StageNeeds:
    """Return the needs of compressing with `calibration.mode=corrected`.

    Args:
        sizes: sizes of the model.
        stream: needs of the calibration, which are there for the compressed model again.
    """
    drifts = 12 * sizes.block // sizes.itemsize  # sums in float64, and means
    inputs = sizes.widest**2
    working = drifts + 4 * inputs + max(40 * inputs, sizes.compressing) + CHUNK_BYTES  # to invert H, or to compress
    return StageNeeds(
        "compression",
        device=2 * stream.device - sizes.skeleton - sizes.block + sizes.compressed_block + working,
        host=sizes.compressed_block,
        shared_host=2 * stream.shared_host,
        disk=sizes.compressed,
        device_option=f"{stream.device_option}, or calibration.mode",
        host_option=stream.host_option,
    )


def candidate_bytes(model: StreamedModel, settings: Sequence[Compressor]) -> list[int]:
    """Return the size of each block's linears, compressed with every setting that fits them, together.

    Args:
        model: a model whose weights need not be in memory.
        settings: the compressor itself and its candidates.
    """
    blocks = []
    for index in range(len(model)):
        size = 0.0
        for linear, compressor in product(model.linears(index).values(), settings):
            with suppress(ValueError):
                made = compressor.empty((linear.out_features, linear.in_features), model.checkpoint.dtype)
                size += compressed_bytes(made, linear)
        blocks.append(round(size))
    return blocks


def budget_needs(
    sizes: ModelSizes, candidates: Sequence[int], num_sequences: int, seq_len: int, batch_size: int
) -> StageNeeds:
    """Return the needs of spreading a budget, beside those of a compression.

    Args:
        sizes: sizes of the model.
        candidates: what :func:`candidate_bytes` gives.
        num_sequences: sequences on which sensitivities are measured.
        seq_len: tokens in each.
        batch_size: sequences that pass a block together.
    """
    activations = 4 * sizes.activations(batch_size * seq_len)  # kept, their gradients, and the change of an output
    restored = round((12 + sizes.restoring) * sizes.largest_linear)  # both weights and their difference in float32
    block = sizes.block + max(candidates) + restored + activations
    return StageNeeds(
        "budget",
        device=sizes.skeleton + max(block, 2 * measuring_bytes(sizes, batch_size * seq_len)),
        host=max(candidates),
        shared_host=(sizes.num_blocks + 2) * sizes.hidden_states(num_sequences, seq_len),
        disk=sum(candidates) + sizes.compressed,  # and the whole model once more, to compare
        device_option="calibration.batch_size or data.seq_len",
        host_option="compression.budget.num_sequences",
        disk_option="compression.budget.candidates",
    )


def reference_needs(sizes: ModelSizes, windows: Mapping[str, int], seq_len: int, batch_size: int) -> StageNeeds:
    """Return the needs of recording the dense model's predictions.

    Args:
        sizes: sizes of the model.
        windows: evaluation windows of each text.
        seq_len: tokens in each.
        batch_size: windows that pass a block together.
    """
    return StageNeeds(
        "dense reference",
        device=sizes.skeleton + sizes.block + sizes.activations(batch_size * seq_len),
        shared_host=sizes.hidden_states(max(windows.values(), default=0), seq_len),
        disk=sizes.hidden_states(sum(windows.values()), seq_len),
        device_option="report.batch_size",
        host_option="data.max_eval_windows",
        disk_option="data.max_eval_windows",
    )


def teacher_needs(sizes: ModelSizes, num_windows: int, seq_len: int, batch_size: int, top_k: int | None) -> StageNeeds:
    """Return the needs of recording what the dense model teaches.

    Args:
        sizes: sizes of the model.
        num_windows: training windows.
        seq_len: tokens in each.
        batch_size: windows that pass a block together.
        top_k: likeliest tokens that are kept of each prediction; None: hidden states are kept.
    """
    tokens = batch_size * seq_len
    head = 0 if top_k is None else (2 * sizes.itemsize + 12) * tokens * sizes.vocabulary  # softened, in float32
    hidden = sizes.hidden_states(num_windows, seq_len)
    return StageNeeds(
        "teacher",
        device=sizes.skeleton + max(sizes.block + sizes.activations(tokens), head),
        shared_host=hidden,
        disk=hidden if top_k is None else 8 * top_k * num_windows * seq_len,
        device_option="model.objective.batch_size",
        host_option="data.max_train_windows",
        disk_option="data.max_train_windows, model.objective.top_k",
    )


def measuring_bytes(sizes: ModelSizes, num_tokens: int, compared: bool = True) -> int:
    """Return what logits take while perplexity is measured, and compared with the dense model's.

    Args:
        sizes: sizes of the model.
        num_tokens: tokens of a batch; at most 4096 of them are measured together, 1024 at a time in float32.
        compared: whether there are logits of both models.
    """
    alone = 5 if sizes.itemsize == 4 else 9  # and widened
    logits, working = (4, 22) if compared else (2, alone)  # each with a copy
    together = min(num_tokens, MEASURED_TOKENS)
    return sizes.vocabulary * (logits * sizes.itemsize * together + working * min(num_tokens, 1024))


def validation_needs(sizes: ModelSizes, windows: Mapping[str, int], seq_len: int, batch_size: int) -> StageNeeds:
    """Return the needs of measuring the compressed model a block at a time; arguments as :func:`reference_needs`."""
    weight = round((sizes.itemsize + sizes.restoring) * sizes.largest_linear)  # restored, from packed parts
    tokens = batch_size * seq_len
    block = sizes.compressed_block + weight + sizes.activations(tokens)
    return StageNeeds(
        "validation",
        device=sizes.skeleton + max(block, measuring_bytes(sizes, tokens, sizes.is_compressed_here)),
        host=sizes.compressed_block,
        shared_host=sizes.hidden_states(sum(windows.values()), seq_len),
        device_option="data.eval_batch_size",
        host_option="data.max_eval_windows",
    )


def finetuning_needs(
    sizes: ModelSizes, num_sequences: int, seq_len: int, batch_size: int, in_memory: bool, num_streams: int
) -> StageNeeds:
    """Return the needs of finetuning blocks.

    Args:
        sizes: sizes of the model.
        num_sequences: sequences to train on and held out together.
        seq_len: tokens in each.
        batch_size: sequences per step on each device.
        in_memory: whether inputs and targets are held in host memory.
        num_streams: sets of hidden states on disk at once.
    """
    hidden, num_weights = sizes.hidden_states(num_sequences, seq_len), sizes.block // sizes.itemsize
    # every value, gradient and two moments in float32; the restored weights and their gradients; activations kept
    states = 16 * min(8 * sizes.compressed_block // (8 * sizes.itemsize), num_weights) + 8 * num_weights
    return StageNeeds(
        "finetuning",
        device=sizes.skeleton + sizes.block + states + 4 * sizes.activations(batch_size * seq_len),
        host=2 * sizes.compressed_block + (2 * hidden if in_memory else 0),
        disk=num_streams * hidden + sizes.compressed + sizes.others,
        device_option="finetuning.batch_size (with finetuning.accumulate_grad_batches)",
        host_option="finetuning.activations=disk",
        disk_option="finetuning.num_sequences",
    )


def num_streams(targets: Literal["block", "model"]) -> int:
    """Return how many sets of hidden states finetuning has on disk at once: inputs, targets, and what comes next."""
    return 3 if targets == "block" else 4


def export_needs(sizes: ModelSizes, num_copies: int, dense: bool = False) -> StageNeeds:
    """Return the needs of writing that many model folders, compressed or dense again."""
    packed_block = sizes.compressed_block + sizes.others // sizes.num_blocks
    blocks = sizes.num_blocks * sizes.block if dense else sizes.compressed + sizes.others
    return StageNeeds(
        "export",
        device=sizes.skeleton,
        host=2 * packed_block + (sizes.block if dense else 0),
        disk=num_copies * (sizes.skeleton + blocks),
        disk_option="export.enabled=false",
    )
