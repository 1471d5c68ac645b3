"""Estimates of device memory, host memory and disk for the stages of a run.

The formulas are those of docs/reproduction.md, "Memory and disk". All figures are bytes; those of memory are upper
bounds, those of disk are exact except for file headers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

from nowag_pl.functional.chunks import CHUNK_BYTES as LOGITS_CHUNK
from nowag_pl.functional.chunks import DISTILLATION_BYTES, LOSS_BYTES
from nowag_pl.stages.plan import CalibrationSettings, FinetuningSettings, Plan
from nowag_pl.stages.sizes import Holding, ModelSizes
from nowag_pl.stages.teacher import TeacherSettings

CHUNK_BYTES = 2**27  # intermediate results of work in chunks; distances of a chunk of points


@dataclass(frozen=True)
class StageNeeds:
    """The peak needs of one stage.

    Attributes:
        stage: its name.
        device: device memory of each process.
        host: host memory of each process.
        shared_host: host memory of all processes together.
        disk: written into the run directory.
        device_option, host_option, disk_option: options that lower them; for disk, other than another run_dir.
        built: host memory of each process in which the model is made before it goes to the device.
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


@dataclass(frozen=True)
class DataShape:
    """The amount of text.

    Attributes:
        seq_len: tokens in a window.
        eval_windows: number of evaluation windows of each text.
        eval_batch_size: windows that pass through a block together.
        eval_chunk_bytes: memory for logits that are measured together.
    """

    seq_len: int
    eval_windows: Mapping[str, int]
    eval_batch_size: int
    eval_chunk_bytes: int = 2**28


@dataclass(frozen=True)
class Training:
    """A training end to end.

    Attributes:
        batch_size: windows of a step on each device.
        teacher: settings for recording the dense model's predictions, if they are trained on.
        num_windows: windows on which they are recorded.
        num_checkpoints: checkpoints on disk at once.
        recompute: whether activations of blocks are computed again for gradients.
    """

    batch_size: int
    teacher: TeacherSettings | None = None
    num_windows: int = 0
    num_checkpoints: int = 1
    recompute: bool = False


def stages_of_fit(
    sizes: ModelSizes, plan: Plan, data: DataShape, holding: Holding, training: Training | None = None
) -> list[StageNeeds]:
    """Return the needs of every stage of a fit, in their order; with a training end to end, if there is one."""
    stages = []
    if plan.calibration is not None and plan.compression is not None:
        stages += [head(sizes)] * (sizes.head.weights > 0)
        stages += calibration_stages(sizes, plan, data.seq_len, plan.calibration.batch_size)
    if plan.report is not None:
        stages += [reference(sizes, data, plan.report.batch_size)] * sizes.is_compressed_here
        stages.append(validation(sizes, data, holding))
    if plan.finetuning is not None:
        stages.append(finetuning(sizes, plan.finetuning, data.seq_len, holding.num_ranks))
    num_copies = (plan.compression is not None) + (plan.finetuning is not None or training is not None)
    if plan.export is not None and num_copies:
        stages.append(export(sizes, num_copies, plan.export.dense))
    if training is not None:
        if training.teacher is not None:
            stages.append(teacher(sizes, training.teacher, training.num_windows, data.seq_len))
        stages.append(end_to_end(sizes, data, training, holding))
    return stages


def calibration_stages(sizes: ModelSizes, plan: Plan, seq_len: int, batch_size: int) -> list[StageNeeds]:
    """Return the needs of all stages that read calibration sequences, so many at a time.

    Args:
        sizes: sizes of the model.
        plan: a plan with a calibration and a compression.
        seq_len: tokens in a sequence.
        batch_size: sequences that pass through a block together.
    """
    assert plan.calibration is not None
    assert plan.compression is not None
    settings = replace(plan.calibration, batch_size=batch_size)
    stages = [rotation(sizes, settings, seq_len)] * (plan.rotation is not None)
    stages += [guidance(sizes, settings, seq_len)] * (settings.guidance is not None)
    stages += compression(sizes, settings, seq_len)
    if plan.compression.budget is not None:
        stages.append(budget(sizes, settings, plan.compression.budget.num_sequences, seq_len))
    return stages


