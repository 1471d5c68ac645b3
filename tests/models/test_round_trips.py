"""Models of any shape, method, type, with or without biases and tied embeddings, come back bit by bit."""

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen3Config

from nowag_pl import ArmorCompressor, NoWagPruner, NoWagQuantizer, load_compressed, save_compressed, save_dense
from nowag_pl.models.checkpoint import set_module
from nowag_pl.models.format.tensors import compressed_linears
from nowag_pl.models.streaming import find_linears
from nowag_pl.modules import ArmorLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


MAX_GROUPS = {"unstructured": 1, "pattern": 24, "quantized": 1, "armor": 8}  # the largest M of each method


@st.composite
def compressors(draw, kind, group, shapes):
    """Return a method that goes with linears of the given shapes, whose rows are groups."""
    if kind == "quantized":
        dim = draw(st.integers(1, 9))
        most = min(rows * ceil(columns / dim) for rows, columns in shapes)
        return NoWagQuantizer(subvector_dim=dim, codebook_size=draw(st.integers(1, min(most, 70))), max_iters=1)
    if kind == "unstructured":
        return NoWagPruner(sparsity=draw(st.floats(0, 0.95)))
    pattern = (draw(st.integers(1, group)), group)
    if kind == "pattern":
        return NoWagPruner(pattern=pattern)
    return ArmorCompressor(pattern, block_size=draw(st.integers(group, 30)), max_iters=2)


@st.composite
def models(draw, group=1):
    """Return a dense model whose linears have rows of whole groups."""
    hidden, intermediate = (group * draw(st.integers(ceil(3 / group), most // group)) for most in (26, 40))
    head_dim = 2 * group * draw(st.integers(1, ceil(7 / group)))
    config = Qwen3Config(
        vocab_size=draw(st.integers(5, 40)), hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim, max_position_embeddings=16,
        attention_bias=draw(st.booleans()), tie_word_embeddings=draw(st.booleans()), bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 99)))
    model = AutoModelForCausalLM.from_config(config, dtype=draw(st.sampled_from(DTYPES))).eval()
    for linear in find_linears(model.model).values():
        if linear.bias is not None:
            torch.nn.init.normal_(linear.bias)
    return model


@st.composite
def compressed_models(draw, kind):
    """Return a model of which a linear may also have stayed dense."""
    group = draw(st.integers(min(2, MAX_GROUPS[kind]), MAX_GROUPS[kind]))
    model = draw(models(group))
    linears = find_linears(model.model)
    compressor = draw(compressors(kind, group, [linear.weight.shape for linear in linears.values()]))
    left = draw(st.sampled_from([None, "layers.0.mlp.up_proj"]))
    for name, linear in linears.items():
        if name != left:
            set_module(model.model, name, compressor.compress(linear, torch.rand(linear.in_features) + 0.1))
    return model


def assert_comes_back(model, folder, max_shard_bytes=20_000):
    """Save a model packed and dense, and compare every tensor and the logits of what is loaded."""
    tokens = torch.arange(5)[None]
    expected = model(tokens).logits  # with gradients, so that weights are reconstructed as in a dense model
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    linears = compressed_linears(model)
    save_compressed(model, folder / "packed", max_shard_bytes=max_shard_bytes)
    save_dense(model, folder / "dense", max_shard_bytes=max_shard_bytes)
    for load in (load_compressed, AutoModelForCausalLM.from_pretrained):
        loaded = load(folder / "packed", dtype=model.dtype)
        assert compressed_linears(loaded).keys() == linears.keys()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, state[name]), name
            assert tensor.dtype == state[name].dtype
        assert torch.equal(loaded(tokens).logits, expected)
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype="auto")
    assert dense.dtype == model.dtype
    for name, linear in linears.items():
        assert torch.equal(dense.get_submodule(name).weight, linear.weight), name
        set_module(model, name, dense.get_submodule(name))
    by_factors = any(isinstance(linear, ArmorLinear) for linear in linears.values())  # rounded in other places
    assert torch.equal(dense(tokens).logits, model(tokens).logits if by_factors else expected)


@pytest.mark.filterwarnings("ignore:.*codebook")
@pytest.mark.parametrize("kind", MAX_GROUPS)
@settings(max_examples=3)
@given(data=st.data())
def test_model_comes_back(kind, data, tmp_path_factory):
    model, max_shard_bytes = data.draw(compressed_models(kind)), data.draw(st.integers(1, 20_000))
    assert_comes_back(model, tmp_path_factory.mktemp("model"), max_shard_bytes)


@pytest.mark.parametrize("num_codewords", [257, 1023, 1025, 4096])
def test_codes_of_nine_to_twelve_bits_come_back(num_codewords, tmp_path):
    config = Qwen3Config(
        vocab_size=9, hidden_size=32, intermediate_size=130, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    linear = model.model.layers[0].mlp.up_proj
    compressor = NoWagQuantizer(subvector_dim=1, codebook_size=num_codewords, max_iters=1)
    quantized = compressor.compress(linear, torch.ones(linear.in_features))
    assert num_codewords // 2 < quantized.unpacked_codes.max() < num_codewords
    model.model.layers[0].mlp.up_proj = quantized
    assert_comes_back(model, tmp_path)
