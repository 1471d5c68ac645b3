"""Compressed experts as model folders: packed ones run everywhere, dense ones are in the layout of their source."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import WINDOWS, run_of
from tiny_models import EXPERT_FAMILIES, random_tokens

from nowag_pl import NoWagPruner, NoWagQuantizer, NoWagTrellis, accelerate, load_compressed, save_compressed, save_dense
from nowag_pl.models.experts import routed_experts
from nowag_pl.modules import CompressedLinear

os.environ["HF_HUB_OFFLINE"] = "1"
pytest_plugins = ["tiny_fixtures"]

TOKENS = random_tokens(1, seq_len=12)
QUANTIZER = NoWagQuantizer(subvector_dim=2, codebook_size=16, max_iters=2)
DEFAULT = ("gpt_oss",)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS, use_cache=False).logits


def tensors_in(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def compressed(model_folder, tmp_path):
    """Return a function that gives a compressed model of a run, and the folder of the dense one."""

    def make(family, compressor=QUANTIZER, **more):
        run = run_of(model_folder(family), tmp_path / "run", compressor, **more)
        run.calibrate(WINDOWS)
        run.compress()
        return run.compressed(), model_folder(family)

    return make


FAMILIES = [pytest.param(each, marks=[] if each in DEFAULT else pytest.mark.slow) for each in EXPERT_FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_dense_folders_open_with_equal_logits(family, compressed, tmp_path):
    from transformers import AutoModelForCausalLM

    # One expert stays dense, in both kinds of folder.
    model, source = compressed(family, ignore=("experts.3.*",))
    expected = logits(model.assemble())
    model.save(tmp_path / "packed")
    model.save(tmp_path / "dense", "dense")
    torch.testing.assert_close(logits(load_compressed(tmp_path / "packed")), expected, atol=1e-5, rtol=0)
    for folder in ("packed", "dense"):
        loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=0)
    shapes = [
        {name: tensor.shape for name, tensor in tensors_in(each).items()} for each in (source, tmp_path / "dense")
    ]
    assert shapes[0] == shapes[1]


def test_linears_are_stored_by_expert(compressed, tmp_path):
    model, _ = compressed("gpt_oss", NoWagPruner())
    model.save(tmp_path / "packed")
    described = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["linears"]
    names = [f"model.layers.2.mlp.experts.3.{each}_proj" for each in ("gate", "up", "down")]
    assert set(names) <= described.keys()
    assert f"{names[0]}.mask" in tensors_in(tmp_path / "packed")
    assert not any("router" in name for name in described)


@pytest.mark.parametrize(
    "compressor", [NoWagPruner(pattern=(2, 4)), pytest.param(NoWagTrellis(bits=2), marks=pytest.mark.slow)]
)
def test_a_packed_folder_generates_and_is_saved_again(compressor, compressed, tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = compressed("mixtral", compressor)
    model.save(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    written = loaded.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert written.shape == (1, 16)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_compressed(tmp_path / "again")), logits(loaded))
    fast = accelerate(loaded)
    torch.testing.assert_close(logits(fast), logits(load_compressed(tmp_path / "packed")), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_models_in_memory_are_saved_in_both_ways(compressed, tmp_path):
    from transformers import AutoModelForCausalLM

    model, source = compressed("mixtral")
    whole = model.assemble()
    save_compressed(whole, tmp_path / "packed", source=str(source))
    assert torch.equal(logits(load_compressed(tmp_path / "packed", packed=True)), logits(whole))
    for number, of in enumerate((None, str(source), str(tmp_path / "packed"))):
        # Without a source that tells otherwise, experts are fused as transformers has them.
        save_dense(whole, tmp_path / str(number), source=of)
        names = tensors_in(tmp_path / str(number)).keys()
        assert ("model.layers.0.mlp.experts.gate_up_proj" in names) == (number != 1)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        torch.testing.assert_close(logits(loaded), logits(whole), atol=1e-5, rtol=0)


def test_only_the_experts_of_a_token_are_looked_up(compressed, tmp_path):
    model, _ = compressed("qwen3_moe", NoWagPruner())
    model.save(tmp_path / "packed")
    loaded, called = load_compressed(tmp_path / "packed", packed=True), []
    for name, experts in routed_experts(loaded).items():
        for linear, each in experts.named_modules():
            if isinstance(each, CompressedLinear):
                each.register_forward_pre_hook(lambda *_, name=f"{name}.{linear}": called.append(name))
    with torch.no_grad():
        loaded(TOKENS[:, :1], use_cache=False)
    # Three blocks, two experts, three linears.
    assert len(called) == len(set(called)) == 18
