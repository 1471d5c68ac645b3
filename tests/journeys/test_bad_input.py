"""Bad input ends in one or two sentences on the command line and an exit code, never in a traceback.

`command_line` lets exceptions through that main.py does not turn into a message: such a test fails with the traceback
that a user would see.
"""

import errno
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    HARD_TIMEOUT,
    SEQ_LEN,
    Outcome,
    artefacts,
    copy_model,
    edit_json,
    edit_tensors,
    fit_arguments,
    save_tiny_model,
    start,
    validate_arguments,
)

from nowag_pl.files import read_tensors

DISTILLATION = "--model.objective={class_path: nowag_pl.lit.objectives.Distillation, init_args: {temperature: "
pytest_plugins = ["tiny_fixtures"]

MOST_CHARACTERS = 600  # of a message, a path counting as little


@pytest.fixture
def fit(command_line, model_folder, workplace, tmp_path):
    """Run a fit of the tiny Llama in tmp_path/run; arguments replace the usual ones."""

    def run(*more: str, model: Path | str | None = None) -> Outcome:
        return command_line(fit_arguments(workplace, model or model_folder(), tmp_path / "run", *more))

    return run


@pytest.fixture
def own_model(model_folder, tmp_path):
    """Return a copy of the tiny Llama that a test may damage."""
    return copy_model(model_folder(), tmp_path / "own_model")


def assert_refused(outcome: Outcome, *patterns: str) -> None:
    """Check for a short error that says all of `patterns`, and nothing that smells of a traceback."""
    message = outcome.message
    assert outcome.code != 0, outcome.output
    for pattern in patterns:
        assert re.search(pattern, message, re.DOTALL), f"no {pattern!r} in {message!r}"
    assert "Traceback" not in message
    assert 'File "' not in message
    shortened = re.sub(r"/[\w./-]+", "/path", message)
    assert len(shortened) <= MOST_CHARACTERS, message


def test_no_such_model_folder(fit):
    assert_refused(fit(model="/no/such/folder"), "no folder", "/no/such/folder")


def test_relative_folder_that_is_not_there(fit):
    assert_refused(fit(model="./typo"), "no folder", "typo")


