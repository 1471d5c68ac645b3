"""A model built around compressed linears is the dense model with those linears replaced."""

import copy
from hashlib import sha256

import pytest
import torch
from tiny_models import FAMILIES, copy_model, edit_tensors, load_whole, random_tokens

from nowag_pl import ArmorCompressor, NoWagPruner, NoWagQuantizer
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.selection import find_linears
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear

pytest_plugins = ["tiny_fixtures"]

TOKENS = random_tokens(2)
COMPRESSORS = {
    "armor": ArmorCompressor(block_size=8, max_iters=3),
    "pruned": NoWagPruner(),
    "2:4": NoWagPruner(pattern=(2, 4)),
    "quantized": NoWagQuantizer(subvector_dim=5, codebook_size=16, max_iters=3),
}


# Every family by one method, and every method in one family.
FAMILY_METHODS = [(family, "pruned") for family in FAMILIES] + [
    ("qwen2", name) for name in COMPRESSORS if name != "pruned"
]


_MADE: dict[tuple[bytes, str], dict[str, CompressedLinear]] = {}


def compressed_linears(folder, compressor) -> dict[str, CompressedLinear]:
    """Return copies of the compressed linears of a model, which are made once for the same weights."""
    files = sorted(folder.glob("*.safetensors"))
    key = b"".join(sha256(file.read_bytes()).digest() for file in files), repr(compressor)
    if key not in _MADE:
        model = StreamedModel(Checkpoint(str(folder)))
        _MADE[key] = {
            f"{model.block_name(index)}.{name}": compressor.compress(linear, torch.rand(linear.in_features) + 0.1)
            for index in range(len(model))
            for name, linear in find_linears(model.load_block(index)).items()
        }
    return copy.deepcopy(_MADE[key])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize(("family", "tied"), [(family, index % 2 == 0) for index, family in enumerate(FAMILIES)])
def test_without_compressed_linears_it_is_the_dense_model(family, tied, model_folder):
    folder = model_folder(family, tied=tied)
    assert torch.equal(logits(assemble(Checkpoint(str(folder)), {})), logits(load_whole(folder)))


@pytest.mark.parametrize(("family", "method"), FAMILY_METHODS)
def test_it_is_the_dense_model_with_weights_replaced(family, method, model_folder):
    folder = model_folder(family, sharded=True)
    linears = compressed_linears(folder, COMPRESSORS[method])
    expected = load_whole(folder)
    dense = logits(expected)
    with torch.no_grad():
        for name, linear in linears.items():
            expected.get_submodule(name).weight.copy_(linear.weight)
    actual = logits(assemble(Checkpoint(str(folder)), linears))
    torch.testing.assert_close(actual, logits(expected), atol=1e-4, rtol=0)
    assert not torch.allclose(actual, dense, atol=1e-2)


def test_some_linears_may_stay_dense(model_folder):
    folder = model_folder("qwen2")
    name = "model.layers.1.self_attn.v_proj"
    linears = {name: compressed_linears(folder, NoWagPruner())[name]}
    expected = load_whole(folder)
    expected.set_submodule(name, copy.deepcopy(linears[name]))
    assert torch.equal(logits(assemble(Checkpoint(str(folder)), linears)), logits(expected))


def test_replaced_linears_are_never_read(model_folder, tmp_path):
    folder = copy_model(model_folder(), tmp_path / "model")
    linears = compressed_linears(folder, NoWagPruner())
    expected = logits(assemble(Checkpoint(str(folder)), linears))
    edit_tensors(folder, {f"{name}.weight": None for name in linears})
    assert torch.equal(logits(assemble(Checkpoint(str(folder)), linears)), expected)


def test_it_is_in_evaluation_mode_and_nothing_is_left_on_meta(model_folder):
    model = assemble(Checkpoint(str(model_folder(tied=True))), compressed_linears(model_folder(), NoWagPruner()))
    assert not any(module.training for module in model.modules())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_other_type_reaches_what_is_not_compressed(model_folder):
    model = assemble(Checkpoint(str(model_folder()), "bfloat16"), {})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", [False, True])
def test_missing_tensor_is_named(tied, model_folder, tmp_path):
    folder = copy_model(model_folder(tied=tied), tmp_path / "model")
    edit_tensors(folder, {"model.norm.weight": None})
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        assemble(Checkpoint(str(folder)), {})
