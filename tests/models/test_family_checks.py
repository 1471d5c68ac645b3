"""What blocks may hold and be called with."""

import re

import pytest
import torch
from torch import nn

from nowag_pl.models.family_checks import check_arguments, check_experts


class Experts(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


def blocks_with(**modules: nn.Module) -> nn.ModuleList:
    return nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.ModuleDict({"attention": nn.Linear(2, 2), **modules})])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))


@pytest.mark.parametrize(
    "module",
    [
        mlp(),
        Experts(4, 2),
        nn.Conv1d(2, 2, 3),
        nn.ModuleList(),
        nn.ModuleList([nn.Identity(), nn.Identity()]),
        nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),
    ],
)
def test_dense_blocks_pass(module):
    check_experts("any", "layers", blocks_with(mlp=module))


@pytest.mark.parametrize("experts", [Experts(4, 2, 3), nn.ModuleList([mlp(), mlp()])])
def test_experts_are_named(experts):
    message = re.escape("type 'mix' with others in model.layers.1.mlp: such expert layers are not supported")
    with pytest.raises(ValueError, match=message):
        check_experts("mix", "model.layers", blocks_with(mlp=experts))


RIGHT = {"mask": None, "position": (torch.arange(3), torch.ones(2)), "scale": 2.0, "dtype": torch.float32}


def test_equal_arguments_pass():
    again = RIGHT | {"position": (torch.arange(3), torch.ones(2))}
    check_arguments("any", [{}, RIGHT], [{}, again])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mask", torch.ones(2)),
        ("position", (torch.arange(3), torch.zeros(2))),
        ("position", (torch.arange(3),)),
        ("position", (torch.arange(4), torch.ones(2))),
        ("scale", 3.0),
        ("extra", 1),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_arguments_of_other_tokens_that_differ_are_named(name, value, swap):
    pair = [[{}, RIGHT], [{}, RIGHT | {name: value}]]
    with pytest.raises(ValueError, match=f"'{name}' of a model of type 'mix' depends on the tokens"):
        check_arguments("mix", *(reversed(pair) if swap else pair))


@pytest.mark.parametrize("value", [{}, [], (torch.ones(1), {"state": 1})])
def test_arguments_that_blocks_could_write_to_are_named(value):
    with pytest.raises(ValueError, match=r"'states' of a model of type 'mix' holds (dict|list): this family"):
        check_arguments("mix", [RIGHT | {"states": value}], [RIGHT | {"states": value}])
