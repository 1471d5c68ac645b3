"""A rotated model from the command line: pruned, compared with the original, and exported as an ordinary model."""

import pytest
from test_fit_and_validate import perplexity, read_report, text_windows
from tiny_models import artefacts, fit_arguments, load_whole

pytest_plugins = ["tiny_fixtures"]

ROTATION = ["--rotation.kind=learned", "--rotation.num_steps=3", "--calibration.guidance={labels: model}"]


def test_it_is_pruned_exported_and_compared_with_the_original(command_line, model_folder, workplace, tmp_path):
    run_dir, folder = tmp_path / "run", model_folder("llama", tied=True)
    arguments = fit_arguments(workplace, folder, run_dir, *ROTATION, "--export.format=dense")
    outcome = command_line(arguments)
    assert outcome.code == 0, outcome.message
    report, before = read_report(run_dir), artefacts(run_dir)
    figures = report["perplexity"]["held_out"]
    for name, model in ((figures["dense"], folder), (figures["one_shot"], run_dir / "export")):
        assert perplexity(load_whole(model), text_windows(workplace, model)) == pytest.approx(name, rel=1e-4)
    # The rotated model is as good as the original, from which the divergence is measured.
    rotated = run_dir / "rotation" / "model"
    assert perplexity(load_whole(rotated), text_windows(workplace, rotated)) == pytest.approx(
        figures["dense"], rel=1e-4
    )
    assert report["settings"]["calibration.rotation"]["kind"] == "learned"
    assert report["num_parameters"] == sum(p.numel() for p in load_whole(folder).parameters())
    (run_dir / "compressed" / "block_001.safetensors").unlink()
    assert command_line(arguments).code == 0
    assert artefacts(run_dir) == before
    outcome = command_line([*arguments, "--rotation.kind=none"])
    assert outcome.code != 0
    assert ".rotation = {" in outcome.message


def test_a_family_that_cannot_be_rotated_is_refused_before_anything_is_computed(
    command_line, model_folder, workplace, tmp_path
):
    outcome = command_line(fit_arguments(workplace, model_folder("gemma2"), tmp_path / "run", *ROTATION))
    assert outcome.code != 0
    assert "Set rotation.kind to none" in outcome.message
    assert not (tmp_path / "run" / "moments").exists()
