"""Models with experts through the command line: compressed, finetuned, exported, measured, also in two processes."""

import json

import pytest
from test_finetuning import BLOCKWISE, DISTILLATION
from test_fit_and_validate import perplexity, read_report, text_windows
from tiny_models import finish, fit_arguments, load_whole, start, validate_arguments

from nowag_pl import load_compressed

pytest_plugins = ["tiny_fixtures"]

SHORT = ("--finetuning.max_epochs=1", "--trainer.max_epochs=1")
SMALL_CODEBOOK = (
    "--compression.compressor=nowag_pl.NoWagQuantizer",
    "--compression.compressor.subvector_dim=2",
    "--compression.compressor.codebook_size=16",
)


def test_a_mixture_is_compressed_and_reported(command_line, model_folder, workplace, tmp_path):
    folder = model_folder("qwen2_moe", num_blocks=2)
    more = (
        "--report.html=true",
        "--inspection.enabled=true",
        "--report.damage_windows=1",
        "--calibration.expert_shrinkage=20",
    )
    outcome = command_line(fit_arguments(workplace, folder, tmp_path / "run", *more))
    assert outcome.code == 0, outcome.message
    report = read_report(tmp_path / "run")
    experts = report["experts"]
    (row,) = experts["tokens"]
    assert (row["block"], row["name"], len(row["tokens"])) == (1, "mlp.experts", 4)
    assert sum(row["tokens"]) == 2 * report["calibration"]["num_tokens"]
    assert experts["dense"] == ["model.layers.1.mlp.gate", "model.layers.1.mlp.shared_expert_gate"]
    names = [row["name"] for row in report["linears"]]
    assert "model.layers.1.mlp.experts.2.down_proj" in names
    assert "experts" in outcome.output
    assert "shared_expert_gate" in (tmp_path / "run" / "report.html").read_text()
    windows, figures = text_windows(workplace, folder), report["perplexity"]["held_out"]
    assert figures["dense"] == pytest.approx(perplexity(load_whole(folder), windows), rel=1e-5)
    exported = load_compressed(tmp_path / "run" / "export")
    assert figures["one_shot"] == pytest.approx(perplexity(exported, windows), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "llama4"])
def test_a_family_from_dense_to_finetuned(family, command_line, model_folder, workplace, tmp_path):
    arguments = (*SMALL_CODEBOOK, *BLOCKWISE, *DISTILLATION, *SHORT)
    run_dir = tmp_path / "run"
    outcome = command_line(fit_arguments(workplace, model_folder(family), run_dir, *arguments))
    assert outcome.code == 0, outcome.message
    report = read_report(run_dir)
    divergences = report["kl_divergence"]["held_out"]
    assert divergences["finetuned"] < divergences["one_shot"]
    windows = text_windows(workplace, model_folder(family))
    model = load_compressed(run_dir / "export_finetuned")
    assert perplexity(model, windows) == pytest.approx(report["perplexity"]["held_out"]["finetuned"], rel=1e-4)
    assert command_line(validate_arguments(workplace, run_dir / "export", tmp_path / "validation")).code == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_give_what_one_gives(model_folder, workplace, tmp_path):
    # An expert without tokens in one process has gradients there all the same.
    two = ("--trainer.devices=2", "--trainer.strategy=ddp")
    arguments = (*SMALL_CODEBOOK, *BLOCKWISE, *DISTILLATION, *SHORT)
    folder, reports = model_folder("mixtral"), []
    for name, more in (("one", ()), ("two", two)):
        log = tmp_path / f"{name}.log"
        finish(start(fit_arguments(workplace, folder, tmp_path / name, *arguments, *more), log), log, timeout=600)
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
    one, other = reports
    assert one["experts"] == other["experts"]
    figures = [each["perplexity"]["held_out"] for each in reports]
    assert figures[1]["one_shot"] == pytest.approx(figures[0]["one_shot"], rel=1e-3)
    assert figures[1]["finetuned"] == pytest.approx(figures[0]["finetuned"], rel=1e-2)
