"""LoRA by PEFT over compressed linears."""

import warnings

import pytest
import torch
from test_assembly import COMPRESSORS, TOKENS, compressed_linears, logits
from transformers import AutoModelForCausalLM

from nowag_pl import save_compressed
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

pytest_plugins = ["tiny_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(
    scope="module",
    params=["armor", "quantized", *(pytest.param(each, marks=pytest.mark.slow) for each in ("pruned", "2:4"))],
)
def folder(request, model_folder, tmp_path_factory):
    source, folder = model_folder("qwen2"), tmp_path_factory.mktemp("export")
    linears = compressed_linears(source, COMPRESSORS[request.param])
    save_compressed(assemble(Checkpoint(str(source)), linears), folder, source=str(source))
    return folder


def lora(**settings):
    from nowag_pl import lora_for_compressed

    return lora_for_compressed(peft.LoraConfig(**{"target_modules": TARGETS, "r": 4, "lora_dropout": 0.1} | settings))


def trained(folder, **settings):
    """Return a model after three steps of LoRA, and its state before."""
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora(**settings))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), before


def test_it_starts_as_the_compressed_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model)
    assert torch.equal(logits(peft.get_peft_model(model, lora()).eval()), before)


def test_training_moves_the_adapter_alone(folder):
    model, before = trained(folder)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert len(moved) == 3 * 3 * 2  # blocks, targets, matrices


def test_forward_adds_the_low_rank_product(folder):
    model, _ = trained(folder)
    actual = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))
    dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            with torch.no_grad():
                dense.get_submodule(name).weight += layer.scaling["default"] * b @ a
    torch.testing.assert_close(actual, logits(dense), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(actual, logits(AutoModelForCausalLM.from_pretrained(folder)), atol=0.1)


def test_saved_adapter_comes_back(folder, tmp_path):
    model, _ = trained(folder)
    model.save_pretrained(tmp_path / "adapter")
    from nowag_pl import lora_for_compressed

    config = lora_for_compressed(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)), logits(model))


def test_merging_is_refused_and_works_over_the_dequantized_model(folder, tmp_path):
    model, _ = trained(folder)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"dense model to merge an adapter into.*dequantize"):
        model.merge_and_unload()
    dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    merged = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(reopened), expected, atol=1e-4, rtol=1e-4)


def test_transformers_own_adapters_attach(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model)
    model.add_adapter(lora())
    assert sum("lora_" in name for name, _ in model.named_parameters()) == 18
    assert torch.equal(logits(model.eval()), before)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapter_that_changes_the_base_is_refused(start):
    with pytest.raises(ValueError, match=rf"init_lora_weights.*'{start}', which changes the base weights"):
        lora(init_lora_weights=start)


def test_peft_alone_puts_an_adapter_over_a_compressed_model_and_opens_it_again(folder, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=TARGETS, r=4, init_lora_weights="gaussian")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    assert not torch.allclose(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)), atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), logits(model))
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(base.eval()), logits(model))


def test_peft_alone_refuses_an_adapter_that_changes_the_base(folder):
    config = peft.LoraConfig(target_modules=TARGETS, init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"init_lora_weights.*'pissa', which changes the base weights"):
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


def test_peft_works_over_dense_models_as_before(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS, init_lora_weights="pissa", r=4))
    assert type(adapted.base_model.model.model.layers[0].mlp.down_proj) is peft.tuners.lora.Linear
