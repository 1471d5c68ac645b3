"""Give every compressed linear the form in which it runs fastest, by measuring each that it can take."""

import copy
import json
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from nowag_pl.modules.compressed.base import CompressedLinear, dtype_name
from nowag_pl.modules.running.forms import Form, forms_of
from nowag_pl.modules.running.table import Gain, gains_table
from nowag_pl.modules.running.unpacking import shortage_of_memory

Model = TypeVar("Model", bound=nn.Module)

# One token decides; a prompt is shown beside it.
TOKENS = (1, 128)
_ROUNDS = 9
# So many linears of a kind are timed in turn that few are in the cache when they are used, as in a model.
_TIMED_BYTES = 2**26
_MAX_TIMED = 16

_log = logging.getLogger(__name__)


class _Choice(NamedTuple):
    form: Form
    gain: Gain


@torch.no_grad()
def accelerate(model: Model) -> Model:
    """Give the compressed linears of a model, in place, the form in which they process one token fastest.

    Some linears of each kind and size are timed in each form that their device allows, beside dense ones in the type of
    the model: unpacked, where memory allows it; packed; from whole codes on a CPU (:class:`LookupLinear`); and on
    sparse tensor cores (:class:`SemiStructuredLinear`, :class:`SemiStructuredArmorLinear`). Pruned linears lose the
    values that stand in their unpacked weight as well (:class:`DenseLinear`). One table goes to the log: which form was
    chosen, and how fast and large it is beside a dense linear.

    Call it on a model that is on its device and in evaluation mode. The model can be saved as before, but neither
    trained nor loaded into, and it stays on its device.

    Args:
        model: any module with compressed linears inside.

    Returns:
        The model itself.

    Raises:
        ValueError: it is no module.
        RuntimeError: the model is in training mode.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"Expected an nn.Module with compressed linears, but got {type(model).__name__}.")
    if model.training:
        raise RuntimeError(
            "Expected a model in evaluation mode, but got one in training mode. Call model.eval() first."
        )
    places, dtype = _places(model), _activation_dtype(model)
    shortage = shortage_of_memory(places, dtype)
    kinds: dict[str, list[CompressedLinear]] = {}
    for linear in places:
        kind = json.dumps({**linear.description(), "num_kept": None, "class": type(linear).__name__})
        kinds.setdefault(kind, []).append(linear)
    choices = [(linears, _fastest(linears, dtype, shortage)) for linears in kinds.values()]
    for linears, choice in choices:
        for linear in linears:
            form = choice.form.make(linear)
            for name in places[linear]:
                model.set_submodule(name, form)
    if choices:
        # A warning, as logging that nobody has set up shows nothing less.
        _log.warning("%s", gains_table([choice.gain for _, choice in choices], TOKENS, dtype_name(dtype)))
    return model


def _places(model: nn.Module) -> dict[CompressedLinear, list[str]]:
    """Return the compressed linears with all of their names; a model that is one itself cannot be replaced."""
    names: dict[CompressedLinear, list[str]] = {}
    for name, linear in model.named_modules(remove_duplicate=False):
        if isinstance(linear, CompressedLinear) and name:
            names.setdefault(linear, []).append(name)
    return names


def _activation_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of what is not compressed, or else that of the first compressed linear's weight."""
    inside = {
        id(each) for module in model.modules() if isinstance(module, CompressedLinear) for each in module.parameters()
    }
    outside = (each.dtype for each in model.parameters() if id(each) not in inside and each.is_floating_point())
    compressed = (each.weight.dtype for each in model.modules() if isinstance(each, CompressedLinear))
    return next(outside, None) or next(compressed, torch.float32)


def _fastest(linears: Sequence[CompressedLinear], dtype: torch.dtype, shortage: str | None) -> _Choice:
    """Time linears of one kind in all of their forms."""
    first = linears[0]
    forms, reason = forms_of(first, dtype, shortage is None)
    num_bytes = first.in_features * first.out_features * dtype.itemsize
    timed = linears[: min(max(_TIMED_BYTES // num_bytes, 1), _MAX_TIMED)]
    dense = [_dense(each, dtype) for each in timed]
    # A copy has its own unpacked weight, but the parameters of the linear.
    made = [[form.make(copy.copy(each)) for each in timed] for form in forms]
    seconds = [_seconds([dense, *made], _tokens(count, first, dtype)) for count in TOKENS]
    best = min(range(len(forms)), key=lambda number: seconds[0][number + 1])
    speeds = [each[0] / each[best + 1] for each in seconds]
    memory = made[best][0].held_bytes / sum(parameter.nbytes for parameter in dense[0].parameters())
    what = f"{first.description()['class']} {first.out_features} x {first.in_features}"
    note = "; ".join(filter(None, (shortage, reason)))
    return _Choice(forms[best], Gain(what, len(linears), forms[best].name, speeds, memory, note))


def _dense(linear: CompressedLinear, dtype: torch.dtype) -> nn.Linear:
    """Return an ordinary linear with a weight of its own."""
    dense = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    dense.weight = nn.Parameter(linear.dense_weight(dtype).detach().clone())
    if linear.bias is not None:
        dense.bias = nn.Parameter(linear.bias.to(dtype))
    return dense


def _tokens(count: int, linear: CompressedLinear, dtype: torch.dtype) -> Tensor:
    device = next(iter(linear.state_dict().values())).device
    return torch.ones(1, count, linear.in_features, dtype=dtype, device=device)


def _seconds(forms: Sequence[Sequence[nn.Module]], activations: Tensor) -> list[float]:
    """Return the shortest time of each form for all of its linears, one after the other, as in a model.

    Forms take turns, so that a busy moment of the machine meets all of them.
    """
    best = [float("inf")] * len(forms)
    # On one thread its own time counts, so that others on the machine do not.
    alone = activations.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    for number in range(_ROUNDS + 2):
        for place, linears in enumerate(forms):
            _synchronize(activations.device)
            start = clock()
            for linear in linears:
                linear(activations)
            _synchronize(activations.device)
            # Whatever is compiled is compiled in the first two rounds.
            if number >= 2:
                best[place] = min(best[place], clock() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
