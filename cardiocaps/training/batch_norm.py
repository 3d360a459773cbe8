"""Batch normalisation over the batch of all ranks, on any device.

torch's own SyncBatchNorm runs on GPUs alone, so nothing of it could be tested without several of them. The numbers here
are those that one process gets from the whole batch. Source: Ioffe and Szegedy 2015, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class GlobalBatchNorm(_BatchNorm):
    """A layer with the parameters and statistics of a `BatchNorm`, whose training batch is that of all ranks.

    Attributes:
        share: 0 in a rank whose part of the batch is only a filler, which then does not count; else 1.

    Shape: [B, C, ...] -> the same. Every rank must call it equally often.
    """

    share: Tensor | float = 1.0

    @classmethod
    def replace_in(cls, network: nn.Module) -> None:
        """Put one in the place of every batch normalisation of a network; the names of its tensors stay."""
        for name, module in list(network.named_children()):
            if isinstance(module, _BatchNorm):
                new = cls(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
                new.weight, new.bias = module.weight, module.bias
                for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                    setattr(new, buffer, getattr(module, buffer))
                new.train(module.training)
                setattr(network, name, new)
            else:
                cls.replace_in(module)

    @classmethod
    def set_share(cls, network: nn.Module, share: Tensor | float) -> None:
        for module in network.modules():
            if isinstance(module, cls):
                module.share = share

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"GlobalBatchNorm: input has {input.dim()} dimensions; expected at least 2")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        # As torch does, in float32 also under autocast.
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        own = self.share * x.new_full((1,), x.numel() // x.shape[1])
        # From two passes, because a difference of squares would lose digits.
        sums = _over_ranks(torch.cat([self.share * x.sum(axes), own]))
        count = sums[-1].detach().clamp(min=1)
        mean = sums[:-1] / count
        centred = x - mean.view(shape)
        variance = _over_ranks(self.share * centred.square().sum(axes)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                counts = (count > 1).to(count.dtype)  # a step in which all parts are fillers changes nothing
                self.num_batches_tracked.add_(counts.to(self.num_batches_tracked.dtype))
                rate = 1 / self.num_batches_tracked.clamp(min=1) if self.momentum is None else self.momentum
                unbiased = variance * count / (count - 1).clamp(min=1)
                self.running_mean.lerp_(mean, rate * counts)
                self.running_var.lerp_(unbiased, rate * counts)
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)


def _over_ranks(x: Tensor) -> Tensor:
    """The sum over all ranks, through which gradients flow."""
    total: Tensor = all_reduce(x) if distributed.is_initialized() else x
    return total
