"""Policy gradients against scalar loops over a tiny vocabulary, gradients included."""

import math

import pytest
import torch

from nowag_pl.functional.policy_gradient import (
    PolicySettings,
    clipped_surrogate,
    group_advantages,
    is_clipped,
    low_variance_kl,
    policy_losses,
    token_entropy,
)

VOCABULARY = 5
REWARDS = [[1.0, 0.0, 0.25], [0.9, 0.9, 0.9]]


def oracle_advantages(base: str, divide: bool) -> list[list[float]]:
    found = []
    for group in REWARDS:
        compared = [each for row in REWARDS for each in row] if base == "reinforce++" else group
        mean = sum(compared) / len(compared)
        std = math.sqrt(sum((each - mean) ** 2 for each in compared) / (len(compared) - 1))
        row = []
        for number, reward in enumerate(group):
            others = [each for place, each in enumerate(group) if place != number]
            advantage = reward - (sum(others) / len(others) if base == "rloo" else mean)
            row.append(advantage / (std + 1e-6) if divide else advantage)
        found.append(row)
    return found


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("base", ["grpo", "rloo", "reinforce++"])
def test_advantages_are_those_of_the_formulas(base, divide):
    found = group_advantages(torch.tensor(REWARDS).double(), base, divide)
    torch.testing.assert_close(found, torch.tensor(oracle_advantages(base, divide)).double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reward", [0.9, 1 / 3])
def test_equal_rewards_of_a_group_say_nothing(reward):
    assert group_advantages(torch.full((1, 3), reward)).abs().max() < 1e-6


def test_division_makes_any_price_of_length_an_advantage_of_full_size():
    """The trap that the settings explain."""
    all_right = torch.tensor([[1.0, 1.0, 1.0, 1.0 - 1e-3]]).double()
    assert group_advantages(all_right).min() < -1.4
    assert group_advantages(all_right, divide_by_std=False).abs().max() < 1e-3


def oracle_loss(logits, tokens, lengths, old, reference, advantages, settings: PolicySettings) -> float:
    """Return the loss per token, with every probability from a softmax over the vocabulary."""
    total, count = 0.0, 0
    for answer, length in enumerate(lengths):
        for place in range(length):
            row = [float(each) for each in logits[answer][place]]
            top = max(row)
            log_sum = top + math.log(sum(math.exp(each - top) for each in row))
            log_p = row[tokens[answer][place]] - log_sum
            ratio = math.exp(log_p - old[answer][place])
            bounded = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
            loss = -min(ratio * advantages[answer], bounded * advantages[answer])
            if reference is not None:
                difference = reference[answer][place] - log_p
                loss += settings.kl_coefficient * (math.exp(difference) - difference - 1)
            total, count = total + loss, count + 1
    return total / count


@pytest.mark.parametrize("has_reference", [True, False])
def test_loss_and_gradient_are_those_of_a_scalar_loop(generator, has_reference):
    settings = PolicySettings(clip_low=0.1, clip_high=0.3, kl_coefficient=0.5)
    logits = torch.randn(3, 4, VOCABULARY, generator=generator, dtype=torch.float64)
    tokens = torch.randint(VOCABULARY, (3, 4), generator=generator)
    lengths, advantages = [4, 2, 3], torch.tensor([0.7, -1.1, 0.4]).double()
    at_tokens = logits.log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
    old = at_tokens + 0.3 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    reference = at_tokens + torch.randn(3, 4, generator=generator, dtype=torch.float64) if has_reference else None
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]

    def loss(values):
        log_p = values.log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
        return policy_losses(log_p, old, reference, advantages, settings)[mask].mean()

    def expected(values) -> float:
        known = None if reference is None else reference.tolist()
        return oracle_loss(
            values.tolist(), tokens.tolist(), lengths, old.tolist(), known, advantages.tolist(), settings
        )

    leaf = logits.clone().requires_grad_()
    loss(leaf).backward()
    assert float(loss(logits)) == pytest.approx(expected(logits), rel=1e-12)
    step = 1e-6
    for place in [(0, 0, 1), (1, 1, 4), (2, 2, 0), (1, 3, 2)]:
        moved = [logits.clone(), logits.clone()]
        moved[0][place] += step
        moved[1][place] -= step
        slope = (expected(moved[0]) - expected(moved[1])) / (2 * step)
        assert float(leaf.grad[place]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_bound_takes_the_gradient_only_from_what_has_gone_far_enough():
    old, advantages = torch.zeros(4, 1), torch.tensor([1.0, 1.0, -1.0, -1.0])
    log_p = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], requires_grad=True)
    clipped_surrogate(log_p, old, advantages, 0.2, 0.2).sum().backward()
    clipped = is_clipped(log_p.detach(), old, advantages, 0.2, 0.2)
    assert clipped.flatten().tolist() == [True, False, False, True]
    assert (log_p.grad == 0).flatten().tolist() == clipped.flatten().tolist()


def test_divergence_estimate_is_unbiased_and_never_negative(generator):
    p, q = (torch.randn(VOCABULARY, generator=generator).double().softmax(0) for _ in range(2))
    estimates = low_variance_kl(p.log()[None], q.log()[None])[0]
    assert estimates.min() >= 0
    assert float((p * estimates).sum()) == pytest.approx(float((p * (p / q).log()).sum()))


def test_entropy_is_that_of_the_predictions(generator):
    logits = torch.randn(2, 3, VOCABULARY, generator=generator).double()
    p = logits.softmax(-1)
    torch.testing.assert_close(token_entropy(logits), -(p * p.log()).sum(-1))


@pytest.mark.parametrize(("name", "value"), [("clip_low", 1.5), ("clip_high", -0.1), ("kl_coefficient", -1.0)])
def test_settings_refuse_numbers_out_of_their_range(name, value):
    with pytest.raises(ValueError, match=f"policy.{name}"):
        PolicySettings(**{name: value})
