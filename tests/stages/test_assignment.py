"""Some linears left dense, others by settings or a method of their own: artefacts, report, export, and the way back."""

import json

import pytest
import torch
from stage_runs import WINDOWS, calibrated, run_of
from tiny_models import load_whole

from nowag_pl import NoWagPruner, NoWagQuantizer
from nowag_pl.compressors.budget import Budget
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.saving import load_compressed
from nowag_pl.modules import MaskedLinear, VQLinear
from nowag_pl.stages.assignment import assignment_of
from nowag_pl.stages.plan import CompressionSettings

pytest_plugins = ["tiny_fixtures"]

QUANTIZER = NoWagQuantizer(subvector_dim=4, codebook_size=16, max_iters=2)


def test_later_override_holds_and_changes_only_what_it_names():
    names = [["layers.0.up", "layers.0.down"], ["layers.1.up", "layers.1.down"]]
    overrides = {"down": {"sparsity": 0.3}, "blocks:1": QUANTIZER}
    assignment = assignment_of(CompressionSettings(NoWagPruner(update="refit"), overrides=overrides), names)
    assert assignment.method("layers.0.up") == NoWagPruner(update="refit")
    assert assignment.method("layers.0.down") == NoWagPruner(sparsity=0.3, update="refit")
    assert assignment.method("layers.1.down") == assignment.method("layers.1.up") == QUANTIZER


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"gate": QUANTIZER}, r"compression\.overrides to match a linear, but 'gate' matches none"),
        ({"up": {"sparsty": 0.3}}, r"fields of NoWagPruner in compression\.overrides, .* but got sparsty"),
        ({"up": {"sparsity": 3.0}}, r"compression\.overrides: \{'sparsity': 3\.0\}: Expected sparsity"),
    ],
)
def test_wrong_overrides_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        assignment_of(CompressionSettings(NoWagPruner(), overrides=overrides), [["layers.0.up"]])


@pytest.mark.parametrize("mode", ["dense", "propagated", "corrected"])
def test_run_leaves_dense_what_is_ignored_and_takes_overrides(mode, model_folder, tmp_path):
    settings = {"ignore": ("blocks:0", "k_proj"), "overrides": {"mlp.*": QUANTIZER, "q_proj": {"sparsity": 0.25}}}
    run = calibrated(model_folder("qwen2"), tmp_path / "run", mode, **settings)
    run.compress()
    run.compressed().save(tmp_path / "export")
    dense, loaded = load_whole(model_folder("qwen2")), load_compressed(tmp_path / "export")
    rows = {row["name"]: row for row in run.statistics()}
    for index in range(3):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj"):
            full = f"model.layers.{index}.{name}"
            linear, row = loaded.get_submodule(full), rows[full]
            if index == 0 or name == "self_attn.k_proj":
                assert type(linear) is torch.nn.Linear
                assert linear.weight.equal(dense.get_submodule(full).weight)
                assert (row["dense"], row["loss"], row["bits_per_weight"]) == (True, 0.0, 32)
            else:
                assert isinstance(linear, VQLinear if "mlp" in name else MaskedLinear)
                assert linear.sparsity == pytest.approx({"q": 0.25, "o": 0.5}.get(name[10], 0.0), abs=1e-2)
    assert "overrides" in json.loads((tmp_path / "run" / "manifest.json").read_text())["compression"]
    with pytest.raises(ValueError, match=r"calibration\.linears"):
        calibrated(model_folder("qwen2"), tmp_path / "run", mode, **settings | {"ignore": ("blocks:0",)})


def test_budget_spreads_the_bits_of_linears_without_override(model_folder, tmp_path):
    fixed = NoWagPruner(sparsity=0.9)
    budget = Budget([{"sparsity": 0.3}, {"sparsity": 0.7}], num_sequences=2)
    run = calibrated(model_folder(), tmp_path / "run", budget=budget, overrides={"down_proj": fixed})
    run.compress()
    for row in run.statistics():
        if row["name"].endswith("down_proj"):
            assert row["sparsity"] == pytest.approx(0.9, abs=1e-2)
        else:
            assert round(row["sparsity"], 1) in (0.3, 0.5, 0.7)
    assert len({row["setting"] for row in run.statistics() if "down_proj" not in row["name"]}) > 1


def test_other_selection_is_refused_before_moments_are_missed(model_folder, tmp_path):
    calibrated(model_folder(), tmp_path / "run", targets=("mlp.*",))
    with pytest.raises(ValueError, match=r"calibration\.linears"):
        calibrated(model_folder(), tmp_path / "run")


def test_pattern_without_a_match_is_told_when_the_model_is_opened(model_folder, tmp_path):
    run = run_of(model_folder(), tmp_path / "run", targets=("experts.*",))
    with pytest.raises(ValueError, match=r"compression\.targets to match a linear"):
        run.calibrate(WINDOWS)
    assert Checkpoint(str(model_folder())).vocab_size > 0
