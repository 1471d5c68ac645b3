"""Every process of a sharded model reads its own rows, in the types in which they are held."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_models import copy_model, edit_tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from nowag_pl import NoWagPruner, NoWagQuantizer, NoWagTrellis
from nowag_pl.lit.building import build_sharded
from nowag_pl.lit.precision import widen
from nowag_pl.models import shards
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.saving import load_compressed, save_compressed
from nowag_pl.models.selection import find_linears
from nowag_pl.modules.moments import SecondMoment

pytest_plugins = ["tiny_fixtures"]

WORLD_SIZE = 3


@pytest.fixture
def mesh_of():
    """Return a function that makes this process one rank of three; the others are not there."""

    def begin(rank: int):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD_SIZE)
        return init_device_mesh("cpu", (WORLD_SIZE,))

    yield begin
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def alone(monkeypatch):
    """Let each rank check its own share only, as nobody answers."""
    monkeypatch.setattr("nowag_pl.run.ranks.Ranks.gather_work", lambda _, work: [work()])


def nothing(_model) -> None:
    """Leave types and gradients as they are."""


def assert_shards(model, expected, rank: int) -> None:
    """Check that a model holds the rows of a rank of each tensor, cut as `torch.chunk` does."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        parts = expected[name].chunk(WORLD_SIZE)
        own = parts[rank] if rank < len(parts) else expected[name][:0]
        assert torch.equal(parameter.to_local(), own.to(parameter.dtype)), name


@pytest.mark.parametrize("rank", range(WORLD_SIZE))
@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("llama", False)])
def test_shards_of_a_dense_model_are_rows_of_its_files(family, tied, rank, mesh_of, alone, model_folder):
    checkpoint = Checkpoint(str(model_folder(family, tied=tied)))
    model = build_sharded(checkpoint, None, False, mesh_of(rank), nothing)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_shards(model, checkpoint.load().state_dict(), rank)


@pytest.mark.parametrize(
    "method",
    [NoWagPruner(pattern=(2, 4)), NoWagQuantizer(subvector_dim=4, codebook_size=8, max_iters=1), NoWagTrellis(bits=2)],
)
def test_codes_and_masks_are_sharded_too(method, mesh_of, alone, model_folder, tmp_path):
    model = Checkpoint(str(model_folder("qwen2"))).load()
    linears = {name: linear for name, linear in find_linears(model).items() if name.endswith("1.mlp.up_proj")}
    for name, linear in linears.items():
        moment = SecondMoment(linear.in_features, full=method.full_second_moment)
        moment.update(torch.randn(64, linear.in_features, generator=torch.Generator().manual_seed(0)))
        model.set_submodule(name, method.compress(linear, moment.compute()))
    save_compressed(model, tmp_path / "export")
    checkpoint = Checkpoint(str(tmp_path / "export"))
    expected = load_compressed(tmp_path / "export", packed=True).state_dict()
    sharded = build_sharded(checkpoint, None, False, mesh_of(1), lambda model: widen(model, everything=False) and None)
    assert_shards(sharded, expected, 1)
    (linear,) = (sharded.get_submodule(name) for name in linears)
    assert not list(linear.named_buffers())
    assert {parameter.dtype for parameter in linear.parameters() if parameter.requires_grad} == {torch.float32}
    assert linear.fixed().keys() == model.get_submodule(next(iter(linears))).fixed().keys()


def test_only_what_is_trained_is_in_float32(mesh_of, alone, model_folder):
    checkpoint = Checkpoint(str(model_folder(dtype=torch.bfloat16)))

    def train_norms(model):
        model.requires_grad_(False)
        model.model.norm.requires_grad_(True)
        model.model.norm.weight.data = model.model.norm.weight.data.float()

    model = build_sharded(checkpoint, None, False, mesh_of(0), train_norms)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_rows_alone_are_read(mesh_of, alone, model_folder, monkeypatch):
    checkpoint, read = Checkpoint(str(model_folder())), []
    monkeypatch.setattr(checkpoint, "read", lambda *_: pytest.fail("a whole tensor"))
    read_rows = checkpoint.read_rows
    monkeypatch.setattr(checkpoint, "read_rows", lambda rows: read.append(rows) or read_rows(rows))
    build_sharded(checkpoint, None, False, mesh_of(2), nothing)
    # Three blocks, and the rest.
    assert len(read) == 4
    assert all(part.stop - part.start < 48 for rows in read[:3] for part in rows.values())


def test_a_tensor_that_is_not_there_is_told(mesh_of, alone, model_folder, tmp_path):
    folder = copy_model(model_folder(), tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    assert name in load_file(folder / "model.safetensors")
    edit_tensors(folder, {name: None})
    with pytest.raises(ValueError, match=r"Expected the stored model to hold 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        build_sharded(Checkpoint(str(folder)), None, False, mesh_of(0), nothing)


def test_a_tensor_of_another_shape_is_told(mesh_of, alone, model_folder, tmp_path):
    folder = copy_model(model_folder(), tmp_path / "model")
    edit_tensors(folder, {"model.norm.weight": torch.ones(7)})
    with pytest.raises(ValueError, match=r"Expected \(11,\) rows of a stored tensor, but got \(7,\)"):
        build_sharded(Checkpoint(str(folder)), None, False, mesh_of(0), nothing)


def test_rows_of_a_short_tensor_may_be_none(mesh_of):
    mesh = mesh_of(2)
    made = DTensor.from_local(torch.zeros(0, 2), mesh, run_check=False, shape=torch.Size([2, 2]), stride=(2, 1))
    assert shards.rows_of(made) == slice(2, 2)
