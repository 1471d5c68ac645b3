"""The command line from end to end on tiny models."""

import json
import math
import re
import shutil

import pytest
import torch
import yaml
from tiny_models import (
    EMBEDDED,
    ROOT,
    SEQ_LEN,
    artefacts,
    finish,
    fit_arguments,
    load_whole,
    start,
    validate_arguments,
)

from nowag_pl import load_compressed
from nowag_pl.data.sources import read_text_file
from nowag_pl.data.tokens import whole_windows
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.modules import CompressedLinear

pytest_plugins = ["tiny_fixtures"]

REPORT_KEYS = {
    "model", "method", "num_parameters", "num_compressed_parameters", "seq_len", "calibration", "bits_per_weight",
    "sparsity", "bytes_on_disk", "perplexity", "kl_divergence", "seconds", "finetuned_blocks", "peak_memory_bytes",
    "linears", "peak_memory", "protocol", "bytes", "settings", "command", "versions", "device", "budget", "samples",
    "sha256", "damage", "head", "policy", "experts", "top1_agreement",
}  # fmt: skip


def text_windows(workplace, folder) -> torch.Tensor:
    checkpoint = Checkpoint(str(folder))
    tokenizer = checkpoint.tokenizer
    ids = tokenizer(read_text_file(workplace / "eval.txt"), add_special_tokens=False)["input_ids"]
    windows = whole_windows(torch.tensor([tokenizer.bos_token_id, *ids]), SEQ_LEN).clone()
    if checkpoint.config.model_type.startswith("gemma"):
        windows[:, 0] = tokenizer.bos_token_id
    return windows


@torch.no_grad()
def log_probabilities(model, windows: torch.Tensor) -> torch.Tensor:
    """Return `[windows, seq_len - 1, vocabulary]` in float64."""
    return model(windows, use_cache=False).logits[:, :-1].double().log_softmax(dim=-1)


def perplexity(model, windows: torch.Tensor) -> float:
    chosen = log_probabilities(model, windows).gather(2, windows[:, 1:, None])
    return math.exp(-float(chosen.mean()))


def perplexity_shown(output: str, column: int = 3) -> float:
    """Read a figure from the table on the screen."""
    row = next(line for line in output.splitlines() if re.match(r"\W*held_out\b.*\d", line) and "│" in line)
    return float(re.split(r"\s*[│|┃]\s*", row.strip("│|┃ "))[column])


@pytest.fixture
def fit(command_line, model_folder, workplace, tmp_path):
    def run(*more: str, model=None):
        return command_line(fit_arguments(workplace, model or model_folder(), tmp_path / "run", *more))

    return run


QUANTIZER = (
    "--compression.compressor=nowag_pl.NoWagQuantizer",
    "--compression.compressor.subvector_dim=4",
    "--compression.compressor.codebook_size=16",
)


def read_report(run_dir) -> dict:
    return json.loads((run_dir / "report.json").read_text())


def test_report_has_the_promised_keys_and_sensible_values(finished_fit, model_folder):
    report, folder = read_report(finished_fit().run_dir), model_folder()
    assert set(report) == REPORT_KEYS
    assert report["model"] == str(folder)
    assert re.fullmatch(r"NoWagPruner\(.*sparsity=0\.5.*\)", report["method"])
    assert report["num_parameters"] == sum(p.numel() for p in load_whole(folder).parameters())
    assert report["num_compressed_parameters"] == 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert report["seq_len"] == SEQ_LEN
    assert set(report["calibration"]) == {"num_sequences", "num_tokens", "sha256"}
    assert report["calibration"]["num_sequences"] == 6
    assert report["calibration"]["num_tokens"] == 6 * SEQ_LEN
    assert re.fullmatch("[0-9a-f]{64}", report["calibration"]["sha256"])
    assert report["sparsity"] == pytest.approx(0.5)
    assert report["bits_per_weight"] == pytest.approx(17)  # half of 32 bits and a mask
    assert report["bytes_on_disk"] == pytest.approx(report["num_compressed_parameters"] * 17 / 8)
    assert set(report["seconds"]) == {"calibration", "compression", "finetuning", "evaluation"}
    assert all(0 <= seconds < 60 for seconds in report["seconds"].values())
    assert report["seconds"]["finetuning"] == 0
    assert report["peak_memory_bytes"] > 50 * 2**20
    assert len(report["linears"]) == 21
    for row in report["linears"]:
        assert set(row) == {"name", "shape", "loss", "bits_per_weight", "sparsity"}
        assert 0 < row["loss"] < 0.5


