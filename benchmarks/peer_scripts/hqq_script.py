"""HQQ: a scalar grid for each group of weights, fitted without calibration data."""

from dense_folder import check_grid, grouped_bits, linear_names, main_arguments, parser, weights, write
from hqq.core.quantize import Quantizer
from safetensors.torch import load_file

if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--bits", type=int, required=True)
    made.add_argument("--group_size", type=int, default=64)
    args = main_arguments(made)
    tensors, linears = weights(args.model), {}
    for name in linear_names(load_file(args.work / "moments.safetensors")):
        weight = tensors[f"{name}.weight"].float()
        codes, meta = Quantizer.quantize(
            weight, nbits=args.bits, group_size=args.group_size, axis=1, optimize=True, device="cpu", bitpack=False
        )
        meta["compute_dtype"] = weight.dtype
        linears[name] = Quantizer.dequantize(codes, meta).view_as(weight)
    check_grid(linears, args.bits, args.group_size)
    # A 16-bit scale and a 16-bit zero for each group.
    write(args, linears, ["hqq"], bits_per_weight=grouped_bits(args.bits, args.group_size, 32), sparsity=0.0)
