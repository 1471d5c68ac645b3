import pytest
import torch

from nowag_pl.functional.moments import damped_inverse_factor, output_error
from nowag_pl.functional.trellis.feedback import quantize_with_feedback


def problem(num_out=8, num_in=22):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_out, num_in, generator=generator)
    inputs = torch.randn(60, num_in, generator=generator) @ torch.randn(num_in, num_in, generator=generator)
    return weight, *damped_inverse_factor(inputs.T @ inputs / 60, 0.01)


def round_block(block):
    return block.target.round()


@pytest.mark.parametrize("block_size", [1, 5, 16, 40])
def test_errors_are_made_up_for_by_the_columns_after(block_size):
    """Each block's target is the best that its columns can be, given those before it: solved anew for every block."""
    weight, moment, factor = problem()
    targets = []

    def quantize(block):
        targets.append(block.target.clone())
        return block.target.round()

    quantized = quantize_with_feedback(weight, factor, block_size, quantize)
    for number, target in enumerate(targets):
        start = number * block_size
        error = weight[:, :start] - quantized[:, :start]
        rest = moment[start:, start:]
        best = weight[:, start:] + torch.linalg.solve(rest, moment[start:, :start] @ error.T).T
        torch.testing.assert_close(target, best[:, : target.shape[1]], rtol=1e-3, atol=1e-3)
        assert torch.equal(quantized[:, start : start + target.shape[1]], target.round())


def test_metric_says_what_a_block_costs_in_the_end():
    weight, moment, factor = problem()
    total = 0.0

    def quantize(block):
        nonlocal total
        error = block.target - block.target.round()
        total += ((error @ block.metric) * error).sum().item()
        return block.target.round()

    quantized = quantize_with_feedback(weight, factor, 5, quantize)
    assert total == pytest.approx(output_error(weight, quantized, moment).sum().item(), rel=1e-3)


def test_feedback_lowers_the_error_and_changes_no_argument():
    weight, moment, factor = problem()
    copies = weight.clone(), factor.clone()
    quantized = quantize_with_feedback(weight, factor, 4, round_block)
    assert output_error(weight, quantized, moment).sum() < output_error(weight, weight.round(), moment).sum()
    assert torch.equal(weight, copies[0])
    assert torch.equal(factor, copies[1])