def test_quality_figures_are_the_oracles(finished_fit, model_folder, workplace):
    run_dir = finished_fit().run_dir
    report, windows = read_report(run_dir), text_windows(workplace, model_folder())
    dense, compressed = load_whole(model_folder()), load_compressed(run_dir / "export")
    figures = report["perplexity"]["held_out"]
    assert figures["dense"] == pytest.approx(perplexity(dense, windows), rel=1e-5)
    assert figures["one_shot"] == pytest.approx(perplexity(compressed, windows), rel=1e-5)
    assert figures["finetuned"] is None
    p, q = log_probabilities(dense, windows), log_probabilities(compressed, windows)
    divergence = float((p.exp() * (p - q)).sum(dim=-1).mean())
    assert report["kl_divergence"] == {"held_out": {"one_shot": pytest.approx(divergence, rel=1e-4), "finetuned": None}}
    assert divergence > 0.01
    assert figures["one_shot"] != pytest.approx(figures["dense"], rel=1e-3)


@pytest.mark.parametrize(
    "method",
    [
        QUANTIZER,
        pytest.param((f"--config={ROOT / 'configs/method/nowag_p_2_4.yaml'}",), marks=pytest.mark.slow),
    ],
    ids=["vq", "2:4"],
)
def test_validate_on_the_export_gives_the_perplexity_of_the_report(
    method, finished_fit, command_line, workplace, tmp_path
):
    run_dir = finished_fit(*method).run_dir
    outcome = command_line(validate_arguments(workplace, run_dir / "export", tmp_path / "validation"))
    assert outcome.code == 0
    expected = read_report(run_dir)["perplexity"]["held_out"]["one_shot"]
    assert perplexity_shown(outcome.output) == pytest.approx(expected, rel=1e-4, abs=1e-3)
    modules = load_compressed(run_dir / "export").modules()
    assert sum(isinstance(module, CompressedLinear) for module in modules) == 21


def test_validate_on_a_dense_model_gives_its_perplexity_and_claims_no_run_dir(
    command_line, fit, model_folder, workplace, tmp_path
):
    outcome = command_line(validate_arguments(workplace, model_folder("qwen2"), tmp_path / "run"))
    expected = perplexity(load_whole(model_folder("qwen2")), text_windows(workplace, model_folder("qwen2")))
    assert perplexity_shown(outcome.output) == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert fit().code == 0  # of another model, in the same folder


@pytest.mark.parametrize(
    "family", ["mistral", *(pytest.param(each, marks=pytest.mark.slow) for each in ("qwen2", "qwen3"))]
)
def test_every_family_goes_through(family, fit, model_folder, workplace, tmp_path):
    folder = model_folder(family, sharded=True, tied=True)
    assert fit("--calibration.mode=propagated", model=folder).code == 0
    figures = read_report(tmp_path / "run")["perplexity"]["held_out"]
    assert figures["dense"] == pytest.approx(perplexity(load_whole(folder), text_windows(workplace, folder)), rel=1e-5)


def test_same_command_again_gives_the_same_report(fit, finished_fit, tmp_path):
    finished_fit().copy(tmp_path / "run")
    first, files = read_report(tmp_path / "run"), artefacts(tmp_path / "run")
    assert fit().code == 0
    second = read_report(tmp_path / "run")
    for report in (first, second):
        for key in ("sha256", "seconds", "peak_memory_bytes", "peak_memory", "command"):
            del report[key]
    assert first == second
    assert artefacts(tmp_path / "run") == files


