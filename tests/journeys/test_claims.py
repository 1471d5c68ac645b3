"""A command that is refused leaves a finished run as it is, and a report forgets nothing that is still there."""

import json

import pytest
from tiny_models import fit_arguments

pytest_plugins = ["tiny_fixtures"]
TRAINING = ("--trainer.max_epochs=1", "--data.max_train_windows=4", "--data.train_batch_size=2")


@pytest.fixture
def fit(command_line, model_folder, workplace, tmp_path):
    return lambda *more: command_line(fit_arguments(workplace, model_folder(), tmp_path / "run", *more))


def contents(folder):
    """Return all files but the lock, which names its last holder, and the logs, to which each command adds its own."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder): path.read_bytes() for path in files if "lightning_logs" not in path.parts}


def test_finished_training_is_refused_gone_on_with_and_remembered(fit, tmp_path):
    run_dir = tmp_path / "run"
    assert fit(*TRAINING).code == 0
    before, report = contents(run_dir), json.loads((run_dir / "report.json").read_text())

    for option, name in {
        "--data.train_batch_size=4": r"training.batch_size = 2, not 4",
        "--trainer.limit_train_batches=1": "training.limit_train_batches = None, not 1",
        "--trainer.gradient_clip_algorithm=value": "training.gradient_clip_algorithm = None, not 'value'",
        "--trainer.precision=bf16-mixed": "training.precision = '32-true', not 'bf16-mixed'",
        "--model.learning_rate=1e-3": "training.learning_rate",
        "--calibration.seed=1": "calibration.seed = 0, not 1",
    }.items():
        outcome = fit(*TRAINING, option)
        assert outcome.code != 0
        assert name in outcome.message
        assert contents(run_dir) == before

    # Without training: the figures and the time of the training stay.
    assert fit().code == 0
    again = json.loads((run_dir / "report.json").read_text())
    assert again["perplexity"] == report["perplexity"]
    assert again["kl_divergence"] == report["kl_divergence"]
    assert again["seconds"]["finetuning"] == report["seconds"]["finetuning"] > 0

    # With more epochs: on from where it was.
    outcome = fit(*TRAINING, "--trainer.max_epochs=2")
    assert outcome.code == 0, outcome.message
    further = json.loads((run_dir / "report.json").read_text())
    assert further["perplexity"]["held_out"]["finetuned"] != report["perplexity"]["held_out"]["finetuned"]
    assert further["seconds"]["finetuning"] > report["seconds"]["finetuning"]
    assert "training.max_epochs = 2, not 1" in fit(*TRAINING).message
