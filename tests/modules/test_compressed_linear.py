import pytest
import torch

from nowag_pl.modules import CompressedLinear, MaskedLinear, VQLinear
from nowag_pl.modules.compressed.base import dtype_name


def test_class_name_finds_the_class():
    masked = MaskedLinear(torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool))
    quantized = VQLinear(torch.ones(1, 2), torch.zeros(2, 2).int(), torch.ones(4), torch.ones(2))
    for module in (masked, quantized):
        assert type(CompressedLinear.from_description(module.description())) is type(module)


def test_description_is_left_as_it_is():
    description = MaskedLinear(torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool)).description()
    before = dict(description)
    CompressedLinear.from_description(description)
    assert description == before


def test_unknown_class_is_refused():
    with pytest.raises(ValueError, match=r"MaskedLinear.*VQLinear.*but got 'NoLinear'"):
        CompressedLinear.from_description({"class": "NoLinear"})


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
def test_dtype_name(dtype, name):
    assert dtype_name(dtype) == name


def test_repr_tells_the_settings():
    module = MaskedLinear(torch.ones(2, 4), torch.tensor([[True, False] * 2] * 2), pattern=(2, 4))
    assert "in_features=4, out_features=2, num_kept=4, pattern=[2, 4], bias=None" in repr(module)
