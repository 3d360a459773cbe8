"""A small network of matrix capsules with EM routing on scikit-learn's digits. Needs scikit-learn.

    python examples/em_digits.py --compare

It is the network of Hinton et al. 2018 at a smaller size: primary capsules with a pose of 4 × 4 and an activation, a
convolutional capsule layer, and a capsule for each digit. It prints its accuracy on test images. With `--compare` the
same network is trained again from the same weights, with EM routing in plain PyTorch.
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
from capsops.nn import ConvCapsules, EMCapsules

TYPES, POSE = 4, 4


class EMNetwork(nn.Module):
    """Images [B, 1, 8, 8] -> activations of the ten digits [B, 10]."""

    def __init__(self, competition: str) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 32, kernel_size=3), nn.BatchNorm2d(32), nn.ReLU())  # [B, 32, 6, 6]
        self.pose = nn.Conv2d(32, TYPES * POSE**2, kernel_size=1)
        self.activation = nn.Conv2d(32, TYPES, kernel_size=1)
        # λ in proportion to the number of output capsules for each input capsule keeps the activations in range.
        self.grid = ConvCapsules(
            TYPES, POSE, TYPES, POSE, 3, 1, routing="em", competition=competition, inverse_temperature=3 / 9
        )
        inputs = TYPES * 4 * 4
        self.digits = EMCapsules(inputs, POSE, 10, POSE, inverse_temperature=3 * 10 / inputs)
        for layer in (self.grid.capsules, self.digits):
            # Matrices near the identity: a mean of many random votes would be nearly 0.
            with torch.no_grad():
                layer.weight.mul_(0.5).add_(torch.eye(POSE)[:, None])
            nn.init.constant_(layer.beta_u, 1.0)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        pose = self.pose(features).unflatten(1, (TYPES, POSE, POSE)).movedim((2, 3), (4, 5))
        pose, activation = self.grid(pose, self.activation(features).sigmoid())
        _, activation = self.digits(pose.flatten(1, 3), activation.flatten(1))
        return activation


def spread_loss(activation: Tensor, labels: Tensor, margin: float = 0.5) -> Tensor:
    """Hinton et al. 2018, equation 3, with one margin: by it the right digit is more active than each other one."""
    right = activation.gather(1, labels[:, None])
    others = nn.functional.one_hot(labels, activation.shape[1]) == 0
    return ((margin - (right - activation)).relu() ** 2 * others).sum(dim=1).mean()


def train(network: EMNetwork, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for epoch in range(1, epochs + 1):
        start, total = time.perf_counter(), 0.0
        for batch in torch.randperm(len(images), generator=order).split(64):
            loss = spread_loss(network(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch}: loss {total / len(images):.4f}, {time.perf_counter() - start:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train matrix capsules with EM routing on scikit-learn's digits.")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=1347, help="how many to train with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--competition", choices=("positions", "window"), default="window")
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
    first = EMNetwork(options.competition)
    networks = {"capsops": first}
    if options.compare:
        networks["plain PyTorch"] = copy.deepcopy(first)
    for name, network in networks.items():
        print(f"routing by {name}")
        with capsops.use_backend("reference") if network is not first else nullcontext():
            train(network, train_images[: options.images], train_labels[: options.images], options.epochs, options.seed)
            network.eval()
            with torch.no_grad():
                predicted = network(test_images).argmax(dim=1)
        accuracy = (predicted == test_labels).double().mean().item()
        print(f"test accuracy {accuracy:.3f} on {len(test_images)} images")


if __name__ == "__main__":
    main()
