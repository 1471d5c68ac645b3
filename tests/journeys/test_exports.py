"""What `fit` leaves behind: packed as small as the report says, or dense for other programs."""

import json
import struct
from math import prod

import pytest
import torch
from test_fit_and_validate import QUANTIZER, perplexity, perplexity_shown, read_report, text_windows
from tiny_models import ROOT, fit_arguments, load_whole, validate_arguments
from transformers import AutoModelForCausalLM

from nowag_pl.models.format.saving import is_compressed, load_compressed

pytest_plugins = ["tiny_fixtures"]

VQ = ["--compression.compressor=nowag_pl.NoWagQuantizer", "--compression.compressor.max_iters=2"]
METHODS = {
    "unstructured": ["--compression.compressor.sparsity=0.66"],
    "4:8": [f"--config={ROOT / 'configs/method/nowag_p_4_8.yaml'}"],
    "vq": [*VQ, "--compression.compressor.subvector_dim=5", "--compression.compressor.codebook_size=20"],
}
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}


def bytes_of_tensors(folder) -> dict[str, int]:
    """Read from the headers how many bytes each tensor takes in the files."""
    sizes = {}
    for file in folder.glob("*.safetensors"):
        content = file.read_bytes()
        [length] = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__")
        own = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
        assert own == {name: prod(entry["shape"]) * SIZES[entry["dtype"]] for name, entry in header.items()}
        assert len(content) == 8 + length + sum(own.values())
        sizes |= own
    return sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_report_says_what_the_files_hold(method, dtype, command_line, model_folder, workplace, tmp_path):
    model = model_folder("qwen2", dtype=dtype)  # with biases, which nothing compresses
    assert command_line(fit_arguments(workplace, model, tmp_path / "run", *METHODS[method])).code == 0
    report, export = read_report(tmp_path / "run"), tmp_path / "run" / "export"
    linears = tuple(json.loads((export / "config.json").read_text())["quantization_config"]["linears"])
    assert set(linears) == {row["name"] for row in report["linears"]}
    sizes = bytes_of_tensors(export)
    stored = {
        name: sum(size for key, size in sizes.items() if key.startswith(f"{name}.") and key != f"{name}.bias")
        for name in linears
    }
    assert report["bytes_on_disk"] == sum(stored.values())
    assert report["bytes_on_disk"] / report["num_compressed_parameters"] * 8 == pytest.approx(
        report["bits_per_weight"], rel=0.01
    )
    for row in report["linears"]:
        excess = stored[row["name"]] * 8 - row["bits_per_weight"] * prod(row["shape"])
        assert -1e-6 <= excess < 8


@pytest.mark.parametrize(
    ("method", "finetuning"),
    [
        ("4:8", []),
        ("vq", ["--trainer.max_epochs=1"]),
        pytest.param("unstructured", [], marks=pytest.mark.slow),
        pytest.param("vq", [], marks=pytest.mark.slow),
    ],
)
def test_dense_export(method, finetuning, command_line, model_folder, workplace, tmp_path):
    more = [*METHODS[method], *finetuning, "--export.format=dense"]
    assert command_line(fit_arguments(workplace, model_folder(), tmp_path / "run", *more)).code == 0
    phase, name = ("finetuned", "export_finetuned") if finetuning else ("one_shot", "export")
    export = tmp_path / "run" / name
    assert not is_compressed(export)
    expected = read_report(tmp_path / "run")["perplexity"]["held_out"][phase]
    assert perplexity(load_whole(export), text_windows(workplace, export)) == pytest.approx(expected, rel=1e-5)
    outcome = command_line(validate_arguments(workplace, export, tmp_path / "validation"))
    assert perplexity_shown(outcome.output) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_packed_export_opens_in_transformers(finished_fit, workplace):
    run_dir = finished_fit(*QUANTIZER).run_dir
    export = run_dir / "export"
    model = AutoModelForCausalLM.from_pretrained(export)
    expected = read_report(run_dir)["perplexity"]["held_out"]["one_shot"]
    assert perplexity(model, text_windows(workplace, export)) == pytest.approx(expected, rel=1e-5)


def test_crash_while_measuring_leaves_the_model(command_line, model_folder, workplace, tmp_path, monkeypatch):
    def crash(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr("nowag_pl.lit.validation.Validation.add", crash)
    with pytest.raises(RuntimeError, match="killed"):
        command_line(fit_arguments(workplace, model_folder(), tmp_path / "run", *METHODS["4:8"]))
    weight = load_compressed(tmp_path / "run" / "export").model.layers[0].mlp.up_proj.weight
    assert float((weight == 0).float().mean()) == 0.5


def test_unknown_format_is_refused(command_line, model_folder, workplace, tmp_path):
    outcome = command_line(fit_arguments(workplace, model_folder(), tmp_path / "run", "--export.format=gguf"))
    assert outcome.code != 0
    assert "format" in outcome.message


def test_files_are_trusted_on_demand(command_line, finished_fit, workplace, tmp_path):
    export = finished_fit().copy(tmp_path / "run") / "export"
    (export / "generation_config.json").write_text("{}")
    arguments = validate_arguments(workplace, export, tmp_path / "validation")
    assert "generation_config.json" in command_line(arguments).message
    assert command_line([*arguments, "--model.verify=false"]).code == 0
