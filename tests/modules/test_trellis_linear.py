"""A linear on a trellis: what is stored of it, its gradients, and the way back."""

import copy

import pytest
import torch
from torch import nn

from nowag_pl import NoWagTrellis, SecondMoment, accelerate
from nowag_pl.functional.trellis.codes import code_values
from nowag_pl.functional.trellis.matmul import CPU_MAX_TOKENS
from nowag_pl.kernels import dispatch
from nowag_pl.modules import CompressedLinear, TrellisLinear
from nowag_pl.modules.compressed import trellis as trellis_module

SHAPES = [(32, 48), (40, 56)]  # 16 divides the first; the second is padded to 48 x 64


def problem(shape: tuple[int, int], bias: bool = True) -> tuple[nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[0])
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(shape, generator=generator))
    moment = SecondMoment(shape[1], full=True)
    moment.update(torch.randn(2, 200, shape[1], generator=generator) * torch.rand(shape[1], generator=generator).exp())
    return linear, moment.compute()


def compressed(shape=(32, 48), **settings) -> tuple[nn.Linear, torch.Tensor, TrellisLinear]:
    linear, moment = problem(shape)
    return linear, moment, NoWagTrellis(state_bits=settings.pop("state_bits", 8), **settings).compress(linear, moment)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bits_are_those_of_paths_and_scales(shape, bits):
    _, _, made = compressed(shape, bits=bits)
    rows, columns = (size + -size % 16 for size in shape)
    expected = (bits * rows * columns + 16 * (rows + columns)) / (shape[0] * shape[1])
    assert made.bits_per_weight == pytest.approx(expected)
    assert made.storage_bytes * 8 == pytest.approx(expected * shape[0] * shape[1])
    empty = NoWagTrellis(bits=bits, state_bits=8).empty(shape, torch.float32, bias=True)
    assert empty.description() == made.description()
    assert (empty.bits_per_weight, empty.storage_bytes) == (made.bits_per_weight, made.storage_bytes)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())


@pytest.mark.parametrize("shape", SHAPES)
def test_storage_restores_the_module(shape):
    _, _, made = compressed(shape)
    again = CompressedLinear.from_description(made.description())
    again.load_state_dict(made.storage())
    assert again.weight.equal(made.weight)
    assert again.bias.equal(made.bias)
    inputs = torch.randn(3, shape[1])
    torch.testing.assert_close(made(inputs), inputs @ made.weight.T + made.bias)


@pytest.mark.parametrize("rotation", ["full", "both", "none"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_few_tokens_are_multiplied_by_packed_tiles(bits, shape, rotation, monkeypatch):
    _, _, made = compressed(shape, bits=bits, rotation=rotation)
    inputs = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(1))
    expected = (inputs.double() @ made.weight.double().T + made.bias).float().detach()
    if dispatch.has_module("numba"):
        monkeypatch.setattr(trellis_module, "reconstruct", None)  # it is not needed
    with torch.no_grad():
        # The numbers are not rounded to float16 on the way.
        torch.testing.assert_close(made(inputs), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
        half = made(inputs.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.04 * float(expected.std()))


@pytest.mark.parametrize(
    ("settings", "num_tokens"), [({}, CPU_MAX_TOKENS + 1), ({"code": "mcg"}, 1), ({"code": "1mad"}, 1)]
)
def test_others_take_the_reconstructed_weight(settings, num_tokens):
    _, _, made = compressed(**settings)
    inputs = torch.randn(num_tokens, 48)
    with torch.no_grad():
        assert made(inputs).equal(torch.nn.functional.linear(inputs, made.weight, made.bias))


def test_accelerate_says_how_it_runs(caplog):
    model = nn.Sequential(compressed()[2], compressed((48, 32), code="mcg")[2]).eval()
    assert accelerate(model) is model
    assert "the code is" in caplog.text
    assert caplog.text.count("TrellisLinear") == 2


@pytest.mark.parametrize("rotation", ["full", "both", "none"])
def test_gradients_reach_the_scales_and_nothing_else(rotation):
    _, _, made = compressed(rotation=rotation)
    inputs = torch.randn(4, 48, dtype=torch.float64)

    def output(in_scale, out_scale):
        module = copy.deepcopy(made)
        del module.in_scale, module.out_scale
        module.in_scale, module.out_scale = in_scale, out_scale
        return inputs.float() @ module.weight.T

    scales = [made.in_scale.detach().clone().requires_grad_(), made.out_scale.detach().clone().requires_grad_()]
    output(*scales).square().sum().backward()
    # The weight is linear in each vector: a central difference is exact.
    for scale in scales:
        direction, before = torch.randn_like(scale) * 1e-2, scale.detach().clone()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                scale.copy_(before + sign * direction)
                values.append(float(output(*scales).double().square().sum()))
                scale.copy_(before)
        expected = (values[0] - values[1]) / 2
        assert float((scale.grad * direction).sum()) == pytest.approx(expected, rel=2e-2, abs=1e-3)
    assert list(made.fixed()) == ["codes"]


def test_more_bits_and_states_lose_less():
    errors = {}
    for bits, state_bits in ((2, 8), (2, 12), (3, 8)):
        linear, moment, made = compressed((64, 128), bits=bits, state_bits=state_bits)
        dense = linear.weight.detach()
        error = dense - made.weight.detach()
        errors[bits, state_bits] = float(((error @ moment) * error).sum() / ((dense @ moment) * dense).sum())
    assert errors[3, 8] < 0.4 * errors[2, 8] < 0.4 * 0.09
    assert errors[2, 12] < errors[2, 8]


def test_without_feedback_mean_squares_are_enough():
    linear, moment = problem((32, 48))
    method = NoWagTrellis(state_bits=8, feedback=False, rotation="none")
    assert not method.full_second_moment
    made = method.compress(linear, moment.diagonal())
    assert made.weight.shape == linear.weight.shape
    assert not torch.allclose(code_values("mul1", 8), code_values("mcg", 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0}, "bits from 1 to 8, but got 0"),
        ({"state_bits": 17}, "state_bits from 8 to 16"),
        ({"code": "table"}, "code to be one of"),
        ({"rotation": "left"}, "rotation to be one of"),
        ({"damping": 0}, "damping above 0"),
        ({"refit_rounds": -1}, "refit_rounds from 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NoWagTrellis(**settings)


def test_matrix_is_asked_for():
    linear, moment = problem((32, 48))
    with pytest.raises(ValueError, match="full second moments of 48 input features"):
        NoWagTrellis().compress(linear, moment.diagonal())
