"""The schedule of end-to-end training against a loop, and the settings that are refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.lit.optimizers import OptimizerSettings, rate_share

SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.25, "momentum": 0.5}}


@pytest.mark.parametrize(("warmup_fraction", "rising"), [(0.0, 0), (0.05, 1), (0.25, 5), (0.6, 12)])
def test_learning_rate_rises_for_a_share_of_the_steps_and_falls_along_a_cosine(warmup_fraction, rising):
    settings, steps = OptimizerSettings(0.5, warmup_fraction=warmup_fraction), 20
    optimizer = settings.make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    scheduler = settings.make_scheduler(optimizer, steps)["scheduler"]
    for step in range(steps):
        if step < rising:
            expected = 0.5 * (step + 1) / (rising + 1)
        else:
            expected = 0.25 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected), step
        optimizer.step()
        scheduler.step()


@given(steps=st.integers(1, 200), warmup_fraction=st.floats(0, 0.99))
def test_every_step_trains(steps, warmup_fraction):
    shares = [rate_share(step, steps, warmup_fraction) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares)
    assert max(shares) > 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "model.learning_rate above 0"),
        ({"learning_rate": float("inf")}, "model.learning_rate above 0"),
        ({"weight_decay": -1.0}, "model.weight_decay of at least 0"),
        ({"warmup_fraction": 1.0}, "model.warmup_fraction of at least 0 and below 1"),
        ({"learning_rate": 0.1, "optimizer": SGD}, "Expected no model.learning_rate with optimizer, .*but got 0.1"),
        ({"weight_decay": 0.0, "optimizer": SGD}, "Expected no model.weight_decay with optimizer"),
        ({"warmup_fraction": 0.5, "lr_scheduler": SGD}, "Expected no model.warmup_fraction with lr_scheduler"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**settings)


def test_another_optimizer_and_scheduler_by_class_path():
    halving = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}
    settings = OptimizerSettings(optimizer=SGD, lr_scheduler=halving)
    trained, frozen = (torch.nn.Parameter(torch.zeros(2), requires_grad=each) for each in (True, False))
    optimizer = settings.make_optimizer(iter([trained, frozen]))
    assert type(optimizer) is torch.optim.SGD
    assert [group["params"] for group in optimizer.param_groups] == [[trained]]
    scheduler = settings.make_scheduler(optimizer, 10)
    assert scheduler["interval"] == "step"
    optimizer.step()
    scheduler["scheduler"].step()
    assert optimizer.param_groups[0] | {"lr": 0.125, "momentum": 0.5} == optimizer.param_groups[0]
    assert settings.described()["optimizer"] == SGD
    assert settings.rate == "optimizer.lr than 0.25"


def test_rate_that_waits_for_a_value_says_which():
    plateau = {"init_args": {"monitor": "perplexity/held_out"}, "class_path": "lightning.pytorch.cli.ReduceLROnPlateau"}
    settings = OptimizerSettings(lr_scheduler=plateau)
    optimizer = settings.make_optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert settings.make_scheduler(optimizer, 10)["monitor"] == "perplexity/held_out"
    silent = OptimizerSettings(lr_scheduler={"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau"})
    with pytest.raises(ValueError, match="does not say which value it watches"):
        silent.make_scheduler(optimizer, 10)
