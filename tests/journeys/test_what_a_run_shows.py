"""What a run shows: TensorBoard, report.html, `compare`, lines of progress, the command line's own help."""

import json
import re

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tiny_models import ROOT, finish, fit_arguments, start

pytest_plugins = ["tiny_fixtures"]

INSPECTED = ("--inspection.enabled=true", "--inspection.max_blocks=2", "--inspection.linears=[q_proj,mlp.up_proj]")
QUANTIZER = ("--compression.compressor=nowag_pl.NoWagQuantizer", "--compression.compressor.codebook_size=16")
LINEARS = ("self_attn.q_proj", "mlp.up_proj")


@pytest.fixture
def fit(command_line, model_folder, workplace, tmp_path):
    def run(*more: str, name: str = "run"):
        return command_line(fit_arguments(workplace, model_folder(), tmp_path / name, *more))

    return run


def events(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), {"images": 0, "tensors": 0}).Reload()


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def steps(found: EventAccumulator, tag: str) -> list[int]:
    return [image.step for image in found.Images(tag)]


def test_pruned_run_shows_its_linears_blocks_and_itself(fit, tmp_path):
    assert fit(*INSPECTED).code == 0
    folder = tmp_path / "run" / "lightning_logs" / "version_0"
    found, report = events(folder), json.loads((tmp_path / "run" / "report.json").read_text())
    tags = found.Tags()
    assert set(tags["images"]) == {*(f"weights/{name}" for name in LINEARS), "model/linears"}
    assert all(steps(found, f"weights/{name}") == [0, 2] for name in LINEARS)
    assert set(tags["histograms"]) == {
        f"{kind}/{name}" for kind in ("weight", "normalized_weight", "log10_importance") for name in LINEARS
    }
    for kind in ("alone", "accumulated"):
        scalars = found.Scalars(f"within_blocks/error_{kind}_one_shot")
        assert [scalar.step for scalar in scalars] == [0, 1, 2]
        assert all(0 < scalar.value < 5 for scalar in scalars)
    text = found.Tensors("summary/one_shot/text_summary")[0].tensor_proto.string_val[0].decode()
    figures = report["perplexity"]["held_out"]
    assert f"| held_out | {figures['dense']:.3f} | {figures['one_shot']:.3f} |" in text
    assert "17.000 bits per weight" in text

    assert report["damage"]["one_shot"]["divergence"] == pytest.approx(
        [scalar.value for scalar in found.Scalars("within_blocks/kl_divergence_after_one_shot")], rel=1e-5
    )
    # One run of TensorBoard for one run, and figures that are the same in every linear are left out.
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []
    assert {tag for tag in tags["scalars"] if "q_proj" in tag} == {"within_linears/loss/self_attn.q_proj"}
    table = found
    assert table.Scalars("perplexity/held_out/dense")[0].value == pytest.approx(figures["dense"], rel=1e-5)
    assert table.Scalars("perplexity/held_out/one_shot")[0].value == pytest.approx(figures["one_shot"], rel=1e-5)
    start_info = metadata.parse_session_start_info_plugin_data(
        table.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    )
    settings = {name: value.WhichOneof("kind") for name, value in start_info.hparams.items()}
    assert start_info.hparams["compression.sparsity"].number_value == 0.5
    assert start_info.hparams["compression.compressor"].string_value == "NoWagPruner"
    assert not [name for name in settings if "sha256" in name]


def test_quantized_and_finetuned_run_shows_codewords_and_curves(fit, tmp_path):
    finetuning = ("--finetuning.enabled=true", "--finetuning.num_sequences=2", "--finetuning.num_held_out=1")
    assert fit(*INSPECTED, *QUANTIZER, *finetuning, "--finetuning.max_epochs=2").code == 0
    folder = tmp_path / "run" / "lightning_logs" / "version_0"
    found, report = events(folder), json.loads((tmp_path / "run" / "report.json").read_text())
    assert steps(found, "codewords/mlp.up_proj") == [0, 2]
    assert steps(found, "model/finetuning") == [0]
    for key in ("before", "after"):
        values = [scalar.value for scalar in found.Scalars(f"within_blocks/held_out_error_{key}")]
        assert values == pytest.approx([row[key] for row in report["finetuned_blocks"]], rel=1e-5)
    assert len(found.Scalars("within_blocks/error_alone_blockwise")) == 3
    measured = report["perplexity"]["held_out"]["finetuned"]
    for index, row in enumerate(report["finetuned_blocks"]):
        curve = [scalar.value for scalar in found.Scalars(f"train/held_out_error/block_{index:03d}")]
        assert curve == pytest.approx(row["curve"], rel=1e-5)
        assert len(curve) == 2
    assert not list((tmp_path / "run").glob("finetuning"))
    value = found.Scalars("perplexity/held_out/blockwise")[0].value
    assert value == pytest.approx(measured, rel=1e-5)


