"""A recommender with several interests for each user, on synthetic data.

    python examples/mind.py --compare

It is the multi-interest extractor of MIND (Li et al. 2019): the items that a user has chosen are routed to a few
capsules, the user's interests. All pairs of capsules share one matrix, so random initial logits tell the interests
apart. Each user of the data has three hidden tastes, each for a group of 20 items. The program prints how often the
next item is among the 60 that are nearest to one of the interests: 0.1 by chance, 1 for someone who knew the tastes.
With `--compare` the same network is trained again from the same weights, with the routing in plain PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn

import capsops

ITEMS, GROUPS, HISTORY, DIM, INTERESTS = 600, 30, 30, 32, 4


class Mind(nn.Module):
    """Items [B, HISTORY] that users have chosen, 0 beyond the end -> interests [B, INTERESTS, DIM]."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS + 1, DIM, padding_idx=0)
        nn.init.normal_(self.items.weight[1:], std=DIM**-0.5)
        self.matrix = nn.Parameter(torch.randn(DIM, DIM) / DIM**0.5)
        # Drawn once: the same logits in training and in prediction.
        self.register_buffer("logits", torch.randn(HISTORY, INTERESTS))

    def forward(self, history: Tensor) -> Tensor:
        return capsops.dynamic_routing(
            self.items(history), self.matrix, 3, logits=self.logits, detach=True, mask=history != 0
        )


def synthetic_users(users: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Histories [users, HISTORY] of items 1 … ITEMS, padded with 0, and the next item of each user."""
    tastes = torch.rand(users, GROUPS, generator=generator).topk(3).indices
    taken = torch.randint(3, (users, HISTORY + 1), generator=generator)
    size = ITEMS // GROUPS
    of_group = torch.randint(size, (users, HISTORY + 1), generator=generator)
    items = tastes.gather(1, taken) * size + of_group + 1
    lengths = torch.randint(10, HISTORY + 1, (users, 1), generator=generator)
    return items[:, :-1] * (torch.arange(HISTORY) < lengths), items[:, -1]


def train(network: Mind, histories: Tensor, targets: Tensor, epochs: int, seed: int) -> None:
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    for epoch in range(1, epochs + 1):
        start, total = time.perf_counter(), 0.0
        for batch in torch.randperm(len(histories), generator=order).split(256):
            interests, target = network(histories[batch]), targets[batch]
            # The interest that fits the target best learns from it (label-aware attention with a high power).
            fit = torch.einsum("bjd,bd->bj", interests, network.items(target))
            chosen = interests[torch.arange(len(batch)), fit.argmax(dim=1)]
            loss = nn.functional.cross_entropy(10 * chosen @ network.items.weight[1:].T, target - 1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch}: loss {total / len(histories):.4f}, {time.perf_counter() - start:.2f} s")


@torch.no_grad()
def hit_rate(network: Mind, histories: Tensor, targets: Tensor) -> float:
    """The share of users whose next item is among the 60 that are nearest to one of their interests."""
    scores = (network(histories) @ network.items.weight[1:].T).amax(dim=1)
    return (scores.topk(60).indices == targets[:, None] - 1).any(dim=1).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a recommender with several interests on synthetic data.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--users", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="train once more, with the routing in plain PyTorch")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    histories, targets = synthetic_users(options.users, generator)
    new_histories, new_targets = synthetic_users(1000, generator)
    print("synthetic data: users with three tastes each, for groups of 20 items")

    first = Mind()
    networks = {"capsops": first}
    if options.compare:
        networks["plain PyTorch"] = copy.deepcopy(first)
    for name, network in networks.items():
        print(f"routing by {name}")
        with capsops.use_backend("reference") if network is not first else nullcontext():
            train(network, histories, targets, options.epochs, options.seed)
            hits = hit_rate(network, new_histories, new_targets)
        print(f"hit rate {hits:.3f} of 1000 new users")


if __name__ == "__main__":
    main()
