"""Blockwise finetuning without the command line: what is trained on, what is kept, what resumes, what is alive."""

import gc
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from stage_runs import compress, plan_of
from tiny_models import artefacts, load_whole, random_tokens
from torch import nn

from callbacks.finetuning import ModelFinetuning
from nowag_pl import ArmorCompressor, NoWagPruner, NoWagQuantizer
from nowag_pl.lit import blockwise
from nowag_pl.lit.block_module import BlockModule
from nowag_pl.lit.block_trainer import BlockTrainer
from nowag_pl.lit.blockwise import finetune_blocks
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.layout import FINETUNED
from nowag_pl.stages import finetuned as finetuning
from nowag_pl.stages.block_inputs import BlockInputs
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.plan import FinetuningSettings

pytest_plugins = ["tiny_fixtures"]

TRAIN, HELD_OUT = random_tokens(7, 16, seed=1), random_tokens(3, 16, seed=2)
COMPRESSORS = {
    "pruner": NoWagPruner(pattern=(2, 4)),
    "quantizer": NoWagQuantizer(subvector_dim=4, codebook_size=32, max_iters=3),
}
ALL_COMPRESSORS = COMPRESSORS | {"armor": ArmorCompressor(block_size=8, max_iters=3)}
SETTINGS = {"max_epochs": 3, "stop_patience": 9, "learning_rate": 3e-3, "batch_size": 3}


class CutError(Exception):
    """The process ends here."""


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def finetuned(model_folder, own_signals, tmp_path):
    """Compress and finetune in a run directory; go on where it stands."""

    def make(name="run", family="qwen2", compressor="pruner", train=TRAIN, folder=None, trainer=None, **settings):
        run = CompressionRun(Checkpoint(str(folder or model_folder(family))), tmp_path / name, plan_of())
        run.calibrate(TRAIN)
        compress(run, ALL_COMPRESSORS[compressor])
        trainer = {"accelerator": "cpu"} | (trainer or {})
        finetune_blocks(run, train, HELD_OUT, FinetuningSettings(**SETTINGS | settings), trainer)
        return run

    return make


@pytest.fixture(scope="module")
def finished_runs() -> dict:
    """Return what `finished` has computed so far."""
    return {}


@pytest.fixture
def finished(finetuned, finished_runs, tmp_path_factory):
    """Return a function that gives a finetuned run, which is computed once and which tests only read."""

    def get(**settings) -> CompressionRun:
        key = tuple(sorted(settings.items()))
        if key not in finished_runs:
            finished_runs[key] = finetuned(tmp_path_factory.mktemp("finished") / "run", **settings)
        return finished_runs[key]

    return get


@pytest.fixture
def finished_copy(finished, tmp_path):
    """Return the folder of a copy of a finished run, which a test may change."""
    return Path(shutil.copytree(finished().store.folder, tmp_path / "run"))


