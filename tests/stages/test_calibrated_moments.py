"""Second moments against an oracle: hooks on the whole model, sums in float64."""

import gc
import re

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import WINDOWS, calibrated, compress, run_of
from tiny_models import FAMILIES, copy_model, edit_tensors, load_whole
from torch import Tensor, nn

from nowag_pl import NoWagPruner, SecondMoment
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.layout import MOMENTS
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages import compression
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.hidden import HiddenStates
from nowag_pl.stages.moments import Observed

pytest_plugins = ["tiny_fixtures"]


@torch.no_grad()
def oracle(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Return the mean square of every input feature of every linear in the blocks, all in float64."""
    model = model.double()
    inputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("model.layers."):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, 1))
            )
    for window in windows:
        model(window[None], use_cache=False)
    return {name: torch.cat(rows).square().mean(dim=0) for name, rows in inputs.items()}


def moments_of(run: CompressionRun) -> dict[str, Tensor]:
    """Return the stored second moments by the linears' names in the model."""
    return {
        f"{run.model.block_name(index)}.{name}": tensor
        for index in range(len(run.model))
        for name, tensor in run.store.read(MOMENTS, index)[0].items()
    }


def assert_equal_moments(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(actual[name].double(), tensor, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_moments_are_the_oracles(family, model_folder, tmp_path):
    folder = model_folder(family, sharded=True)
    run = calibrated(folder, tmp_path / "run")
    assert_equal_moments(moments_of(run), oracle(load_whole(folder), WINDOWS))


def test_batch_size_does_not_matter(model_folder, tmp_path):
    one, *others = (
        moments_of(calibrated(model_folder("mistral"), tmp_path / str(size), batch_size=size)) for size in (1, 2, 7, 99)
    )
    for other in others:
        assert_equal_moments(other, {name: tensor.double() for name, tensor in one.items()})


def test_propagated_moments_are_those_behind_the_compressed_prefix(model_folder, tmp_path):
    folder, compressor = model_folder("qwen2"), NoWagPruner(sparsity=0.7)
    run = calibrated(folder, tmp_path / "run", "propagated")
    compress(run, compressor)
    actual = moments_of(run)

    whole = load_whole(folder).double()
    for index, block in enumerate(whole.model.layers):
        expected = oracle(whole, WINDOWS)  # blocks before `index` hold compressed weights
        prefix = f"model.layers.{index}."
        names = [name for name in expected if name.startswith(prefix)]
        assert_equal_moments({name: actual[name] for name in names}, {name: expected[name] for name in names})
        linears = compression.read_block(run.store, index)
        with torch.no_grad():
            for name, linear in linears.items():
                block.get_submodule(name).weight.copy_(linear.weight)


def test_propagated_and_dense_agree_on_the_first_block_alone(model_folder, tmp_path):
    dense = moments_of(calibrated(model_folder(), tmp_path / "dense"))
    run = calibrated(model_folder(), tmp_path / "propagated", "propagated")
    compress(run, NoWagPruner(sparsity=0.7))
    propagated = moments_of(run)
    first = [name for name in dense if name.startswith("model.layers.0.")]
    last = [name for name in dense if name.startswith("model.layers.2.")]
    assert all(torch.equal(dense[name], propagated[name]) for name in first)
    assert not any(torch.allclose(dense[name], propagated[name], rtol=1e-3) for name in last)


def test_propagated_writes_no_moments_before_it_compresses(model_folder, tmp_path):
    run = calibrated(model_folder(), tmp_path / "run", "propagated")
    assert run.store.missing(MOMENTS, 3) == [0, 1, 2]


def test_metadata_counts_every_token_once(model_folder, tmp_path):
    run = calibrated(model_folder(), tmp_path / "run")
    assert [run.store.read_metadata(MOMENTS, index)["num_tokens"] for index in range(3)] == [7 * 24] * 3


class Alone(Ranks):
    """One rank of several that hears nothing of the others."""

    def broadcast(self, value):
        return value

    def gather(self, value):
        return [value]


def test_each_rank_takes_its_share_of_the_sequences(model_folder, tmp_path):
    folder, total = model_folder(), {}
    for rank in range(3):
        ranks = Alone(rank, 3)
        run = run_of(folder, tmp_path / "run", ranks=ranks)
        states = HiddenStates(run.model, WINDOWS[ranks.rank :: ranks.world_size], 2)
        block = run.model.load_block(0)
        with (observed := Observed(run.model, block, 0, full=False)):
            states.run(block, 0)
        for name, moment in observed.moments.items():
            total.setdefault(name, SecondMoment(len(moment.total))).merge(moment)
    expected = oracle(load_whole(folder), WINDOWS)
    first = {name.removeprefix("model.layers.0."): t for name, t in expected.items() if ".layers.0." in name}
    assert {name: int(moment.num_tokens) for name, moment in total.items()} == dict.fromkeys(first, 7 * 24)
    assert_equal_moments({name: moment.compute() for name, moment in total.items()}, first)


def test_dead_channels_are_told(model_folder, tmp_path, caplog):
    folder = copy_model(model_folder(), tmp_path / "model")
    norm = load_file(folder / "model.safetensors")["model.layers.1.input_layernorm.weight"]
    norm[[4, 9]] = 0
    edit_tensors(folder, {"model.layers.1.input_layernorm.weight": norm})
    with caplog.at_level("WARNING", "nowag_pl"):
        run = calibrated(folder, tmp_path / "run")
    dead = run.store.read_metadata(MOMENTS, 1)["dead_channels"]
    assert dead == {f"self_attn.{name}_proj": 2 for name in "qkv"}
    assert run.store.read_metadata(MOMENTS, 0)["dead_channels"] == {}
    assert "model.layers.1" in caplog.text
    compress(run, NoWagPruner())  # goes on
    for row in run.statistics():
        assert 0 <= row["loss"] < 1


def test_bad_activation_names_block_and_linear(model_folder, tmp_path):
    folder = copy_model(model_folder(), tmp_path / "model")
    norm = load_file(folder / "model.safetensors")["model.layers.1.post_attention_layernorm.weight"]
    norm[2] = 3e38
    edit_tensors(folder, {"model.layers.1.post_attention_layernorm.weight": norm})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj: .*NaN or infinity in 1 of 32"):
        calibrated(folder, tmp_path / "run")
    assert (tmp_path / "run" / "moments" / "block_000.safetensors").is_file()
    assert not (tmp_path / "run" / "moments" / "block_001.safetensors").exists()


@pytest.mark.parametrize("mode", ["dense", "propagated"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj", "model.layers.2.self_attn.q_proj"])
def test_nan_weight_names_block_and_linear(name, mode, model_folder, tmp_path):
    folder = copy_model(model_folder(), tmp_path / "model")
    weight = load_file(folder / "model.safetensors")[f"{name}.weight"]
    weight[1, 1] = float("nan")
    edit_tensors(folder, {f"{name}.weight": weight})
    with pytest.raises(ValueError, match=re.escape(name)):
        compress(calibrated(folder, tmp_path / "run", mode), NoWagPruner())


def test_linear_that_its_block_never_calls_is_told(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder())))
    block, stream = model.load_block(0), HiddenStates(model, WINDOWS, 2)
    block.mlp.spare = nn.Linear(32, 4)
    with (observed := Observed(model, block, 0, full=False)):
        stream.run(block, 0)
    with pytest.raises(ValueError, match=r"mlp\.spare: Expected a linear that its block calls.*--compression\.ignore"):
        observed.compute(Ranks())


def test_no_hook_is_left_behind(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder())))
    block = model.load_block(0)
    with (observed := Observed(model, block, 0, full=False)):
        assert all(module._forward_pre_hooks for module in block.modules() if isinstance(module, nn.Linear))
    assert len(observed.moments) == 7
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_no_hook_is_left_behind_after_an_exception(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder())))
    block, stream = model.load_block(0), HiddenStates(model, WINDOWS, 2)
    block.mlp.down_proj.weight = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(RuntimeError), Observed(model, block, 0, full=False):
        stream.run(block, 0)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_running_for_hooks_alone_does_not_advance(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder())))
    stream, block = HiddenStates(model, WINDOWS, 3), model.load_block(0)
    before = torch.cat(list(stream.batches()))
    stream.run(block, 0, advance=False)
    assert torch.equal(torch.cat(list(stream.batches())), before)
    stream.run(block, 0)
    assert not torch.allclose(torch.cat(list(stream.batches())), before)


@pytest.mark.parametrize("mode", ["dense", pytest.param("propagated", marks=pytest.mark.slow)])
def test_at_most_one_block_is_alive(mode, model_folder, tmp_path, monkeypatch):
    """Count the blocks with weights at the moment when another one is read."""
    run = run_of(model_folder(num_blocks=4), tmp_path / "run", mode=mode)
    kind, load, alive = type(run.model.blocks[0]), StreamedModel.load_block, []

    def count() -> int:
        gc.collect()
        blocks = [thing for thing in gc.get_objects() if type(thing) is kind]
        return sum(any(not p.is_meta for p in block.parameters()) for block in blocks)

    def counting(self, index):
        block = load(self, index)
        alive.append(count() - baseline)
        return block

    baseline = count()
    monkeypatch.setattr(StreamedModel, "load_block", counting)
    run.calibrate(WINDOWS)
    compress(run, NoWagPruner())
    run.reference({"text": WINDOWS}, 3)
    assert len(alive) >= 8
    assert max(alive) == 1
    assert count() - baseline == 0
