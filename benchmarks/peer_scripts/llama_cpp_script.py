"""llama.cpp's quantizers with an importance matrix: ggml's library is called tensor by tensor.

Its types cut rows into pieces of 256 weights, and where a row is no multiple of that llama.cpp takes a larger type.
Here as many rows as are needed are joined, so that every linear has the type that the result is named after.
"""

import ctypes
import math
from pathlib import Path

import libggml
import numpy as np
import torch
from dense_folder import linear_names, main_arguments, parser, weights, write
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from safetensors.torch import load_file

FLOATS = ctypes.POINTER(ctypes.c_float)


def library() -> ctypes.CDLL:
    """Return ggml's library."""
    file = next(Path(libggml.__file__).parent.rglob("libggml-base.so"))
    opened = ctypes.CDLL(str(file))
    opened.ggml_quantize_chunk.restype = ctypes.c_size_t
    opened.ggml_quantize_chunk.argtypes = [ctypes.c_int, FLOATS, ctypes.c_void_p, *[ctypes.c_int64] * 3, FLOATS]
    return opened


def quantized(ggml: ctypes.CDLL, weight: np.ndarray, importance: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Return what is left of a weight `[out, in]` after a quantizer with importances `[in]`."""
    block, size = GGML_QUANT_SIZES[kind]
    joined = math.lcm(weight.shape[1], block) // weight.shape[1]
    if weight.shape[0] % joined:
        raise ValueError(f"Expected a multiple of {joined} rows, but got {weight.shape[0]}.")
    rows = np.ascontiguousarray(weight.reshape(-1, joined * weight.shape[1]), dtype=np.float32)
    scores = np.ascontiguousarray(np.tile(importance, joined), dtype=np.float32)
    target = np.empty((len(rows), rows.shape[1] // block * size), dtype=np.uint8)
    written = ggml.ggml_quantize_chunk(
        int(kind), rows.ctypes.data_as(FLOATS), target.ctypes.data, 0, *rows.shape, scores.ctypes.data_as(FLOATS)
    )
    if written != target.nbytes:
        raise RuntimeError(f"Expected {target.nbytes} bytes, but got {written}.")
    return dequantize(target, kind).reshape(weight.shape)


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--type", required=True, help="such as Q2_K")
    args = main_arguments(made)
    kind = GGMLQuantizationType[args.type]
    tensors, moments, ggml = weights(args.model), load_file(args.work / "moments.safetensors"), library()
    linears = {
        name: torch.from_numpy(
            quantized(ggml, tensors[f"{name}.weight"].float().numpy(), moments[name].float().numpy(), kind)
        )
        for name in linear_names(moments)
    }
    block, size = GGML_QUANT_SIZES[kind]
    write(args, linears, ["libggml-python", "gguf"], bits_per_weight=8 * size / block, sparsity=0.0)
