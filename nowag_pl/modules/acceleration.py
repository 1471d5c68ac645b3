"""Turn a compressed model into one that runs faster and cannot be trained."""

import logging
from collections import Counter

from torch import nn

from nowag_pl.functional.semi_structured import semi_structured_obstacle
from nowag_pl.functional.vq_matmul import lookup_obstacle
from nowag_pl.modules.lookup_linear import LookupLinear
from nowag_pl.modules.masked_linear import MaskedLinear
from nowag_pl.modules.running_form import RunningForm
from nowag_pl.modules.semi_structured_linear import SemiStructuredLinear
from nowag_pl.modules.vq_linear import VQLinear

_log = logging.getLogger(__name__)


def accelerate(model: nn.Module) -> int:
    """Replace compressed linears, in place, by what runs faster on their device.

    - 2:4 linears on a GPU with sparse tensor cores: :class:`SemiStructuredLinear`;
    - vector-quantized linears on a CPU, where Numba is installed (the extra `cpu`): :class:`LookupLinear`, in a little
      more memory. On CUDA they run from packed codes and need no conversion.

    Call it on a model that is on its device and in evaluation mode. The model can be saved as before, but neither
    trained nor loaded into, and it stays on its device.

    Args:
        model: any module with compressed linears inside.

    Returns:
        How many linears were replaced. Why others were not is logged.

    Raises:
        RuntimeError: the model is in training mode.
    """
    if model.training:
        raise RuntimeError(
            "Expected a model in evaluation mode, but got one in training mode. Call model.eval() first."
        )
    obstacles: Counter[str] = Counter()
    replaced: dict[nn.Module, RunningForm] = {}  # a linear may be in several places
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, MaskedLinear | VQLinear):
                continue
            form = replaced.get(linear) or _running_form(linear)
            if isinstance(form, RunningForm):
                replaced[linear] = form
                setattr(parent, name, form)
            elif form is not None:
                obstacles[form] += 1
    for obstacle, count in obstacles.items():
        _log.warning("%d %s", count, obstacle)
    return len(replaced)


def _running_form(linear: MaskedLinear | VQLinear) -> RunningForm | str | None:
    """Return what a linear is replaced by, or why it is not, for a message; None where nothing is to be gained."""
    if isinstance(linear, MaskedLinear):
        shape = (linear.out_features, linear.in_features)
        obstacle = semi_structured_obstacle(shape, linear.pattern, linear.dtype, linear.values.device)
        return f"pruned linears run densely: {obstacle}" if obstacle else SemiStructuredLinear(linear)
    if linear.codes.device.type != "cpu":
        return None
    obstacle = lookup_obstacle(linear.codebook_size, linear.out_features)
    return f"quantized linears run from packed codes: {obstacle}" if obstacle else LookupLinear(linear)