@torch.no_grad()
def hidden_states(model: nn.Module, windows: torch.Tensor) -> list[torch.Tensor]:
    """Return the inputs of every block, and the outputs of the last one."""
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in model.model.layers]
    hooks.append(model.model.layers[-1].register_forward_hook(lambda _, args, output: seen.append(output)))
    model.eval()(windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


RUNS = [{}, {"targets": "parts"}, {"compressor": "quantizer"}, {"family": "llama", "compressor": "armor"}]


@pytest.mark.parametrize("settings", RUNS)
def test_every_block_comes_nearer_to_its_targets(settings, finished):
    run = finished(**settings)
    rows = run.finetuning_statistics()
    assert all(0 < row["after"] <= row["before"] and row["epochs"] == 3 for row in rows)
    assert sum(row["after"] for row in rows) < 0.95 * sum(row["before"] for row in rows)
    run.compressed().check_fixed(run.compressed(finetuned=True).assemble())


@pytest.mark.parametrize("targets", ["block", "parts", "model"])
def test_inputs_and_targets_are_those_of_the_oracle(targets, finetuned, model_folder, monkeypatch):
    pairs = {}
    finetune_block = blockwise.Blockwise._finetune_block

    def spy(self, index, data, report):
        pairs[index] = data.inputs.take(range(10)), data.targets.take(range(10))
        return finetune_block(self, index, data, report)

    monkeypatch.setattr(blockwise.Blockwise, "_finetune_block", spy)
    run = finetuned(targets=targets)
    windows = torch.cat([TRAIN, HELD_OUT])
    compressed, dense = run.compressed(finetuned=True).assemble(), load_whole(model_folder("qwen2"))
    inputs, own_stream = hidden_states(compressed, windows), hidden_states(dense, windows)
    assert sorted(pairs) == [0, 1, 2]
    for index, (hidden, wanted) in pairs.items():
        torch.testing.assert_close(hidden, inputs[index], atol=1e-5, rtol=1e-5)
        expected = own_stream[index + 1]
        if targets == "block":
            block = run.model.load_block(index)
            arguments = run.model.arguments(index, 10, 16)
            with torch.no_grad():
                expected = run.model.forward_block(block, hidden, arguments)
        if targets == "parts":
            block = run.model.load_block(index)
            with torch.no_grad():
                attended = block.self_attn(block.input_layernorm(hidden), **run.model.arguments(index, 10, 16))[0]
                after = block.mlp(block.post_attention_layernorm(hidden + attended))
            expected = torch.cat([attended, after], dim=-1)
        torch.testing.assert_close(wanted, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(pairs[1][0], own_stream[1], atol=1e-3)


def test_reported_error_is_the_oracles(finished):
    run = finished()
    hidden = hidden_states(run.compressed(finetuned=True).assemble(), HELD_OUT)[2]
    dense = run.model.load_block(2)

    @torch.no_grad()
    def output(block):
        return run.model.forward_block(block, hidden, run.model.arguments(2, 3, 16)).double()

    wanted = output(dense)
    scale = float((wanted - hidden).square().mean())
    row = run.finetuning_statistics()[2]
    for key, load in {"before": finetuning.load_compressed_block, "after": finetuning.load_finetuned_block}.items():
        error = float((output(load(run.model, run.store, 2)) - wanted).square().mean()) / scale
        assert row[key] == pytest.approx(error, rel=1e-3)


@pytest.fixture
def one_block(finetuned, model_folder):
    """Finetune a model of one block."""
    return lambda name="run", **settings: finetuned(name, folder=model_folder("qwen2", num_blocks=1), **settings)


HELD_OUT_ERRORS = [1.0, 0.9, 0.95, 0.95, 0.95, 0.8, 0.8]  # the third to fifth epoch gain nothing


@pytest.fixture
def scripted(monkeypatch):
    """Let held-out errors be those above; return learning rate and state of the block by epoch."""
    rates, states, errors = {}, {}, BlockModule._errors

    def scripted_errors(self, batch):
        if self.trainer.validating:
            states[self.current_epoch] = {key: value.clone() for key, value in self.block.state_dict().items()}
            return torch.full((len(batch["weight"]),), HELD_OUT_ERRORS[self.current_epoch])
        rates[self.current_epoch] = self.optimizers().param_groups[0]["lr"]
        return errors(self, batch)

    monkeypatch.setattr(BlockModule, "_errors", scripted_errors)
    return rates, states


@pytest.mark.parametrize(("patience", "halvings"), [(0, [0, 0, 0, 1, 2, 3, 3]), (1, [0, 0, 0, 0, 1, 1, 1])])
def test_learning_rate_is_halved_after_epochs_without_gain(patience, halvings, one_block, scripted):
    one_block(plateau_patience=patience, stop_patience=9, max_epochs=7, learning_rate=0.008)
    assert list(scripted[0].values()) == pytest.approx([0.008 / 2**number for number in halvings])


@pytest.mark.parametrize(("patience", "epochs", "best"), [(2, 4, 1), (4, 7, 5)])
def test_training_stops_after_epochs_without_gain_and_keeps_the_best(patience, epochs, best, one_block, scripted):
    run = one_block(stop_patience=patience, max_epochs=7)
    (row,), states = run.finetuning_statistics(), scripted[1]
    assert row["epochs"] == len(states) == epochs
    kept = finetuning.load_finetuned_block(run.model, run.store, 0).state_dict()
    assert all(torch.equal(kept[name], states[best][name]) for name in kept)
    assert not all(torch.equal(kept[name], states[best - 1][name]) for name in kept)


def test_two_accumulated_batches_are_one_of_twice_the_size(one_block):
    settings = {"train": random_tokens(8, 16, seed=1), "max_epochs": 2}

    def trained(name, **more):
        run = one_block(name, **settings, **more)
        return finetuning.load_finetuned_block(run.model, run.store, 0).state_dict()

    large, single = trained("large", batch_size=4), trained("single", batch_size=2)
    accumulated = trained("accumulated", batch_size=2, accumulate_grad_batches=2)
    name = "mlp.down_proj.values"
    torch.testing.assert_close(accumulated[name], large[name], atol=2e-4, rtol=0)
    assert (single[name] - large[name]).abs().max() > 2e-3


@pytest.mark.parametrize("largest", [1e-3, 1e9])
def test_gradients_are_clipped(largest, one_block, monkeypatch):
    norms = []

    def on_train_batch_end(self, *args):
        gradients = [parameter.grad for parameter in self.parameters()]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    monkeypatch.setattr(BlockModule, "on_train_batch_end", on_train_batch_end)
    one_block(gradient_clip_val=largest, max_epochs=1)
    assert len(norms) == 3
    if largest < 1:
        assert norms == pytest.approx([largest] * 3, rel=1e-2)
    else:
        assert all(1e-2 < norm < 1e3 for norm in norms)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_block_computes_in_the_asked_precision(precision, one_block, monkeypatch):
    used, training_step = set(), BlockModule.training_step

    def spying(self, *args):
        used.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        assert {parameter.dtype for parameter in self.parameters()} == {torch.float32}
        return training_step(self, *args)

    monkeypatch.setattr(BlockModule, "training_step", spying)
    one_block(trainer={"precision": precision}, max_epochs=1)
    assert used == {(precision == "bf16-mixed", torch.bfloat16)}


@pytest.mark.parametrize(
    ("asked", "accelerator", "supported", "taken"),
    [
        ("auto", CUDAAccelerator, True, "bf16-mixed"),
        ("auto", CUDAAccelerator, False, "32-true"),
        ("auto", CPUAccelerator, True, "32-true"),
        ("32-true", CUDAAccelerator, True, "32-true"),
        ("bf16-mixed", CPUAccelerator, False, "bf16-mixed"),
    ],
)
def test_bfloat16_is_taken_where_the_device_has_it(asked, accelerator, supported, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    outer = SimpleNamespace(accelerator=accelerator(), device_ids=[1], num_devices=1, num_nodes=1)
    settings = ModelFinetuning(precision=asked)._trainer_settings(outer)
    assert settings["precision"] == taken
    assert settings["devices"] == ([1] if accelerator is CUDAAccelerator else 1)


def test_block_that_only_gets_worse_is_left_as_it_was(finetuned):
    run = finetuned(learning_rate=1e3, gradient_clip_val=1e9)
    for index, row in enumerate(run.finetuning_statistics()):
        assert row["after"] == row["before"]
        before = finetuning.load_compressed_block(run.model, run.store, index).state_dict()
        after = finetuning.load_finetuned_block(run.model, run.store, index).state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_all_that_is_continuous_is_trained(finished):
    run = finished(compressor="quantizer")
    before = finetuning.load_compressed_block(run.model, run.store, 0)
    after = finetuning.load_finetuned_block(run.model, run.store, 0)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new), name
    kinds = {name.rpartition(".")[2] for name, _ in before.named_parameters()}
    assert kinds == {"codebook", "in_scale", "out_scale", "bias", "weight"}  # weight: of the norms


def test_bfloat16_block_is_trained_in_float32_and_stored_as_it_was(finetuned, model_folder):
    run = finetuned(folder=model_folder("qwen2", dtype=torch.bfloat16))
    for index in range(3):
        before = finetuning.load_compressed_block(run.model, run.store, index).state_dict()
        after = run.store.read(FINETUNED, index)[0]
        assert {name: tensor.dtype for name, tensor in after.items()} == {
            name: tensor.dtype for name, tensor in before.items()
        }
    assert sum(row["after"] < row["before"] for row in run.finetuning_statistics()) >= 2


def test_mapped_hidden_states_give_the_same_blocks_and_may_come_later(finetuned, finished_copy, tmp_path):
    before = artefacts(tmp_path / "run")
    (tmp_path / "run" / "finetuned" / "block_002.safetensors").unlink()
    finetuned(activations="disk")
    assert artefacts(tmp_path / "run") == before


def test_lost_block_is_made_again_as_it_was_and_nothing_temporary_is_left(finetuned, finished_copy, tmp_path):
    before = artefacts(tmp_path / "run")
    (tmp_path / "run" / "finetuned" / "block_001.safetensors").unlink()
    finetuned()
    assert artefacts(tmp_path / "run") == before
    names = sorted(file.name for file in (tmp_path / "run" / "finetuned").iterdir())
    assert names == [*(f"block_{index:03d}.safetensors" for index in range(3)), "checkpoints"]
    assert not list((tmp_path / "run" / "finetuned" / "checkpoints").iterdir())


def test_size_of_the_hidden_states_is_told_before(finetuned, caplog):
    with caplog.at_level("INFO", "nowag_pl"):
        finetuned(max_epochs=1)
    assert "Finetuning 3 blocks on 7 sequences, held out 3: hidden states take up to 0.04 MiB in host" in caplog.text


def cut_at(monkeypatch, step, module=BlockModule, name="training_step"):
    """Raise when a step is taken for the n-th time."""
    original, count = getattr(module, name), 0

    def cutting(*args, **kwargs):
        nonlocal count
        count += 1
        if count == step:
            raise CutError
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, cutting)


SLOW_CUTS = [("block", 1), ("block", 10), ("block", 27), ("model", 9)]


# 3 steps in an epoch, 3 epochs in a block: inside the first epoch, a later one, later blocks
@pytest.mark.parametrize(
    ("targets", "step"),
    [("block", 5), ("model", 14), *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW_CUTS)],
)
def test_cut_run_goes_on_to_the_same_bytes(targets, step, finetuned, finished, tmp_path, monkeypatch):
    settings = {"targets": targets} if targets != "block" else {}
    whole = finished(**settings).store.folder
    with monkeypatch.context() as patch:
        cut_at(patch, step)
        with pytest.raises(CutError):
            finetuned("cut", **settings)
    steps = []
    training_step = BlockModule.training_step
    monkeypatch.setattr(BlockModule, "training_step", lambda *args: (steps.append(0), training_step(*args))[1])
    blocks_done = len(list((tmp_path / "cut" / "finetuned").glob("block_*")))
    assert blocks_done == (step - 1) // 9
    finetuned("cut", **settings)
    assert len(steps) == 27 - (step - 1) // 3 * 3  # whole epochs are not trained again
    assert artefacts(tmp_path / "cut") == artefacts(whole)


