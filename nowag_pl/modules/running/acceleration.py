"""Turn a compressed model into one that runs faster and cannot be trained."""

import logging
from collections import Counter

from torch import nn

from nowag_pl.functional.storage.semi_structured import reason_against_semi_structured
from nowag_pl.functional.trellis.matmul import CPU_MAX_TOKENS, reason_against_tiles
from nowag_pl.functional.vq.matmul import reason_against_lookup
from nowag_pl.modules.compressed.armor import ArmorLinear
from nowag_pl.modules.compressed.base import CompressedLinear
from nowag_pl.modules.compressed.masked import MaskedLinear
from nowag_pl.modules.compressed.trellis import TrellisLinear
from nowag_pl.modules.compressed.vq import VQLinear
from nowag_pl.modules.running.base import RunningLinear
from nowag_pl.modules.running.lookup import LookupLinear
from nowag_pl.modules.running.semi_structured import SemiStructuredArmorLinear, SemiStructuredLinear

_log = logging.getLogger(__name__)


def accelerate(model: nn.Module) -> int:
    """Replace compressed linears, in place, by modules that run faster on their device.

    - in float16 or bfloat16, on a GPU with sparse tensor cores: 2:4 linears (:class:`SemiStructuredLinear`) and the 2:4
      cores of ARMOR's, with the factors before and after (:class:`SemiStructuredArmorLinear`);
    - vector-quantized linears on a CPU, if Numba is installed (the extra `cpu`): :class:`LookupLinear`, in slightly
      more memory. On CUDA they run from packed codes and need no conversion.

    Call it on a model that is on its device and in evaluation mode. The model can be saved as before, but neither
    trained nor loaded into, and it stays on its device.

    Args:
        model: any module with compressed linears inside.

    Returns:
        The number of replaced linears. The reasons why others were not replaced are logged as warnings.

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
    # By linear, of which the same one may be in several places.
    forms: dict[nn.Module, RunningLinear | str] = {}
    for name, linear in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(linear, CompressedLinear):
            continue
        if linear not in forms:
            forms[linear] = _running_form(linear) if name else "linears stay: they are the model itself"
        form = forms[linear]
        if isinstance(form, RunningLinear):
            model.set_submodule(name, form)
    reasons = Counter(form for form in forms.values() if isinstance(form, str))
    for reason, count in reasons.items():
        _log.warning("%d %s", count, reason)
    return len(forms) - reasons.total()


def _running_form(linear: CompressedLinear) -> RunningLinear | str:
    """Return the replacement of a linear, or the reason for a message why there is none."""
    match linear:
        case MaskedLinear():
            reason = _reason_against_sparse(linear)
            return f"pruned linears run densely: {reason}" if reason else SemiStructuredLinear(linear)
        case ArmorLinear():
            reason = _reason_against_sparse(linear)
            return f"ARMOR linears run with a dense core: {reason}" if reason else SemiStructuredArmorLinear(linear)
        case VQLinear():
            reason = reason_against_lookup(linear.codebook_size, linear.out_features, linear.codes.device)
            return f"quantized linears run from packed codes: {reason}" if reason else LookupLinear(linear)
        case RunningLinear():
            return "linears stay: they are in their running form already"
        case TrellisLinear():
            return _why_tiles_stay(linear)
    return f"linears stay: a {type(linear).__name__} has no running form"


def _why_tiles_stay(linear: TrellisLinear) -> str:
    reason = reason_against_tiles(linear.code, linear.codes.device)
    if reason:
        return f"linears on a trellis run from a reconstructed weight: {reason}"
    return f"linears on a trellis stay: they run from packed codes for up to {CPU_MAX_TOKENS} tokens"


def _reason_against_sparse(linear: MaskedLinear | ArmorLinear) -> str | None:
    shape = (linear.out_features, linear.in_features)
    return reason_against_semi_structured(shape, linear.pattern, linear.dtype, linear.values.device)
