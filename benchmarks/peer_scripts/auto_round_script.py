"""AutoRound: rounding and ranges of a scalar grid, trained block by block by the signs of gradients."""

from auto_round import AutoRound
from dense_folder import check_grid, grouped_bits, linear_names, load, main_arguments, parser, weights_of, write
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--bits", type=int, required=True)
    made.add_argument("--group_size", type=int, default=64)
    made.add_argument("--iters", type=int, default=200)
    args = main_arguments(made)
    tokens = load_file(args.work / "calibration.safetensors")["tokens"].long()
    scheme = {"bits": args.bits, "group_size": args.group_size, "sym": False, "data_type": "int", "act_bits": 16}
    trained = AutoRound(
        load(args.model),
        AutoTokenizer.from_pretrained(args.model),
        scheme=scheme,
        dataset=DataLoader(tokens, batch_size=8),
        iters=args.iters,
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        device_map="cpu",
    )
    names = linear_names(load_file(args.work / "moments.safetensors"))
    # What it saves in the format "fake" are the weights as they were, to be rounded when they are loaded. Those in
    # memory are rounded.
    rounded, _ = trained.quantize()
    linears = weights_of(rounded, names)
    check_grid(linears, args.bits, args.group_size)
    # A 16-bit scale and a zero as wide as the codes for each group.
    bits = grouped_bits(args.bits, args.group_size, 16 + args.bits)
    write(args, linears, ["auto-round"], bits_per_weight=bits, sparsity=0.0)
