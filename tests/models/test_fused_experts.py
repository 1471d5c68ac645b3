"""Models with fused experts are taken apart into linears, and compute what transformers' own forward does."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EXPERT_FAMILIES, copy_model, load_whole, random_tokens, save_tiny_model
from torch import nn

from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.experts import fused, fused_places, routed_experts
from nowag_pl.models.selection import Selection, find_gates
from nowag_pl.models.streaming import StreamedModel

pytest_plugins = ["tiny_fixtures"]

TOKENS = random_tokens(2, seq_len=24)


@torch.no_grad()
def streamed_logits(model: StreamedModel) -> torch.Tensor:
    hidden, arguments = model.embed(TOKENS)
    for index in range(len(model)):
        hidden = model.forward_block(model.load_block(index), hidden, arguments[index])
    return model.head(hidden)


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_streamed_logits_are_the_whole_models(family, model_folder):
    folder = model_folder(family, sharded=True)
    whole = load_whole(folder)
    with torch.no_grad():
        expected = whole(TOKENS, use_cache=False).logits
    model = StreamedModel(Checkpoint(str(folder)))
    torch.testing.assert_close(streamed_logits(model), expected, atol=1e-5, rtol=0)
    # Experts take part in them.
    for block in whole.model.layers:
        for name, parameter in block.named_parameters():
            if "experts.down_proj" in name:
                parameter.data.zero_()
    with torch.no_grad():
        assert (whole(TOKENS, use_cache=False).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_logits_in_bfloat16(family, model_folder):
    checkpoint = Checkpoint(str(model_folder(family, dtype=torch.bfloat16)))
    whole = checkpoint.load()
    # Grouped products round in another order, and a token that two experts want alike goes to the other one.
    whole.config._experts_implementation = "eager"
    with torch.no_grad():
        expected = whole(TOKENS, use_cache=False).logits
    torch.testing.assert_close(streamed_logits(StreamedModel(checkpoint)), expected, atol=0.05, rtol=0)


def test_biases_of_routers_stay_in_float32(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder("deepseek_v3")), "bfloat16"))
    gate = model.load_block(1).mlp.gate
    assert (gate.e_score_correction_bias.dtype, gate.weight.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "llama4"])
def test_linears_hold_parts_of_the_fused_tensors(family, model_folder):
    folder = model_folder(family)
    whole = dict(load_whole(folder).state_dict())
    model = StreamedModel(Checkpoint(str(folder)))
    state = {f"{model.block_name(1)}.{name}": tensor for name, tensor in model.load_block(1).state_dict().items()}
    places = fused_places(model.load_block(1))
    again = dict(
        fused(
            state.items(),
            {f"{model.block_name(1)}.{k}": (f"{model.block_name(1)}.{w}", p) for k, (w, p) in places.items()},
        )
    )
    expected = {name: tensor for name, tensor in whole.items() if name.startswith(model.block_name(1))}
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_checkpoint_may_hold_fused_tensors(model_folder, tmp_path):
    folder = copy_model(model_folder("qwen3_moe"), tmp_path / "model")
    own = {name: tensor.contiguous() for name, tensor in load_whole(folder).state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in own
    expected = load_file(folder / "model.safetensors")
    save_file(own, folder / "model.safetensors", {"format": "pt"})
    block = StreamedModel(Checkpoint(str(folder))).load_block(0).state_dict()
    for name in ("mlp.experts.2.gate_proj.weight", "mlp.experts.2.up_proj.weight", "mlp.experts.3.down_proj.weight"):
        assert torch.equal(block[name], expected[f"model.layers.0.{name}"])


GATES = {
    "mixtral": {"mlp.gate"},
    "qwen2_moe": {"mlp.gate", "mlp.shared_expert_gate"},
    "gpt_oss": {"mlp.router"},
    "deepseek_v3": {"mlp.gate"},
    "llama4": {"feed_forward.router"},
}


@pytest.mark.parametrize("family", GATES)
def test_routers_are_no_linears(family, model_folder):
    model = StreamedModel(Checkpoint(str(model_folder(family))))
    assert set(find_gates(model.blocks[1])) == GATES[family]
    assert not GATES[family] & set(model.linears(1))
    # Some are linears for torch.
    assert isinstance(model.blocks[1].get_submodule(min(GATES["llama4"])), nn.Linear) if family == "llama4" else True


def test_shared_experts_and_dense_blocks_are_selected(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder("deepseek_v3"))))
    assert "mlp.gate_proj" in model.linears(0)
    assert {"mlp.shared_experts.up_proj", "mlp.experts.7.down_proj", "self_attn.kv_b_proj"} <= set(model.linears(1))


def test_patterns_select_projections_of_experts(model_folder):
    checkpoint = Checkpoint(str(model_folder("qwen3_moe")))
    model = StreamedModel(checkpoint, selection=Selection(("experts.*.down_proj",)))
    assert list(model.linears(2)) == [f"mlp.experts.{number}.down_proj" for number in range(4)]
    with pytest.raises(ValueError, match=r"'experts\.9\.\*' matches none"):
        StreamedModel(checkpoint, selection=Selection(("experts.9.*",)))
    with pytest.raises(ValueError, match=r"'mlp\.gate' matches none"):
        StreamedModel(checkpoint, selection=Selection(("mlp.gate",)))


def test_experts_of_an_unknown_layout_are_refused(model_folder, monkeypatch):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    init = Qwen3MoeExperts.__init__

    def with_another(self, *args, **settings):
        init(self, *args, **settings)
        self.residual_proj = nn.Parameter(torch.zeros(4, 2, 2))

    monkeypatch.setattr(Qwen3MoeExperts, "__init__", with_another)
    with pytest.raises(ValueError, match=r"others in model\.layers\.0\.mlp\.experts: such expert layers"):
        StreamedModel(Checkpoint(str(model_folder("qwen3_moe"))))


def test_experts_after_a_dense_block_are_found(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "qwen3_moe", mlp_only_layers=[0, 1])
    model = StreamedModel(Checkpoint(str(folder)))
    assert [len(routed_experts(block)) for block in model.blocks] == [0, 0, 1]


def test_a_block_that_is_loaded_is_its_own(model_folder):
    model = StreamedModel(Checkpoint(str(model_folder("gpt_oss"))))
    first = model.load_block(0)
    with torch.no_grad():
        first.mlp.experts[1].up_proj.weight.zero_()
    assert model.load_block(0).mlp.experts[1].up_proj.weight.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert all(parameter.is_meta for parameter in model.blocks[0].parameters())