@pytest.mark.parametrize("compressor", ["quantizer", pytest.param("pruner", marks=pytest.mark.slow)])
def test_run_cut_behind_the_last_epoch_trains_no_more(compressor, finetuned, tmp_path, monkeypatch):
    settings = {"stop_patience": 1, "max_epochs": 12, "learning_rate": 0.03, "compressor": compressor}
    steps = []
    training_step = BlockModule.training_step
    monkeypatch.setattr(BlockModule, "training_step", lambda *args: (steps.append(0), training_step(*args))[1])
    run = finetuned("whole", **settings)
    assert any(row["epochs"] < 12 for row in run.finetuning_statistics())
    steps_of_whole = len(steps)
    for write in (1, 2, 2):  # of the first block, then of the next one
        with monkeypatch.context() as patch:
            cut_at(patch, write, finetuning, "write_block")
            with pytest.raises(CutError):
                finetuned("cut", **settings)
    finetuned("cut", **settings)
    assert len(steps) == 2 * steps_of_whole
    assert artefacts(tmp_path / "cut") == artefacts(tmp_path / "whole")


def test_resume_reads_no_finished_block(finetuned, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        cut_at(patch, 20)
        with pytest.raises(CutError):
            finetuned()
    read = []
    load_block = StreamedModel.load_block
    monkeypatch.setattr(
        StreamedModel, "load_block", lambda self, index, *args: (read.append(index), load_block(self, index, *args))[1]
    )
    finetuned()
    assert set(read) == {2}


def test_finished_run_does_nothing_again(finetuned, finished_copy, monkeypatch):
    monkeypatch.setattr(StreamedModel, "load_block", lambda *args: pytest.fail("a block was read"))
    finetuned()


def test_other_settings_are_refused_and_named(finetuned, finished_copy, tmp_path):
    for change, name in [
        ({"learning_rate": 1e-4}, r"finetuning\.learning_rate = 0\.003, not 0\.0001"),
        ({"targets": "model"}, r"finetuning\.targets = 'block', not 'model'"),
        ({"train": TRAIN.flip(0)}, r"finetuning\.train_sha256"),
    ]:
        with pytest.raises(ValueError, match=rf"{name}.*choose another run_dir, or delete \S+finetuned to start again"):
            finetuned(**change)
    for file in (tmp_path / "run" / "compressed").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"compression\.compressor = 'NoWagPruner', not 'NoWagQuantizer'"):
        finetuned(compressor="quantizer")