def test_hub_id_that_cannot_be_fetched(fit, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused(fit(model="nobody/no-such-model"), "nobody/no-such-model", "could not be fetched")


def test_folder_without_config(fit, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_refused(fit(model=tmp_path / "empty"), "empty", "config.json")


def test_model_of_pickles_is_refused_by_name_and_never_opened(fit, own_model, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (own_model / "model.safetensors").unlink()
    torch.save({"weight": Bomb()}, own_model / "pytorch_model.bin")
    assert_refused(fit(model=own_model), "pickle", "pytorch_model.bin", "safetensors")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("command", ["validate", pytest.param("fit", marks=pytest.mark.slow)])
def test_truncated_weights(command, command_line, own_model, workplace, tmp_path):
    file = own_model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    arguments = {"fit": fit_arguments, "validate": validate_arguments}[command](workplace, own_model, tmp_path / "run")
    assert_refused(command_line(arguments), "model.safetensors", "cut short")


@pytest.mark.parametrize("command", ["fit", pytest.param("validate", marks=pytest.mark.slow)])
def test_weights_of_another_shape_than_the_configuration_says(command, command_line, own_model, workplace, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(own_model, {name: torch.zeros(44, 32)})
    arguments = {"fit": fit_arguments, "validate": validate_arguments}[command](workplace, own_model, tmp_path / "run")
    assert_refused(command_line(arguments), r"mlp\.up_proj\.weight")


@pytest.mark.parametrize("command", ["fit", pytest.param("validate", marks=pytest.mark.slow)])
def test_missing_tensor_is_named(command, command_line, own_model, workplace, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(own_model, {name: None})
    arguments = {"fit": fit_arguments, "validate": validate_arguments}[command](workplace, own_model, tmp_path / "run")
    assert_refused(command_line(arguments), re.escape(name))


def test_fewer_blocks_than_the_configuration_says(fit, own_model, tmp_path):
    edit_json(own_model / "config.json", num_hidden_layers=9)
    assert_refused(fit(model=own_model), r"model\.layers\.\d\.")
    assert not list(tmp_path.rglob("block_*.safetensors"))


def test_missing_tensor_of_a_tied_model_is_named(fit, tmp_path):
    folder = save_tiny_model(tmp_path / "tied", tied=True)
    edit_tensors(folder, {"model.norm.weight": None})
    assert_refused(fit(model=folder), r"model\.norm\.weight")


def test_configuration_that_is_no_json(fit, own_model):
    (own_model / "config.json").write_text('{"model_type": "llama", ')
    assert_refused(fit(model=own_model), "config", str(own_model))


def test_family_that_transformers_does_not_know(fit, own_model):
    edit_json(own_model / "config.json", model_type="imaginary")
    assert_refused(fit(model=own_model), "imaginary")


def test_model_that_is_no_causal_language_model(fit, own_model):
    (own_model / "config.json").write_text('{"model_type": "vit"}')
    assert_refused(fit(model=own_model), "(?i)vit")


def test_model_without_tokenizer(fit, own_model):
    (own_model / "tokenizer.json").unlink()
    (own_model / "tokenizer_config.json").unlink()
    assert_refused(fit(model=own_model), "tokenizer", str(own_model))


def test_tokenizer_of_another_model(fit, tmp_path):
    folder = save_tiny_model(tmp_path / "small_vocabulary", vocab_size=100)
    assert_refused(fit(model=folder), "vocabulary|tokenizer", "100")


def test_nan_weights_name_their_linear(fit, own_model):
    name = "model.layers.1.mlp.down_proj"
    weight = load_file(own_model / "model.safetensors")[f"{name}.weight"]
    weight[3, 5] = float("nan")
    edit_tensors(own_model, {f"{name}.weight": weight})
    assert_refused(fit(model=own_model), re.escape(name), "NaN")


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm", "model.layers.1.input_layernorm"])
def test_nan_outside_the_linears_is_named_before_anything_is_written(name, fit, own_model, tmp_path):
    weight = load_file(own_model / "model.safetensors")[f"{name}.weight"]
    edit_tensors(own_model, {f"{name}.weight": weight * float("nan")})
    assert_refused(fit(model=own_model), f"{re.escape(name)}: Expected finite weights")
    assert not list(tmp_path.glob("run/*/*.safetensors"))


def test_calibration_text_shorter_than_a_sequence(fit, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    outcome = fit(f"--data.calibration_files=[{tmp_path / 'short.txt'}]")
    assert_refused(outcome, f"seq_len = {SEQ_LEN}", "more text|smaller")


def test_evaluation_text_shorter_than_a_window(fit, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    outcome = fit(f"--data.eval_files={{mine: {tmp_path / 'short.txt'}}}")
    assert_refused(outcome, f"seq_len = {SEQ_LEN}", "more text|smaller")


def test_sequences_longer_than_the_context(fit):
    assert_refused(fit("--data.seq_len=65"), "seq_len", "64", "65")


@pytest.mark.parametrize("option", ["calibration_files", "eval_files"])
def test_text_that_is_not_there(option, fit):
    value = {"calibration_files": "[/no/such.txt]", "eval_files": "{mine: /no/such.txt}"}[option]
    assert_refused(fit(f"--data.{option}={value}"), r"/no/such\.txt")


@pytest.mark.parametrize("option", ["calibration_files", "eval_files"])
def test_text_that_is_not_utf8(option, fit, tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("déjà vu ".encode("latin-1") * 500)
    value = {"calibration_files": f"[{path}]", "eval_files": f"{{mine: {path}}}"}[option]
    assert_refused(fit(f"--data.{option}={value}"), r"latin1\.txt", "UTF-8")


@pytest.mark.parametrize("option", ["calibration_files", "eval_files"])
def test_rows_without_text(option, fit, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "of the model"}\n')
    value = {"calibration_files": f"[{path}]", "eval_files": f"{{mine: {path}}}"}[option]
    assert_refused(fit(f"--data.{option}={value}"), rf"data\.{option}", r"rows\.jsonl", "column 'text'", "body")


def test_folder_instead_of_a_text(fit, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    assert_refused(fit(f"--data.eval_files={{mine: {folder}}}"), r"data\.eval_files\.mine", "saved dataset", "folder")


def test_dataset_without_network_names_the_file_that_would_do(fit, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    dataset = "{path: nobody/nothing, data_files: en/part.json.gz, protocol: c4}"
    outcome = fit(f"--data.eval_datasets={{c4: {dataset}}}")
    assert_refused(outcome, r"data\.eval_datasets\.c4", "en/part.json.gz of nobody/nothing", "data_files")


def test_stream_without_an_end(fit):
    outcome = fit("--data.calibration_dataset.path=nobody/nothing", "--data.calibration_dataset.streaming=true")
    assert_refused(outcome, "max_documents")


def test_pattern_that_does_not_divide_names_the_linear(fit):
    outcome = fit("--compression.compressor.sparsity=null", "--compression.compressor.pattern=[2, 5]")
    assert_refused(outcome, r"model\.layers\.0\.\S+proj", "divisible by 5")


@pytest.mark.parametrize(
    ("setting", "patterns"),
    [
        ("sparsity=1.5", ["sparsity", r"1\.5"]),
        ("pattern=[4, 2]", ["pattern"]),
        ("sparsity=half", ["sparsity", "half"]),
    ],
)
def test_setting_out_of_range(setting, patterns, fit):
    assert_refused(fit(f"--compression.compressor.{setting}"), *patterns)


def test_sparsity_beside_a_pattern(fit):
    outcome = fit("--compression.compressor.sparsity=0.5", "--compression.compressor.pattern=[2, 4]")
    assert_refused(outcome, "sparsity or pattern")


def test_more_codewords_than_subvectors_names_the_linear_before_anything_is_written(fit, tmp_path):
    outcome = fit(
        "--compression.compressor=nowag_pl.NoWagQuantizer",
        "--compression.compressor.subvector_dim=4",
        "--compression.compressor.codebook_size=256",
    )
    assert_refused(outcome, r"model\.layers\.0\.self_attn\.[kv]_proj", "256", "128")
    assert not list((tmp_path / "run").glob("*/*.safetensors"))


@pytest.mark.parametrize(
    ("setting", "pattern"),
    [
        ("--trainer.limit_val_batches=1", "limit_val_batches.*max_eval_windows"),
        ("--trainer.limit_val_batches=0", "limit_val_batches"),
        ("--trainer.overfit_batches=2", "overfit_batches"),
        ("--trainer.fast_dev_run=true", "fast_dev_run"),
        ("--trainer.max_steps=3", "max_epochs of at least 1 with trainer.max_steps"),
        ("--ckpt_path=.", "folder of other files"),
        ("--ckpt_path=http://localhost/a.ckpt", "on this machine, but got the address"),
        (f"{DISTILLATION}2}}}}", "max_epochs of at least 1 with model.objective"),
        (f"{DISTILLATION}-1}}}}", "^Expected model.objective.temperature above 0, but got -1"),
        ("--compression.budget.num_sequences=0", "^Expected compression.budget.num_sequences of at least 1"),
        ("--data.calibration_files=[]", r"data.calibration_files, but got \[\]"),
        ("--data.eval_files={}", "data.eval_files, but got {}"),
        ("--data.eval_files={mine:text.txt}", "a space after the colon"),
        ("--run_dir=", "run_dir to name a folder"),
        ("--trainer.devices=0", "devices"),
    ],
)
def test_option_that_would_do_something_else_than_it_says(setting, pattern, fit, tmp_path):
    assert_refused(fit(setting), pattern)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("setting", "pattern"),
    [
        ("--model.learning_rate=-1", "model.learning_rate above 0"),
        ("--model.weight_decay=-1", "model.weight_decay of at least 0"),
        ("--model.warmup_fraction=2", "model.warmup_fraction of at least 0 and below 1"),
        (
            DISTILLATION.replace("temperature", "top_k") + "4000}}",
            "model.objective.top_k of at most 2048",
        ),
        ("--ckpt_path=absent.ckpt", "absent.ckpt is not there"),
        ("--ckpt_path=notes.txt", "notes.txt is another file, or damaged"),
        ("--trainer.max_epochs=-2", "max_epochs"),
        ("--checkpoint.every_n_train_steps=-1", "every_n_train_steps"),
    ],
)
def test_training_is_refused_before_anything_is_compressed(setting, pattern, fit, tmp_path):
    (tmp_path / "notes.txt").write_text("no checkpoint")
    assert_refused(fit("--trainer.max_epochs=1", setting), pattern)
    assert not list(tmp_path.rglob("manifest.json"))


def test_run_dir_that_is_a_file_or_the_model(fit, own_model, tmp_path):
    (tmp_path / "notes.txt").touch()
    assert_refused(fit(f"--run_dir={tmp_path / 'notes.txt'}"), "run_dir", "is a file")
    for run_dir in (own_model, own_model / "run", own_model.parent):
        assert_refused(fit(f"--run_dir={run_dir}", model=own_model), "run_dir and model.path to be apart")


def test_run_dir_that_holds_the_data_by_a_link(fit, workplace, tmp_path):
    before = (workplace / "eval.txt").read_bytes()
    (tmp_path / "run").symlink_to(workplace, target_is_directory=True)
    assert_refused(fit(), "run_dir and data.* to be apart")
    assert (workplace / "eval.txt").read_bytes() == before
    assert not (workplace / "manifest.json").exists()


TRAINING = ("--trainer.max_epochs=1", "--data.max_train_windows=4")


def test_training_that_diverges_exports_nothing(fit, tmp_path):
    assert_refused(fit(*TRAINING, "--model.learning_rate=1e30"), "stay finite", r"model.learning_rate than 1e\+30")
    assert not (tmp_path / "run" / "export_finetuned").exists()
    assert not (tmp_path / "run" / "training" / "last.ckpt").exists()


def test_checkpoint_of_another_method(fit, tmp_path):
    assert fit(*TRAINING).code == 0
    method = "{class_path: nowag_pl.NoWagQuantizer, init_args: {subvector_dim: 4, codebook_size: 16}}"
    other = (f"--compression.compressor={method}", f"--run_dir={tmp_path / 'other'}")
    checkpoint = tmp_path / "run" / "training" / "last.ckpt"
    assert_refused(fit(*TRAINING, *other, f"--ckpt_path={checkpoint}"), "this model and method")


def test_run_dir_below_a_file(command_line, model_folder, workplace, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = command_line(fit_arguments(workplace, model_folder(), tmp_path / "file" / "run"))
    assert_refused(outcome, "file/run|run_dir", "(?i)could not|cannot|not a directory")


def replace_on_a_disk_that_is_full_at(part):
    replace = os.replace

    def full(source, target):
        if part in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    return full


def test_full_disk_keeps_what_is_finished_and_the_run_goes_on_afterwards(fit, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_on_a_disk_that_is_full_at("compressed/block_001"))
        outcome = fit()
    assert_refused(outcome, "No space left", "same command again")
    assert "Errno" not in outcome.message
    run_dir = tmp_path / "run"
    assert [file.name for file in run_dir.glob("compressed/*")] == ["block_000.safetensors"]
    assert not list(run_dir.glob("**/*.tmp"))
    before = (run_dir / "compressed/block_000.safetensors").stat().st_mtime_ns
    read_tensors(run_dir / "compressed/block_000.safetensors")
    assert fit().code == 0
    assert (run_dir / "compressed/block_000.safetensors").stat().st_mtime_ns == before
    assert (run_dir / "report.json").is_file()


def test_full_disk_while_tensors_are_written(fit, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(fit(), "No space left", "Could not write")
    assert not list((tmp_path / "run").glob("**/*.tmp"))


def test_full_disk_while_the_model_is_exported(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", replace_on_a_disk_that_is_full_at("export"))
    assert_refused(fit(), "No space left", "export")
    assert len(artefacts(tmp_path / "run")) > 0


def test_damaged_artefact_is_kept_by_name_and_made_anew(finished_run, fit, tmp_path):
    before = artefacts(tmp_path / "run")
    file = tmp_path / "run" / "compressed" / "block_001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert fit().code == 0
    assert file.with_name("block_001.safetensors.damaged").exists()
    assert artefacts(tmp_path / "run") == before


def test_misspelt_key_on_the_command_line(fit, tmp_path):
    outcome = fit("--compression.compressor.sparsty=0.5")
    assert_refused(outcome, "sparsty")
    assert not (tmp_path / "run").exists()


def test_misspelt_key_in_a_file(fit, tmp_path):
    (tmp_path / "mine.yaml").write_text("calibration:\n  num_sequence: 4\n")
    outcome = fit(f"--config={tmp_path / 'mine.yaml'}")
    assert_refused(outcome, "num_sequence")
    assert not (tmp_path / "run").exists()


def test_config_file_that_is_not_there(fit):
    assert_refused(fit("--config=/no/such.yaml"), r"/no/such\.yaml")


def test_unknown_compressor(fit):
    assert_refused(fit("--compression.compressor=nowag_pl.NoWagPrunner"), "NoWagPrunner")


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("--calibration.num_sequences=0", "num_sequences"),
        ("--calibration.batch_size=0", "batch_size"),
        ("--calibration.mode=sparse", "mode"),
        ("--data.seq_len=1", "seq_len"),
        ("--data.max_eval_windows=0", "max_eval_windows"),
        ("--report.batch_size=0", "batch_size"),
        ("--model.dtype=int4", "dtype"),
    ],
)
def test_number_out_of_range_names_its_setting(setting, name, fit):
    assert_refused(fit(setting), name)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("--calibration.mode=propagated", r"calibration\.mode = 'dense', not 'propagated'"),
        ("--data.seq_len=16", r"calibration\.seq_len = 32, not 16"),
        ("--compression.compressor.sparsity=0.6", r"compression\.sparsity = 0\.5, not 0\.6"),
        ("--model.dtype=bfloat16", r"model\.dtype = 'float32', not 'bfloat16'"),
    ],
)
def test_changed_setting_in_the_same_run_dir_is_named(change, name, finished_run, fit, tmp_path):
    before = {file: file.read_bytes() for file in (tmp_path / "run").glob("*/*.safetensors")}
    assert_refused(fit(change), name, "choose another run_dir")
    assert {file: file.read_bytes() for file in (tmp_path / "run").glob("*/*.safetensors")} == before


def test_another_model_in_the_same_run_dir(finished_run, fit, model_folder):
    assert_refused(fit(model=model_folder(seed=1)), r"model", "choose another run_dir")


def test_artefacts_without_a_manifest(finished_run, fit, tmp_path):
    (tmp_path / "run" / "manifest.json").unlink()
    assert_refused(fit(), r"manifest\.json", "run_dir")


@pytest.fixture
def finished_run(finished_fit, tmp_path):
    """Put a finished run of the tiny Llama into tmp_path/run."""
    return finished_fit().copy(tmp_path / "run")


def test_damaged_export_is_refused(command_line, finished_run, workplace, tmp_path):
    export = tmp_path / "run" / "export"
    for name in ("config.json", "model-00003-of-00004.safetensors"):
        content = (export / name).read_bytes()
        (export / name).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        outcome = command_line(validate_arguments(workplace, export, tmp_path / "validation"))
        assert_refused(outcome, name, "SHA-256")
        (export / name).write_bytes(content)


def test_ctrl_c_while_the_program_imports_is_no_traceback(tmp_path):
    stopping = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / "lightning.py").write_text(stopping)
    process = start(["fit"], tmp_path / "log", PYTHONPATH=str(tmp_path))
    assert process.wait(HARD_TIMEOUT) == -signal.SIGINT
    assert (tmp_path / "log").read_text() == ""
