"""Blockwise and end-to-end finetuning through the command line."""

import gc
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import load_file
from test_fit_and_validate import perplexity, read_report, text_windows
from tiny_models import HARD_TIMEOUT, ROOT, artefacts, finish, fit_arguments, load_whole, start, validate_arguments
from torch.distributed.checkpoint import FileSystemReader

from nowag_pl import load_compressed
from nowag_pl.lit import blockwise
from nowag_pl.lit.block_module import BlockModule
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.preemption import Preemption

pytest_plugins = ["tiny_fixtures"]

EXIT_CODE = 128 + signal.SIGTERM

METHODS = {
    "nowag_p_2_4": ("--compression.compressor=nowag_pl.NoWagPruner", "--compression.compressor.pattern=[2,4]"),
    "nowag_vq": (
        "--compression.compressor=nowag_pl.NoWagQuantizer",
        "--compression.compressor.subvector_dim=4",
        "--compression.compressor.codebook_size=16",
    ),
    "armor_2_4": (
        "--compression.compressor=nowag_pl.ArmorCompressor",
        "--compression.compressor.block_size=8",
        "--compression.compressor.max_iters=5",
    ),
}
BLOCKWISE = (
    "--finetuning.enabled=true",
    "--finetuning.num_sequences=10",
    "--finetuning.num_held_out=3",
    "--finetuning.batch_size=4",
    "--finetuning.max_epochs=2",
    "--finetuning.learning_rate=0.003",
)
END_TO_END = (
    "--trainer.max_epochs=2",
    "--model.learning_rate=0.003",
    "--model.weight_decay=0",
    "--data.train_batch_size=4",
    "--data.max_train_windows=14",
)
DISTILLED = "--model.objective=nowag_pl.lit.objectives.Distillation"
DISTILLATION = (*END_TO_END, DISTILLED, "--model.objective.temperature=1.5")


def also_slow(*values):
    """Return further values of a test, for the slow suite."""
    return [pytest.param(*(each if isinstance(each, tuple) else (each,)), marks=pytest.mark.slow) for each in values]


class CutError(Exception):
    """The process ends here."""


@pytest.fixture
def fit(command_line, model_folder, workplace, tmp_path):
    def run(*more: str, name="run", model=None):
        return command_line(fit_arguments(workplace, model or model_folder("qwen2"), tmp_path / name, *more))

    return run


@pytest.fixture
def distilled(finished_fit):
    """Return the folder of a run that is distilled from one end to the other, and is run once."""
    return finished_fit(*DISTILLATION, family="qwen2").run_dir


def stored_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def exported(run_dir) -> dict[str, torch.Tensor]:
    return stored_tensors(run_dir / "export_finetuned")


