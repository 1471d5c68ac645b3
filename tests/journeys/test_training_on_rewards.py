"""Training on rewards by the command line: a compressed model, several ranks, and a run that is killed."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_resume import kill_when
from tiny_models import HARD_TIMEOUT, finish, fit_arguments, save_tiny_model, start

pytest_plugins = ["tiny_fixtures"]

OBJECTIVE = {
    "class_path": "nowag_pl.lit.objectives.PolicyGradient",
    "init_args": {
        "rewards": [{"class_path": "nowag_pl.data.rewards.Format", "init_args": {"pattern": "[a-z ]*", "weight": 1.0}}],
        "sampling": {"group_size": 3, "max_new_tokens": 8},
        "budget": {"tokens": 3, "rate": 0.1},
        "updates": 2,
    },
}
STOPS = list(range(100, 600))  # many, so that a random model stops now and then


@pytest.fixture
def arguments(workplace, tmp_path):
    """Return the arguments of a fit that trains on rewards."""
    model = save_tiny_model(tmp_path / "model", num_blocks=2)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": STOPS}))
    rows = [{"question": f"word {number}", "answer": "x"} for number in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = {
        **OBJECTIVE,
        "init_args": {**OBJECTIVE["init_args"], "prompts": {"files": str(tmp_path / "prompts.jsonl")}},
    }
    (tmp_path / "laconic.yaml").write_text(yaml.safe_dump({"model": {"objective": objective}}))

    def made(name: str, *more: str) -> list[str]:
        training = [
            f"--config={tmp_path / 'laconic.yaml'}",
            "--model.learning_rate=1e-2",
            "--trainer.max_epochs=1",
            "--data.train_batch_size=4",
            "--trainer.log_every_n_steps=1",
        ]
        return fit_arguments(workplace, model, tmp_path / name, *training, *more)

    return made


def weights(run_dir, export="export_finetuned"):
    return {k: value for file in (run_dir / export).glob("*.safetensors") for k, value in load_file(file).items()}


DENSE = "--compression.enabled=false"


def test_compressed_model_learns_with_masks_and_embeddings_as_they_were(arguments, command_line, tmp_path):
    outcome = command_line(arguments("run"))
    assert outcome.code == 0, outcome.message
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    history = report["policy"]["history"]
    assert len(history["reward"]) == 2
    assert len(history["entropy"]) == len(history["lambda"]) == 2
    assert report["policy"]["budget"]["tokens"] == 3
    before = weights(tmp_path / "run", "export")
    after = weights(tmp_path / "run")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any(name.endswith("values") for name in changed)
    assert not any("embed" in name or name.endswith("mask") or "lm_head" in name for name in changed)


@pytest.mark.slow
def test_dense_model_learns_and_the_page_tells(arguments, command_line, tmp_path):
    outcome = command_line(arguments("run", DENSE, "--report.html=true"))
    assert outcome.code == 0, outcome.message
    assert not (tmp_path / "run" / "report.json").exists()
    assert len(json.loads((tmp_path / "run" / "policy.json").read_text())["history"]["kl"]) == 2
    assert "Training on rewards" in (tmp_path / "run" / "policy.html").read_text()
    assert any((tmp_path / "run").rglob("events.out.tfevents*"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_are_one(strategy, arguments, tmp_path):
    for name, more in {
        "one": [],
        "two": ["--trainer.devices=2", f"--trainer.strategy={strategy}", "--data.train_batch_size=2"],
    }.items():
        log = tmp_path / f"{name}.log"
        finish(start(arguments(name, DENSE, *more), log), log, 2 * HARD_TIMEOUT)
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3)
    histories = [json.loads((tmp_path / name / "policy.json").read_text())["history"] for name in ("one", "two")]
    for name, values in histories[0].items():
        assert histories[1][name] == pytest.approx(values, rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_killed_training_ends_with_the_same_weights(arguments, command_line, tmp_path):
    saving = [DENSE, "--checkpoint.every_n_train_steps=1", "--checkpoint.save_on_train_epoch_end=false"]
    log, checkpoint = tmp_path / "log", tmp_path / "killed" / "training" / "last.ckpt"
    process = start(arguments("killed", *saving), log)
    kill_when(process, checkpoint.exists, log)
    for name in ("killed", "whole"):
        assert command_line(arguments(name, *saving)).code == 0
    killed, whole = (weights(tmp_path / name) for name in ("killed", "whole"))
    assert all(torch.equal(killed[name], value) for name, value in whole.items())
