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
_ROUNDS = 15

_log = logging.getLogger(__name__)


class _Choice(NamedTuple):
    form: Form
    gain: Gain


@torch.no_grad()
def accelerate(model: Model) -> Model:
    """Give the compressed linears of a model, in place, the form in which they process one token fastest.

    One linear of each kind and size is timed in each form that its device allows, beside a dense linear in the type of
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
        RuntimeError: the model is in training mode.
    """
    if model.training:
        raise RuntimeError(
            "Expected a model in evaluation mode, but got one in training mode. Call model.eval() first."
        )
    places, dtype = _places(model), _activation_dtype(model)
    shortage = shortage_of_memory(places, dtype)
    choices: dict[str, _Choice] = {}
    counts: dict[str, int] = {}
    for linear, names in places.items():
        kind = json.dumps({**linear.description(), "num_kept": None, "class": type(linear).__name__})
        if kind not in choices:
            choices[kind] = _fastest(linear, dtype, shortage)
        counts[kind] = counts.get(kind, 0) + 1
        form = choices[kind].form.make(linear)
        for name in names:
            model.set_submodule(name, form)
    if choices:
        gains = [choices[kind].gain._replace(number=count) for kind, count in counts.items()]
        # A warning, as logging that nobody has set up shows nothing less.
        _log.warning("%s", gains_table(gains, TOKENS, dtype_name(dtype)))
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


def _fastest(linear: CompressedLinear, dtype: torch.dtype, shortage: str | None) -> _Choice:
    """Time a linear in all of its forms."""
    forms, reason = forms_of(linear, dtype, shortage is None)
    # A copy has its own unpacked weight, but the parameters of the linear.
    made = [form.make(copy.copy(linear)) for form in forms]
    weight = next((each.dense_weight(dtype) for each in made if each.is_unpacked), None)
    dense = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    dense.weight = nn.Parameter(linear.weight.to(dtype) if weight is None else weight)
    if linear.bias is not None:
        dense.bias = nn.Parameter(linear.bias.to(dtype))
    seconds = [_seconds([dense, *made], _tokens(count, linear, dtype)) for count in TOKENS]
    best = min(range(len(forms)), key=lambda number: seconds[0][number + 1])
    speeds = [each[0] / each[best + 1] for each in seconds]
    memory = made[best].held_bytes / sum(parameter.nbytes for parameter in dense.parameters())
    what = f"{linear.description()['class']} {linear.out_features} x {linear.in_features}"
    note = "; ".join(filter(None, (shortage, reason)))
    return _Choice(forms[best], Gain(what, 0, forms[best].name, speeds, memory, note))


def _tokens(count: int, linear: CompressedLinear, dtype: torch.dtype) -> Tensor:
    device = next(iter(linear.state_dict().values())).device
    return torch.ones(1, count, linear.in_features, dtype=dtype, device=device)


def _seconds(modules: Sequence[nn.Module], activations: Tensor) -> list[float]:
    """Return the shortest time of each module; they take turns, so that a busy moment meets all of them."""
    best = [float("inf")] * len(modules)
    # On one thread its own time counts, so that others on the machine do not.
    alone = activations.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    for number in range(_ROUNDS + 2):
        for place, module in enumerate(modules):
            _synchronize(activations.device)
            start = clock()
            module(activations)
            _synchronize(activations.device)
            # Whatever is compiled is compiled in the first two rounds.
            if number >= 2:
                best[place] = min(best[place], clock() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