def assert_equal_tensors(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def unpacked_zeros(model) -> int:
    return sum(int((layer.mlp.up_proj.weight == 0).sum()) for layer in model.model.layers)


@pytest.mark.parametrize("method", ["nowag_vq", *also_slow("nowag_p_2_4", "armor_2_4")])
def test_blockwise_finetuning_wins_perplexity_back(method, fit, command_line, workplace, tmp_path):
    assert fit(*METHODS[method], *BLOCKWISE).code == 0
    report = read_report(tmp_path / "run")
    figures = report["perplexity"]["held_out"]
    assert list(figures) == ["dense", "one_shot", "finetuned"]
    assert report["kl_divergence"]["held_out"]["finetuned"] < report["kl_divergence"]["held_out"]["one_shot"]
    assert [row["after"] < row["before"] for row in report["finetuned_blocks"]].count(True) >= 2
    assert report["seconds"]["finetuning"] > 0
    outcome = command_line(validate_arguments(workplace, tmp_path / "run" / "export_finetuned", tmp_path / "val"))
    assert outcome.code == 0
    model = load_compressed(tmp_path / "run" / "export_finetuned")
    folder = tmp_path / "run" / "export"
    assert perplexity(model, text_windows(workplace, folder)) == pytest.approx(figures["finetuned"], rel=1e-5)
    assert unpacked_zeros(model) == unpacked_zeros(load_compressed(folder))


@pytest.mark.parametrize("method", ["armor_2_4", *also_slow("nowag_p_2_4", "nowag_vq")])
def test_end_to_end_goes_on_from_the_finetuned_blocks(method, fit, workplace, tmp_path):
    outcome = fit(*METHODS[method], *BLOCKWISE, *DISTILLATION)
    assert outcome.code == 0
    report = read_report(tmp_path / "run")
    figures = report["perplexity"]["held_out"]
    assert list(figures) == ["dense", "one_shot", "blockwise", "finetuned"]
    divergences = report["kl_divergence"]["held_out"]
    assert divergences["finetuned"] < divergences["blockwise"] < divergences["one_shot"]
    assert "│ blockwise │" in " ".join(outcome.output.split())
    model, before = load_compressed(tmp_path / "run" / "export_finetuned"), load_compressed(tmp_path / "run" / "export")
    windows = text_windows(workplace, tmp_path / "run" / "export")
    assert perplexity(model, windows) == pytest.approx(figures["finetuned"], rel=1e-5)
    fixed = {name: buffer for name, buffer in before.named_buffers() if name.endswith(("mask", "codes"))}
    assert len(fixed) == 21
    assert all(torch.equal(model.get_buffer(name), buffer) for name, buffer in fixed.items())
    sizes = [
        sum(tensor.nbytes for tensor in stored_tensors(tmp_path / "run" / name).values())
        for name in ("export", "export_finetuned")
    ]
    assert sizes[0] == sizes[1]


def test_distilling_the_likeliest_tokens(fit, tmp_path):
    assert fit(*METHODS["nowag_p_2_4"], *END_TO_END, DISTILLED, "--model.objective.top_k=64").code == 0
    divergences = read_report(tmp_path / "run")["kl_divergence"]["held_out"]
    assert divergences["finetuned"] < divergences["one_shot"]
    assert {file.name.split("_")[2] for file in (tmp_path / "run" / "reference").glob("*_top*")} == {"top64"}


def test_bfloat16_model_is_trained_in_float32_and_stored_as_it_was(fit, model_folder, tmp_path):
    assert fit(*BLOCKWISE, *DISTILLATION, model=model_folder("qwen2", dtype=torch.bfloat16)).code == 0
    before = stored_tensors(tmp_path / "run" / "export")
    after = exported(tmp_path / "run")
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    divergences = read_report(tmp_path / "run")["kl_divergence"]["held_out"]
    assert divergences["finetuned"] < divergences["one_shot"]


def test_embeddings_and_head_stay_as_they_are(fit, model_folder, tmp_path):
    assert fit(*END_TO_END).code == 0
    after, dense = exported(tmp_path / "run"), load_whole(model_folder("qwen2")).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name], dense[name])
    assert not torch.equal(after["model.norm.weight"], dense["model.norm.weight"])


def test_finished_run_trains_nothing_again(fit, finished_fit, tmp_path, monkeypatch, caplog):
    finished_fit(*BLOCKWISE, *DISTILLATION, family="qwen2").copy(tmp_path / "run")
    first, tensors = read_report(tmp_path / "run"), exported(tmp_path / "run")
    for module in (BlockModule, LitCausalLM):
        monkeypatch.setattr(module, "training_step", lambda *args: pytest.fail("something was trained"))
    assert fit(*BLOCKWISE, *DISTILLATION).code == 0
    assert "earlier command" not in caplog.text
    second = read_report(tmp_path / "run")
    for report in (first, second):
        for key in ("sha256", "seconds", "peak_memory_bytes", "peak_memory", "command"):
            del report[key]
    assert first == second
    assert_equal_tensors(exported(tmp_path / "run"), tensors)


# There are 4 steps in an epoch.
@pytest.mark.parametrize("step", [6, *also_slow(2, 8)])
def test_end_to_end_training_that_is_cut_goes_on_to_the_same_bytes(step, distilled, fit, tmp_path, monkeypatch):
    training_step, steps = LitCausalLM.training_step, []

    def cutting(*args):
        steps.append(0)
        if len(steps) == step:
            raise CutError
        return training_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LitCausalLM, "training_step", cutting)
        with pytest.raises(CutError):
            fit(*DISTILLATION)
    steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(LitCausalLM, "training_step", lambda *args: (steps.append(0), training_step(*args))[1])
        assert fit(*DISTILLATION).code == 0
    assert len(steps) == 8 - (step - 1) // 4 * 4
    assert_equal_tensors(exported(tmp_path / "run"), exported(distilled))


