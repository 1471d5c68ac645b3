"""The forms in which a compressed linear can run on its device."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from nowag_pl.functional.storage.semi_structured import reason_against_semi_structured
from nowag_pl.functional.trellis.matmul import reason_against_tiles
from nowag_pl.functional.vq.matmul import reason_against_columns
from nowag_pl.kernels.dispatch import is_for_triton
from nowag_pl.modules.compressed.armor import ArmorLinear
from nowag_pl.modules.compressed.base import CompressedLinear
from nowag_pl.modules.compressed.masked import MaskedLinear
from nowag_pl.modules.compressed.trellis import TrellisLinear
from nowag_pl.modules.compressed.vq import VQLinear
from nowag_pl.modules.running.base import RunningLinear
from nowag_pl.modules.running.dense import DenseLinear
from nowag_pl.modules.running.lookup import LookupLinear
from nowag_pl.modules.running.semi_structured import SemiStructuredArmorLinear, SemiStructuredLinear

_SPARSE = "sparse tensor cores"


class Form(NamedTuple):
    """A way in which a linear can run."""

    name: str
    make: Callable[[Any], CompressedLinear]


def forms_of(linear: CompressedLinear, dtype: torch.dtype, may_unpack: bool) -> tuple[list[Form], str]:
    """Return the forms that a linear can take, and why it cannot take another one, or "".

    Args:
        linear: the linear, on its device.
        dtype: type of the activations.
        may_unpack: whether there is memory for dense weights.
    """
    unpacked = [Form("dense weight", partial(_unpacked, dtype=dtype))] if may_unpack or linear.is_unpacked else []
    packed = [Form("packed", _packed)]
    match linear:
        case RunningLinear():
            return [Form("as it is", lambda each: each)], "is in its running form already"
        case MaskedLinear():
            reason = _reason_against_sparse(linear)
            dense = [Form("dense weight", lambda each: DenseLinear(each, dtype))] if unpacked else packed
            return [*dense, *([] if reason else [Form(_SPARSE, SemiStructuredLinear)])], _note(linear, reason)
        case ArmorLinear():
            reason = _reason_against_sparse(linear)
            sparse = [] if reason else [Form(_SPARSE, SemiStructuredArmorLinear)]
            return [*unpacked, *packed, *sparse], _note(linear, reason)
        case VQLinear():
            reason = reason_against_columns(linear.codebook_size, linear.codes.device)
            columns = [] if reason else [Form("whole codes", LookupLinear)]
            return [*unpacked, *packed, *columns], "" if is_for_triton(linear.codes.device) else reason or ""
        case TrellisLinear():
            return [*unpacked, *packed], reason_against_tiles(linear.code, linear.codes.device) or ""
    return unpacked or packed, ""


def _unpacked(linear: CompressedLinear, dtype: torch.dtype) -> CompressedLinear:
    linear.unpack(dtype)
    return linear


def _packed(linear: CompressedLinear) -> CompressedLinear:
    linear.pack()
    return linear


def _note(linear: MaskedLinear | ArmorLinear, reason: str | None) -> str:
    """Return why there are no sparse tensor cores, on a device that may have them."""
    return f"no {_SPARSE}: {reason}" if reason and linear.values.device.type == "cuda" else ""


def _reason_against_sparse(linear: MaskedLinear | ArmorLinear) -> str | None:
    shape = (linear.out_features, linear.in_features)
    return reason_against_semi_structured(shape, linear.pattern, linear.dtype, linear.values.device)
