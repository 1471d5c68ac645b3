"""Blocks read one at a time compute what the whole model computes."""

import pytest
import torch
from tiny_models import FAMILIES, edit_json, load_whole, num_linears, random_tokens, save_tiny_model
from torch import nn

from nowag_pl.models import streaming
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.selection import find_linears
from nowag_pl.models.streaming import StreamedModel, find_blocks

pytest_plugins = ["tiny_fixtures"]

TOKENS = random_tokens(3, seq_len=24)  # three windows of sliding attention, longer than any rope's first context


@torch.no_grad()
def streamed_logits(model: StreamedModel, tokens: torch.Tensor) -> torch.Tensor:
    hidden, arguments = model.embed(tokens)
    for index in range(len(model)):
        hidden = model.forward_block(model.load_block(index), hidden, arguments[index])
    return model.head(hidden)


@torch.no_grad()
def whole_logits(folder, tokens: torch.Tensor, **settings) -> torch.Tensor:
    return load_whole(folder, **settings)(tokens, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "sharded", "tied"),
    [("llama", False, False), *((family, True, index % 2 == 0) for index, family in enumerate(FAMILIES))],
)
def test_streamed_logits_are_the_whole_models(family, sharded, tied, model_folder):
    folder = model_folder(family, sharded=sharded, tied=tied)
    assert len(list(folder.glob("*.safetensors"))) > 1 if sharded else True
    expected = whole_logits(folder, TOKENS)
    actual = streamed_logits(StreamedModel(Checkpoint(str(folder))), TOKENS)
    assert expected.std() > 0.1  # a model that says something
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3"])
def test_streamed_logits_under_eager_attention(family, model_folder):
    folder = model_folder(family)
    checkpoint = Checkpoint(str(folder))
    checkpoint.config._attn_implementation = "eager"
    expected = whole_logits(folder, TOKENS, attn_implementation="eager")
    torch.testing.assert_close(streamed_logits(StreamedModel(checkpoint), TOKENS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("llama3", "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("mistral", "sliding_window", None),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "final_logit_softcapping", None),
        ("gemma2", "sliding_window", 64),
        ("gemma3", "sliding_window", 64),
        ("gemma3", "rope_parameters", {f"{kind}_attention": {"rope_theta": 1e4} for kind in ("full", "sliding")}),
        ("phi3", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
    ],
)
def test_specifics_of_a_family_change_what_it_says(family, name, value, model_folder, tmp_path):
    usual = whole_logits(model_folder(family), TOKENS)
    other = whole_logits(save_tiny_model(tmp_path / "other", family, **{name: value}), TOKENS)
    assert not torch.allclose(usual[:, 12:], other[:, 12:], atol=1e-3)  # else the tests above prove nothing


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_variant_of_a_family(family, settings, model_folder):
    folder = model_folder(family, **settings)
    expected = whole_logits(folder, TOKENS)
    torch.testing.assert_close(
        streamed_logits(StreamedModel(Checkpoint(str(folder))), TOKENS), expected, atol=1e-5, rtol=0
    )
    assert not torch.allclose(expected, whole_logits(model_folder(family), TOKENS), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_shape_in_any_order(family, model_folder):
    model, whole = StreamedModel(Checkpoint(str(model_folder(family)))), load_whole(model_folder(family))
    for size, seq_len in ((3, 24), (2, 6), (1, 9), (3, 17), (3, 24)):
        tokens = random_tokens(size, seq_len, seed=seq_len)
        hidden = model.embed(tokens).hidden
        with torch.no_grad():
            for index in range(len(model)):
                hidden = model.forward_block(model.load_block(index), hidden, model.arguments(index, size, seq_len))
            expected = whole(tokens, use_cache=False).logits
        torch.testing.assert_close(model.head(hidden), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_streamed_logits_in_bfloat16(family, model_folder):
    checkpoint = Checkpoint(str(model_folder(family, dtype=torch.bfloat16)))
    with torch.no_grad():
        expected = checkpoint.load()(TOKENS, use_cache=False).logits
    assert expected.dtype == torch.bfloat16
    assert torch.equal(streamed_logits(StreamedModel(checkpoint), TOKENS), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_come_in_the_wanted_type(dtype, model_folder):
    model = StreamedModel(Checkpoint(str(model_folder()), dtype))
    types = {p.dtype for module in (model.skeleton, model.load_block(1)) for p in module.parameters()}
    assert types == {getattr(torch, dtype)}


def test_loaded_block_is_the_models_own(model_folder):
    folder = model_folder("qwen2")
    model, whole = StreamedModel(Checkpoint(str(folder))), load_whole(folder)
    for index in range(len(model)):
        actual, expected = model.load_block(index).state_dict(), whole.model.layers[index].state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_loaded_blocks_are_fresh_and_frozen(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder())))
    first = model.load_block(0)
    with torch.no_grad():
        first.mlp.up_proj.weight.zero_()
    assert model.load_block(0).mlp.up_proj.weight.abs().sum() > 0
    assert not any(p.requires_grad for p in first.parameters())
    assert not first.training


def test_skeleton_never_holds_a_block(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder())))
    streamed_logits(model, TOKENS)
    assert not find_linears(model.skeleton.model)
    assert all(p.is_meta for block in model.blocks for p in block.parameters())


def test_skeleton_is_whole_after_a_failing_block(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder())))
    with pytest.raises(IndexError):
        model.embed(torch.full((1, 4), 10**6))
    torch.testing.assert_close(streamed_logits(model, TOKENS), whole_logits(model_folder(), TOKENS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_find_blocks(family, model_folder):
    assert find_blocks(load_whole(model_folder(family))) == "model.layers"


def test_find_linears_gives_names_in_order(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder())))
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert list(model.linears(1)) == attention + mlp
    assert sum(len(model.linears(index)) for index in range(len(model))) == num_linears(model_folder())


