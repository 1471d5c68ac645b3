"""Two processes give what one gives."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import HARD_TIMEOUT, artefacts, copy_model, finish, fit_arguments, start, validate_arguments

pytest_plugins = ["tiny_fixtures"]

TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.fixture
def report(command_line, workplace, tmp_path):
    """Return the report of a fit in one process or two."""

    def run(name: str, model, *more: str) -> dict:
        arguments = fit_arguments(workplace, model, tmp_path / name, *more)
        if "--trainer.devices=2" in more:
            log = tmp_path / f"{name}.log"
            finish(start(arguments, log), log)
        else:
            assert command_line(arguments).code == 0
        return json.loads((tmp_path / name / "report.json").read_text())

    return run


def figures(report: dict) -> dict[str, float]:
    """Return all figures of quality."""
    return {
        f"{kind}/{text}/{phase}": value
        for kind in ("perplexity", "kl_divergence")
        for text, phases in report[kind].items()
        for phase, value in phases.items()
        if value is not None
    }


# With training behind it: test_two_ranks_are_one_rank in test_finetuning.py.
@pytest.mark.slow
def test_fit_on_two_ranks_is_the_fit_on_one(report, model_folder, tmp_path):
    one = report("one", model_folder("qwen2"))
    two = report("two", model_folder("qwen2"), *TWO)
    assert figures(two) == pytest.approx(figures(one), rel=1e-6, abs=1e-9)
    assert [row["name"] for row in one["linears"]] == [row["name"] for row in two["linears"]]
    assert one["calibration"] == two["calibration"]
    first, second = artefacts(tmp_path / "one"), artefacts(tmp_path / "two")
    for index in range(3):
        name = f"compressed/block_{index:03d}.safetensors"
        assert first[name][0] == second[name][0]  # the same masks and values
        moments = [load_file(tmp_path / each / "moments" / f"block_{index:03d}.safetensors") for each in ("one", "two")]
        torch.testing.assert_close(moments[1], moments[0], rtol=1e-5, atol=0)
    assert len(list((tmp_path / "two" / "reference").glob("*"))) == 2


@pytest.mark.slow
def test_armor_on_two_ranks_fits_the_factors_of_one(report, model_folder, tmp_path):
    method = [
        "--compression.compressor=nowag_pl.ArmorCompressor",
        "--compression.compressor.block_size=8",
        "--compression.compressor.max_iters=20",
    ]
    one = report("one", model_folder("qwen2"), *method)
    two = report("two", model_folder("qwen2"), *method, *TWO)
    assert figures(two) == pytest.approx(figures(one), rel=1e-6, abs=1e-9)
    first, second = artefacts(tmp_path / "one"), artefacts(tmp_path / "two")
    for index in range(3):
        name = f"compressed/block_{index:03d}.safetensors"
        assert first[name][0] == second[name][0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["propagated", "corrected"])
def test_fit_behind_compressed_linears_on_two_ranks_is_the_fit_on_one(mode, report, model_folder, tmp_path):
    mode = f"--calibration.mode={mode}"
    one = report("one", model_folder(), mode)
    two = report("two", model_folder(), mode, *TWO)
    assert figures(two) == pytest.approx(figures(one), rel=1e-6, abs=1e-9)


@pytest.mark.slow
def test_run_begun_on_two_ranks_ends_on_one(report, model_folder, tmp_path):
    report("run", model_folder(), *TWO)
    before = artefacts(tmp_path / "run")
    (tmp_path / "run" / "compressed" / "block_002.safetensors").unlink()
    report("run", model_folder())
    after = artefacts(tmp_path / "run")
    assert all(after[name] == before[name] for name in before if "reference" not in name)


@pytest.mark.slow
def test_more_ranks_than_windows_and_sequences(report, model_folder):
    few = ["--calibration.num_sequences=1", "--data.max_eval_windows=1"]
    one = report("one", model_folder(), *few)
    two = report("two", model_folder(), *few, *TWO)
    assert figures(two) == pytest.approx(figures(one), rel=1e-6, abs=1e-9)


@pytest.mark.slow
def test_validate_on_two_ranks_is_the_validate_on_one(command_line, model_folder, workplace, tmp_path):
    from test_fit_and_validate import perplexity_shown

    one = command_line(validate_arguments(workplace, model_folder(), tmp_path / "one"))
    log = tmp_path / "log"
    said = finish(start(validate_arguments(workplace, model_folder(), tmp_path / "two", *TWO), log), log)
    assert perplexity_shown(said) == perplexity_shown(one.output)


@pytest.mark.slow
@pytest.mark.parametrize("linear", ["down_proj", "up_proj"])  # the first is rank 0's, the second rank 1's
def test_error_on_one_rank_ends_both_with_its_message(linear, model_folder, workplace, tmp_path):
    from tiny_models import edit_tensors

    folder, name = copy_model(model_folder(), tmp_path / "model"), f"model.layers.1.mlp.{linear}.weight"
    weight = load_file(folder / "model.safetensors")[name]
    edit_tensors(folder, {name: weight * 1e8})  # finite, and too large for the 16 bits of a scale
    quantizer = ["--compression.compressor=nowag_pl.NoWagQuantizer", "--compression.compressor.codebook_size=8"]
    log, began = tmp_path / "log", time.monotonic()
    process = start(fit_arguments(workplace, folder, tmp_path / "run", *quantizer, *TWO), log)
    with pytest.raises(AssertionError):
        finish(process, log)
    said = log.read_text()
    assert time.monotonic() - began < HARD_TIMEOUT
    assert process.returncode not in (0, -9)
    assert f"model.layers.1.mlp.{linear}" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_fit_by_full_second_moments_on_two_ranks_is_the_fit_on_one(report, model_folder):
    update = "--compression.compressor.update=refit"
    one = report("one", model_folder(), update)
    two = report("two", model_folder(), update, *TWO)
    assert figures(two) == pytest.approx(figures(one), rel=1e-5, abs=1e-8)
    assert figures(report("plain", model_folder())) != pytest.approx(figures(one), rel=1e-3)
