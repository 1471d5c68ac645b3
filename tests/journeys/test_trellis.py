"""A model on a trellis, from the command line to the folders that other programs read."""

import json

import pytest
from safetensors.torch import load_file
from test_fit_and_validate import perplexity, perplexity_shown, read_report, text_windows
from tiny_models import artefacts, finish, fit_arguments, load_whole, start, validate_arguments
from transformers import AutoModelForCausalLM

from nowag_pl.models.format.saving import load_compressed
from nowag_pl.models.state import compressed_linears

pytest_plugins = ["tiny_fixtures"]

METHOD = ["--compression.compressor=nowag_pl.NoWagTrellis", "--compression.compressor.state_bits=8"]
BLOCKS = "--compression.compressor.rotation=both"
EXL3 = [METHOD[0], "--compression.compressor.state_bits=16", BLOCKS, "--export.format=exl3"]
BLOCKWISE = [
    "--finetuning.enabled=true",
    "--finetuning.num_sequences=8",
    "--finetuning.num_held_out=4",
    "--finetuning.max_epochs=2",
    "--finetuning.learning_rate=1e-3",
]


def test_it_is_finetuned_drawn_exported_and_goes_on(command_line, model_folder, workplace, tmp_path):
    run_dir = tmp_path / "run"
    arguments = fit_arguments(workplace, model_folder("qwen2"), run_dir, *METHOD, *BLOCKWISE)
    outcome = command_line([*arguments, "--inspection.enabled=true", "--report.html=true"])
    assert outcome.code == 0, outcome.message
    report, before = read_report(run_dir), artefacts(run_dir)
    held_out = report["perplexity"]["held_out"]
    for phase, name in (("one_shot", "export"), ("finetuned", "export_finetuned")):
        model = AutoModelForCausalLM.from_pretrained(run_dir / name)
        assert perplexity(model, text_windows(workplace, run_dir / name)) == pytest.approx(held_out[phase], rel=1e-3)
    one_shot, tuned = (compressed_linears(load_compressed(run_dir / name)) for name in ("export", "export_finetuned"))
    assert len(one_shot) == len(report["linears"])
    for name, linear in tuned.items():
        assert linear.codes.equal(one_shot[name].codes)
    assert any(not linear.in_scale.equal(one_shot[name].in_scale) for name, linear in tuned.items())
    assert report["bits_per_weight"] == pytest.approx(report["bytes_on_disk"] * 8 / report["num_compressed_parameters"])
    # What is lost is made again, and the rest is not.
    for folder in ("compressed", "finetuned"):
        (run_dir / folder / "block_001.safetensors").unlink()
    assert command_line(arguments).code == 0
    assert artefacts(run_dir) == before


def test_dense_export_has_the_weights_of_the_packed_one(command_line, model_folder, workplace, tmp_path):
    arguments = fit_arguments(workplace, model_folder(), tmp_path / "run", *METHOD, "--export.format=dense")
    assert command_line(arguments).code == 0
    export = tmp_path / "run" / "export"
    expected = read_report(tmp_path / "run")["perplexity"]["held_out"]["one_shot"]
    assert perplexity(load_whole(export), text_windows(workplace, export)) == pytest.approx(expected, rel=1e-5)
    outcome = command_line(validate_arguments(workplace, export, tmp_path / "validation"))
    assert perplexity_shown(outcome.output) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_budget_spreads_bits_at_an_average_that_is_asked_for(command_line, model_folder, workplace, tmp_path):
    settings = ["--compression.budget.bits_per_weight=2.75", "--compression.budget.num_sequences=3"]
    model = model_folder(hidden_size=64, intermediate_size=128, num_blocks=2)
    outcome = command_line(fit_arguments(workplace, model, tmp_path / "run", *METHOD, *settings))
    assert outcome.code == 0, outcome.message
    report = read_report(tmp_path / "run")
    assert len({row["setting"] for row in report["linears"]}) > 1
    scales = 16 * (1 / 64 + 1 / 64)
    assert 2.0 + scales < report["bits_per_weight"] <= 2.75


@pytest.mark.slow
def test_two_ranks_make_the_codes_of_one(command_line, model_folder, workplace, tmp_path):
    model = model_folder("qwen2")
    assert command_line(fit_arguments(workplace, model, tmp_path / "one", *METHOD)).code == 0
    log = tmp_path / "log"
    two = fit_arguments(workplace, model, tmp_path / "two", *METHOD, "--trainer.devices=2", "--trainer.strategy=ddp")
    finish(start(two, log), log)
    first, second = artefacts(tmp_path / "one"), artefacts(tmp_path / "two")
    for name in (f"compressed/block_{index:03d}.safetensors" for index in range(3)):
        codes = [{key: value for key, value in each[name][0].items() if ".codes " in key} for each in (first, second)]
        assert codes[0]
        assert codes[0] == codes[1]


def test_exl3_folder_is_written(command_line, model_folder, workplace, tmp_path):
    model = model_folder(num_blocks=1)
    arguments = fit_arguments(workplace, model, tmp_path / "run", *EXL3, "--compression.compressor.multiple=128")
    outcome = command_line(arguments)
    assert outcome.code == 0, outcome.message
    export = tmp_path / "run" / "export"
    described = json.loads((export / "config.json").read_text())["quantization_config"]
    names = {row["name"] for row in read_report(tmp_path / "run")["linears"]}
    assert described["quant_method"] == "exl3"
    assert described["tensor_storage"].keys() == names
    tensors = {name: tensor for file in export.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert tensors.keys() >= {f"{name}.trellis" for name in names}
    assert tensors["model.layers.0.self_attn.q_proj.trellis"].shape == (8, 8, 32)
    # It is a model like any other, read with its weights restored.
    expected = read_report(tmp_path / "run")["perplexity"]["held_out"]["one_shot"]
    outcome = command_line(validate_arguments(workplace, export, tmp_path / "validation"))
    assert perplexity_shown(outcome.output) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "sizes that 128 divides"),
        (["--compression.compressor.state_bits=12"], "state_bits 16, but got 12"),
        (["--compression.compressor=nowag_pl.NoWagPruner"], "linears on a trellis"),
        (["--compression.overrides={v_proj: {state_bits: 12}, q_proj: {multiple: 128}}"], "q_proj|v_proj"),
    ],
)
def test_methods_that_do_not_fit_exl3_are_refused_at_once(
    more, message, command_line, model_folder, workplace, tmp_path
):
    method = EXL3 if "NoWagPruner" not in "".join(more) else EXL3[3:]
    outcome = command_line(fit_arguments(workplace, model_folder(), tmp_path / "run", *method, *more))
    assert outcome.code != 0
    assert "Expected, with export.format=exl3" in outcome.message
    assert message.split("|")[0] in outcome.message or "|" in message
    assert "\n" not in outcome.message
    assert not list((tmp_path / "run").glob("moments/*"))
