"""Turn a compressed model into one that runs faster and cannot be trained."""

import logging
from collections import Counter

from torch import nn

from nowag_pl.functional.semi_structured import semi_structured_obstacle
from nowag_pl.modules.masked_linear import MaskedLinear
from nowag_pl.modules.semi_structured_linear import SemiStructuredLinear

_log = logging.getLogger(__name__)


def accelerate(model: nn.Module) -> int:
    """Replace 2:4 linears, in place, by ones that run on sparse tensor cores where the hardware has them.

    Call it on a model that is on its device and in evaluation mode. The model can be saved as before, but neither
    trained nor loaded into. Vector-quantized linears need no conversion.

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
    replaced: dict[MaskedLinear, SemiStructuredLinear] = {}  # a linear may be in several places
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, MaskedLinear):
                continue
            shape = (linear.out_features, linear.in_features)
            obstacle = semi_structured_obstacle(shape, linear.pattern, linear.dtype, linear.values.device)
            if obstacle is None:
                if linear not in replaced:
                    replaced[linear] = SemiStructuredLinear(linear)
                setattr(parent, name, replaced[linear])
            else:
                obstacles[obstacle] += 1
    for obstacle, count in obstacles.items():
        _log.warning("%d pruned linears run densely: %s", count, obstacle)
    return len(replaced)