ONE_SET = 10 * 16 * 32 * 4  # bytes of the hidden states of all sequences in front of a block


def sizes(tensors) -> tuple[int, float]:
    """Return the bytes of tensors of at least 256, but for hidden states `[..., 16, 32]`, and the sets of these."""
    weights, hidden = {}, {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        kind = hidden if tensor.shape[-2:] == (16, 32) else weights
        kind[storage.data_ptr()] = storage.nbytes()
    return sum(size for size in weights.values() if size >= 256), sum(hidden.values()) / ONE_SET


@pytest.mark.parametrize(("targets", "compressor"), [("block", "pruner"), ("model", "quantizer")])
def test_one_block_and_two_sets_of_hidden_states_are_alive(targets, compressor, finetuned, monkeypatch):
    """On the host as well as on the device."""
    seen, places, finetune = {}, ["making targets"], blockwise.Blockwise.finetune

    def watch(patch, owner, name, place=None):
        original = getattr(owner, name)

        def watching(*args):
            places.append(place or places[-1])
            alive = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and not each.is_meta]
            seen.setdefault(places[-1], []).append(sizes(alive))
            try:
                return original(*args)
            finally:
                places.pop()

        patch.setattr(owner, name, watching)

    def watched(self, missing):
        gc.collect()
        gc.freeze()  # only what is made from here on is looked at
        with monkeypatch.context() as patch:
            watch(patch, StreamedModel, "forward_block")
            watch(patch, BlockTrainer, "train", "training")
            watch(patch, blockwise.Blockwise, "_mean_square", "measuring")
            watch(patch, BlockInputs, "advance", "advancing")
            watch(patch, finetuning, "write_block", "writing")
            finetune(self, missing)

    monkeypatch.setattr(blockwise.Blockwise, "finetune", watched)
    run = finetuned(compressor=compressor, targets=targets, max_epochs=2, batch_size=1)
    dense, _ = sizes(run.model.load_block(0).state_dict().values())
    compressed, _ = sizes(finetuning.load_compressed_block(run.model, run.store, 0).state_dict().values())
    weights = {place: max(size for size, _ in each) for place, each in seen.items()}
    hidden = {place: max(number for _, number in each) for place, each in seen.items()}
    embeddings = 2 * 16 * 8 * 4  # of the positions
    assert 3 * compressed < weights.pop("training") <= 4 * compressed + embeddings  # with gradients and moments
    assert dense - compressed < weights.pop("making targets") <= dense + embeddings
    assert weights.keys() == {"measuring", "advancing", "writing"}
    assert all(compressed <= size <= compressed + embeddings for size in weights.values())
    assert hidden.pop("making targets") < (2.5 if targets == "block" else 3.5)  # one is the file that is written
    assert all(1 <= number < 2.5 for number in hidden.values())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_epochs": 0}, "max_epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches"),
        ({"stop_patience": 0}, "stop_patience"),
        ({"plateau_patience": -1}, "plateau_patience"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"gradient_clip_val": -1.0}, "gradient_clip_val"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=rf"finetuning\.{name}"):
        FinetuningSettings(**settings)