def test_find_blocks_refuses_two_candidates(model_folder):
    model = load_whole(model_folder())
    model.other = nn.ModuleList([nn.Identity()] * len(model.model.layers))
    with pytest.raises(ValueError, match=r"one list of 3 decoder blocks.*model\.layers.*other"):
        find_blocks(model)


def test_find_blocks_refuses_none(model_folder):
    model = load_whole(model_folder())
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="one list of 5 decoder blocks, but found none"):
        find_blocks(model)


def test_find_blocks_takes_the_outer_of_nested_lists(model_folder):
    model = load_whole(model_folder())
    model.model.layers[0].experts = nn.ModuleList([nn.Identity()] * 3)
    assert find_blocks(model) == "model.layers"


def test_missing_tensor_of_a_block_is_named(model_folder, tmp_path):
    from tiny_models import copy_model

    folder = copy_model(model_folder(), tmp_path / "model")
    edit_json(folder / "config.json", num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"model\.layers\.3\.\S+weight"):
        StreamedModel(Checkpoint(str(folder)))


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_from_inference_can_be_trained_with(family, model_folder):
    with torch.inference_mode():
        model = StreamedModel(Checkpoint(str(model_folder(family))))
        arguments = model.arguments(0, 2, 24)
        model.head(torch.randn(2, 24, 32))
    block, hidden = model.load_block(0).requires_grad_(True), torch.randn(2, 24, 32)
    model.forward_block(block, hidden, arguments).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    model.arguments(0, 2, 12)  # under the original context of phi3, whose frequencies change with the length


def test_arguments_that_depend_on_the_tokens_are_refused(model_folder, monkeypatch):
    model = StreamedModel(Checkpoint(str(model_folder())))
    monkeypatch.setattr(model.skeleton.model.rotary_emb, "forward", lambda hidden, position_ids: (hidden, hidden))
    with pytest.raises(ValueError, match="'position_embeddings' of a model of type 'llama' depends on the tokens"):
        model.arguments(0, 2, 4)


class Doubled(nn.ModuleList):
    """A list of blocks whose model does something between them."""

    def __getitem__(self, index):
        return [lambda hidden, block=block, **arguments: block(2 * hidden, **arguments) for block in self]


def test_computation_between_blocks_is_refused(model_folder, monkeypatch):
    model = StreamedModel(Checkpoint(str(model_folder())))
    monkeypatch.setattr(streaming.nn, "ModuleList", Doubled)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM to pass hidden states.*as they are.*not supported"):
        model.embed(TOKENS)


def test_positional_arguments_are_recorded_by_name():
    class Block(nn.Module):
        def forward(self, hidden_states, attention_mask, scale=1.0, **more):
            raise AssertionError

    calls = []
    streaming._StandIn(Block(), lambda *call: calls.append(call))(TOKENS, None, 3.0, position_ids=4)
    assert calls == [(TOKENS, {"attention_mask": None, "scale": 3.0, "position_ids": 4})]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_as_long_as_the_models_own_context(family, tmp_path):
    folder = save_tiny_model(tmp_path / "model", family, num_blocks=2, max_position_embeddings=10**9)
    model = StreamedModel(Checkpoint(str(folder)))
    arguments = model.embed(TOKENS).arguments
    tensors = [*model.skeleton.buffers(), *(value for each in arguments for value in each.values())]
    assert all(tensor.numel() < 10**6 for tensor in tensors if isinstance(tensor, torch.Tensor))
    assert streamed_logits(model, TOKENS).isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_are_held_while_they_are_used_only(tied, model_folder):
    model, tokens = StreamedModel(Checkpoint(str(model_folder("qwen2", tied=tied)))), random_tokens(2)
    before = model.embed(tokens).hidden
    logits = model.head(before)
    model.load_block(0)
    assert all(parameter.is_meta for parameter in model._skeleton.parameters())
    assert torch.equal(model.embed(tokens).hidden, before)
    assert torch.equal(model.head(before), logits)
    head, embeddings = model.skeleton.lm_head.weight, model.skeleton.get_input_embeddings().weight
    assert (head is embeddings) == tied
    assert not head.requires_grad
