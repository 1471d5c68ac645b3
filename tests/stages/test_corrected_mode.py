"""Corrected mode against an oracle: whole models in float64, hooks, and sums token by token."""

import gc

import pytest
import torch
from stage_runs import WINDOWS, calibrated, compress, run_of
from test_calibrated_moments import moments_of
from test_compression_run import everything
from tiny_models import artefacts, copy_model, edit_tensors, load_whole
from torch import nn

from nowag_pl import NoWagPruner, NoWagQuantizer
from nowag_pl.compressors import Compressor
from nowag_pl.functional.correction import RIDGE
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import MaskedLinear
from nowag_pl.stages import compression
from nowag_pl.stages.correction import Point, captured, find_groups

pytest_plugins = ["tiny_fixtures"]

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
OWN = "own output"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        *[
            (
                family,
                [
                    dict.fromkeys(ATTENTION, OWN),
                    {"self_attn.o_proj": "post_attention_layernorm"},
                    dict.fromkeys(["mlp.gate_proj", "mlp.up_proj"], OWN),
                    {"mlp.down_proj": ""},
                ],
            )
            for family in ("llama", "qwen2", "qwen3", "mistral")
        ],
        *[  # norms before the sums
            (
                family,
                [
                    dict.fromkeys(ATTENTION, OWN),
                    {"self_attn.o_proj": OWN},
                    dict.fromkeys(["mlp.gate_proj", "mlp.up_proj"], OWN),
                    {"mlp.down_proj": OWN},
                ],
            )
            for family in ("gemma2", "gemma3", "olmo2")
        ],
        (
            "phi3",
            [
                {"self_attn.qkv_proj": OWN},
                {"self_attn.o_proj": "post_attention_layernorm"},
                {"mlp.gate_up_proj": OWN},
                {"mlp.down_proj": ""},
            ],
        ),
    ],
)
def test_groups_and_targets_of_the_families(family, expected, model_folder):
    model = StreamedModel(Checkpoint(str(model_folder(family))))
    for index in range(len(model)):
        block = model.load_block(index)
        groups = find_groups(model, block, index)
        assert [list(group) for group in groups] == [list(group) for group in expected]
        for group, targets in zip(groups, expected, strict=True):
            for name, target in targets.items():
                where = (name, "output") if target == OWN else (target, "input" if target else "output")
                assert group[name] == Point(*where)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_linear_that_is_not_called_is_named(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder())))
    block = model.load_block(1)
    block.mlp.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model\.layers\.1 to call all .* does not call mlp\.spare"):
        find_groups(model, block, 1)


class Noting(Compressor):
    """Prune, and note what was given."""

    def __init__(self):
        self.given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def compress(self, linear, second_moment):
        self.given.append((linear.weight.clone(), second_moment.clone()))
        keep = torch.arange(linear.weight.numel()).view(linear.weight.shape) % 3 != 0
        return MaskedLinear(linear.weight, keep, linear.bias)