def rotation(sizes: ModelSizes, settings: CalibrationSettings, seq_len: int) -> StageNeeds:
    """Return the needs of rotating the model: one block and its second moments, and gradients of one matrix.

    On disk is the rotated model, with a head of its own, and for a time the second moments of all blocks.
    """
    # Before attention and MLP, and after the attention.
    pairs = 4 * 3 * sizes.hidden**2
    weights = sizes.dense_block // sizes.itemsize
    # In float32: the weights, rotated ones, their squares and shares, and a gradient of each; six of the matrix.
    learning = 28 * weights + pairs + 24 * sizes.hidden**2
    gathering = sizes.activations(settings.batch_size * seq_len) + 3 * pairs
    return StageNeeds(
        "rotation",
        device=2 * sizes.skeleton + sizes.dense_block + max(learning, gathering),
        host=sizes.skeleton + 4 * weights,
        shared_host=sizes.hidden_states(settings.num_sequences, seq_len),
        disk=2 * sizes.skeleton + sizes.dense_blocks + sizes.num_blocks * pairs,
        device_option="calibration.batch_size, data.seq_len or rotation.kind",
        host_option="calibration.num_sequences or data.seq_len",
    )


def guidance(sizes: ModelSizes, settings: CalibrationSettings, seq_len: int) -> StageNeeds:
    """Return the needs of weighting tokens: hidden states before all blocks, and one block with its gradients.

    Second moments of gradients, where a method needs them, are summed in float64, and stored in float32.
    """
    tokens = settings.batch_size * seq_len
    block = sizes.dense_block + 4 * sizes.activations(tokens) + 8 * sizes.block.output_pairs
    return StageNeeds(
        "guidance",
        device=sizes.skeleton + max(block, 2 * sizes.measuring(tokens)),
        shared_host=(sizes.num_blocks + 2) * sizes.hidden_states(settings.num_sequences, seq_len),
        host=4 * sizes.block.output_pairs,
        disk=4 * (sizes.total.num_linears * settings.num_sequences * seq_len + sizes.total.output_pairs),
        device_option="calibration.batch_size or data.seq_len",
        host_option="calibration.num_sequences or data.seq_len",
    )


def compression(sizes: ModelSizes, settings: CalibrationSettings, seq_len: int) -> list[StageNeeds]:
    """Return the needs of calibration and compression: one stage if compression gathers second moments."""
    hidden = sizes.hidden_states(settings.num_sequences, seq_len)
    activations, pairs = sizes.activations(settings.batch_size * seq_len), sizes.block.pairs
    passing = sizes.dense_block + activations
    calibration = StageNeeds(
        "calibration",
        device=max(sizes.skeleton, passing),
        shared_host=hidden,
        disk=4 * sizes.total.inputs,
        device_option="calibration.batch_size or data.seq_len",
        host_option="calibration.num_sequences or data.seq_len",
    )
    alone = StageNeeds(
        "compression",
        device=max(sizes.skeleton, sizes.dense_block + sizes.linear.compressing + CHUNK_BYTES),
        host=sizes.compressed_block,
        disk=sizes.total.stored,
        device_option="model.dtype or another compressor",
    )
    if settings.mode == "dense" and not pairs:
        return [calibration, alone]
    along = replace(alone, disk=alone.disk + calibration.disk, host_option=calibration.host_option)
    if settings.mode != "corrected":
        # Full second moments are summed in float64 on the device; their means go to the host in float32.
        device = max(alone.device, passing + 8 * pairs)
        return [replace(along, device=device, host=alone.host + 4 * pairs, shared_host=hidden)]
    # Both models; drifts of all linears, in float64 and as means; a matrix to invert, or compressing.
    inputs = sizes.widest**2
    working = 12 * sizes.dense_block // sizes.itemsize + 4 * inputs + max(40 * inputs, sizes.linear.compressing)
    both = passing + activations + sizes.compressed_block + working + CHUNK_BYTES
    option = f"{calibration.device_option}, or calibration.mode"
    return [replace(along, device=max(sizes.skeleton, both), shared_host=2 * hidden, device_option=option)]


