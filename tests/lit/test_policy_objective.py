"""Policy gradient under the Trainer: plain training under a loose budget, the same weights after a stop, messages."""

import json

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_lit_module import data, quiet  # noqa: F401 - fixtures

from nowag_pl.data.prompts import PromptSource
from nowag_pl.data.rewards import Reward
from nowag_pl.functional.length_budget import LengthBudget
from nowag_pl.functional.policy_gradient import PolicySettings
from nowag_pl.lit.batches import SharedBatches
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.objectives import PolicyGradient, policy_gradient
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.rollouts import SamplingSettings

pytest_plugins = ["tiny_fixtures"]
SAMPLING = SamplingSettings(group_size=3, max_new_tokens=6, batch_size=5)


class Lower(Reward):
    """The share of small letters, which no answer has alone."""

    def score(self, answer, wanted):
        return sum(letter.islower() for letter in answer) / max(len(answer), 1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> PromptSource:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"question": f"word {n}" * (n + 1), "answer": "x"}) + "\n" for n in range(5)))
    return PromptSource(str(path))


@pytest.fixture
def train(data, model_folder, prompts, tmp_path, monkeypatch):  # noqa: F811
    """Return the weights and the objective after a training of a tiny model."""
    data.train_batch_size = 2
    # So many that a random model stops now and then.
    monkeypatch.setattr(policy_gradient, "stop_tokens", lambda model, tokenizer: list(range(100, 600)))

    def run(max_steps: int = 3, ckpt_path=None, checkpoints=(), **settings):
        settings = {"sampling": SAMPLING, **settings}
        objective = PolicyGradient(prompts, settings.pop("rewards", [Lower()]), **settings)
        module = LitCausalLM(str(model_folder()), objective=objective, learning_rate=1e-2, lr_scheduler=CONSTANT)
        steps = {"max_epochs": 1 if max_steps <= 3 * objective.updates else 2, "max_steps": max_steps}
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        made = Trainer(
            **options,
            **steps,
            default_root_dir=tmp_path,
            callbacks=list(checkpoints),
            enable_checkpointing=bool(checkpoints),
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        made.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return {name: value.clone() for name, value in module.model.state_dict().items()}, objective

    return run


CONSTANT = {"class_path": "torch.optim.lr_scheduler.ConstantLR", "init_args": {"factor": 1.0}}


def equal(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_loose_budget_is_plain_training_bit_for_bit(train):
    plain, _ = train()
    loose, objective = train(budget=LengthBudget(6, hit=0.0))
    assert equal(plain, loose)
    assert objective.controller.price == 0.0
    assert objective.controller.history["lambda"] == [0.0] * 3
    tight, objective = train(budget=LengthBudget(2, rate=0.1, ceiling=0.3, hit=0.0))
    assert not equal(plain, tight)
    history = objective.controller.history
    assert history["lambda"][:2] == pytest.approx([0.0, 0.1 * (history["mean_length"][0] / 2 - 1)])
    assert history["lambda"][1] > 0
    assert history["length_over_budget"][0] == pytest.approx(history["mean_length"][0] / 2)


def test_batch_of_answers_in_memory_changes_no_result(train):
    whole, _ = train(sampling=SamplingSettings(group_size=3, max_new_tokens=6, batch_size=64))
    parts, _ = train(sampling=SamplingSettings(group_size=3, max_new_tokens=6, batch_size=2))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-4, rtol=1e-3)


# After the last update on some answers, and between two.
@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_resumed_training_ends_with_the_same_weights(train, step, tmp_path):
    settings = {"budget": LengthBudget(2, rate=0.1, hit=0.1), "updates": 2}
    saved = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, every_n_train_steps=1)
    whole, first = train(5, **settings, checkpoints=[saved])
    resumed, second = train(5, **settings, ckpt_path=str(tmp_path / "saved" / f"step={step}.ckpt"))
    assert equal(whole, resumed)
    first_state, second_state = vars(first.controller), vars(second.controller)
    assert all(first_state[name] == second_state[name] for name in ("step", "price", "history", "shown"))
    assert first.controller.step == 3


def test_second_update_is_on_the_same_answers_within_bounds(train):
    _, objective = train(2, updates=2, policy=PolicySettings(clip_low=0.0, clip_high=0.0))
    assert objective.controller.step == 1
    assert objective.controller.history["share_clipped"][0] > 0


def test_reference_is_the_model_before_the_training(train, model_folder):
    _, objective = train(2)
    reference = objective._reference_model
    for name, value in Checkpoint(str(model_folder())).load().state_dict().items():
        assert torch.equal(reference.state_dict()[name], value)
    assert objective.controller.history["kl"][0] == pytest.approx(0, abs=1e-9)
    assert objective.controller.history["kl"][1] > 1e-9
    _, objective = train(1, policy=PolicySettings(kl_coefficient=0.0))
    assert objective._reference_model is None
    assert "kl" not in objective.controller.history


def test_reward_that_is_no_number_stops_with_the_sample(train):
    class Broken(Reward):
        def score(self, answer, wanted):
            return float("nan")

    with pytest.raises(ValueError, match=r"Broken gave no reward.*Prompt \d: 'word \d.*right answer: 'x'.*answer 0 of"):
        train(1, rewards=[Lower(), Broken()])


def test_what_the_result_depends_on_goes_into_the_manifest(prompts):
    settings = PolicyGradient(prompts, [Lower(weight=0.5)], SAMPLING, budget=LengthBudget(4)).settings()
    assert settings["rewards.0"] == {"class": "Lower", "weight": 0.5}
    assert (settings["budget.tokens"], settings["sampling.group_size"], settings["reference"]) == (4, 3, "start")
    assert "sampling.batch_size" not in settings
    assert len(settings["prompts_sha256"]) == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": []}, "at least one reward"),
        ({"budget": LengthBudget(7)}, "budget.tokens of at most sampling.max_new_tokens = 6"),
        ({"sampling": SamplingSettings(group_size=1)}, "group_size of at least 2 with policy.base=grpo"),
        ({"updates": 0}, "objective.updates of at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        PolicyGradient(prompts, **{"rewards": [Lower()], "sampling": SAMPLING, **settings})


def test_prompts_have_to_leave_room_for_answers(prompts, model_folder):
    objective = PolicyGradient(prompts, [Lower()], SamplingSettings(max_new_tokens=60))
    with pytest.raises(ValueError, match=r"at most 64 tokens together, .* prompts of up to"):
        objective.check(Checkpoint(str(model_folder())))


def test_each_batch_comes_once_for_every_update():
    batches = SharedBatches(5, 2, seed=1, repeats=2)
    shares = [share.indices for share in batches]
    assert len(batches) == len(shares) == 6
    assert shares[::2] == shares[1::2] == [share.indices for share in SharedBatches(5, 2, seed=1)]
    batches.skip = 3
    assert [share.indices for share in batches] == shares[3:]
