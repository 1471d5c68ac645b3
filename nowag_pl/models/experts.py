"""Fused experts of transformers, taken apart: one linear for each expert and projection.

The layouts, for E experts, hidden size H and intermediate size I:

- `gate_up_proj [E, 2 I, H]` and `down_proj [E, H, I]`: Mixtral, Qwen, OLMoE, Granite, DeepSeek;
- the same transposed, with biases `[E, 2 I]` and `[E, H]`, gate and up row by row in turn: gpt-oss;
- the same transposed, for inputs that the router has weighted: Llama 4;
- `up_proj [E, I, H]` in place of `gate_up_proj`, where there is no gate.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nowag_pl.modules.experts import DOWN, IN_PROJECTIONS, ExpertSizes, Place, RoutedExperts, ScaledExperts

_FUSED = {"gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", DOWN, f"{DOWN}_bias"}
_SCALED = "Llama4TextExperts"
# What these classes do not tell of themselves, or not in every version of transformers.
_TOLD: dict[str, dict[str, bool]] = {
    "GptOssExperts": {"is_transposed": True, "is_concatenated": False},
    _SCALED: {"is_transposed": True},
}


class FusedGating:
    """The activation of fused experts, which may be any function of gate and up.

    Args:
        experts: the fused experts; their weights are not used.
        is_concatenated: whether they want gate and up one after the other, not in turn.
    """

    def __init__(self, experts: nn.Module, is_concatenated: bool) -> None:
        self._experts = experts
        self._is_concatenated = is_concatenated

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Return the intermediate values."""
        experts: Any = self._experts
        if gate is None:
            return experts.act_fn(up)
        if _apply_gate_of(experts) is None:
            return up * experts.act_fn(gate)
        joined = torch.cat([gate, up], -1) if self._is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        return experts._apply_gate(joined)


def _apply_gate_of(experts: nn.Module) -> Callable[[Tensor], Tensor] | None:
    return getattr(experts, "_apply_gate", None)


def take_apart(model: nn.Module) -> None:
    """Replace fused experts, in place, by :class:`RoutedExperts` without weights, on the meta device.

    Experts of an unknown layout stay as they are.

    Args:
        model: a model of transformers.
    """
    for name, module in list(model.named_modules()):
        if (apart := _apart(module)) is not None:
            model.set_submodule(name, apart.train(module.training))


def _apart(module: nn.Module) -> RoutedExperts | None:
    """Return the experts of a module, or None if it holds none, or in an unknown layout."""
    parameters = dict(module.named_parameters(recurse=False))
    kind = type(module).__name__
    told = {"is_transposed": False, "is_concatenated": True} | vars(module) | _TOLD.get(kind, {})
    has_gate = "gate_up_proj" in parameters
    needed = {"gate_up_proj" if has_gate else "up_proj", DOWN}
    # What comes after `down_proj` would be left out.
    if not needed <= parameters.keys() <= _FUSED or parameters[DOWN].dim() != 3 or told.get("has_post_expert_norm"):
        return None
    count, *sizes = parameters[DOWN].shape
    hidden, intermediate = reversed(sizes) if told["is_transposed"] else sizes
    layout = ExpertSizes(hidden, intermediate, has_gate, f"{DOWN}_bias" in parameters)
    places = _places(count, layout, told["is_transposed"], told["is_concatenated"])
    dtype = parameters[DOWN].dtype
    # The gating keeps the module for what it says of the activation.
    module._parameters.clear()
    with torch.device("meta"):
        made = (ScaledExperts if kind == _SCALED else RoutedExperts)(
            count, layout, FusedGating(module, told["is_concatenated"]), places
        )
    return made.to(dtype)


def _places(count: int, sizes: ExpertSizes, is_transposed: bool, is_concatenated: bool) -> dict[str, Place]:
    """Return the place of every weight and bias of the experts by its name."""
    projections = (*IN_PROJECTIONS, DOWN) if sizes.has_gate else (IN_PROJECTIONS[1], DOWN)
    found = {}
    for expert in range(count):
        for projection in projections:
            is_half = sizes.has_gate and projection != DOWN
            fused, part = ("gate_up_proj", IN_PROJECTIONS.index(projection)) if is_half else (projection, None)
            name = f"{expert}.{projection}"
            found[f"{name}.weight"] = Place(fused, expert, part, is_transposed, is_concatenated)
            if sizes.has_bias:
                found[f"{name}.bias"] = Place(f"{fused}_bias", expert, part, False, is_concatenated)
    return found


def routed_experts(module: nn.Module) -> dict[str, RoutedExperts]:
    """Return the experts of a block or a model that are taken apart, by name."""
    return {name: each for name, each in module.named_modules() if isinstance(each, RoutedExperts)}


def fused_places(model: nn.Module) -> dict[str, tuple[str, Place]]:
    """Return, for every tensor of an expert's linear, the whole name of the fused tensor and its place there."""
    return {
        f"{name}.{tensor}": (f"{name}.{place.fused}", place)
        for name, experts in routed_experts(model).items()
        for tensor, place in experts.places.items()
    }


def fused(
    tensors: Iterable[tuple[str, Tensor]], places: Mapping[str, tuple[str, Place]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors with those of experts put together again.

    Args:
        tensors: names and tensors; those of one fused tensor are best near to each other, as it is held until the last.
        places: as :func:`fused_places` returns; tensors that are not in it pass.

    Raises:
        ValueError: a part of a fused tensor does not come.
    """
    missing: dict[str, int] = {}
    for whole, _ in places.values():
        missing[whole] = missing.get(whole, 0) + 1
    counts = {whole: 1 + place.expert for whole, place in places.values()}
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name not in places:
            yield name, tensor
            continue
        whole, place = places[name]
        if whole not in held:
            held[whole] = tensor.new_empty(place.fused_shape(tensor.shape, counts[whole]))
        place.put(held[whole], tensor)
        missing[whole] -= 1
        if not missing[whole]:
            yield whole, held.pop(whole)
    if held:
        raise ValueError(
            f"Expected all experts of {next(iter(held))!r}, but {missing[next(iter(held))]} parts are missing."
        )
