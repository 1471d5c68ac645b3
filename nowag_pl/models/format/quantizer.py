"""What makes `AutoModelForCausalLM.from_pretrained` give a compressed model: a quantizer registered with transformers.

Imported by :mod:`nowag_pl.models.format.registration` when transformers has defined what is extended here.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nowag_pl.models.assembly import empty_like_described
from nowag_pl.models.compressed_head import tie, tied_embedding
from nowag_pl.models.experts import routed_experts
from nowag_pl.models.format.checksums import Checksums
from nowag_pl.models.format.descriptions import FORMAT, METHOD, check_stored, described_linears, empty_linears
from nowag_pl.models.state import check_linears, compressed_linears, guard_of, packed_tensors
from nowag_pl.models.weights import read_headers
from nowag_pl.modules.running.unpacking import unpack_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(METHOD)
class CompressionConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model.

    Args:
        linears: description of each compressed linear by its name in the model.
        format: version of the format.
        quant_method: what tells the format from others.
        verify: compare every file with its checksum when the model is loaded; not stored.
        packed: keep no dense weights in memory, which takes a fraction of it, and is slower; not stored.

    Raises:
        ValueError: the format is newer than this version.
    """

    def __init__(
        self,
        linears: dict[str, dict[str, Any]],
        format: int = FORMAT,
        quant_method: str = METHOD,
        verify: bool = True,
        packed: bool = False,
    ) -> None:
        self.quant_method: Any = quant_method  # transformers' own type lists its own methods
        self.format = format
        self.verify, self.packed = verify, packed
        self.linears = linears

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what :meth:`to_dict` gave; a newer format is refused before its keys are looked at."""
        described_linears(config_dict)
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in config.json."""
        return {key: value for key, value in super().to_dict().items() if key not in ("verify", "packed")}


@register_quantizer(METHOD)
class CompressionQuantizer(HfQuantizer):
    """Puts compressed linears into the places of the dense ones before transformers reads the weights."""

    requires_calibration = True
    is_trainable = True  # by LoRA, see nowag_pl.lora_for_compressed
    quantization_config: CompressionConfig
    _checksums: Checksums | None = None  # of the folder that is being loaded

    def is_serializable(self) -> bool:
        """Tell that `save_pretrained` writes the same format again."""
        return True

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Check the files and replace the linears, on the meta device.

        Raises:
            ValueError: a file or a description is damaged.
        """
        files = [Path(file) for file in checkpoint_files or []]
        if files and self.quantization_config.verify:
            checksums = Checksums(files[0].parent)
            if checksums.covers(files):
                checksums.check_small_files(may_lack=True)
                checksums.check(*files)
                self._checksums = checksums
        linears = self.quantization_config.linears
        if files:
            check_stored(empty_linears(linears), read_headers(files))
        empty_like_described(model, linears)
        ignored = [re.escape(guard_of(name.removeprefix(f"{model.base_model_prefix}."))) + "$" for name in linears]
        if (given := tied_embedding(model)) is not None:
            model._keys_to_ignore_on_load_missing = _more(model._keys_to_ignore_on_load_missing, [re.escape(given)])
        model._keys_to_ignore_on_load_unexpected = _more(model._keys_to_ignore_on_load_unexpected, ignored)

    def update_weight_conversions(self, weight_conversions: list[Any], model: "PreTrainedModel") -> list[Any]:
        """Return no conversions for a model with experts, whose linears are stored under their names in the model."""
        return [] if routed_experts(model) else super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        """Unpack the weights, having checked the values, and the files that were fetched meanwhile.

        Raises:
            ValueError: a value or a file is damaged.
        """
        check_linears(model)
        if self._checksums is not None:
            self._checksums.check_small_files(may_lack=True)
            self._checksums = None
        if not self.quantization_config.packed:
            unpack_linears(model, model.dtype)
        tie(model, model.dtype)
        return model

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what `save_pretrained` writes, and describe it in the configuration, which is written next."""
        self.quantization_config.linears = {
            name: linear.description() for name, linear in compressed_linears(model).items()
        }
        return dict(packed_tensors(model)), {}

    def _dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> "PreTrainedModel":
        """Replace the compressed linears by ordinary ones."""
        given = tied_embedding(model)
        for name, linear in compressed_linears(model).items():
            dense = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
            dense.weight = nn.Parameter(linear.weight.detach().to(dtype))
            if linear.bias is not None:
                dense.bias = nn.Parameter(linear.bias.detach().to(dtype))
            model.set_submodule(name, dense)
        if given is not None:
            model.get_input_embeddings().weight = model.get_output_embeddings().weight
        return model


def _more(known: Any, patterns: list[str]) -> Any:
    """Return names to ignore and more of them: a set, perhaps an empty one, or a list, by transformers' version."""
    return (list if known is None else type(known))([*(known or ()), *patterns])


def attach(model: "PreTrainedModel", linears: dict[str, dict[str, Any]], packed: bool = False) -> None:
    """Give a model that was loaded in another way what `from_pretrained` would have given it."""
    quantizer = CompressionQuantizer(CompressionConfig(linears, packed=packed))
    attributes: Any = model
    attributes.hf_quantizer = quantizer
    attributes.is_quantized = True
    attributes.quantization_method = METHOD
    quantizer.postprocess_model(model)
