"""A budget over linears, from the command line."""

import json
import re

import pytest
from tiny_models import finish, fit_arguments, start

pytest_plugins = ["tiny_fixtures"]

BUDGET = ["--compression.budget.candidates=[{sparsity: 0.3}, {sparsity: 0.7}]", "--compression.budget.num_sequences=3"]


def test_fit_says_what_was_taken_and_gives_each_linear_its_setting(command_line, model_folder, workplace, tmp_path):
    run_dir = tmp_path / "run"
    outcome = command_line(fit_arguments(workplace, model_folder(), run_dir, *BUDGET, "--report.html=true"))
    assert outcome.code == 0, outcome.message
    report = json.loads((run_dir / "report.json").read_text())
    budget, settings = report["budget"], ["sparsity=0.5", "sparsity=0.3", "sparsity=0.7"]
    assert budget["settings"] == settings
    assert budget["taken"] == "spread"
    assert budget["spread"]["divergence"] < budget["uniform"]["divergence"]
    assert {row["setting"] for row in report["linears"]} > {"sparsity=0.3"}
    assert report["sparsity"] >= 0.5 - 1e-6
    assert "spread taken: KL on calibration text" in " ".join(outcome.output.split())
    assert "spread by sensitivity (taken)" in (run_dir / "report.html").read_text()
    assert not (run_dir / "budget" / "candidates").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--compression.compressor.pattern=[2, 4]", "--compression.budget={}"],
            "offers none. Give compression.budget",
        ),
        (["--compression.budget.candidates=[{sparsty: 0.3}]"], "which are sparsity, pattern, .* but got sparsty"),
        (["--compression.budget.candidates=[{sparsity: 1.5}]"], "{'sparsity': 1.5}: Expected sparsity"),
    ],
)
def test_budget_that_makes_no_sense_is_refused(arguments, message, command_line, model_folder, workplace, tmp_path):
    outcome = command_line(fit_arguments(workplace, model_folder(), tmp_path / "run", *arguments))
    assert outcome.code != 0
    assert re.search(message, outcome.message), outcome.message
    assert "Traceback" not in outcome.message


@pytest.mark.slow
@pytest.mark.parametrize("update", ["null", "refit"])
def test_two_ranks_give_each_linear_the_setting_of_one(update, command_line, model_folder, workplace, tmp_path):
    arguments = [*BUDGET, f"--compression.compressor.update={update}"]
    one, two = (fit_arguments(workplace, model_folder(), tmp_path / name, *arguments) for name in ("one", "two"))
    assert command_line(one).code == 0
    log = tmp_path / "log"
    finish(start([*two, "--trainer.devices=2", "--trainer.strategy=ddp"], log), log)
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert [row["setting"] for row in first["linears"]] == [row["setting"] for row in second["linears"]]
    assert second["kl_divergence"]["held_out"]["one_shot"] == pytest.approx(
        first["kl_divergence"]["held_out"]["one_shot"], rel=1e-5
    )
    for name in ("spread", "uniform"):
        assert second["budget"][name] == pytest.approx(first["budget"][name], rel=1e-5)
