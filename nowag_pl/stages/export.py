"""What the format of an export asks of the linears, before anything is computed."""

import torch
from torch import nn

from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.exl3 import check_exl3
from nowag_pl.modules import CompressedLinear
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.head import head_of
from nowag_pl.stages.sizes import methods_of


def check_export_of_run(run: CompressionRun) -> None:
    """Refuse methods, those that a budget may choose as well, whose linears an EXL3 folder cannot hold.

    Args:
        run: a run that compresses.

    Raises:
        ValueError: there is one; the message names the linear.
    """
    methods = methods_of(run)
    linears: dict[str, nn.Linear] = {}
    for index in range(len(run.model)):
        inner = run.model.linears(index).items()
        linears |= {f"{run.model.block_name(index)}.{name}": linear for name, linear in inner}
    if run.plan.compression is not None and run.plan.compression.head is not None:
        linears |= dict([head_of(run.model)])
    for name, linear in linears.items():
        shape, has_bias = (linear.out_features, linear.in_features), linear.bias is not None
        for method in methods[name]:
            empty = method.empty(shape, linear.weight.dtype, has_bias)
            if empty is None:
                raise ValueError(
                    f"{name}: Expected, with export.format=exl3, nowag_pl.NoWagTrellis, but got "
                    f"{type(method).__name__}."
                )
            check_exl3({name: empty})


def check_export_of_model(checkpoint: Checkpoint) -> None:
    """Do as :func:`check_export_of_run` with a model that is compressed already.

    Args:
        checkpoint: the model.

    Raises:
        ValueError: a linear does not fit, or none is compressed.
    """
    described = checkpoint.compressed_linears
    if not described:
        raise ValueError(f"Expected, with export.format=exl3, linears on a trellis, but {checkpoint.path} has none.")
    with torch.device("meta"):
        check_exl3({name: CompressedLinear.from_description(each) for name, each in described.items()})
