"""Rotation before pruning: a model that computes the same, in whose weights importance is concentrated.

One forward pass of the dense model gathers second moments around the residual stream and around the values of each
attention. The matrix of the stream, the same for all blocks, is learned on some blocks at a time; those of the values
block by block. The result is an ordinary model folder in the run directory, which is compressed in the place of the
dense model.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nowag_pl.files import read_tensors, write_tensors
from nowag_pl.functional.rotation_learning import (
    Reader,
    Writer,
    learn_rotation,
    principal_axes,
    random_hadamard,
    rotated_squares,
    stream_entropy,
    value_entropy,
)
from nowag_pl.models.checkpoint import CONFIG_FILE
from nowag_pl.models.rotation import (
    DOWN,
    OUTPUT,
    READERS,
    WRITERS,
    folded_state,
    readers_of,
    rotated_stream,
    rotated_values,
    save_rotated,
    values_of,
    writers_of,
)
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import SecondMoment
from nowag_pl.run.layout import ROTATED_MODEL, ROTATION_MATRIX, ROTATION_MOMENTS
from nowag_pl.run.progress import block_progress
from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.correction import Point, captured
from nowag_pl.stages.hidden import HiddenStates, forward
from nowag_pl.stages.moments import naming
from nowag_pl.stages.plan import RotationSettings


def write_rotated(
    model: StreamedModel, store: ArtefactStore, windows: Tensor, settings: RotationSettings, batch_size: int
) -> Path:
    """Write the rotated model, unless it is there, and return its folder.

    Args:
        model: dense model.
        store: run directory.
        windows: calibration sequences `[num_sequences, seq_len]`, the same on every rank; each takes its share.
        settings: kind of rotation, and how it is learned.
        batch_size: sequences that pass through a block together.

    Raises:
        ValueError: an activation is NaN or infinite; the message names block and linear.
    """
    folder = store.folder / ROTATED_MODEL
    if store.ranks.broadcast((folder / CONFIG_FILE).is_file()):
        return folder
    if settings.kind == "learned":
        gather_moments(model, store, windows, batch_size)
    if store.ranks.is_zero:
        _write(model, store, settings, folder)
    store.remove(ROTATION_MOMENTS)
    return folder


@torch.no_grad()
def gather_moments(model: StreamedModel, store: ArtefactStore, windows: Tensor, batch_size: int) -> None:
    """Write the second moments of normalised hidden states, and of the inputs of linears that write to the stream.

    Args:
        model: dense model.
        store: run directory.
        windows: calibration sequences, the same on every rank; each takes its share.
        batch_size: sequences that pass through a block together.

    Raises:
        ValueError: an activation is NaN or infinite; the message names block and linear.
    """
    missing = store.missing(ROTATION_MOMENTS, len(model))
    if not missing:
        return
    states = HiddenStates(model, store.ranks.share(windows), batch_size)
    with block_progress("Rotation: moments", max(missing) + 1, store.ranks.is_zero, model.device) as report:
        for index in range(max(missing) + 1):
            started, block = time.perf_counter(), model.load_block(index)
            if index in missing:
                moments = _moments(model, block, index, states, store.ranks)
                store.write(ROTATION_MOMENTS, index, moments, {"seconds": time.perf_counter() - started})
            states.run(block, index)
            report("")


def _moments(
    model: StreamedModel, block: nn.Module, index: int, states: HiddenStates, ranks: Ranks
) -> dict[str, Tensor]:
    """Return the second moments of a block by the name of the norm or linear whose inputs they are those of."""
    sizes = {name: (block.get_submodule(name).get_parameter("weight").shape[-1], name != DOWN) for name in _places()}
    moments = {name: SecondMoment(*size).to(model.device) for name, size in sizes.items()}
    for hidden in states.batches():
        with captured(block, [Point(name, "input") for name in moments]) as seen:
            forward(model, block, index, hidden)
        for name, moment in moments.items():
            inputs = seen[Point(name, "input")].float()
            moment.update(F.rms_norm(inputs, inputs.shape[-1:]) if name in READERS else inputs)
    for moment in moments.values():
        moment.all_reduce()
    found = {}
    for name, moment in moments.items():
        with naming(f"{model.block_name(index)}.{name}"):
            found[name] = moment.compute().cpu()
    heads = model.checkpoint.config.num_attention_heads
    found[OUTPUT] = _of_heads(found[OUTPUT], heads)
    return found


def _places() -> tuple[str, ...]:
    return (*READERS, *WRITERS)


def _of_heads(matrix: Tensor, heads: int) -> Tensor:
    """Return the blocks on the diagonal of second moments, `[heads, head_dim, head_dim]`."""
    blocks = matrix.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))  # [heads, head_dim, heads, head_dim]
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).contiguous()


def _write(model: StreamedModel, store: ArtefactStore, settings: RotationSettings, folder: Path) -> None:
    """Find all matrices and write the model, on rank zero; the matrix of the stream is kept in a file of its own."""
    path = store.folder / ROTATION_MATRIX
    if not path.is_file():
        write_tensors(path, {"stream": _stream_rotation(model, store, settings).cpu()})
    rotation = read_tensors(path, model.device)[0]["stream"]
    with block_progress("Rotating", len(model), True, model.device) as report:

        def rotated(index: int) -> dict[str, Tensor]:
            state = rotated_stream(folded_state(model.load_block(index)), rotation)
            if settings.values:
                state = rotated_values(state, _value_rotation(model, store, settings, index, rotation, state))
            report("")
            return state

        save_rotated(model, rotation, rotated, folder)


def _stream_rotation(model: StreamedModel, store: ArtefactStore, settings: RotationSettings) -> Tensor:
    """Return the matrix of the stream."""
    if not settings.stream:
        return torch.eye(model.hidden_size, device=model.device)
    if settings.kind == "hadamard":
        return random_hadamard(model.hidden_size, torch.Generator().manual_seed(settings.seed)).to(model.device)
    generator = torch.Generator().manual_seed(settings.seed)
    start = principal_axes(_mean_moment(model, store))
    num_blocks = min(settings.blocks_per_step, len(model))
    with block_progress("Rotation: learning", settings.num_steps, True, model.device) as report:

        def gradient(step: int, rotation: Tensor) -> tuple[float, Tensor]:
            slope, entropy = torch.zeros_like(rotation), 0.0
            for index in torch.randperm(len(model), generator=generator)[:num_blocks].tolist():
                of_block, its_slope = _stream_slope(*_terms(model, store, index), rotation)
                entropy, slope = entropy + of_block / num_blocks, slope + its_slope / num_blocks
            report(f"entropy {entropy:.4f}")
            return entropy, slope

        return learn_rotation(start, gradient, settings.num_steps, settings.learning_rate)


def _stream_slope(readers: list[Reader], writers: list[Writer], rotation: Tensor) -> tuple[float, Tensor]:
    """Return the entropy of a block and its gradient in the matrix of the stream."""
    with torch.enable_grad():
        leaf = rotation.detach().requires_grad_()
        entropy = stream_entropy(leaf, readers, writers)
    (slope,) = torch.autograd.grad(entropy, leaf)
    return float(entropy.detach()), slope


def _read_moments(model: StreamedModel, store: ArtefactStore, index: int) -> dict[str, Tensor]:
    return {name: tensor.to(model.device) for name, tensor in store.read(ROTATION_MOMENTS, index)[0].items()}


def _terms(model: StreamedModel, store: ArtefactStore, index: int) -> tuple[list[Reader], list[Writer]]:
    """Return the linears of a block around the stream."""
    moments, state = _read_moments(model, store, index), folded_state(model.load_block(index))
    squares = {DOWN: moments[DOWN], OUTPUT: moments[OUTPUT].diagonal(dim1=1, dim2=2).flatten()}
    return readers_of(state, moments), writers_of(state, squares)


def _mean_moment(model: StreamedModel, store: ArtefactStore) -> Tensor:
    """Return the mean second moments of normalised hidden states, before all attentions and MLPs."""
    total = torch.zeros(model.hidden_size, model.hidden_size)
    for index in range(len(model)):
        moments = store.read(ROTATION_MOMENTS, index)[0]
        total += sum((moments[name] for name in READERS), torch.zeros(()))
    return (total / (len(model) * len(READERS))).to(model.device)


def _value_rotation(
    model: StreamedModel, store: ArtefactStore, settings: RotationSettings, index: int, stream: Tensor, state: dict
) -> Tensor:
    """Return the matrices of the values of a block whose stream is rotated."""
    heads = model.checkpoint.config.num_attention_heads
    head_dim = state[f"{OUTPUT}.weight"].shape[1] // heads
    num_kv = state["self_attn.v_proj.weight"].shape[0] // head_dim
    if settings.kind == "hadamard":
        generator = torch.Generator().manual_seed(settings.seed + index)
        return torch.stack([random_hadamard(head_dim, generator) for _ in range(num_kv)]).to(model.device)
    moments = _read_moments(model, store, index)
    squares = rotated_squares(moments["input_layernorm"], stream)
    values = values_of(state, squares, moments[OUTPUT])
    start = principal_axes(moments[OUTPUT].unflatten(0, (num_kv, -1)).mean(dim=1))

    def gradient(step: int, rotation: Tensor) -> tuple[float, Tensor]:
        with torch.enable_grad():
            leaf = rotation.detach().requires_grad_()
            entropy = value_entropy(leaf, values)
        return float(entropy.detach()), torch.autograd.grad(entropy, leaf)[0]

    return learn_rotation(start, gradient, settings.num_steps, settings.learning_rate)