def test_errors_of_every_block_lie_in_its_artefact(finished):
    run = finished()
    for row in run.finetuning_statistics():
        assert len(row["curve"]) == row["epochs"] == 3
        assert min(row["curve"]) == pytest.approx(row["after"], rel=0.05)
    rows = run.finetuning_statistics()
    assert json.loads(json.dumps(rows)) == rows


def test_left_overs_of_a_process_killed_after_the_last_block_are_removed(finetuned, finished_copy, tmp_path):
    folder = finished_copy / "finetuned"
    for name in ("hidden/prefix_002.0_of_1.npy", "checkpoints/block_002/last.ckpt"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    before = artefacts(tmp_path / "run")
    finetuned()
    assert sorted(path.name for path in folder.iterdir()) == [f"block_{index:03d}.safetensors" for index in range(3)]
    assert artefacts(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["last", "best"])
def test_block_with_a_damaged_checkpoint_begins_anew(name, finetuned, finished, monkeypatch, tmp_path):
    whole = finished().store.folder

    def cut(self, index, path):
        raise CutError

    monkeypatch.setattr(blockwise.Blockwise, "_trained", cut)
    with pytest.raises(CutError):
        finetuned()
    monkeypatch.undo()
    file = tmp_path / "run" / "finetuned" / "checkpoints" / "block_000" / f"{name}.ckpt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    finetuned()
    assert artefacts(tmp_path / "run") == artefacts(whole)


def test_another_precision_of_the_blocks_is_refused(finetuned):
    finetuned(max_epochs=1, trainer={"precision": "32-true"})
    with pytest.raises(ValueError, match=r"finetuning\.precision = '32-true', not 'bf16-mixed'"):
        finetuned(max_epochs=1, trainer={"precision": "bf16-mixed"})
