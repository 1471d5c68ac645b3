"""Rotation before pruning: a model that computes the same, in whose weights importance is concentrated.

One forward pass of the dense model gathers second moments around the residual stream and around the values of each
attention. The matrix of the stream, the same for all blocks, is learned on some blocks at a time; those of the values
block by block. The result is an ordinary model folder in the run directory, which is compressed in the place of the
dense model.
"""

import time
from pathlib import Path
from typing import NamedTuple

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
from nowag_pl.models.checkpoint import CONFIG_FILE, Checkpoint
from nowag_pl.models.rotation import (
    DOWN,
    OUTPUT,
    READERS,
    WRITERS,
    check_rotatable,
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
from nowag_pl.stages.moments import TokenWeights, Weights, naming
from nowag_pl.stages.plan import RotationSettings

# The linears that share the inputs of each norm or linear.
_PLACES = {**READERS, **{name: (name,) for name in WRITERS}}


class Tokens(NamedTuple):
    """The calibration text.

    Attributes:
        windows: sequences `[num_sequences, seq_len]`, the same on every rank; each takes its share.
        batch_size: sequences that pass through a block together.
        weights: weight of each token for each linear; None: equal weights.
    """

    windows: Tensor
    batch_size: int
    weights: TokenWeights | None = None

    def of(self, index: int, names: tuple[str, ...]) -> Weights | None:
        """Return the mean weights of this rank's tokens for some linears of a block."""
        if self.weights is None:
            return None
        return Weights(torch.stack([self.weights(index, name) for name in names]).mean(dim=0))


def rotate(path: str, run_dir: str | Path, windows: Tensor, settings: RotationSettings, batch_size: int = 8) -> Path:
    """Rotate a dense model outside of a fit, and return the folder of the rotated one.

    Args:
        path: a local folder, or whatever else `model.path` takes.
        run_dir: folder to write into: `rotation/model` is the result.
        windows: calibration sequences `[num_sequences, seq_len]`.
        settings: kind of rotation, and how it is learned.
        batch_size: sequences that pass through a block together.

    Raises:
        ValueError: the model is built in a way that does not allow it.
    """
    model = StreamedModel(Checkpoint(path))
    check_rotatable(model)
    return write_rotated(model, ArtefactStore(Path(run_dir), Ranks.current()), Tokens(windows, batch_size), settings)


def write_rotated(model: StreamedModel, store: ArtefactStore, tokens: Tokens, settings: RotationSettings) -> Path:
    """Write the rotated model, unless it is there, and return its folder.

    Args:
        model: dense model.
        store: run directory.
        tokens: calibration text.
        settings: kind of rotation, and how it is learned.

    Raises:
        ValueError: an activation is NaN or infinite; the message names block and linear.
    """
    folder = store.folder / ROTATED_MODEL
    if store.ranks.broadcast((folder / CONFIG_FILE).is_file()):
        return folder
    if settings.kind == "learned":
        gather_moments(model, store, tokens)
    if store.ranks.is_zero:
        _write(model, store, settings, folder)
    store.remove(ROTATION_MOMENTS)
    return folder


@torch.no_grad()
def gather_moments(model: StreamedModel, store: ArtefactStore, tokens: Tokens) -> None:
    """Write the second moments of normalised hidden states, and of the inputs of linears that write to the stream.

    Args:
        model: dense model.
        store: run directory.
        tokens: calibration text.

    Raises:
        ValueError: an activation is NaN or infinite; the message names block and linear.
    """
    missing = store.missing(ROTATION_MOMENTS, len(model))
    if not missing:
        return
    states = HiddenStates(model, store.ranks.share(tokens.windows), tokens.batch_size)
    with block_progress("Rotation: moments", max(missing) + 1, store.ranks.is_zero, model.device) as report:
        for index in range(max(missing) + 1):
            started, block = time.perf_counter(), model.load_block(index)
            if index in missing:
                weights = {name: tokens.of(index, linears) for name, linears in _PLACES.items()}
                moments = _moments(model, block, index, states, weights)
                for moment in moments.values():
                    moment.all_reduce()
                store.write(
                    ROTATION_MOMENTS,
                    index,
                    _computed(model, index, moments),
                    {"seconds": time.perf_counter() - started},
                )
            states.run(block, index)
            report("")


def _moments(
    model: StreamedModel, block: nn.Module, index: int, states: HiddenStates, weights: dict[str, Weights | None]
) -> dict[str, SecondMoment]:
    """Return this rank's second moments of a block by the name of the norm or linear whose inputs they are those of."""
    sizes = {name: block.get_submodule(name).get_parameter("weight").shape[-1] for name in _PLACES}
    moments = {name: SecondMoment(size, full=name != DOWN).to(model.device) for name, size in sizes.items()}
    for hidden in states.batches():
        with captured(block, [Point(name, "input") for name in moments]) as seen:
            forward(model, block, index, hidden)
        for name, moment in moments.items():
            inputs, of_tokens = seen[Point(name, "input")].float(), weights[name]
            inputs = F.rms_norm(inputs, inputs.shape[-1:]) if name in READERS else inputs
            moment.update(inputs, None if of_tokens is None else of_tokens.of(inputs))
    return moments


def _computed(model: StreamedModel, index: int, moments: dict[str, SecondMoment]) -> dict[str, Tensor]:
    """Return the means in host memory; those of the attention's output head by head."""
    found = {}
    for name, moment in moments.items():
        with naming(f"{model.block_name(index)}.{name}"):
            found[name] = moment.compute().cpu()
    return {**found, OUTPUT: _of_heads(found[OUTPUT], model.checkpoint.config.num_attention_heads)}


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
    start = principal_axes(_mean_moment(model, store), generator)
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
    model: StreamedModel,
    store: ArtefactStore,
    settings: RotationSettings,
    index: int,
    stream: Tensor,
    state: dict[str, Tensor],
) -> Tensor:
    """Return the matrices of the values of a block whose stream is rotated."""
    heads = model.checkpoint.config.num_attention_heads
    head_dim = state[f"{OUTPUT}.weight"].shape[1] // heads
    num_kv = state["self_attn.v_proj.weight"].shape[0] // head_dim
    generator = torch.Generator().manual_seed(settings.seed + index)
    if settings.kind == "hadamard":
        return torch.stack([random_hadamard(head_dim, generator) for _ in range(num_kv)]).to(model.device)
    moments = _read_moments(model, store, index)
    squares = rotated_squares(moments["input_layernorm"], stream)
    values = values_of(state, squares, moments[OUTPUT])
    start = principal_axes(moments[OUTPUT].unflatten(0, (num_kv, -1)).mean(dim=1), generator)

    def gradient(step: int, rotation: Tensor) -> tuple[float, Tensor]:
        with torch.enable_grad():
            leaf = rotation.detach().requires_grad_()
            entropy = value_entropy(leaf, values)
        return float(entropy.detach()), torch.autograd.grad(entropy, leaf)[0]

    return learn_rotation(start, gradient, settings.num_steps, settings.learning_rate)
