"""llm-compressor: SparseGPT, Wanda and GPTQ, on the linears of the blocks alone."""

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from dense_folder import check_grid, grouped_bits, linear_names, load, main_arguments, parser, weights_of, write, zeros
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
from safetensors.torch import load_file

# The tied head is pruned where it is only named "lm_head", so that this also says what a name ends in.
IGNORE = ["lm_head", "re:.*lm_head$"]


def modifier(args):
    """Return the modifier that the options ask for."""
    if args.method == "gptq":
        grid = QuantizationArgs(
            num_bits=args.bits, type="int", symmetric=False, strategy="group", group_size=args.group_size
        )
        groups = {"linears": QuantizationScheme(targets=["Linear"], weights=grid)}
        return GPTQModifier(config_groups=groups, ignore=IGNORE)
    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[args.method]
    return kind(sparsity=0.5, mask_structure=args.structure, targets=["Linear"], ignore=IGNORE)


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--method", choices=("sparsegpt", "wanda", "gptq"), required=True)
    made.add_argument("--structure", default="0:0", help="2:4, or 0:0 for none")
    made.add_argument("--bits", type=int, default=2)
    made.add_argument("--group_size", type=int, default=64)
    args = main_arguments(made)
    tokens = load_file(args.work / "calibration.safetensors")["tokens"]
    sequences = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": (tokens * 0 + 1).tolist()})
    model = load(args.model)
    oneshot(
        model=model,
        dataset=sequences,
        recipe=modifier(args),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        tie_word_embeddings=False,
    )
    linears = weights_of(model, linear_names(load_file(args.work / "moments.safetensors")))
    if args.method == "gptq":
        check_grid(linears, args.bits, args.group_size)
        # A 16-bit scale and a zero as wide as the codes for each group.
        figures = {"bits_per_weight": grouped_bits(args.bits, args.group_size, 16 + args.bits), "sparsity": 0.0}
    else:
        # Half of the values in 16 bits, and one bit for each weight that says which; of 2:4 three for each four.
        mask_bits = 1.0 if args.structure == "0:0" else 0.75
        figures = {"bits_per_weight": 8.0 + mask_bits, "sparsity": zeros(linears)}
    write(args, linears, ["llmcompressor", "compressed-tensors"], **figures)