def test_inspection_and_page_can_be_switched_off(finished_fit):
    run_dir = finished_fit().run_dir
    assert not events(run_dir / "lightning_logs" / "version_0").Tags()["images"]
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("setting", "least"), [("inspection.max_blocks", 1), ("inspection.max_image_size", 1), ("report.damage_windows", 0)]
)
def test_limits_of_what_is_shown_are_checked(setting, least, fit):
    outcome = fit(f"--{setting}={least - 1}")
    assert outcome.code == 1
    assert f"{setting} of at least {least}, but got {least - 1}" in outcome.message


def test_two_runs_are_compared(fit, command_line, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    outcome = fit("--report.html=true", "--report.prompts=[the model]", "--report.max_new_tokens=4")
    assert outcome.code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in page
    (sample,) = json.loads((tmp_path / "run" / "report.json").read_text())["samples"]
    assert sample.keys() == {"prompt", "dense", "one_shot"}
    assert sample["prompt"] == "the model"
    assert "<h2>Continuations</h2>" in page
    assert "Divergence after each block" in page
    assert "Greedy continuations" in outcome.output
    assert fit(*QUANTIZER, "--data.seq_len=16", name="second").code == 0
    page = tmp_path / "compare.html"
    runs = [str(tmp_path / name) for name in ("run", "second")]
    outcome = command_line(["compare", *runs, "--output", str(page)])
    assert outcome.code == 0
    said = " ".join(outcome.output.split())
    assert "tokens per window (seq_len)" in said
    assert f"{report_of(tmp_path / 'run')['top1_agreement']['held_out']['one_shot']:.3f}" in said
    for name in ("run", "second"):
        value = json.loads((tmp_path / name / "report.json").read_text())["perplexity"]["held_out"]["one_shot"]
        assert f"{value:.3f}" in said
        assert f"{value:.3f}" in page.read_text()


def test_comparison_of_a_folder_without_a_report_says_so(command_line, tmp_path):
    outcome = command_line(["compare", str(tmp_path / "nothing")])
    assert outcome.code == 1
    assert "there is no report.json" in outcome.message


@pytest.mark.slow
def test_two_ranks_say_everything_once(model_folder, workplace, tmp_path):
    log = tmp_path / "log"
    two = ("--trainer.devices=2", "--trainer.strategy=ddp")
    said = finish(start(fit_arguments(workplace, model_folder(), tmp_path / "run", *two), log), log)
    for stage in ("Calibrating", "Compressing", "Dense model on held_out", "Model on held_out"):
        for number in (1, 2, 3):
            assert len(re.findall(rf"^{stage}: block {number} of 3\b", said, flags=re.MULTILINE)) == 1
    ours = [line for line in said.splitlines() if line.strip() and "rank" not in line.lower()]
    repeated = {line for line in ours if ours.count(line) > 1 and re.search(r"[a-z]{4}", line)}
    assert repeated == set(), said


def test_printed_configuration_runs_again_as_it_was(command_line, tmp_path):
    arguments = [
        "fit",
        f"--config={ROOT / 'configs/method/nowag_p_2_4.yaml'}",
        "--calibration.num_sequences=3",
        "--data.eval_files={mine: a.txt}",
        "--inspection.linears=[up_proj]",
    ]
    printed = command_line([*arguments, "--print_config"]).output
    (tmp_path / "printed.yaml").write_text(printed)
    again = command_line(["fit", f"--config={tmp_path / 'printed.yaml'}", "--print_config"]).output
    assert again == printed
    settings = yaml.safe_load(again)
    assert settings["compression"]["compressor"]["init_args"]["pattern"] == [2, 4]
    assert settings["data"]["eval_files"] == {"mine": "a.txt"}


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("--compression.compressor=NoWagPrunner", "nowag_pl.NoWagPruner"),
        ("--compression.compressor.sparsty=0.7", "sparsity"),
        ("--calibration.num_sequnces=3", "--calibration.num_sequences"),
        ("--calibration.mode=propagatd", "propagated"),
        ("--config={configs}/method/nowag_p_2_5.yaml", "nowag_p_2_4.yaml"),
        ("--model.dtype=floot32", "float32"),
    ],
)
def test_wrong_value_suggests_the_right_one(wrong, meant, command_line):
    outcome = command_line(["fit", wrong.format(configs=ROOT / "configs")])
    assert outcome.code in (1, 2)
    assert re.search(rf"did you mean \S*{re.escape(meant)}\?", outcome.message)


def test_every_option_of_ours_is_explained(command_line):
    said = command_line(["fit", "--help"]).output
    groups = "model|data|calibration|compression|finetuning|report|inspection|export|run_dir"
    options = re.findall(rf"^  (--(?:{groups})[\w.]*)[^\n]*\n((?: {{8,}}[^\n]*\n)*)", said, flags=re.MULTILINE)
    explained = {name: " ".join(text.split()) for name, text in options}
    assert len(explained) > 50
    for name, text in explained.items():
        if "." in name and not name.endswith(".help"):
            assert re.match(r".*\w{3,}.*\(type: .*default: ", text), name
