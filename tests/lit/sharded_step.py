"""One process of two that take a step together with a sharded model; tests/lit/test_sharded_steps.py starts it."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from nowag_pl.lit.building import build_sharded, empty_copy
from nowag_pl.lit.precision import widen
from nowag_pl.lit.sharded_saving import save_sharded
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.heads import chunked_losses, last_hidden, recompute_activations
from nowag_pl.run.ranks import Ranks


def gradients(model, tokens, parts, recompute: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of some tokens and the gradients of all that is trained."""
    if recompute:
        recompute_activations(model)
    model.train()

    def loss(logits, positions):
        return F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:][:, positions], reduction="none")

    value = chunked_losses(model, last_hidden(model, tokens), parts, loss).mean()
    value.backward()
    trained = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    return float(value.detach()), {name: each for name, each in trained.items() if each is not None}


def main(folder: Path, output: Path) -> None:
    dist.init_process_group("gloo")
    mesh, checkpoint = init_device_mesh("cpu", (2,)), Checkpoint(str(folder))
    tokens = torch.load(output / "tokens.pt")
    for name, parts, recompute in (
        ("whole", [slice(0, 11)], False),
        ("parts", [slice(0, 4), slice(4, 8), slice(8, 11)], False),
        ("recomputed", [slice(0, 6), slice(6, 11)], True),
    ):
        model = build_sharded(checkpoint, None, False, mesh, lambda model: widen(model, everything=False))
        loss, found = gradients(model, tokens, parts, recompute)
        whole = {key: each.full_tensor() for key, each in found.items()}
        if dist.get_rank() == 0:
            torch.save((loss, whole), output / f"{name}.pt")
    save_sharded(model, empty_copy(checkpoint, None), output / "export", "packed", Ranks.current())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