@pytest.mark.parametrize("stops", [(4, 5), *also_slow(((2, 8),))])
def test_sigterm_behind_any_step_loses_none(stops, fit, tmp_path, monkeypatch):
    training_step = LitCausalLM.training_step

    def steps_of(stop=None, **settings):
        steps = []

        def spying(self, batch, batch_index):
            loss = training_step(self, batch, batch_index)
            rate = self.optimizers().param_groups[0]["lr"]
            steps.append((self.trainer.current_epoch, batch["index"].tolist(), rate, float(loss)))
            if len(steps) == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss

        with monkeypatch.context() as patch:
            patch.setattr(LitCausalLM, "training_step", spying)
            assert fit(*DISTILLATION, **settings).code == (EXIT_CODE if stop else 0)
        return steps

    whole = steps_of(name="whole")
    for stop in stops:
        assert steps_of(stop=stop, name=str(stop)) + steps_of(name=str(stop)) == whole
        assert_equal_tensors(exported(tmp_path / str(stop)), exported(tmp_path / "whole"))


def test_signal_whose_exception_is_lost_stops_before_the_next_block(fit, tmp_path, monkeypatch):
    class Lossy:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    collect = gc.collect
    with monkeypatch.context() as patch:
        patch.setattr(blockwise.gc, "collect", lambda: (Lossy(), collect())[1])
        assert fit(*BLOCKWISE).code == 128 + signal.SIGINT
    assert len(list((tmp_path / "run" / "finetuned").glob("block_*.safetensors"))) == 1
    assert fit(*BLOCKWISE).code == 0


def test_finetuned_export_of_an_earlier_command_is_named(fit, distilled, tmp_path, caplog):
    shutil.copytree(distilled, tmp_path / "run")
    assert fit().code == 0
    assert "run/export_finetuned is of an earlier command" in caplog.text


@pytest.mark.parametrize("checkpoints", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sigterm_between_two_epochs_loses_none(checkpoints, distilled, fit, tmp_path, monkeypatch, caplog):
    settings = (*DISTILLATION, f"--trainer.enable_checkpointing={checkpoints}")
    on_train_epoch_end = Preemption.on_train_epoch_end

    def stopping(self, trainer, pl_module):
        on_train_epoch_end(self, trainer, pl_module)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Preemption, "on_train_epoch_end", stopping)
        assert fit(*settings).code == EXIT_CODE
    assert "Training is saved in" in caplog.text
    assert fit(*settings).code == 0
    assert_equal_tensors(exported(tmp_path / "run"), exported(distilled))


@pytest.mark.parametrize(
    ("step", "every"),
    [(4, 4), (5, 3), *also_slow((3, 3), (4, 1), (5, 1))],
)
def test_run_cut_after_a_checkpoint_between_epochs(step, every, distilled, fit, tmp_path, monkeypatch):
    settings = (*DISTILLATION, f"--checkpoint.every_n_train_steps={every}")
    training_step, on_validation_start, steps = LitCausalLM.training_step, LitCausalLM.on_validation_start, []

    def cutting(self, *args):
        if len(steps) == step:
            raise CutError
        steps.append(0)
        return training_step(self, *args)

    def cutting_validation(self):
        if self.trainer.state.fn == TrainerFn.FITTING and len(steps) == step:
            raise CutError
        on_validation_start(self)

    with monkeypatch.context() as patch:
        patch.setattr(LitCausalLM, "training_step", cutting)
        patch.setattr(LitCausalLM, "on_validation_start", cutting_validation)
        with pytest.raises(CutError):
            fit(*settings)
    assert fit(*settings).code == 0
    assert_equal_tensors(exported(tmp_path / "run"), exported(distilled))


