"""The benchmark of methods runs the command line once for each, and reads what is finished."""

import json
import sys

import pytest
from tiny_models import ROOT, subprocess_environment

from benchmarks import real_model

pytest_plugins = ["tiny_fixtures"]


@pytest.fixture
def small(model_folder, workplace, tmp_path, monkeypatch):
    """Measure a tiny model on a few windows; return the results' file."""
    for name, value in subprocess_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    shared = tmp_path / "shared" / "data"
    shared.mkdir(parents=True)
    for name, source in {"wikitext2-raw-test.txt": "eval.txt", "prose-calibration.txt": "calibration.txt"}.items():
        (shared / name).write_bytes((workplace / source).read_bytes())
    monkeypatch.setattr("benchmarks.protocol.SEQ_LEN", 32)
    monkeypatch.setattr(real_model, "SEQ_LEN", 32)
    arguments = ["real_model", f"--model={model_folder()}", f"--shared={shared.parent}", "--threads=1", "--windows=3"]
    arguments += [f"--output={tmp_path / 'runs'}", f"--results={tmp_path / 'results.json'}", "--methods"]

    def run(*methods: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", [*arguments, *methods])
        real_model.main()
        return json.loads((tmp_path / "results.json").read_text())["rows"]

    return run


@pytest.mark.filterwarnings("ignore")
def test_dense_model_is_measured(small):
    (dense,) = small("dense")
    assert dense["perplexity"] > 1
    assert dense["windows"] == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rows_have_what_the_table_shows_and_finished_runs_are_read(small, monkeypatch):
    dense, pruned = small("dense", "nowag_p_50")
    assert pruned["dense_perplexity"] == pytest.approx(dense["perplexity"], rel=1e-3)
    assert pruned["windows"] == dense["windows"] == 3
    assert pruned["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert 0 < pruned["top1_agreement"] < 1
    assert pruned["cpu_seconds"] > 0
    assert pruned["peak_memory_bytes"] > 2**20
    monkeypatch.setattr("subprocess.Popen", None)
    monkeypatch.setattr(real_model, "measure", None)
    assert small("nowag_p_50", "dense") == [dense, pruned]


@pytest.mark.slow
def test_failing_method_is_told_and_leaves_the_others(small, capsys):
    assert small("nowag_vq_2bit") == []
    assert "nowag_vq_2bit failed: Expected main.py fit to succeed" in capsys.readouterr().out.replace("\n", " ")
