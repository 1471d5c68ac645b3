"""A reader written from docs/format.md alone, with NumPy and JSON, reads what the package writes."""

import json
from hashlib import sha256
from itertools import combinations
from math import ceil, comb

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_assembly import compressed_linears
from tiny_models import save_tiny_model
from torch import nn

from nowag_pl import ArmorCompressor, NoWagPruner, NoWagQuantizer, save_compressed
from nowag_pl.files import write_tensors
from nowag_pl.models.assembly import assemble
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.state import compressed_linears as linears_of
from nowag_pl.modules import ArmorLinear, MaskedLinear, VQLinear

pytest_plugins = ["tiny_fixtures"]

NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "U8": "u1", "BF16": "<u2"}


def read_safetensors(file) -> dict[str, np.ndarray]:
    """Read a file by its layout: length of the header, header, bytes."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, entry in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            flat = np.frombuffer(content[start + first : start + last], NUMPY_TYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":
                flat = (flat.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def integers(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    assert len(packed) == ceil(count * bits / 8)
    string = np.unpackbits(packed, bitorder="little")
    assert not string[count * bits :].any()
    places = 1 << np.arange(bits, dtype=np.int64)
    return string[: count * bits].reshape(count, bits).astype(np.int64) @ places


def scattered(description: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    rows, columns, pattern = description["out_features"], description["in_features"], description["pattern"]
    keep = np.zeros((rows, columns), bool)
    if pattern is None or pattern[1] > 16:
        keep[:] = integers(tensors["mask"], 1, rows * columns).reshape(rows, columns)
    else:
        kept = list(combinations(range(pattern[1]), pattern[0]))
        bits = (comb(pattern[1], pattern[0]) - 1).bit_length()
        for group, number in enumerate(integers(tensors["mask"], bits, rows * columns // pattern[1])):
            for position in kept[number]:
                keep.flat[group * pattern[1] + position] = True
    weight = np.zeros((rows, columns), np.float32)
    weight[keep] = tensors["values"]
    return weight


def masked_weight(description: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    assert tensors["values"].shape == (description["num_kept"],)
    return scattered(description, tensors)


def block_diagonal(blocks: np.ndarray, size: int) -> np.ndarray:
    matrix = np.zeros((len(blocks) * size, len(blocks) * size), np.float32)
    for number, block in enumerate(blocks):
        part = slice(number * size, (number + 1) * size)
        matrix[part, part] = block
    return matrix


def armor_weight(description: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    left = block_diagonal(tensors["out_factor"], description["out_block"])
    right = block_diagonal(tensors["in_factor"], description["in_block"])
    return left @ scattered(description, tensors) @ right


def quantized_weight(description: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    rows, columns = description["out_features"], description["in_features"]
    num_codes, size = ceil(columns / description["subvector_dim"]), description["codebook_size"]
    assert tensors["codebook"].shape == (size, description["subvector_dim"])
    codes = integers(tensors["codes"], (size - 1).bit_length(), rows * num_codes).reshape(rows, num_codes)
    normalized = tensors["codebook"].astype(np.float32)[codes].reshape(rows, -1)[:, :columns]
    in_scale, out_scale = (tensors[key].astype(np.float32) for key in ("in_scale", "out_scale"))
    return normalized * in_scale * out_scale[:, None]


READERS = {"ArmorLinear": armor_weight, "MaskedLinear": masked_weight, "VQLinear": quantized_weight}


def read_linear(name: str, description: dict, tensors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    assert (description["bias"] is None) == ("bias" not in own)
    return READERS[description["class"]](description, own), own.get("bias")


def assert_same(linear: nn.Module, weight: np.ndarray, bias: np.ndarray | None) -> None:
    rounded = torch.from_numpy(weight).to(linear.dtype)
    if isinstance(linear, ArmorLinear):  # its sums have no order
        torch.testing.assert_close(rounded, linear.weight, rtol=1e-2, atol=1e-5)
    else:
        assert torch.equal(rounded, linear.weight)
    assert (bias is None) == (linear.bias is None)
    if bias is not None:
        assert torch.equal(torch.from_numpy(bias.copy()), linear.bias.float())


@pytest.mark.parametrize(
    ("compressor", "settings"),
    [
        (NoWagPruner(sparsity=0.7), {"dtype": torch.bfloat16}),
        (NoWagPruner(pattern=(3, 8)), {"tied": True}),
        (NoWagQuantizer(subvector_dim=5, codebook_size=11, max_iters=2), {"family": "qwen2", "dtype": torch.float16}),
        (ArmorCompressor(pattern=(1, 4), block_size=8, max_iters=3), {"family": "qwen2"}),
        (ArmorCompressor(block_size=16, max_iters=3), {"dtype": torch.bfloat16}),
    ],
    ids=["unstructured", "3:8", "vq", "armor_1_4", "armor"],
)
def test_folder_is_read_without_the_package(compressor, settings, tmp_path):
    source = save_tiny_model(tmp_path / "dense", **settings)
    model = assemble(Checkpoint(str(source)), compressed_linears(source, compressor))
    folder = tmp_path / "packed"
    save_compressed(model, folder, source=str(source), max_shard_bytes=50_000)

    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (quantization["quant_method"], quantization["format"]) == ("nowag_pl", 2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for name, digest in index["metadata"]["sha256"].items():
        assert sha256((folder / name).read_bytes()).hexdigest() == digest
    files = {path.name for path in folder.iterdir()}
    assert files == {*index["metadata"]["sha256"], "model.safetensors.index.json", "README.md"}
    shards = {file: read_safetensors(folder / file) for file in set(index["weight_map"].values())}
    tensors = {name: shards[file].pop(name) for name, file in index["weight_map"].items()}
    assert not any(shards.values())

    linears = linears_of(model)
    assert set(quantization["linears"]) == set(linears)
    for name, description in quantization["linears"].items():
        assert_same(linears[name], *read_linear(name, description, tensors))
    names = tuple(f"{name}." for name in linears)
    others = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(names)}
    if settings.get("tied"):
        del others["lm_head.weight"]
    assert set(others) == {name for name in tensors if not name.startswith(names)}
    for name, tensor in others.items():
        assert torch.equal(torch.from_numpy(tensors[name].copy()).float(), tensor.float())


DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def masked(draw):
    """Return a pruned linear of any shape, pattern, type, with or without bias."""
    pattern = draw(st.none() | st.tuples(st.integers(1, 4), st.integers(4, 20)))
    rows = draw(st.integers(1, 9))
    columns = draw(st.integers(1, 4)) * pattern[1] if pattern else draw(st.integers(1, 23))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    noise = torch.rand(rows, columns, generator=generator)
    size, kept = (pattern[1], pattern[0]) if pattern else (rows * columns, draw(st.integers(0, rows * columns)))
    keep = (noise.view(-1, size).argsort(dim=1).argsort(dim=1) < kept).view(rows, columns)
    dtype = draw(DTYPES)
    bias = draw(st.booleans())
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    linear = MaskedLinear(weight, keep, torch.randn(rows, generator=generator).to(dtype) if bias else None, pattern)
    return linear, weight * keep


@st.composite
def quantized(draw):
    """Return a quantized linear of any shape, codebook and type, with or without bias."""
    rows, columns, dim, size = (draw(st.integers(1, high)) for high in (9, 23, 9, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    codes = torch.randint(size, (rows, ceil(columns / dim)), generator=generator)
    codebook, in_scale, out_scale = (torch.randn(*s, generator=generator) for s in ((size, dim), (columns,), (rows,)))
    dtype = draw(DTYPES)
    bias = torch.randn(rows, generator=generator).to(dtype) if draw(st.booleans()) else None
    linear = VQLinear(codebook, codes, in_scale, out_scale, bias, dtype)
    normalized = codebook.half().float()[codes].flatten(1)[:, :columns]
    return linear, (normalized * in_scale.half().float() * out_scale.half().float()[:, None]).to(dtype)


@given(made=masked() | quantized())
def test_any_linear_is_read_back(made, tmp_path_factory):
    linear, expected = made
    file = tmp_path_factory.mktemp("linear") / "linear.safetensors"
    write_tensors(file, {f"x.y.{key}": tensor for key, tensor in linear.storage().items()})
    description = json.loads(json.dumps(linear.description()))
    weight, bias = read_linear("x.y", description, read_safetensors(file))
    assert torch.equal(linear.weight, expected)
    assert_same(linear, weight, bias)