def test_end_to_end_training_from_a_named_checkpoint(fit, distilled, tmp_path):
    shutil.copytree(distilled, tmp_path / "run")
    tensors = exported(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere.ckpt"
    (tmp_path / "run" / "training" / "last.ckpt").rename(elsewhere)
    assert fit(*DISTILLATION, f"--ckpt_path={elsewhere}").code == 0
    assert_equal_tensors(exported(tmp_path / "run"), tensors)


def test_changed_settings_are_refused_by_name(fit, finished_fit, tmp_path):
    finished_fit(*BLOCKWISE, *DISTILLATION, family="qwen2").copy(tmp_path / "run")
    for change, name in {
        "--model.learning_rate=0.001": "training.learning_rate = 0.003, not 0.001",
        "--model.warmup_fraction=0.5": "training.warmup_fraction = 0.05, not 0.5",
        "--trainer.max_epochs=1": "training.max_epochs = 2, not 1",
        "--finetuning.learning_rate=0.001": "finetuning.learning_rate = 0.003, not 0.001",
        "--model.objective.temperature=2": "training.objective.temperature = 1.5, not 2",
        "--data.max_train_windows=9": "training.tokens_sha256",
    }.items():
        outcome = fit(*BLOCKWISE, *DISTILLATION, change)
        assert outcome.code == 1
        assert name in outcome.message
        assert "to start again" in outcome.message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--finetuning.enabled=true", "--compression.enabled=false"), "compression.enabled with finetuning.enabled"),
        ((*DISTILLATION, "--compression.enabled=false"), "compression.enabled with model.objective of Distillation"),
        ((*END_TO_END, "--trainer.precision=bf16-true"), "trainer.precision of 32-true, bf16-mixed or 16-mixed"),
        (("--finetuning.enabled=true", "--finetuning.num_held_out=0"), "finetuning.num_held_out of at least 1"),
        (("--finetuning.enabled=true", "--finetuning.max_epochs=0"), "finetuning.max_epochs of at least 1"),
        ((*END_TO_END, DISTILLED, "--model.objective.top_k=0"), "model.objective.top_k of at least 1"),
        ((*END_TO_END, DISTILLED, "--model.objective.top_k=4000"), "model.objective.top_k of at most 2048"),
    ],
)
def test_bad_settings_are_refused(arguments, message, fit):
    outcome = fit(*arguments)
    assert outcome.code != 0
    assert message in outcome.message


def stop_when(process, ready, log, signum) -> int:
    """Send a signal to a process as soon as `ready`; return its exit code."""
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signum)
    return process.wait(60)


LONG = (
    "--finetuning.max_epochs=4",
    "--finetuning.stop_patience=9",
    "--trainer.max_epochs=8",
    "--data.train_batch_size=2",
)