@torch.no_grad()
def tensors(model, layer: int, points: dict[str, tuple[str, str]]):
    """Return the first input or the output of some modules of a layer over all windows, `[tokens, features]`."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []

    def keep(key, value):
        seen.setdefault(key, []).append((value[0] if isinstance(value, tuple) else value).flatten(0, 1))

    for key, (name, side) in points.items():
        module = model.model.layers[layer].get_submodule(name)
        if side == "input":
            handles.append(module.register_forward_pre_hook(lambda _, args, key=key: keep(key, args)))
        else:
            handles.append(module.register_forward_hook(lambda _, args, out, key=key: keep(key, out)))
    for window in WINDOWS:
        model(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: torch.cat(values) for key, values in seen.items()}


@torch.no_grad()
def test_compressor_is_given_corrected_weights_and_moments_behind_all_linears_before(model_folder, tmp_path):
    folder, compressor = model_folder("qwen2"), Noting()  # with biases
    run = calibrated(folder, tmp_path / "run", "corrected")
    compress(run, compressor)
    dense, compressed = load_whole(folder).double(), load_whole(folder).double()
    given = iter(compressor.given)
    for layer in range(3):
        written = compression.read_block(run.store, layer)
        for names, target in [
            (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], None),
            (["self_attn.o_proj"], ("post_attention_layernorm", "input")),
            (["mlp.gate_proj", "mlp.up_proj"], None),
            (["mlp.down_proj"], ("", "output")),
        ]:
            points = {name: target or (name, "output") for name in names}
            of_dense = tensors(dense, layer, points)
            of_compressed = tensors(compressed, layer, points | {"inputs": (names[0], "input")})
            inputs = of_compressed["inputs"]
            second = inputs.T @ inputs / len(inputs)
            ridge = RIDGE * second.diagonal().mean() * torch.eye(len(second))
            by_size = sorted(names, key=lambda name: -written[name].weight.numel())
            for name in by_size:
                weight = dense.model.layers[layer].get_submodule(name).weight
                drift = (of_dense[name] - of_compressed[name]).T @ inputs / len(inputs)
                expected = weight + torch.linalg.solve(second + ridge, drift.T).T
                actual, moment = next(given)
                torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(moment.double(), second.diagonal(), rtol=1e-4, atol=1e-5)
                if layer == 0 and names[0] in ATTENTION:
                    assert torch.equal(actual.double(), weight)
                elif "k_proj" not in name:
                    assert (actual - weight).norm() > 0.01 * weight.norm()
            for name in names:
                compressed.model.layers[layer].get_submodule(name).weight.copy_(written[name].weight)
    assert next(given, None) is None


def test_outputs_come_closer_to_the_dense_models(model_folder, tmp_path):
    folder = model_folder("llama")
    with torch.no_grad():
        expected = load_whole(folder).model(WINDOWS).last_hidden_state
        errors = {}
        for compressor in (NoWagPruner(), NoWagQuantizer(4, 32, update="feedback", rounds=2)):
            for mode in ("dense", "corrected"):
                run = calibrated(folder, tmp_path / f"{type(compressor).__name__}{mode}", mode)
                compress(run, compressor)
                actual = run.compressed().assemble().model(WINDOWS).last_hidden_state
                errors[mode] = float((actual - expected).square().mean())
            assert errors["corrected"] < 0.75 * errors["dense"]


@pytest.mark.parametrize(
    "compressor",
    [pytest.param(NoWagPruner(), marks=pytest.mark.slow), NoWagPruner(update="refit")],
    ids=["diagonal", "full"],
)
def test_lost_block_is_made_again_bit_for_bit(compressor, model_folder, tmp_path):
    everything(model_folder(), tmp_path / "run", compressor, "corrected")
    before = artefacts(tmp_path / "run")
    assert len(before) == 8
    for index in (1, 2):
        (tmp_path / "run" / "compressed" / f"block_{index:03d}.safetensors").unlink()
    everything(model_folder(), tmp_path / "run", compressor, "corrected")
    assert artefacts(tmp_path / "run") == before


def test_statistics_are_those_of_the_dense_weight(model_folder, tmp_path):
    run = calibrated(model_folder(), tmp_path / "run", "corrected")
    compress(run, NoWagPruner())
    moments = moments_of(run)
    dense, compressed = load_whole(model_folder()), run.compressed().assemble()
    for row in run.statistics():
        linears = (model.get_submodule(row["name"]) for model in (dense, compressed))
        assert row == {"name": row["name"], "block": row["block"]} | compression.measure(*linears, moments[row["name"]])


def test_failing_compressor_names_the_linear(model_folder, tmp_path):
    class Failing(Noting):
        def compress(self, linear, second_moment):
            if len(self.given) == 5:
                raise ValueError("Expected less.")
            return super().compress(linear, second_moment)

    run = calibrated(model_folder(), tmp_path / "run", "corrected")
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.up_proj: Expected less\.$"):
        compress(run, Failing())


def test_infinite_activation_names_block_and_linear(model_folder, tmp_path):
    folder = copy_model(model_folder(), tmp_path / "model")
    edit_tensors(folder, {"model.layers.1.post_attention_layernorm.weight": torch.full((32,), 3e38)})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj: .*NaN or infinity"):
        compress(calibrated(folder, tmp_path / "run", "corrected"), NoWagPruner())


def test_dense_weights_are_in_memory_once(model_folder, tmp_path):
    """Count the bytes of the parameters of blocks when the first and the last linear of block 1 are compressed."""
    run = run_of(model_folder(), tmp_path / "run", mode="corrected")
    kind = type(run.model.blocks[0])
    seen = {}

    class Watching(Noting):
        def compress(self, linear, second_moment):
            if len(self.given) in (7, 13):
                gc.collect()
                blocks = [thing for thing in gc.get_objects() if type(thing) is kind]
                parameters = {p.data_ptr(): p.nbytes for block in blocks for p in block.parameters() if not p.is_meta}
                seen[len(self.given)] = sum(parameters.values())
            return super().compress(linear, second_moment)

    run.calibrate(WINDOWS)
    compress(run, Watching())
    block = sum(p.nbytes for p in run.model.load_block(0).parameters())
    assert seen[7] == block
    assert seen[13] <= 2 * block


def test_hooks_are_gone_and_the_error_goes_on():
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(RuntimeError), captured(block, [Point("0", "input"), Point("1", "output")]):
        block(torch.ones(1, 3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_block_stops_when_all_is_seen():
    calls = []
    block = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    block[2].register_forward_pre_hook(lambda *_: calls.append(1))
    inputs = torch.ones(1, 2)
    with captured(block, [Point("0", "input"), Point("1", "input")], stop=True) as seen:
        block(inputs)
    assert not calls
    assert list(seen) == [Point("0", "input"), Point("1", "input")]
    assert seen[Point("0", "input")] is inputs
    assert torch.equal(seen[Point("1", "input")], block[0](inputs))
    with captured(block, [Point("1", "output")]) as seen:
        block(inputs)
    assert calls
