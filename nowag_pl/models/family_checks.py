"""What a family of models has to keep to so that its blocks can be compressed one at a time; all else is refused."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nowag_pl.modules.experts import RoutedExperts

_FIXED = (bool, int, float, str, type(None))


def needs_bos(model_type: str) -> bool:
    """Tell whether a family predicts badly where a text does not begin with the beginning-of-sequence token.

    >>> needs_bos("gemma3_text"), needs_bos("llama")
    (True, False)
    """
    return model_type.startswith("gemma")


def check_experts(model_type: str, blocks_name: str, blocks: nn.ModuleList) -> None:
    """Check that blocks hold linears and experts that are taken apart, none in a layout that is not known here.

    Args:
        model_type: family, for the message.
        blocks_name: name of the list of blocks in the model, for the message.
        blocks: decoder blocks.

    Raises:
        ValueError: a block holds matrices stacked in one parameter, or a list of modules with linears.
    """
    for name, module in blocks.named_modules(prefix=blocks_name):
        if module is not blocks and (_has_stacked_matrices(module) or _is_list_of_experts(module)):
            raise ValueError(
                f"Expected linears, or experts in a layout that is known, but got a model of type {model_type!r} with "
                f"others in {name}: such expert layers are not supported."
            )


def _has_stacked_matrices(module: nn.Module) -> bool:
    stacked = any(parameter.ndim > 2 for parameter in module.parameters(recurse=False))
    return stacked and not isinstance(module, _ConvNd)


def _is_list_of_experts(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or isinstance(module, RoutedExperts) or not len(module):
        return False
    return all(any(isinstance(below, nn.Linear) for below in [*child.modules()][1:]) for child in module)


def check_arguments(
    model_type: str, arguments: Sequence[Mapping[str, Any]], of_other_tokens: Sequence[Mapping[str, Any]]
) -> None:
    """Check that blocks are called with the same arguments for all tokens, and none that blocks could write to.

    Args:
        model_type: family, for the message.
        arguments: keyword arguments of each block.
        of_other_tokens: the same for another batch of the same shape.

    Raises:
        ValueError: they differ, or hold something else than tensors and constants.
    """
    for block, other in zip(arguments, of_other_tokens, strict=True):
        for name, value in block.items():
            for leaf in _leaves(value):
                if not isinstance(leaf, (Tensor, torch.dtype, *_FIXED)):
                    raise ValueError(
                        f"Expected blocks that are called with tensors and constants, but {name!r} of a model of type "
                        f"{model_type!r} holds {type(leaf).__name__}: this family is not supported."
                    )
        changed = [name for name in block.keys() | other.keys() if not _same(block.get(name), other.get(name))]
        if changed:
            raise ValueError(
                f"Expected blocks that are called with the same arguments for all tokens, but {min(changed)!r} of a "
                f"model of type {model_type!r} depends on the tokens: this family is not supported."
            )


def _leaves(value: Any) -> list[Any]:
    return [leaf for each in value for leaf in _leaves(each)] if isinstance(value, tuple) else [value]


def _same(value: Any, other: Any) -> bool:
    leaves, others = _leaves(value), _leaves(other)
    return len(leaves) == len(others) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b
        for a, b in zip(leaves, others, strict=True)
    )
