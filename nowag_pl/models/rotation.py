"""Rotate the residual stream and the values of a Llama, so that it stays an ordinary one that computes the same.

The stream is rotated by one orthogonal matrix R for the whole model. Norms without weights do not notice it, so that
their weights are first multiplied into the linears after them. Linears that read the stream become `W R`, those that
write to it `R^T W`. The values of each attention are rotated head by head (QuaRot, arXiv:2404.00456; SliceGPT,
arXiv:2401.15024).
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from nowag_pl.functional.rotation_learning import Reader, Values, Writer, rotate_values
from nowag_pl.models.format.folder import FolderConfig, write_folder
from nowag_pl.models.state import plain_tensors
from nowag_pl.models.streaming import StreamedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Linears that read the stream, by the norm before them."""

VALUE, OUTPUT, DOWN = "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"
WRITERS = (OUTPUT, DOWN)

_LINEARS = (*READERS["input_layernorm"], *READERS["post_attention_layernorm"], *WRITERS)
_NEEDED = {f"{name}.weight" for name in (*_LINEARS, *READERS)}
# Biases, and norms of queries and keys, are none of the stream's.
_ALLOWED = {f"{name}.bias" for name in _LINEARS} | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
_PROBED_ROWS = 4


def check_rotatable(model: StreamedModel) -> None:
    """Check that a model is built like Llama, as far as a rotation has to know it: Mistral, Qwen2 and Qwen3 are.

    Args:
        model: dense model.

    Raises:
        ValueError: it is built in another way.
    """
    names = {name for block in model.blocks for name, _ in block.named_parameters()}
    block = model.load_block(0)
    problem = None
    if unlike := sorted((_NEEDED - names) | (names - _NEEDED - _ALLOWED)):
        problem = f"{unlike[0]} is {'missing from' if unlike[0] in _NEEDED else 'in'} its blocks"
    elif not all(_is_rms_norm(norm) for norm in (*(block.get_submodule(name) for name in READERS), _last_norm(model))):
        problem = "its norms do more than divide by the root mean square and multiply by their weight"
    if problem:
        raise ValueError(
            f"Expected a model whose blocks are built like Llama's for a rotation, but got one of type "
            f"{model.checkpoint.config.model_type!r}: {problem}. Set rotation.kind to none."
        )


@torch.no_grad()
def _is_rms_norm(norm: nn.Module) -> bool:
    weight = norm.get_parameter("weight").float()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBED_ROWS, len(weight), generator=generator).to(weight.device)
    expected = nn.functional.rms_norm(rows, weight.shape, weight)
    tolerance = 0.02 * float(expected.abs().max())
    return torch.allclose(norm(rows.to(norm.get_parameter("weight").dtype)).float(), expected, rtol=0, atol=tolerance)


def _last_norm(model: StreamedModel) -> nn.Module:
    """Return the norm between the last block and the head."""
    return model.skeleton.get_submodule(f"{model.skeleton.base_model_prefix}.norm")


def folded_state(block: nn.Module) -> dict[str, Tensor]:
    """Return the state of a block, float32, with the weights of its norms multiplied into the linears after them.

    Args:
        block: dense block.
    """
    state = {name: tensor.float() for name, tensor in block.state_dict().items()}
    for norm, linears in READERS.items():
        for name in linears:
            state[f"{name}.weight"] = state[f"{name}.weight"] * state[f"{norm}.weight"]
        state[f"{norm}.weight"] = torch.ones_like(state[f"{norm}.weight"])
    return state