@pytest.mark.parametrize(
    "signum",
    [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGKILL))],
)
@pytest.mark.parametrize(
    "point",
    ["training/last.ckpt", pytest.param("finetuned/checkpoints/block_001/last.ckpt", marks=pytest.mark.slow)],
)
def test_stopped_process_goes_on_to_the_same_bytes(point, signum, fit, model_folder, workplace, tmp_path):
    settings = (*BLOCKWISE, *DISTILLATION, *LONG)
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = fit_arguments(workplace, model_folder("qwen2"), run_dir, *settings)
    code = stop_when(start(arguments, log), (run_dir / point).exists, log, signum)
    said = log.read_text()
    assert not (run_dir / "export_finetuned").exists() or "training" in point
    if signum != signal.SIGKILL:
        assert code == 128 + signum, said
        assert f"Stopped by {signum.name}; the same command goes on" in said
        assert "Training is saved in" in said or "training" not in point  # blockwise it may be between two blocks
        assert "Traceback" not in said
    else:
        assert code == -signum
    assert fit(*settings).code == 0
    assert fit(*settings, name="whole").code == 0
    assert_equal_tensors(exported(run_dir), exported(tmp_path / "whole"))
    assert artefacts(run_dir) == artefacts(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_outside_of_training_stops_at_once(signum, fit, model_folder, workplace, tmp_path):
    run_dir, log, stage = tmp_path / "run", tmp_path / "log", "moments/block_001.safetensors"
    arguments = fit_arguments(workplace, model_folder("qwen2", num_blocks=12), run_dir)
    assert stop_when(start(arguments, log), (run_dir / stage).exists, log, signum) == 128 + signum
    assert f"Stopped by {signum.name}" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert fit(model=model_folder("qwen2", num_blocks=12)).code == 0


TWO = (f"--config={ROOT / 'configs/trainer/ddp.yaml'}", "--trainer.accelerator=cpu", "--trainer.devices=2")
FSDP = (f"--config={ROOT / 'configs/trainer/fsdp2.yaml'}", "--trainer.accelerator=cpu", "--trainer.devices=2")
UNEVEN = ("--calibration.num_sequences=7", "--finetuning.num_sequences=9")


def saved_parts(checkpoint) -> dict[str, list[torch.Size]]:
    """Return the sizes of the parts in which a model's tensors are saved, one for each rank."""
    saved = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    own = {name: entry for name, entry in saved.items() if name.startswith("state_dict.")}
    return {name: [chunk.sizes for chunk in entry.chunks] for name, entry in own.items()}


def assert_said_once(said: str) -> None:
    """Check that what two processes say stands on the screen once."""
    for stage in ("Calibrating", "Compressing", "Dense model on held_out"):
        # Without a terminal, a stage says at least how it ended.
        assert len(re.findall(rf"^{stage}: block 3 of 3\b", said, flags=re.MULTILINE)) == 1
    lines = [line for line in said.splitlines() if line.strip() and "rank" not in line.lower()]
    # Every validation measures the model anew.
    ours = [line for line in lines if not line.startswith(("Model on held_out", "Measuring held_out"))]
    repeated = {line for line in ours if ours.count(line) > 1 and re.search(r"[a-z]{4}", line)}
    assert repeated == set(), said


def assert_equal_one_shot(one, two) -> None:
    """Check that two ranks have compressed to the same masks, codes and values from the same second moments."""
    first, second = artefacts(one), artefacts(two)
    reports = [read_report(folder) for folder in (one, two)]
    assert reports[0]["calibration"] == reports[1]["calibration"]
    assert [row["name"] for row in reports[0]["linears"]] == [row["name"] for row in reports[1]["linears"]]
    for index in range(3):
        name = f"compressed/block_{index:03d}.safetensors"
        assert first[name][0] == second[name][0]
        moments = [load_file(folder / "moments" / f"block_{index:03d}.safetensors") for folder in (one, two)]
        torch.testing.assert_close(moments[1], moments[0], rtol=1e-5, atol=0)
    for phase in ("dense", "one_shot"):
        figures = [report["perplexity"]["held_out"][phase] for report in reports]
        assert figures[1] == pytest.approx(figures[0], rel=1e-6)


@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        ("fsdp2", "nowag_vq"),
        pytest.param("ddp", "nowag_p_2_4", marks=pytest.mark.slow),
        pytest.param("ddp", "nowag_vq", marks=pytest.mark.slow),
        pytest.param("fsdp2", "nowag_p_2_4", marks=pytest.mark.slow),
        pytest.param("ddp", "armor_2_4", marks=pytest.mark.slow),
        pytest.param("fsdp2", "armor_2_4", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_are_one_rank(strategy, method, fit, model_folder, workplace, tmp_path):
    settings = (*METHODS[method], *BLOCKWISE, *DISTILLATION, *UNEVEN)
    two = {"ddp": TWO, "fsdp2": FSDP}[strategy]
    assert fit(*settings, "--data.train_batch_size=6", name="one").code == 0
    log = tmp_path / "log"
    arguments = fit_arguments(workplace, model_folder("qwen2"), tmp_path / "two", *settings, *two)
    said = finish(start([arguments[0], *arguments[1:], "--data.train_batch_size=3"], log), log)
    assert_said_once(said)
    one, many = read_report(tmp_path / "one"), read_report(tmp_path / "two")
    assert_equal_one_shot(tmp_path / "one", tmp_path / "two")
    for phase in ("dense", "one_shot", "blockwise", "finetuned"):
        assert many["perplexity"]["held_out"][phase] == pytest.approx(one["perplexity"]["held_out"][phase], rel=1e-3)
    first, second = exported(tmp_path / "one"), exported(tmp_path / "two")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if tensor.dtype == torch.uint8 or "mask" in name or "codes" in name:
            assert torch.equal(second[name], tensor), name
        else:
            torch.testing.assert_close(second[name], tensor, rtol=2e-2, atol=2e-3)
    assert json.loads((tmp_path / "two" / "report.json").read_text())["finetuned_blocks"]
    if strategy == "fsdp2":
        parts = saved_parts(tmp_path / "two" / "training" / "last.ckpt")
        fixed = {name for name in parts if name.endswith(("codes", "mask"))}
        assert len(fixed) == 21
        # Codes as well as values, a part for each process.
        assert all(len(sizes) == 2 for sizes in parts.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nowag_vq", "armor_2_4"])
def test_validate_shards_a_compressed_model(method, fit, command_line, workplace, tmp_path):
    assert fit(*METHODS[method]).code == 0
    log = tmp_path / "log"
    finish(start(validate_arguments(workplace, tmp_path / "run" / "export", tmp_path / "val", *FSDP), log), log)
    expected = read_report(tmp_path / "run")["perplexity"]["held_out"]["one_shot"]
    assert f"{expected:.3f}" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("point", ["finetuned/checkpoints/block_001/last.ckpt", "training/last.ckpt"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_stop_together_and_go_on(strategy, point, fit, model_folder, workplace, tmp_path):
    settings = (*BLOCKWISE, *DISTILLATION, *LONG, *{"ddp": TWO, "fsdp2": FSDP}[strategy])
    log = tmp_path / "log"
    whole = fit_arguments(workplace, model_folder("qwen2"), tmp_path / "whole", *settings)
    finish(start(whole, log), log)
    arguments = fit_arguments(workplace, model_folder("qwen2"), tmp_path / "run", *settings)
    code = stop_when(start(arguments, log), (tmp_path / "run" / point).exists, log, signal.SIGTERM)
    assert code == EXIT_CODE, log.read_text()
    assert "Traceback" not in log.read_text()
    finish(start(arguments, log), log)
    assert_equal_tensors(exported(tmp_path / "run"), exported(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_a_sharded_training_goes_on_with_another_number_of_ranks(num_ranks, model_folder, workplace, tmp_path):
    def arguments(name: str, ranks: int) -> list[str]:
        more = (f"--trainer.devices={ranks}", f"--data.train_batch_size={8 // ranks}", "--model.recompute=true")
        return fit_arguments(workplace, model_folder("qwen2"), tmp_path / name, *DISTILLATION, *LONG, *FSDP, *more)

    log, point = tmp_path / "log", tmp_path / "run" / "training" / "last.ckpt"
    finish(start(arguments("whole", 2), log), log, 2 * HARD_TIMEOUT)
    assert stop_when(start(arguments("run", 2), log), point.exists, log, signal.SIGTERM) == EXIT_CODE, log.read_text()
    finish(start(arguments("run", num_ranks), log), log, 2 * HARD_TIMEOUT)
    first, second = exported(tmp_path / "whole"), exported(tmp_path / "run")
    for name, tensor in first.items():
        # Sums over ranks have another order.
        torch.testing.assert_close(second[name], tensor, rtol=2e-2, atol=2e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", ["finetuned/checkpoints/block_001/last.ckpt", "training/last.ckpt"])
def test_dead_rank_ends_the_other(point, rank, model_folder, workplace, tmp_path):
    import psutil

    log = tmp_path / "log"
    settings = (*BLOCKWISE, *DISTILLATION, *LONG, *TWO)
    process = start(fit_arguments(workplace, model_folder("qwen2"), tmp_path / "run", *settings), log)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / point).exists():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.001)
        children = psutil.Process(process.pid).children(recursive=True)
        victim = process.pid if rank == 0 else next(c.pid for c in children if "main.py" in " ".join(c.cmdline()))
        os.kill(victim, signal.SIGKILL)
        code = process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
        assert code == -signal.SIGKILL if rank == 0 else code > 0
        assert re.search(rf"\[rank{1 - rank}\]: [\w.]*Error: ", log.read_text())
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_one_gpu_is_near_the_cpu(strategy, method, fit, model_folder, workplace, tmp_path):
    settings = (*METHODS[method], *BLOCKWISE, *DISTILLATION)
    assert fit(*settings, name="cpu").code == 0
    log = tmp_path / "log"
    more = ("--trainer.accelerator=cuda", "--trainer.devices=1", f"--trainer.strategy={strategy}")
    arguments = fit_arguments(workplace, model_folder("qwen2"), tmp_path / "gpu", *settings, *more)
    finish(start(arguments, log, CUDA_VISIBLE_DEVICES="0"), log)
    cpu, gpu = (read_report(tmp_path / name)["kl_divergence"]["held_out"] for name in ("cpu", "gpu"))
    for phase, value in cpu.items():
        assert gpu[phase] == pytest.approx(value, rel=0.1)
