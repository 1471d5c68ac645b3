"""What every method offers beside compressing: the empty module, memory, settings."""

import pytest
import torch
from torch import nn

from nowag_pl import ArmorCompressor, MagnitudePruner, NoWagPruner, NoWagQuantizer, SparseGPTPruner, WandaPruner
from nowag_pl.compressors import Compressor
from nowag_pl.modules import MaskedLinear

COMPRESSORS = [
    NoWagPruner(sparsity=0.3),
    NoWagPruner(pattern=(3, 8), update="refit"),
    NoWagPruner(sparsity=0.3, structured="rows"),
    NoWagPruner(sparsity=0.3, structured="columns"),
    MagnitudePruner(sparsity=0.37),
    WandaPruner(sparsity=0.37),
    NoWagQuantizer(subvector_dim=5, codebook_size=12, max_iters=1),
    ArmorCompressor(block_size=4, max_iters=1),
    SparseGPTPruner(sparsity=0.37),
    SparseGPTPruner(pattern=(2, 4)),
]


class Custom(Compressor):
    """Keep every second weight."""

    def __init__(self, first: bool = True):
        self.first = first

    def compress(self, linear, second_moment):
        keep = torch.arange(linear.weight.numel()).view(linear.weight.shape) % 2 == int(not self.first)
        return MaskedLinear(linear.weight, keep, linear.bias)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize(("shape", "dtype", "bias"), [((6, 8), torch.bfloat16, True), ((7, 16), torch.float32, False)])
def test_empty_module_is_that_of_the_result(compressor, shape, dtype, bias):
    linear = nn.Linear(shape[1], shape[0], bias, dtype=dtype)
    moments = torch.eye(shape[1]) if compressor.full_second_moment else torch.rand(shape[1])
    made, empty = compressor.compress(linear, moments), compressor.empty(shape, dtype, bias)
    assert empty.description() == made.description()
    assert (empty.bits_per_weight, empty.storage_bytes) == (made.bits_per_weight, made.storage_bytes)
    assert (empty.gradient_bytes, empty.restoring_bytes) == (made.gradient_bytes, made.restoring_bytes)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    for name, tensor in made.state_dict().items():
        assert (empty.state_dict()[name].shape, empty.state_dict()[name].dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize(
    ("compressor", "message"),
    [
        (NoWagPruner(pattern=(2, 4)), "divisible by 4"),
        (ArmorCompressor(pattern=(2, 4)), "divisible by 4"),
        (NoWagQuantizer(subvector_dim=4, codebook_size=13), "13 codewords for 12 subvectors"),
    ],
)
def test_settings_that_do_not_fit_the_shape_are_refused(compressor, message):
    with pytest.raises(ValueError, match=message):
        compressor.empty((6, 7), torch.float32)


def test_method_that_only_compresses_has_defaults():
    compressor = Custom(first=False)
    assert compressor.empty((6, 8), torch.float32) is None
    assert compressor.alternatives() == []
    assert not compressor.full_second_moment
    assert compressor.describe() == {"compressor": "Custom", "first": False}
    assert compressor.working_bytes((6, 8)) >= max(each.working_bytes((6, 8)) for each in COMPRESSORS[4:7])
    with pytest.raises(TypeError, match="abstract"):
        Compressor()


def test_fields_of_a_dataclass_describe_it():
    described = MagnitudePruner(pattern=(2, 4)).describe()
    assert described == {"compressor": "MagnitudePruner", "sparsity": None, "pattern": (2, 4)}


def test_quantizer_needs_little_memory_beside_points_codes_and_distances():
    needed = [NoWagQuantizer(subvector_dim=dim).working_bytes((30, 40)) / 1200 for dim in (1, 2, 4, 6)]
    assert needed == pytest.approx([25, 15, 10, 8 + 1 / 3])


def test_full_second_moments_are_counted():
    plain, full = (NoWagPruner(update=update).working_bytes((10, 20)) for update in (None, "refit"))
    assert full - plain == 48 * (20 * 20 + 10 * 20)
