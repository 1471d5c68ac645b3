"""What the stages of a run will need: device memory, host memory and disk, from shapes and settings alone.

The formulas are those of docs/reproduction.md, "Memory and disk". All figures are bytes; those of memory are upper
bounds, those of disk are what is written but for file headers.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import psutil
import torch

from nowag_pl.compressors import Compressor
from nowag_pl.compressors.protocol import (
    expected_bits_per_weight,
    needs_full_second_moment,
    working_bytes,
    working_bytes_per_weight,
)
from nowag_pl.models.streaming import StreamedModel

CHUNK_BYTES = 2**27  # intermediate results of work in chunks; distances of a chunk of points
LIBRARY_BYTES = 2**27  # that libraries hold in each process, and parts of files that are being read
LOGITS_BYTES = 4 * 4096 + 20 * 1024  # per word: logits of 4096 tokens, and a comparison of 1024 positions at a time


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model and of what a method makes of it, in bytes unless said otherwise.

    Attributes:
        num_blocks: decoder blocks.
        hidden: length of a hidden state.
        widest: longest input or output of a linear.
        vocabulary: number of token ids.
        itemsize: of a weight.
        skeleton: embeddings, head and norms outside of the blocks.
        block: largest dense block.
        largest_linear: weights of the largest linear.
        compressed_block: largest block, compressed.
        compressed: all compressed linears.
        others: all of the blocks that is not compressed.
        moments: second moments of all linears.
        restoring: per weight of the linear whose weight is made from its packed parts.
        compressing: of the linear that takes the most while it is compressed.
        full_moments: pairs of inputs in the full second moments of a block; 0 where the method needs none.
    """

    num_blocks: int
    hidden: int
    widest: int
    vocabulary: int
    itemsize: int
    skeleton: int
    block: int
    largest_linear: int
    compressed_block: int
    compressed: int
    others: int
    moments: int
    restoring: float
    compressing: int
    full_moments: int

    @classmethod
    def of(cls, model: StreamedModel, compressor: Compressor) -> "ModelSizes":
        """Return the sizes of a model whose weights need not be in memory.

        Raises:
            ValueError: the method does not fit the shape of a linear; the message names it.
        """
        itemsize = model.checkpoint.dtype.itemsize
        shapes: list[tuple[int, int]] = []
        blocks: list[int] = []
        compressed: list[int] = []
        others, full_moments = 0, 0
        for index, block in enumerate(model.blocks):
            linears, size = model.linears(index), 0.0
            for name, linear in linears.items():
                shape = (linear.out_features, linear.in_features)
                try:
                    bits = expected_bits_per_weight(compressor, shape, 8 * itemsize)
                except ValueError as error:
                    raise ValueError(f"{model.block_name(index)}.{name}: {error}") from error
                shapes.append(shape)
                size += bits / 8 * linear.weight.numel()
            whole = sum(parameter.numel() for parameter in block.parameters()) * itemsize
            rest = whole - sum(linear.weight.numel() for linear in linears.values()) * itemsize
            blocks.append(whole)
            compressed.append(round(size))
            others += rest
            if needs_full_second_moment(compressor):  # linears may share theirs, which shapes do not tell
                full_moments = max(full_moments, sum(linear.in_features**2 for linear in linears.values()))
        return cls(
            num_blocks=len(blocks),
            hidden=model.hidden_size,
            widest=max(max(shape) for shape in shapes),
            vocabulary=model.checkpoint.vocab_size,
            itemsize=itemsize,
            skeleton=sum(parameter.numel() for parameter in model.skeleton.parameters()) * itemsize,
            block=max(blocks),
            largest_linear=max(rows * columns for rows, columns in shapes),
            compressed_block=max(compressed),
            compressed=sum(compressed),
            others=others,
            moments=4 * sum(columns for _, columns in shapes),
            restoring=working_bytes_per_weight(compressor) / 2,
            compressing=max(working_bytes(compressor, shape) for shape in shapes),
            full_moments=full_moments,
        )

    def hidden_states(self, num_sequences: int, seq_len: int) -> int:
        """Return the size of hidden states of that many sequences."""
        return num_sequences * seq_len * self.hidden * self.itemsize

    def activations(self, num_tokens: int) -> int:
        """Return what a block holds beside its weights while that many tokens pass it."""
        return num_tokens * (4 * self.itemsize * self.hidden + (3 * self.itemsize + 8) * self.widest)


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
    """

    stage: str
    device: int
    host: int = 0
    shared_host: int = 0
    disk: int = 0
    device_option: str = ""
    host_option: str = ""
    disk_option: str = ""


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
    value_bits, blocks = 8 * model.checkpoint.dtype.itemsize, []
    for index in range(len(model)):
        size = 0.0
        for linear, compressor in product(model.linears(index).values(), settings):
            with suppress(ValueError):
                bits = expected_bits_per_weight(compressor, (linear.out_features, linear.in_features), value_bits)
                size += bits / 8 * linear.weight.numel()
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
        device=sizes.skeleton + max(block, 2 * LOGITS_BYTES * sizes.vocabulary),
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


def validation_needs(sizes: ModelSizes, windows: Mapping[str, int], seq_len: int, batch_size: int) -> StageNeeds:
    """Return the needs of measuring the compressed model a block at a time; arguments as :func:`reference_needs`."""
    weight = round((sizes.itemsize + sizes.restoring) * sizes.largest_linear)  # restored, from packed parts
    block = sizes.compressed_block + weight + sizes.activations(batch_size * seq_len)
    return StageNeeds(
        "validation",
        device=sizes.skeleton + max(block, LOGITS_BYTES * sizes.vocabulary),
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


@dataclass(frozen=True)
class Available:
    """What this machine has to offer, in bytes.

    Attributes:
        device: free memory of the device; None where it is host memory.
        host: host memory that can be had without swapping.
        disk: free space where the run directory is.
    """

    device: int | None
    host: int
    disk: int

    @classmethod
    def here(cls, folder: Path, device: torch.device) -> "Available":
        """Look at this process's device, this machine and the file system of a folder, which need not exist."""
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        return cls(free, psutil.virtual_memory().available, psutil.disk_usage(str(existing)).free)


