"""LoRA adapters (arXiv:2106.09685) inside a whole model, dense or compressed, by PEFT (the extra `lora`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nowag_pl.files import write_tensors
from nowag_pl.functional.ranges import check_real, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Linears of a block in the families that are supported.
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
_MARK = ".lora_"  # in the names of what is trained


@dataclass(frozen=True)
class AdapterSettings:
    """Low-rank matrices beside linears, which are trained in the place of the model.

    Attributes:
        rank: of each product of two matrices.
        alpha: its factor is alpha / rank.
        targets: last part of the names of the linears that get them. null: those of attention and MLP.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        check_whole("adapters.rank", self.rank, 1)
        check_real("adapters.alpha", self.alpha, above=True)


def add_adapters(model: "PreTrainedModel", settings: AdapterSettings) -> "PreTrainedModel":
    """Put adapters over linears of a model, which is changed; at first they change no output.

    Args:
        model: dense or compressed.
        settings: which and how large.

    Raises:
        ValueError: the extra is not installed, or no linear has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("Expected peft for model.adapters: pip install -e '.[lora]'.") from error
    from nowag_pl.models.peft import register

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in (settings.targets or LINEARS) if settings.targets or name in names]
    if missing := sorted(set(targets) - names) or ([] if targets else list(LINEARS)):
        raise ValueError(f"Expected adapters.targets to name linears of the model, but it has no {missing[0]}.")
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets)  # type: ignore[arg-type]
    register(config)
    # The same on every rank, and again when a training that was killed begins anew.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(config, model)
    return model


def train_adapters_alone(model: nn.Module) -> None:
    """Ask for gradients of the adapters of a model, and of nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_MARK in name)


@contextmanager
def adapters_removed(model: nn.Module) -> Iterator[None]:
    """Put the linears themselves in the places of those with adapters, for a while.

    Args:
        model: with or without adapters.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(_base_layer(layer), nn.Module)}
    for name, layer in layers.items():
        model.set_submodule(name, _base_layer(layer))
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def _base_layer(layer: nn.Module) -> Any:
    """Return the linear under an adapter; PEFT registers it as a module of this name."""
    return layer._modules.get("base_layer")


def save_adapters(model: "PreTrainedModel", folder: Path, source: str) -> None:
    """Write the adapters of a model as PEFT reads them.

    Args:
        model: with adapters.
        folder: to create.
        source: name or folder of the model under them.
    """
    whole: Any = model
    config = whole.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = source, True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = {
        f"base_model.model.{name.replace('.default', '')}": tensor.detach().cpu()
        for name, tensor in model.state_dict().items()
        if _MARK in name
    }
    write_tensors(folder / "adapter_model.safetensors", tensors)