def head(sizes: ModelSizes) -> StageNeeds:
    """Return the needs of compressing the head, beside which the skeleton is read once more."""
    return StageNeeds(
        "head",
        device=2 * sizes.skeleton + sizes.head.compressing,
        disk=sizes.head.stored,
        device_option="compression.head=null",
    )


def budget(sizes: ModelSizes, settings: CalibrationSettings, num_sequences: int, seq_len: int) -> StageNeeds:
    """Return the needs of spreading a budget by sensitivities on so many sequences, without those of a compression."""
    tokens = settings.batch_size * seq_len
    # Activations are kept, with their gradients and the change of an output; both weights, and their difference.
    block = sizes.dense_block + sizes.block.candidates + 12 * sizes.linear.weights + sizes.linear.restoring
    block += 4 * sizes.activations(tokens)
    hidden = sizes.hidden_states(min(num_sequences, settings.num_sequences), seq_len)
    return StageNeeds(
        "budget",
        device=sizes.skeleton + max(block, 2 * sizes.measuring(tokens)),
        host=sizes.block.candidates,
        shared_host=(sizes.num_blocks + 2) * hidden,
        disk=sizes.total.candidates + sizes.total.stored,  # and the whole model once more, to compare
        device_option="calibration.batch_size or data.seq_len",
        host_option="compression.budget.num_sequences",
        disk_option="compression.budget.candidates",
    )


def reference(sizes: ModelSizes, data: DataShape, batch_size: int) -> StageNeeds:
    """Return the needs of recording the dense model's predictions, so many windows at a time."""
    return StageNeeds(
        "dense reference",
        device=max(sizes.skeleton, sizes.dense_block + sizes.activations(batch_size * data.seq_len)),
        shared_host=sizes.hidden_states(max(data.eval_windows.values(), default=0), data.seq_len),
        disk=sizes.hidden_states(sum(data.eval_windows.values()), data.seq_len),
        device_option="report.batch_size",
        host_option="data.max_eval_windows",
        disk_option="data.max_eval_windows",
    )


def teacher(sizes: ModelSizes, settings: TeacherSettings, num_windows: int, seq_len: int) -> StageNeeds:
    """Return the needs of recording the teacher's predictions: its hidden states, or its likeliest tokens."""
    tokens, top_k = settings.batch_size * seq_len, settings.top_k
    head = 0 if top_k is None else (2 * sizes.itemsize + 12) * tokens * sizes.vocabulary  # softened, in float32
    hidden = sizes.hidden_states(num_windows, seq_len)
    return StageNeeds(
        "teacher",
        device=max(sizes.dense_block + sizes.activations(tokens), sizes.skeleton + head),
        shared_host=hidden,
        disk=hidden if top_k is None else 8 * top_k * num_windows * seq_len,
        device_option="model.objective.batch_size",
        host_option="data.max_train_windows",
        disk_option="data.max_train_windows, model.objective.top_k",
    )


def validation(sizes: ModelSizes, data: DataShape, holding: Holding) -> StageNeeds:
    """Return the needs of measuring perplexity before any training end to end."""
    tokens = data.eval_batch_size * data.seq_len
    if holding.streams:
        logits = sizes.measuring(tokens, data.eval_chunk_bytes)
        return StageNeeds(
            "validation",
            device=max(sizes.compressed_block + sizes.passing(tokens, sizes.itemsize), sizes.skeleton + logits),
            host=sizes.compressed_block,
            shared_host=sizes.hidden_states(sum(data.eval_windows.values()), data.seq_len),
            device_option="data.eval_batch_size",
            host_option="data.max_eval_windows",
        )
    parameters = holding.parameters(sizes) if holding.widened else sizes.stored
    device = holding.share(sizes, parameters) + sizes.forward(tokens, sizes.itemsize, data.eval_chunk_bytes)
    return StageNeeds(
        "validation",
        device=device + sizes.skeleton * sizes.is_compressed_here,
        built=holding.building(sizes, parameters),
        device_option="data.eval_batch_size, or trainer.strategy=fsdp2 on more devices",
        host_option="fewer trainer.devices on this machine",
    )