def host_bytes(needs: StageNeeds, available: Available, num_processes: int) -> int:
    """Return the host memory of a stage; where the device is the host, with what the device would need."""
    each = needs.host + LIBRARY_BYTES + (needs.device if available.device is None else 0)
    return num_processes * each + needs.shared_host


def shortages(
    stages: Iterable[StageNeeds], available: Available, num_processes: int = 1, on_disk: int = 0
) -> list[str]:
    """Return a sentence for each thing that does not fit, with the option that helps.

    Args:
        stages: needs of the stages of one run.
        available: what there is.
        num_processes: processes that share host memory and disk.
        on_disk: what an earlier process of the same run has written already.
    """
    stages = list(stages)
    found = []
    for needs in stages:
        if available.device is not None and needs.device > available.device:
            found.append(_shortage(needs.stage, needs.device, "device memory", available.device, needs.device_option))
        host = host_bytes(needs, available, num_processes)
        if host > available.host:
            options = [needs.host_option, needs.device_option if available.device is None else ""]
            found.append(
                _shortage(needs.stage, host, "host memory", available.host, " or ".join(filter(None, options)))
            )
    disk = sum(needs.disk for needs in stages) - on_disk
    if disk > available.disk:
        options = [needs.disk_option for needs in stages if needs.disk_option]
        option = ", ".join(dict.fromkeys([*options, "run_dir on another disk"]))
        found.append(_shortage("the run", disk, "disk", available.disk, option))
    return found


def readable(size: float) -> str:
    """Return a size for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _shortage(stage: str, needed: int, what: str, available: int, option: str) -> str:
    remedy = f"; change {option}" if option else ""
    return f"{stage} may need {readable(needed)} of {what}, but {readable(available)} are free{remedy}"
