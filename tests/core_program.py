"""What the package does without the extra `train`: compress linears, save, load, run and finetune adapters.

python tests/core_program.py <folder to write>     in an installation of any versions
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TRAIN = ("datasets", "jsonargparse", "lightning", "matplotlib", "tensorboard", "torchmetrics")


def main(folder: Path) -> None:
    """Go through it, and print what was seen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.arange(8)[None]

    import nowag_pl

    quantizer = nowag_pl.NoWagQuantizer(subvector_dim=4, codebook_size=64, max_iters=3)
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            model.model.layers.set_submodule(name, quantizer.compress(linear, torch.ones(linear.in_features)))
    nowag_pl.save_compressed(model, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        error = float((loaded(tokens).logits - model(tokens).logits).abs().max())
    made = loaded.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    fast = nowag_pl.accelerate(nowag_pl.load_compressed(folder))
    again = fast.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    nowag_pl.save_dense(loaded, folder / "dense")

    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted(tokens, labels=tokens).loss.backward()
    trained = sum(parameter.grad is not None for parameter in adapted.parameters())
    imported = sorted(name for name in TRAIN if sys.modules.get(name) is not None)
    print(json.dumps({"error": error, "same": made.tolist() == again.tolist(), "trained": trained, "train": imported}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