def finetuning(sizes: ModelSizes, settings: FinetuningSettings, seq_len: int, num_ranks: int) -> StageNeeds:
    """Return the needs of finetuning blocks."""
    hidden = sizes.hidden_states(settings.num_sequences + settings.num_held_out, seq_len)
    activations = sizes.activations(ceil(settings.batch_size / num_ranks) * seq_len)
    # Every value, its gradient and two moments in float32; restored weights, a gradient of one and a copy.
    states = 16 * sizes.block_values + sizes.block.packed + sizes.block.keeping + 8 * sizes.linear.weights
    return StageNeeds(
        "finetuning",
        device=max(sizes.skeleton, sizes.dense_block + activations, states + 4 * activations),
        host=2 * sizes.compressed_block + (settings.num_held * hidden if settings.activations == "memory" else 0),
        disk=settings.num_streams * hidden + sizes.total.stored + sizes.others,
        device_option="finetuning.batch_size (with finetuning.accumulate_grad_batches)",
        host_option="finetuning.activations=disk",
        disk_option="finetuning.num_sequences",
    )


def export(sizes: ModelSizes, num_copies: int, dense: bool = False) -> StageNeeds:
    """Return the needs of writing that many model folders, compressed or dense again."""
    return StageNeeds(
        "export",
        device=sizes.skeleton,
        host=2 * sizes.compressed_block + sizes.dense_block * dense,
        disk=num_copies * (sizes.skeleton + sizes.dense_blocks if dense else sizes.stored),
        disk_option="export.enabled=false",
    )


def end_to_end(sizes: ModelSizes, data: DataShape, training: Training, holding: Holding) -> StageNeeds:
    """Return the needs of training end to end.

    Every trained value has a gradient and two moments in float32. Restored weights that are kept for gradients
    are whole on every rank, as activations are; these are of all blocks, or of one where they are computed again.
    """
    trained, parameters = sizes.trained_values, holding.parameters(sizes)
    buckets = 4 * trained if holding.num_ranks > 1 and not holding.sharded else 0  # of DDP
    states = holding.share(sizes, parameters + 12 * trained + buckets)
    tokens = training.batch_size * data.seq_len
    each = sizes.vocabulary * (LOSS_BYTES if training.teacher is None else DISTILLATION_BYTES)
    # Hidden states of all positions, with their gradients, and logits of some.
    logits = min(each * tokens, max(LOGITS_CHUNK, each * training.batch_size)) + 8 * tokens * sizes.hidden
    step = sizes.stepping(tokens, holding.mixed, training.recompute) + logits
    between = sizes.forward(data.eval_batch_size * data.seq_len, 4, data.eval_chunk_bytes)
    checkpoint = parameters + 8 * trained
    batch = "data.train_batch_size (with trainer.accumulate_grad_batches)" if step > between else "data.eval_batch_size"
    batch += ", model.recompute=true" * (step > between and not training.recompute)
    without = "trainer.enable_checkpointing=false"
    return StageNeeds(
        "training",
        device=sizes.skeleton * sizes.is_compressed_here + states + max(step, between),
        built=holding.building(sizes, parameters if holding.sharded else sizes.stored),
        shared_host=0 if holding.sharded else checkpoint * 9 // 8 * (training.num_checkpoints > 0),
        disk=training.num_checkpoints * checkpoint,
        device_option=f"{batch}, data.seq_len, or trainer.strategy=fsdp2 on more devices",
        host_option="fewer trainer.devices on this machine" if holding.sharded else without,
        disk_option="checkpoint.save_top_k" if training.num_checkpoints > 1 else without,
    )


def questions(sizes: ModelSizes, seq_len: int, batch_size: int) -> StageNeeds:
    """Return the needs of asking a whole model so many questions of at most that many tokens at a time."""
    device = sizes.stored + sizes.answering(batch_size * seq_len)
    return StageNeeds("questions", device, built=sizes.stored, device_option="batch_size")
