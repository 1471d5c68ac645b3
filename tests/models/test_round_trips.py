"""Models of any shape, method, type, with or without biases and tied embeddings, come back bit by bit."""

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen3Config

from nowag_pl import NoWagPruner, NoWagQuantizer, load_compressed, save_compressed, save_dense
from nowag_pl.models.checkpoint import compressed_linears
from nowag_pl.models.loading import set_module
from nowag_pl.models.streaming import find_linears

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def compressors(draw, shapes):
    """Return a method that goes with linears of the given shapes."""
    columns = [shape[1] for shape in shapes]
    kind = draw(st.sampled_from(["unstructured", "pattern", "quantized"]))
    if kind == "quantized":
        dim = draw(st.integers(1, 9))
        most = min(rows * ceil(columns / dim) for rows, columns in shapes)
        return NoWagQuantizer(subvector_dim=dim, codebook_size=draw(st.integers(1, min(most, 70))), max_iters=1)
    group = draw(st.sampled_from([size for size in range(1, 25) if all(column % size == 0 for column in columns)]))
    if kind == "pattern" and group > 1:
        return NoWagPruner(pattern=(draw(st.integers(1, group - 1)), group))
    return NoWagPruner(sparsity=draw(st.floats(0, 0.95)))


@st.composite
def compressed_models(draw):
    """Return a model of which a linear may also have stayed dense."""
    hidden, intermediate, head_dim = draw(st.integers(3, 26)), draw(st.integers(3, 40)), 2 * draw(st.integers(1, 7))
    config = Qwen3Config(
        vocab_size=draw(st.integers(5, 40)), hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim, max_position_embeddings=16,
        attention_bias=draw(st.booleans()), tie_word_embeddings=draw(st.booleans()), bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(DTYPES))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    linears = find_linears(model.model)
    compressor = draw(compressors([linear.weight.shape for linear in linears.values()]))
    left = draw(st.sampled_from([None, "layers.0.mlp.up_proj"]))
    for name, linear in linears.items():
        if linear.bias is not None:
            torch.nn.init.normal_(linear.bias)
        if name != left:
            set_module(model.model, name, compressor.compress(linear, torch.rand(linear.in_features) + 0.1))
    return model


@pytest.mark.filterwarnings("ignore:.*codebook")
@settings(max_examples=8)
@given(model=compressed_models(), max_shard_bytes=st.integers(1, 20_000))
def test_model_comes_back(model, max_shard_bytes, tmp_path_factory):
    folder, tokens = tmp_path_factory.mktemp("model"), torch.arange(5)[None]
    expected = model(tokens).logits  # with gradients, so that weights are reconstructed as in a dense model
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_compressed(model, folder / "packed", max_shard_bytes=max_shard_bytes)
    save_dense(model, folder / "dense", max_shard_bytes=max_shard_bytes)
    for load in (load_compressed, AutoModelForCausalLM.from_pretrained):
        loaded = load(folder / "packed", dtype=model.dtype)
        assert compressed_linears(loaded).keys() == compressed_linears(model).keys()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, state[name]), name
            assert tensor.dtype == state[name].dtype
        assert torch.equal(loaded(tokens).logits, expected)
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype="auto")
    assert dense.dtype == model.dtype
    assert torch.equal(dense(tokens).logits, expected)