def test_scalars_of_every_linear_lie_over_the_blocks(finished_fit):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = finished_fit().run_dir
    folders = {file.parent for file in run_dir.rglob("events.out.tfevents.*")}
    assert len(folders) == 1
    events = EventAccumulator(str(folders.pop())).Reload()
    report = read_report(run_dir)
    for linear in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        scalars = events.Scalars(f"within_linears/loss/{linear}")
        expected = [row["loss"] for row in report["linears"] if row["name"].endswith(linear)]
        assert [scalar.step for scalar in scalars] == [0, 1, 2]
        assert [scalar.value for scalar in scalars] == pytest.approx(expected)
    # What is the same in every linear is no curve.
    assert not [tag for tag in events.Tags()["scalars"] if "/sparsity/" in tag]
    assert events.Scalars("perplexity/held_out")[-1].value == pytest.approx(
        report["perplexity"]["held_out"]["one_shot"], rel=1e-5
    )


SHORT_TRAINING = (
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=3",
    "--data.train_batch_size=2",
    "--model.learning_rate=0.01",
    "--trainer.enable_checkpointing=false",
)


def test_training_afterwards_keeps_masks_and_reports_both(fit, model_folder, workplace, tmp_path):
    outcome = fit(*SHORT_TRAINING)
    assert outcome.code == 0
    figures = read_report(tmp_path / "run")["perplexity"]["held_out"]
    assert figures["finetuned"] < figures["one_shot"]
    windows = text_windows(workplace, model_folder())
    one_shot = load_compressed(tmp_path / "run" / "export")
    assert perplexity(one_shot, windows) == pytest.approx(figures["one_shot"], rel=1e-4)
    model = load_compressed(tmp_path / "run" / "export_finetuned")
    assert perplexity(model, windows) == pytest.approx(figures["finetuned"], rel=1e-4)
    weight, dense = model.model.layers[0].mlp.up_proj.weight, load_whole(model_folder()).model.layers[0].mlp.up_proj
    assert float((weight == 0).float().mean()) == 0.5
    assert not torch.equal(weight[weight != 0], dense.weight[weight != 0])


def test_training_by_another_optimizer_and_scheduler(fit, tmp_path):
    chosen = [
        "--optimizer=torch.optim.SGD",
        "--optimizer.lr=0.01",
        "--lr_scheduler=torch.optim.lr_scheduler.ExponentialLR",
        "--lr_scheduler.gamma=0.5",
    ]
    outcome = fit(*[option for option in SHORT_TRAINING if "learning_rate" not in option], *chosen)
    assert outcome.code == 0, outcome.message
    figures = read_report(tmp_path / "run")["perplexity"]["held_out"]
    assert figures["finetuned"] != figures["one_shot"]
    settings = json.loads((tmp_path / "run" / "manifest.json").read_text())["training"]
    assert settings["optimizer"]["class_path"] == "torch.optim.SGD"
    assert settings["optimizer"]["init_args"]["lr"] == 0.01
    assert settings["lr_scheduler"]["init_args"]["gamma"] == 0.5
    outcome = fit(*SHORT_TRAINING, *chosen)
    assert "Expected no model.learning_rate with optimizer" in outcome.message


def test_trained_codebooks_are_measured_as_they_are_stored(fit, model_folder, workplace, tmp_path):
    assert fit(*QUANTIZER, *SHORT_TRAINING).code == 0
    figures = read_report(tmp_path / "run")
    measured = figures["perplexity"]["held_out"]["finetuned"]
    model = load_compressed(tmp_path / "run" / "export_finetuned")
    assert perplexity(model, text_windows(workplace, model_folder())) == pytest.approx(measured, rel=1e-7)
    assert figures["seconds"]["finetuning"] > 0


