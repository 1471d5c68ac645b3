"""What the peers' scripts share; runs in a peer's own environment, which has no nowag_pl.

Each script is called as SCRIPT --model FOLDER --work FOLDER --output FOLDER and options of its own. The work folder
holds calibration.safetensors ("tokens" [num_sequences, seq_len]) and moments.safetensors (mean of x_j^2 for the inputs
of each linear, by the linear's name). The script writes a dense folder of the same architecture and peer.json.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with what all scripts are told."""
    made = argparse.ArgumentParser(description=description)
    for name in ("--model", "--work", "--output"):
        made.add_argument(name, type=Path, required=True)
    return made


def weights(model: Path) -> dict[str, Tensor]:
    """Return the tensors of a model folder."""
    return {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def linear_names(moments: dict[str, Tensor]) -> list[str]:
    """Return the linears of the blocks, which are all that is compressed."""
    return sorted(moments)


def load(model: Path) -> Any:
    """Return a model in float32 with a head of its own.

    SmolLM2 ties its head to the embedding. What changes the head's weight changes the embedding, unasked.
    """
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if loaded.config.tie_word_embeddings:
        loaded.lm_head.weight = nn.Parameter(loaded.lm_head.weight.detach().clone())
    return loaded


def write(args: argparse.Namespace, linears: dict[str, Tensor], packages: Iterable[str], **figures: Any) -> None:
    """Write the model with other weights in its linears, and what is known of them.

    Args:
        args: with model, output and started.
        linears: name of a linear to its weight `[out, in]`.
        packages: whose versions count.
        **figures: bits_per_weight and sparsity, over the linears given.
    """
    tensors = weights(args.model)
    unknown = [name for name in linears if f"{name}.weight" not in tensors]
    if unknown or not linears:
        raise ValueError(f"Expected linears of the model, but got {unknown or 'none'}.")
    dtype = tensors[f"{next(iter(linears))}.weight"].dtype
    tensors |= {f"{name}.weight": weight.to(dtype).contiguous() for name, weight in linears.items()}
    args.output.mkdir(parents=True, exist_ok=True)
    for file in args.model.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in file.name:
            shutil.copy(file, args.output)
    save_file(tensors, args.output / "model.safetensors", {"format": "pt"})
    about = {**figures, "versions": {name: version(name) for name in packages}, "seconds": time.time() - args.started}
    (args.output / "peer.json").write_text(json.dumps(about, indent=1))


def weights_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the weights of linears of a model."""
    return {name: model.get_submodule(name).weight.detach() for name in names}


def zeros(linears: dict[str, Tensor]) -> float:
    """Return the fraction of weights that are zero."""
    return sum(int((weight == 0).sum()) for weight in linears.values()) / sum(map(Tensor.numel, linears.values()))


def grouped_bits(bits: int, group_size: int, overhead_bits: int) -> float:
    """Return the bits of a weight on a scalar grid with constants for each group."""
    return bits + overhead_bits / group_size


def check_grid(linears: dict[str, Tensor], bits: int, group_size: int) -> None:
    """Raise ValueError unless every group of weights has as few values as its grid.

    Programs that write a folder in the end may put back weights that they keep aside, or write them unrounded.
    """
    for name, weight in linears.items():
        ordered = weight.reshape(-1, group_size).sort(dim=1).values
        most = 1 + int((ordered[:, 1:] != ordered[:, :-1]).sum(dim=1).max())
        if most > 2**bits:
            raise ValueError(f"Expected at most {2**bits} values in a group of {name}, but got {most}.")


def main_arguments(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, and start the clock."""
    args = made.parse_args()
    args.started = time.time()
    return args
