"""A small capsule network on scikit-learn's digits: 1,797 images of 8 × 8 pixels. Needs scikit-learn.

    python examples/digits.py --compare

It is the network of Sabour et al. 2017 at a smaller size, without the decoder, and prints its accuracy on test images.
With `--compare` the same network is trained again from the same weights, with dynamic routing in plain PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import time
from contextlib import nullcontext

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import capsops
from capsops.nn import CapsuleLayer, PrimaryCapsules


class CapsNet(nn.Module):
    """Images [B, 1, 8, 8] -> capsules of the ten digits [B, 10, 16]; their lengths are the scores of the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 32, kernel_size=3), nn.ReLU())  # [B, 32, 6, 6]
        self.primary = PrimaryCapsules(32, types=8, dim=8, kernel_size=3, stride=1)  # [B, N, 8], N = 8 · 4 · 4
        self.digits = CapsuleLayer(8 * 4 * 4, 8, 10, 16, routing="dynamic", iterations=3)

    def forward(self, images: Tensor) -> Tensor:
        return self.digits(self.primary(self.features(images)))


def margin_loss(capsules: Tensor, labels: Tensor) -> Tensor:
    """Sabour et al. 2017, equation 4: the right capsule is longer than 0.9, each other one shorter than 0.1."""
    lengths = capsules.norm(dim=-1)
    right = nn.functional.one_hot(labels, lengths.shape[1])
    return (right * (0.9 - lengths).relu() ** 2 + 0.5 * (1 - right) * (lengths - 0.1).relu() ** 2).sum(dim=1).mean()


def train(network: CapsNet, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    for epoch in range(1, epochs + 1):
        start, total = time.perf_counter(), 0.0
        for batch in torch.randperm(len(images), generator=order).split(64):
            loss = margin_loss(network(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch}: loss {total / len(images):.4f}, {time.perf_counter() - start:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small capsule network on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=1347, help="how many to train with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="train once more, with the routing in plain PyTorch")
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16,
        torch.tensor(labels),
        test_size=0.25,
        random_state=options.seed,
        stratify=labels,
    )
    first = CapsNet()
    networks = {"capsops": first}
    if options.compare:
        networks["plain PyTorch"] = copy.deepcopy(first)
    for name, network in networks.items():
        print(f"routing by {name}")
        with capsops.use_backend("reference") if network is not first else nullcontext():
            train(network, train_images[: options.images], train_labels[: options.images], options.epochs, options.seed)
            with torch.no_grad():
                predicted = network(test_images).norm(dim=-1).argmax(dim=1)
        accuracy = (predicted == test_labels).double().mean().item()
        print(f"test accuracy {accuracy:.3f} on {len(test_images)} images")


if __name__ == "__main__":
    main()
