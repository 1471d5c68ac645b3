"""Compress the linears of any network, without Lightning and without a language model.

    python examples/any_linear.py

A small network learns two moons; its hidden linears are pruned and quantized with the inputs that they really see.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nowag_pl import NoWagPruner, NoWagQuantizer, SecondMoment
from nowag_pl.compressors import Compressor


def two_moons(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return points `[count, 2]` on two interleaved half circles, and which one each lies on, `[count]`."""
    labels = torch.randint(2, (count,), generator=generator)
    angles = torch.rand(count, generator=generator) * torch.pi
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    points = torch.where(labels[:, None] == 1, torch.tensor([1.0, 0.5]) - points, points)
    return points + 0.1 * torch.randn(count, 2, generator=generator), labels


def train(network: nn.Module, points: Tensor, labels: Tensor) -> None:
    """Train for a moment."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(network(points), labels).backward()
        optimizer.step()


def second_moments(network: nn.Module, points: Tensor) -> dict[str, Tensor]:
    """Return the mean square of every linear's inputs, `[in]` each, by name."""
    moments, handles = {}, []
    for name, linear in network.named_modules():
        if isinstance(linear, nn.Linear):
            moments[name] = moment = SecondMoment(linear.in_features)
            handles.append(linear.register_forward_pre_hook(lambda _, args, moment=moment: moment.update(args[0])))
    with torch.no_grad():
        network(points)
    for handle in handles:
        handle.remove()
    return {name: moment.compute() for name, moment in moments.items()}


def compressed(network: nn.Sequential, compressor: Compressor, moments: dict[str, Tensor]) -> nn.Sequential:
    """Return the network with its hidden linears compressed; first and last have too few weights to gain anything."""
    hidden = {"2", "4"}
    layers = [
        compressor.compress(layer, moments[name]) if name in hidden and isinstance(layer, nn.Linear) else layer
        for name, layer in network.named_children()
    ]
    return nn.Sequential(*layers)


@torch.no_grad()
def accuracy(network: nn.Module, points: Tensor, labels: Tensor) -> float:
    """Return the share of points that the network puts on the right half circle."""
    return float((network(points).argmax(dim=1) == labels).float().mean())


def main() -> None:
    """Train, compress, compare."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(
        nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    train(network, *two_moons(2000, generator))
    moments = second_moments(network, two_moons(500, generator)[0])
    held_out = two_moons(2000, generator)
    print(f"dense: 32 bits per weight, accuracy {accuracy(network, *held_out):.3f}")
    for compressor in (NoWagPruner(pattern=(2, 4)), NoWagQuantizer(subvector_dim=4, codebook_size=32)):
        smaller = compressed(network, compressor, moments)
        bits = smaller[2].bits_per_weight
        name = type(compressor).__name__
        print(f"{name}: {bits:.2f} bits per weight, accuracy {accuracy(smaller, *held_out):.3f}")


if __name__ == "__main__":
    main()
