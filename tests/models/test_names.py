"""What other programs call a weight is found; the oracle is transformers, or the same model under its own names."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_assembly import COMPRESSORS, TOKENS, compressed_linears, logits
from tiny_models import copy_model, edit_json, load_whole

from nowag_pl import load_compressed, save_compressed
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel

pytest_plugins = ["tiny_fixtures"]


def rename(folder, function):
    tensors = {function(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def streamed_logits(folder):
    model = StreamedModel(Checkpoint(str(folder)))
    inputs = model.embed(TOKENS)
    hidden = inputs.hidden
    for index, arguments in enumerate(inputs.arguments):
        hidden = model.forward_block(model.load_block(index), hidden, arguments)
    return model.head(hidden).detach()


def opens(folder, expected):
    """Check that a folder gives these logits streamed, loaded, and compressed without losing a weight."""
    torch.testing.assert_close(streamed_logits(folder), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(Checkpoint(str(folder)).load()), expected, rtol=1e-4, atol=1e-4)
    model = assemble(Checkpoint(str(folder)), compressed_linears(folder, COMPRESSORS["pruned"]))
    save_compressed(model, folder.with_name("packed"), source=str(folder))
    assert torch.equal(logits(load_compressed(folder.with_name("packed"), packed=True)), logits(model))


@pytest.mark.parametrize("tied", [False, True])
def test_without_the_prefix(tied, model_folder, tmp_path):
    folder = copy_model(model_folder(tied=tied), tmp_path / "bare")
    rename(folder, lambda name: name.removeprefix("model."))
    opens(folder, logits(load_whole(model_folder(tied=tied))))


def test_tied_weights_under_the_name_of_the_head(model_folder, tmp_path):
    folder = copy_model(model_folder(tied=True), tmp_path / "head")
    rename(folder, lambda name: name.replace("model.embed_tokens", "lm_head"))
    opens(folder, logits(load_whole(model_folder(tied=True))))


@pytest.mark.parametrize(
    ("family", "larger", "style"),
    [
        ("gemma3", "gemma3", "model.language_model."),
        ("llama", "llava", "language_model.model."),
        ("mistral", "mistral3", "model.language_model."),
    ],
)
def test_text_part_of_a_larger_model(family, larger, style, model_folder, tmp_path):
    folder = copy_model(model_folder(family), tmp_path / "larger")
    text = json.loads((folder / "config.json").read_text())
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "config.json").write_text(
        json.dumps({"model_type": larger, "text_config": text, "vision_config": vision, "dtype": "float32"})
    )
    head = "language_model.lm_head." if style.startswith("language") else "lm_head."
    rename(folder, lambda name: name.replace("model.", style, 1) if "lm_head" not in name else head + "weight")
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_tower.patch.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    opens(folder, logits(load_whole(model_folder(family))))


def test_family_that_transformers_renames(tmp_path, model_folder):
    config = transformers.GPTNeoXConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config).eval()
    folder = tmp_path / "neox"
    model.save_pretrained(folder)
    opens(folder, logits(load_whole(folder)))


def test_type_is_that_of_the_weights_where_the_configuration_has_none(model_folder, tmp_path):
    folder = copy_model(model_folder(dtype=torch.bfloat16), tmp_path / "untyped")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(str(folder))
    assert checkpoint.dtype == torch.bfloat16
    assert next(checkpoint.load().parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["armor", "quantized"])
def test_auto_model_opens_an_export(method, model_folder, tmp_path):
    source = model_folder()
    save_compressed(assemble(Checkpoint(str(source)), compressed_linears(source, COMPRESSORS[method])), tmp_path)
    expected = load_compressed(tmp_path).model(TOKENS).last_hidden_state
    model = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(model(TOKENS).last_hidden_state, expected)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again(TOKENS).last_hidden_state, expected)


def test_all_stop_tokens_stay(model_folder, tmp_path):
    source = copy_model(model_folder(), tmp_path / "chat")
    edit_json(source / "generation_config.json", eos_token_id=[1, 7], temperature=0.6, do_sample=True)
    model = assemble(Checkpoint(str(source)), compressed_linears(source, COMPRESSORS["pruned"]))
    save_compressed(model, tmp_path / "packed", source=str(source))
    loaded = [model, StreamedModel(Checkpoint(str(source))).skeleton, Checkpoint(str(source)).load()]
    loaded += [load_compressed(tmp_path / "packed")]
    loaded += [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")]
    for each in loaded:
        assert each.generation_config.eos_token_id == [1, 7]
        assert each.generation_config.temperature == 0.6
