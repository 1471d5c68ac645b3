"""What is refused before Lightning is imported, and what is left to the program."""

import json
import subprocess
import sys

import pytest
from tiny_models import ROOT, subprocess_environment

from nowag_pl.run.early import changed_setting, refuse_changed_settings

MANIFEST = {
    "calibration": {"num_sequences": 128, "seed": 0, "mode": "dense", "seq_len": 256},
    "compression": {"compressor": "NoWagPruner", "sparsity": 0.5, "pattern": None},
    "finetuning": {"learning_rate": 1e-4, "max_epochs": 5, "precision": "32-true"},
}


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    for stage in ("moments", "compressed", "finetuned"):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "block_000.safetensors").touch()
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    return folder


def problem(run_dir, *words):
    return changed_setting([f"--run_dir={run_dir}", *words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--calibration.num_sequences=64"], "calibration.num_sequences = 128, not 64"),
        (["--data.seq_len", "512"], "calibration.seq_len = 256, not 512"),
        (["--compression.compressor.sparsity=0.6"], "compression.sparsity = 0.5, not 0.6"),
        (["--compression.compressor.init_args.sparsity=0.6"], "compression.sparsity = 0.5, not 0.6"),
        (
            ["--compression.compressor=nowag_pl.WandaPruner"],
            "compression.compressor = 'NoWagPruner', not 'WandaPruner'",
        ),
        (["--config", "{configs}/method/nowag_vq_2bit.yaml"], "compressor = 'NoWagPruner', not 'NoWagQuantizer'"),
        (
            ["--finetuning.enabled=true", "--finetuning.learning_rate=1e-3"],
            "finetuning.learning_rate = 0.0001, not 0.001",
        ),
    ],
)
def test_changed_settings_are_refused(words, said, run_dir):
    assert said in problem(run_dir, *(word.format(configs=ROOT / "configs") for word in words))


@pytest.mark.parametrize(
    "words",
    [
        ["--config={configs}/method/nowag_p_50.yaml", "--compression.compressor.sparsity=5e-1"],
        ["--compression.compressor.sparsity=0.6", "--compression.compressor.sparsity=0.5"],
        # The options of another class go with it.
        ["--compression.compressor.sparsity=0.6", "--compression.compressor=nowag_pl.NoWagPruner"],
        ["--finetuning.learning_rate=1e-3"],
        ["--compression.enabled=false", "--calibration.num_sequences=64"],
        ["--calibration.batch_size=1", "--finetuning.enabled=true", "--finetuning.precision=bf16-mixed"],
    ],
)
def test_the_same_settings_and_those_that_are_uncertain_are_not(words, run_dir):
    assert problem(run_dir, *(word.format(configs=ROOT / "configs") for word in words)) is None


def test_a_stage_that_has_made_nothing_may_change(run_dir):
    (run_dir / "moments" / "block_000.safetensors").unlink()
    assert problem(run_dir, "--calibration.num_sequences=64") is None


@pytest.mark.parametrize("words", [["validate"], ["fit", "--help"], ["fit", "--config=missing.yaml"], []])
def test_other_commands_go_on(words, run_dir):
    assert refuse_changed_settings([*words, f"--run_dir={run_dir}", "--calibration.num_sequences=64"]) is None


def test_nothing_large_is_imported(run_dir):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "main.py", "fit", f"--run_dir={run_dir}", "--data.seq_len=8"],
        cwd=ROOT,
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "seq_len = 256, not 8. Runs are never mixed" in done.stderr
    assert not any(f"| {name}\n" in done.stderr.replace("  ", "") for name in ("torch", "lightning", "transformers"))
