"""An export keeps the files of its source, and its configuration says no word more than ours."""

import json

import pytest
import torch
from test_assembly import COMPRESSORS, compressed_linears, logits
from tiny_models import copy_model, load_whole

from nowag_pl import load_compressed, save_compressed, save_dense
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.card import add_figures, model_card
from nowag_pl.models.format.saving import save_streamed
from nowag_pl.models.streaming import StreamedModel

pytest_plugins = ["tiny_fixtures"]

OTHERS = {
    "LICENSE": "do what you like",
    "NOTICE.txt": "notice",
    "special_tokens_map.json": '{"eos_token":   "</s>"}',
    "preprocessor_config.json": "{ }",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "merges.txt": "a b\r\nc d\n",
    "generation_config.json": '{"eos_token_id": [1, 7],\n "temperature": 0.6, "do_sample": true}',
}
LEFT = {"modeling_own.py": "raise", "pytorch_model.bin": "x", "gguf.json": "{}", "adapter_config.json": "{}"}


@pytest.fixture
def source(model_folder, tmp_path):
    """A model as transformers 4 wrote it, with all that lies beside one."""
    folder = copy_model(model_folder("llama3"), tmp_path / "source")
    for name, content in (OTHERS | LEFT).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode())
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The source\n")
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    config |= {"auto_map": {"AutoConfig": "modeling_own.Config"}, "_attn_implementation": "a/kernel", "said": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def export(source, folder, dense=False, method="quantized", change=lambda model: None):
    model = assemble(Checkpoint(str(source)), compressed_linears(source, COMPRESSORS[method]))
    change(model)
    (save_dense if dense else save_compressed)(model, folder, source=str(source))
    return model


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dense", [False, True])
def test_files_are_kept_byte_for_byte(dense, source, tmp_path):
    export(source, tmp_path / "export", dense)
    for name in [*OTHERS, "tokenizer.json"]:
        assert (tmp_path / "export" / name).read_bytes() == (source / name).read_bytes(), name
    assert (tmp_path / "export" / "README.source.md").read_bytes() == (source / "README.md").read_bytes()
    for name in LEFT:
        assert not (tmp_path / "export" / name).exists()


@pytest.mark.parametrize("dense", [False, True])
def test_configuration_is_the_sources_but_for_our_key(dense, source, tmp_path):
    model = export(source, tmp_path / "export", dense)
    expected, actual = config_of(source), config_of(tmp_path / "export")
    del expected["auto_map"], expected["_attn_implementation"]
    assert ("quantization_config" in actual) != dense
    actual.pop("quantization_config", None)
    assert actual == expected
    opened = load_whole(tmp_path / "export") if dense else load_compressed(tmp_path / "export")
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-4, atol=1e-4)


def test_streamed_export_keeps_them_too(source, tmp_path):
    model = StreamedModel(Checkpoint(str(source), "bfloat16"))
    save_streamed(model, model.load_block, tmp_path / "export", dense=True)
    assert config_of(tmp_path / "export")["torch_dtype"] == "bfloat16"
    assert config_of(tmp_path / "export")["rope_theta"] == 5e5
    for name in OTHERS:
        assert (tmp_path / "export" / name).read_bytes() == (source / name).read_bytes(), name


def test_changed_model_is_described_as_it_is(source, tmp_path):
    def change(model):
        model.config.max_position_embeddings = 128
        model.generation_config.temperature = 0.9

    export(source, tmp_path / "export", change=change)
    config = config_of(tmp_path / "export")
    assert config["max_position_embeddings"] == 128
    assert load_compressed(tmp_path / "export").generation_config.temperature == 0.9
    # In the words of both dialects.
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert "rope_theta" not in config["rope_scaling"]


def test_export_of_an_export_is_the_same(source, tmp_path):
    export(source, tmp_path / "first")
    save_compressed(load_compressed(tmp_path / "first"), tmp_path / "second", source=str(tmp_path / "first"))
    for path in (tmp_path / "first").rglob("*"):
        if path.is_file():
            assert (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes() == path.read_bytes()


def test_dense_export_of_a_compressed_model_is_dense(source, tmp_path):
    export(source, tmp_path / "packed")
    save_dense(load_compressed(tmp_path / "packed"), tmp_path / "dense", source=str(tmp_path / "packed"))
    assert "quantization_config" not in config_of(tmp_path / "dense")


def test_tokenizer_class_of_transformers_5_gets_its_older_name(model_folder, tmp_path):
    folder = copy_model(model_folder(), tmp_path / "source")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend"
    export(folder, tmp_path / "export")
    written = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    assert written == settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    text = "12 columns, a matrix"
    assert Checkpoint(str(tmp_path / "export")).tokenizer(text) == Checkpoint(str(folder)).tokenizer(text)


def test_without_a_source_everything_is_written_anew(source, tmp_path):
    model = assemble(Checkpoint(str(source)), compressed_linears(source, COMPRESSORS["pruned"]))
    save_compressed(model, tmp_path / "export")
    assert torch.equal(logits(load_compressed(tmp_path / "export", packed=True)), logits(model))
    assert not (tmp_path / "export" / "LICENSE").exists()


def test_damaged_source_is_refused(source, tmp_path):
    export(source, tmp_path / "first")
    model = load_compressed(tmp_path / "first")
    (tmp_path / "first" / "LICENSE").write_text("other")
    with pytest.raises(ValueError, match=r"LICENSE as it was written"):
        save_compressed(model, tmp_path / "second", source=str(tmp_path / "first"))


@pytest.mark.parametrize("dense", [False, True])
def test_card_opens_with_how_to_load_and_says_method_and_bits(dense, source, tmp_path):
    export(source, tmp_path / "export", dense)
    card = (tmp_path / "export" / "README.md").read_text()
    front, _, rest = card.removeprefix("---\n").partition("\n---\n")
    assert front == "license: mit"
    lines = rest.strip().splitlines()
    assert (lines[0], lines[3]) == ("```python", "```")
    assert "import" in lines[1]
    assert "from_pretrained" in lines[2]
    assert ("nowag_pl" in lines[1]) != dense
    assert "| VQLinear | subvector_dim 5, codebook_size 16 | 21 |" in card
    assert "README.source.md" in card
    assert ("stored as ordinary ones" in card) == dense
    add_figures(tmp_path / "export", {"wiki|text": {"perplexity": 12.345678, "kl": float("nan")}})
    assert "| wiki\\|text | 12.35 |  |" in (tmp_path / "export" / "README.md").read_text()


def test_card_of_a_dense_model_claims_no_compression():
    assert "Compressed" not in model_card({}, True, None)
