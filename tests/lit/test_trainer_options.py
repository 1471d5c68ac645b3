"""Numbers of the Trainer are refused by name before Lightning, torch or a network stumble over them."""

import inspect

import pytest
from lightning.pytorch import Trainer

from nowag_pl.lit.trainer_options import check_options

DEFAULTS = {name: each.default for name, each in inspect.signature(Trainer.__init__).parameters.items()}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_nodes", 10**20, "from 1 to 10000, but got 1"),
        ("num_nodes", 0, "from 1 to 10000, but got 0"),
        ("accumulate_grad_batches", 2.5, "to be a whole number, but got 2.5"),
        ("max_steps", 2**31, "from -1 to 2147483647"),
        ("max_epochs", 10**20, "from 0 to 2147483647"),
        ("max_epochs", -1, "from 0 to 2147483647, but got -1"),
        ("devices", "9" * 20, "from -1 to 2147483647"),
        ("devices", 0, "of at least 1, or -1 for all, but got 0"),
        ("limit_train_batches", 1.5, "1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=rf"^Expected trainer\.{name}.*{expected}"):
        check_options(DEFAULTS | {name: value})


def test_defaults_and_large_numbers_are_fine():
    check_options(DEFAULTS | {"max_steps": 10**6, "max_epochs": -1, "devices": "2", "num_nodes": 64})
