"""Write a small mixture of experts that computes what the embedded model does, to be trained on by `fit`.

    python scripts/make_small_moe.py runs/small-moe-model

It is a Mixtral of 3.3 million parameters: 4 blocks, 8 experts, of which 2 are active. As in sparse upcycling
(arXiv:2212.05055) the experts are made of the dense model's neurons: each pair of them, which the router at first
chooses together, is another partition of all neurons into two halves. Training then tells the pairs apart.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig

EMBEDDED = Path(__file__).resolve().parent.parent / "nowag_pl" / "assets" / "embedded"
HIDDEN, INTERMEDIATE, EXPERTS, BLOCKS = 144, 384, 8, 4
# A router's weights of two experts differ so much less within a pair than between pairs.
WITHIN_PAIR = 0.02


def main(folder: Path) -> None:
    """Write the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = MixtralConfig(
        vocab_size=2048,
        hidden_size=HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=36,
        intermediate_size=INTERMEDIATE // 2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    save_file(upcycled(load_file(EMBEDDED / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder)


def upcycled(dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the mixture, given those of the dense model."""
    torch.manual_seed(0)
    tensors = {name: tensor for name, tensor in dense.items() if ".mlp." not in name}
    for block in range(BLOCKS):
        mlp, moe = f"model.layers.{block}.mlp", f"model.layers.{block}.block_sparse_moe"
        gate, up, down = (dense[f"{mlp}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        rows = []
        for pair in range(EXPERTS // 2):
            direction = torch.randn(HIDDEN) / HIDDEN**0.5
            for half, neurons in enumerate(torch.randperm(INTERMEDIATE).chunk(2)):
                expert = f"{moe}.experts.{2 * pair + half}"
                tensors[f"{expert}.w1.weight"] = gate[neurons].contiguous()
                tensors[f"{expert}.w3.weight"] = up[neurons].contiguous()
                # The router gives each of two experts a weight of about one half.
                tensors[f"{expert}.w2.weight"] = 2 * down[:, neurons].contiguous()
                rows.append(direction + WITHIN_PAIR * torch.randn(HIDDEN) / HIDDEN**0.5)
        tensors[f"{moe}.gate.weight"] = torch.stack(rows)
    return tensors


if __name__ == "__main__":
    main(Path(sys.argv[1]))
