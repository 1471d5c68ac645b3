"""Everything of an export but the weights: the source's own files, byte for byte, and its configuration with our key.

A configuration written anew would be in the dialect of the transformers that wrote it, which earlier versions and other
programs misread without a word; so the JSON of the source is edited instead, where it still describes the model.
"""

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nowag_pl.files import read_json, write_json
from nowag_pl.models.checkpoint import CONFIG_FILE, DESCRIPTION_FILE, GENERATION_FILE, Checkpoint
from nowag_pl.models.format.card import CARD_FILE, SOURCE_CARD_FILE

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

_COPIED = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_COPIED_BELOW = ("additional_chat_templates/*.jinja",)
_WRITTEN = (CONFIG_FILE, DESCRIPTION_FILE, GENERATION_FILE, "gguf.json", "*.index.json", "adapter_*", "trainer_state*")
_TOKENIZER_FILE = "tokenizer_config.json"
# What tells nothing about the model, or is ours to say.
_INCIDENTAL = (
    "architectures",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "transformers_version",
    "_name_or_path",
    "_attn_implementation",
)
# Code is not copied, and what computes attention is no property of a model.
_LEFT_OUT = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def write_source_files(
    stage: Path,
    model: "PreTrainedModel",
    source: Checkpoint | None,
    quantization: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Write configuration, generation settings, tokenizer, licence and whatever else lies beside the source's weights.

    Args:
        stage: folder to fill.
        model: a model with the right configuration.
        source: where the model comes from; None: everything is written anew, without a tokenizer.
        quantization: `quantization_config`; empty for a dense model.
        dtype: type that the configuration names.

    Raises:
        ValueError: a file of the source is damaged.
        OSError: the folder cannot be written.
    """
    if source is not None:
        _copy(source.folder, stage)
    _write_generation(stage, model, source)
    content = _described(stage, model, source)
    for key in _LEFT_OUT:
        content.pop(key, None)
    content["architectures"] = [type(model).__name__]
    _name_type(content, dtype)
    content.pop("quantization_config", None)
    if quantization:
        content["quantization_config"] = dict(quantization)
    write_json(stage / CONFIG_FILE, _for_older_readers(content))


def _copy(folder: Path, stage: Path) -> None:
    """Copy what compression does not change; the source's model card becomes a file beside the export's own."""
    kept = {path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()}
    kept -= {path for pattern in _WRITTEN for path in folder.glob(pattern)}
    kept |= {path for pattern in _COPIED_BELOW for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(kept):
        target = stage / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    cards = [folder / name for name in (SOURCE_CARD_FILE, CARD_FILE) if (folder / name).is_file()]
    if cards:
        shutil.copyfile(cards[0], stage / SOURCE_CARD_FILE)
    tokenizer = stage / _TOKENIZER_FILE
    settings = read_json(tokenizer) if tokenizer.is_file() else {}
    # The name that this class has had before transformers 5, which still knows it.
    if settings.get("tokenizer_class") == "TokenizersBackend":
        write_json(tokenizer, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_generation(stage: Path, model: "PreTrainedModel", source: Checkpoint | None) -> None:
    """Write the settings of generation, as they are in the source if the model still has those."""
    own = model.generation_config
    file = None if source is None else source.folder / GENERATION_FILE
    if own is None:
        return
    if source is not None and file is not None and file.is_file() and _same(own, source.generation_config):
        shutil.copyfile(file, stage / GENERATION_FILE)
    else:
        own.save_pretrained(stage)


def _same(one: "GenerationConfig", other: "GenerationConfig") -> bool:
    """Tell whether settings of generation are the same, whoever wrote them."""
    contents = [one.to_dict(), other.to_dict()]
    for content in contents:
        for key in (*_INCIDENTAL, "_from_model_config"):
            content.pop(key, None)
    return contents[0] == contents[1]


def _described(stage: Path, model: "PreTrainedModel", source: Checkpoint | None) -> dict[str, Any]:
    """Return the source's config.json if it describes the model, else what transformers writes."""
    if source is not None and not source.is_part and _meaning(source.config) == _meaning(model.config):
        return read_json(source.folder / CONFIG_FILE)
    config = copy.deepcopy(model.config)
    # What another program's names for a type are, save_pretrained would refuse.
    config.dtype = None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(stage)
    return read_json(stage / CONFIG_FILE)


def _meaning(config: "PretrainedConfig") -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL}


def _name_type(content: dict[str, Any], dtype: torch.dtype) -> None:
    """Name a type under the key that is there; without one, under the key that all versions know."""
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("torch_dtype", "dtype") if key in content] or ["torch_dtype"]
    for key in keys:
        content[key] = name


def _for_older_readers(content: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with rotary settings in the words of transformers 4, beside those of transformers 5."""
    rope = content.get("rope_parameters")
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), int | float):
        return content
    old: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = {key: value for key, value in rope.items() if key not in old}
    if rope.get("rope_type") == "longrope":
        # Phi-3's configuration takes these three fields alone, and the length beside them.
        factors = {key: rope[key] for key in ("short_factor", "long_factor") if key in rope}
        old["rope_scaling"] = {"type": "longrope", **factors}
        if "original_max_position_embeddings" in rope:
            old["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return old | content