def readers_of(state: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> list[Reader]:
    """Return the linears of a block that read the stream.

    Args:
        state: from :func:`folded_state`.
        moments: second moments of normalised hidden states by the name of the norm, `[hidden, hidden]`.
    """
    return [Reader(state[f"{name}.weight"], moments[norm]) for norm, linears in READERS.items() for name in linears]


def writers_of(state: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> list[Writer]:
    """Return the linears of a block that write to the stream.

    Args:
        state: from :func:`folded_state`.
        squares: mean squares of their inputs by name, `[in]`.
    """
    return [Writer(state[f"{name}.weight"], squares[name]) for name in WRITERS]


def values_of(state: Mapping[str, Tensor], squares: Tensor, moments: Tensor) -> Values:
    """Return the linears around the values of a block's attention.

    Args:
        state: from :func:`folded_state`, or of a rotated stream.
        squares: mean squares of the inputs of the first, `[hidden]`.
        moments: second moments of the inputs of the second, `[heads, head_dim, head_dim]`.
    """
    heads, head_dim = moments.shape[:2]
    value = state[f"{VALUE}.weight"].unflatten(0, (-1, head_dim))
    return Values(value, squares, state[f"{OUTPUT}.weight"].unflatten(1, (heads, head_dim)), moments)


def rotated_stream(state: Mapping[str, Tensor], rotation: Tensor) -> dict[str, Tensor]:
    """Return the state of a block whose stream is rotated.

    Args:
        state: from :func:`folded_state`.
        rotation: R, `[hidden, hidden]`.
    """
    rotated = dict(state)
    for name in (name for linears in READERS.values() for name in linears):
        rotated[f"{name}.weight"] = state[f"{name}.weight"] @ rotation
    for name in WRITERS:
        rotated[f"{name}.weight"] = rotation.T @ state[f"{name}.weight"]
        if f"{name}.bias" in state:
            rotated[f"{name}.bias"] = rotation.T @ state[f"{name}.bias"]
    return rotated


def rotated_values(state: Mapping[str, Tensor], rotation: Tensor) -> dict[str, Tensor]:
    """Return the state of a block whose values are rotated.

    Args:
        state: of a block, float32.
        rotation: a matrix for each head of the values, `[kv_heads, head_dim, head_dim]`.
    """
    head_dim = rotation.shape[-1]
    value = state[f"{VALUE}.weight"].unflatten(0, (-1, head_dim))
    output = state[f"{OUTPUT}.weight"].unflatten(1, (-1, head_dim))
    value, output = rotate_values(rotation, value, output)
    rotated = {**state, f"{VALUE}.weight": value.flatten(0, 1), f"{OUTPUT}.weight": output.flatten(1)}
    if f"{VALUE}.bias" in state:
        bias = state[f"{VALUE}.bias"].unflatten(0, (-1, head_dim))
        # Attention weights sum to one, so that a bias passes as any value does.
        rotated[f"{VALUE}.bias"] = rotate_values(rotation, bias, output)[0].flatten()
    return rotated


@torch.no_grad()
def rotated_ends(model: StreamedModel, rotation: Tensor) -> "PreTrainedModel":
    """Return what is outside of the blocks, for a stream that is rotated; the model itself stays as it is.

    A head that is tied to the embeddings becomes a matrix of its own, unless all weights of the last norm are equal.

    Args:
        model: dense model.
        rotation: R, `[hidden, hidden]`, float32.
    """
    ends: Any = copy.deepcopy(model.skeleton)
    embeddings, head = ends.get_input_embeddings(), cast(nn.Linear, ends.get_output_embeddings())
    norm = ends.get_submodule(f"{ends.base_model_prefix}.norm")
    scale = norm.get_parameter("weight")
    stays_tied = ends.config.tie_word_embeddings and bool((scale == scale[0]).all())
    if not stays_tied:
        weight = head.weight.float() * scale.float() @ rotation
        head.weight = nn.Parameter(weight.to(head.weight.dtype), requires_grad=False)
        scale.fill_(1.0)
        ends.config.tie_word_embeddings = False
    # In place, so that a tied head follows.
    embeddings.weight.copy_(embeddings.weight.float() @ rotation)
    return ends


def save_rotated(
    model: StreamedModel, rotation: Tensor, rotated: Callable[[int], Mapping[str, Tensor]], folder: Path
) -> None:
    """Write a rotated model as an ordinary one in the type of the model, a block at a time.

    Args:
        model: dense model.
        rotation: R of the stream, `[hidden, hidden]`, float32.
        rotated: gives the state of a rotated block.
        folder: folder to create, or whose model is replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    dtype = model.checkpoint.dtype
    ends = rotated_ends(model, rotation)

    def shards() -> Iterator[dict[str, Tensor]]:
        yield dict(plain_tensors(ends))
        for index in range(len(model)):
            tensors = rotated(index).items()
            yield {f"{model.block_name(index)}.{name}": tensor.to(dtype).contiguous() for name, tensor in tensors}

    described: dict[str, Any] = {}
    write_folder(folder, ends, shards(), model.checkpoint.path, FolderConfig(dtype, described, dense=True))