def test_setting_that_failed_can_be_corrected_in_the_same_run_dir_and_export_switched_off(fit, tmp_path):
    assert fit("--compression.compressor.pattern=[2,5]").code != 0
    assert fit("--compression.compressor.pattern=[2,4]", "--export.enabled=false").code == 0
    assert not (tmp_path / "run" / "export").exists()


def test_bfloat16_costs_half_and_comes_back(fit, command_line, model_folder, workplace, tmp_path):
    assert fit(model=model_folder("qwen2", dtype=torch.bfloat16)).code == 0
    report = read_report(tmp_path / "run")
    assert report["bits_per_weight"] == pytest.approx(9)  # half of 16 bits and a mask
    size = sum(file.stat().st_size for file in (tmp_path / "run" / "export").glob("*.safetensors"))
    assert size < 2 * report["num_parameters"] + 4 * 2**12  # with a header in each file
    outcome = command_line(validate_arguments(workplace, tmp_path / "run" / "export", tmp_path / "validation"))
    expected = report["perplexity"]["held_out"]["one_shot"]
    assert perplexity_shown(outcome.output) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_nothing_compressed_is_the_dense_model(fit, model_folder, workplace, tmp_path):
    outcome = fit("--compression.enabled=false")
    assert outcome.code == 0
    expected = perplexity(load_whole(model_folder()), text_windows(workplace, model_folder()))
    assert perplexity_shown(outcome.output) == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert not (tmp_path / "run" / "compressed").exists()


def test_settings_lie_beside_the_report_and_run_again(fit, command_line, tmp_path):
    fit("--compression.compressor.sparsity=0.25")
    (file,) = (tmp_path / "run").rglob("config.yaml")
    settings = yaml.safe_load(file.read_text())
    assert settings["compression"]["compressor"]["init_args"]["sparsity"] == 0.25
    assert settings["run_dir"] == str(tmp_path / "run")
    shutil.copy(file, tmp_path / "again.yaml")
    before = artefacts(tmp_path / "run")
    assert command_line(["fit", f"--config={tmp_path / 'again.yaml'}", f"--run_dir={tmp_path / 'second'}"]).code == 0
    assert artefacts(tmp_path / "second") == before


def test_table_says_the_protocol(finished_fit):
    output = " ".join(finished_fit().outcome.output.split())
    assert f"windows of {SEQ_LEN} tokens, {SEQ_LEN - 1} predictions each" in output
    assert "one-shot" in output
    assert "dense" in output


def test_as_its_own_process_it_says_little(model_folder, workplace, tmp_path):
    """The one thing that a run inside this process cannot show: what stands on the screen."""
    log = tmp_path / "log"
    said = finish(start(fit_arguments(workplace, model_folder(), tmp_path / "run"), log), log)
    assert "Warning" not in said
    assert "Traceback" not in said
    assert (tmp_path / "run" / "report.json").is_file()


@pytest.mark.slow
def test_as_its_own_process_it_fails_in_one_line(finished_fit, model_folder, workplace, tmp_path):
    log = tmp_path / "log"
    finished_fit().copy(tmp_path / "run")
    process = start(
        fit_arguments(workplace, model_folder(), tmp_path / "run", "--compression.compressor.sparsity=0.6"), log
    )
    with pytest.raises(AssertionError, match="choose another run_dir"):
        finish(process, log)
    said = log.read_text()
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "compression.sparsity = 0.5, not 0.6" in said


@pytest.mark.slow
@pytest.mark.skipif(not (EMBEDDED / "model.safetensors").is_file(), reason="there is no embedded model")
def test_default_run_on_the_embedded_model(tmp_path):
    """`python main.py fit` with nothing else, as in the README."""
    log = tmp_path / "log"
    finish(start(["fit"], log), log, timeout=600)
    (file,) = (tmp_path / "runs").glob("*/report.json")
    report = json.loads(file.read_text())
    assert set(report) == REPORT_KEYS
    assert report["model"] == "embedded"
    figures = next(iter(report["perplexity"].values()))
    assert 1 < figures["dense"] < figures["one_shot"] < 10 * figures["dense"]
