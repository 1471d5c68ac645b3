"""Turn a compressed model into one that runs faster and cannot be trained."""

import logging
from collections import Counter

from torch import nn

from nowag_pl.functional.storage.semi_structured import semi_structured_obstacle
from nowag_pl.functional.vq.matmul import lookup_obstacle
from nowag_pl.modules.compressed.armor import ArmorLinear
from nowag_pl.modules.compressed.base import CompressedLinear
from nowag_pl.modules.compressed.masked import MaskedLinear
from nowag_pl.modules.compressed.vq import VQLinear
from nowag_pl.modules.running.base import RunningForm
from nowag_pl.modules.running.lookup import LookupLinear
from nowag_pl.modules.running.semi_structured import SemiStructuredArmorLinear, SemiStructuredLinear

_log = logging.getLogger(__name__)


def accelerate(model: nn.Module) -> int:
    """Replace compressed linears, in place, by what runs faster on their device.

    - in float16 or bfloat16, on a GPU with sparse tensor cores: 2:4 linears (:class:`SemiStructuredLinear`) and the 2:4
      cores of ARMOR's, with the factors before and after (:class:`SemiStructuredArmorLinear`);
    - vector-quantized linears on a CPU, where Numba is installed (the extra `cpu`): :class:`LookupLinear`, in a little
      more memory. On CUDA they run from packed codes and need no conversion.

    Call it on a model that is on its device and in evaluation mode. The model can be saved as before, but neither
    trained nor loaded into, and it stays on its device.

    Args:
        model: any module with compressed linears inside.

    Returns:
        How many linears were replaced. Why others were not is logged as a warning.

    Raises:
        RuntimeError: the model is in training mode.
    """
    if model.training:
        raise RuntimeError(
            "Expected a model in evaluation mode, but got one in training mode. Call model.eval() first."
        )
    forms: dict[nn.Module, RunningForm | str] = {}  # a linear may be in several places
    for name, linear in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(linear, CompressedLinear):
            continue
        if linear not in forms:
            forms[linear] = _running_form(linear) if name else "linears stay: they are the model itself"
        form = forms[linear]
        if isinstance(form, RunningForm):
            model.set_submodule(name, form)
    obstacles = Counter(form for form in forms.values() if isinstance(form, str))
    for obstacle, count in obstacles.items():
        _log.warning("%d %s", count, obstacle)
    return len(forms) - obstacles.total()


def _running_form(linear: CompressedLinear) -> RunningForm | str:
    """Return what a linear is replaced by, or why it is not, for a message."""
    match linear:
        case MaskedLinear():
            obstacle = _semi_structured_obstacle(linear)
            return f"pruned linears run densely: {obstacle}" if obstacle else SemiStructuredLinear(linear)
        case ArmorLinear():
            obstacle = _semi_structured_obstacle(linear)
            return f"ARMOR linears run with a dense core: {obstacle}" if obstacle else SemiStructuredArmorLinear(linear)
        case VQLinear():
            obstacle = _lookup_obstacle(linear)
            return f"quantized linears run from packed codes: {obstacle}" if obstacle else LookupLinear(linear)
        case RunningForm():
            return "linears stay: they are in their running form already"
    return f"linears stay: a {type(linear).__name__} has no running form"


def _semi_structured_obstacle(linear: MaskedLinear | ArmorLinear) -> str | None:
    shape = (linear.out_features, linear.in_features)
    return semi_structured_obstacle(shape, linear.pattern, linear.dtype, linear.values.device)


def _lookup_obstacle(linear: VQLinear) -> str | None:
    device = linear.codes.device.type
    if device != "cpu":
        return f"on {device}, not on a CPU"
    return lookup_obstacle(linear.codebook_size, linear.out_features)
