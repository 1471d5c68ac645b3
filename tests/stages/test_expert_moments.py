"""Second moments of experts: each sees its own tokens; the oracle is a loop over tokens with transformers' routing."""

import logging

import pytest
import torch
from stage_runs import WINDOWS, calibrated, run_of
from tiny_models import copy_model, edit_tensors, load_whole

from nowag_pl import NoWagPruner
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.layout import MOMENTS
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages.compression import read_block
from nowag_pl.stages.hidden import HiddenStates
from nowag_pl.stages.moments import DenseMoments
from nowag_pl.stages.plan import CalibrationSettings, GuidanceSettings

pytest_plugins = ["tiny_fixtures"]

BLOCK, SHRINKAGE = 1, 40.0


def routed(folder):
    """Return what the experts of a block of the whole model are called with, and they."""
    whole, seen = load_whole(folder), []
    experts = whole.model.layers[BLOCK].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        whole(WINDOWS)
    (arguments,) = seen
    return experts, *arguments


def oracle(folder, shrinkage):
    """Return mean squares of every expert's inputs and intermediate values, and its tokens, one token at a time."""
    experts, hidden, index, weights = routed(folder)
    found = {}
    with torch.no_grad():
        for number in range(experts.num_experts):
            gate, up = experts.gate_up_proj[number].chunk(2)
            inner = experts.act_fn(hidden @ gate.T) * (hidden @ up.T)
            sums, total, count = [torch.zeros(hidden.shape[1]), torch.zeros(inner.shape[1])], 0.0, 0
            for token in range(len(hidden)):
                for chosen, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                    if chosen == number:
                        sums = [sums[0] + weight * hidden[token] ** 2, sums[1] + weight * inner[token] ** 2]
                        total, count = total + weight, count + 1
            everywhere = [hidden.square().mean(0), inner.square().mean(0)]
            own = [each / total if total else everywhere[side] for side, each in enumerate(sums)]
            means = [(count * a + shrinkage * b) / (count + shrinkage) for a, b in zip(own, everywhere, strict=True)]
            found[number] = (*means, count)
    return found


def gathered(folder, full=False, shrinkage=SHRINKAGE, windows=WINDOWS):
    model = StreamedModel(Checkpoint(str(folder)))
    source = DenseMoments(model, HiddenStates(model, windows, 7), Ranks(), full, shrinkage=shrinkage)
    for index in range(BLOCK + 1):
        block = model.load_block(index)
        (group,) = source.groups(block, index)
        source.advance(block, index, lambda _: {})
    return group.moments, source.gathered()


def test_moments_of_experts_are_those_of_their_tokens(model_folder):
    moments, statistics = gathered(model_folder("olmoe"))
    expected = oracle(model_folder("olmoe"), SHRINKAGE)
    for number, (inputs, intermediate, count) in expected.items():
        name = f"mlp.experts.{number}"
        torch.testing.assert_close(moments[f"{name}.gate_proj"], inputs, rtol=1e-4, atol=1e-6)
        assert torch.equal(moments[f"{name}.up_proj"], moments[f"{name}.gate_proj"])
        torch.testing.assert_close(moments[f"{name}.down_proj"], intermediate, rtol=1e-4, atol=1e-6)
        assert statistics.tokens["mlp.experts"][number] == count
    assert sum(statistics.tokens["mlp.experts"]) == 2 * WINDOWS.numel()


def test_full_moments_have_the_mean_squares_on_their_diagonal(model_folder):
    squares, _ = gathered(model_folder("mixtral"))
    moments, statistics = gathered(model_folder("mixtral"), full=True)
    for name, square in squares.items():
        torch.testing.assert_close(moments[name].diagonal(), square, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.squares[name], square, rtol=1e-4, atol=1e-6)
    assert moments["mlp.experts.2.gate_proj"] is moments["mlp.experts.2.up_proj"]


def test_much_shrinkage_gives_all_experts_the_moments_of_the_block(model_folder):
    moments, _ = gathered(model_folder("mixtral"), shrinkage=1e12)
    _, hidden, _, _ = routed(model_folder("mixtral"))
    for number in range(4):
        expected = hidden.square().mean(0)
        torch.testing.assert_close(moments[f"mlp.experts.{number}.gate_proj"], expected, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def unrouted(model_folder, tmp_path_factory):
    """Return a model in which no token goes to the last group of experts of a block."""
    folder = copy_model(model_folder("deepseek_v3"), tmp_path_factory.mktemp("unrouted") / "model")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    return edit_tensors(folder, {name: torch.tensor([0.0, 0, 0, 0, 0, 0, 0, -9])})


def test_an_expert_without_tokens_is_named_and_has_the_moments_of_the_block(unrouted, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "nowag_pl"):
        run = calibrated(unrouted, tmp_path / "run", compressor=NoWagPruner())
    assert "model.layers.1: no calibration token was routed to mlp.experts.6, mlp.experts.7" in caplog.text
    moments, metadata = run.store.read(MOMENTS, BLOCK)
    assert metadata["tokens_per_expert"]["mlp.experts"][7] == 0
    # The faults that were seen elsewhere: scales that differ between gate and up, or are not finite.
    assert torch.equal(moments["mlp.experts.7.gate_proj"], moments["mlp.experts.7.up_proj"])
    everywhere, _ = gathered(unrouted, shrinkage=1e12)
    for projection in ("gate_proj", "down_proj"):
        name = f"mlp.experts.7.{projection}"
        assert moments[name].isfinite().all()
        torch.testing.assert_close(moments[name], everywhere[name])
    run.compress()
    assert read_block(run.store, BLOCK)["mlp.experts.7.down_proj"].weight.isfinite().all()
    assert run.expert_statistics()["unseen"] == [f"model.layers.1.mlp.experts.{number}" for number in (6, 7)]


def test_calibration_changes_no_routing(model_folder, tmp_path):
    run = calibrated(model_folder("qwen3_moe"), tmp_path / "run")
    before = Checkpoint(str(model_folder("qwen3_moe"))).config
    assert run.checkpoint.config.num_experts_per_tok == before.num_experts_per_tok == 2
    assert all(block.mlp.gate.top_k == 2 for block in run.model.blocks)
    assert not any(each._forward_pre_hooks for block in run.model.blocks for each in block.modules())


def test_routers_stay_dense_and_the_statistics_say_so(model_folder, tmp_path):
    run = calibrated(model_folder("qwen2_moe"), tmp_path / "run")
    run.compress()
    names = {row["name"] for row in run.statistics()}
    assert run.expert_statistics()["dense"] == [f"model.layers.1.mlp.{name}" for name in ("gate", "shared_expert_gate")]
    assert not names & set(run.expert_statistics()["dense"])
    assert "model.layers.1.mlp.experts.3.up_proj" in names
    block = run.compressed().load_block(1)
    assert torch.equal(block.mlp.gate.weight, run.model.load_block(1).mlp.gate.weight)


def test_ignored_experts_are_listed_as_dense(model_folder, tmp_path):
    run = run_of(model_folder("mixtral"), tmp_path / "run", ignore=("experts.3.*",))
    run.calibrate(WINDOWS)
    run.compress()
    dense = [row["name"] for row in run.statistics() if row.get("dense")]
    assert len(dense) == 9
    assert all(".mlp.experts.3." in name for name in dense)


@pytest.mark.parametrize(
    ("more", "option"), [({"mode": "corrected"}, "mode=corrected"), ({"guidance": GuidanceSettings()}, "guidance")]
)
def test_what_needs_all_tokens_is_refused(more, option, model_folder, tmp_path):
    with pytest.raises(ValueError, match=rf"without experts for calibration\.{option}, but got one with experts"):
        calibrated(model_folder("mixtral"), tmp_path / "run", **more)


def test_shrinkage_is_checked_and_of_no_account_without_experts(model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"calibration\.expert_shrinkage of at least 0, but got -1"):
        CalibrationSettings(expert_shrinkage=-1)
    assert "expert_shrinkage" not in calibrated(model_folder(), tmp_path / "dense")._settings["calibration"]
    assert calibrated(model_folder("mixtral"), tmp_path / "experts")._settings["calibration"]["expert_shrinkage"] == 128
