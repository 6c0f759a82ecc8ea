"""A small model in stages, its batches, and what it computes without a pipeline."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from scaledtrain import Precision
from scaledtrain.data.steps import StepBatch
from scaledtrain.parallel.pipeline.cut import cut_step
from scaledtrain.schedule import MicrobatchLoop

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def join() -> tuple[int, int]:
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def parts(n: int) -> list[nn.Module]:
    torch.manual_seed(0)
    inner = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8)) for _ in range(n - 1)]
    return [*inner, nn.Linear(8, 3)]


def batch(samples: int, seed: int = 1) -> StepBatch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 8, generator=generator)
    return StepBatch([(x, torch.randint(3, (samples,), generator=generator))], [samples])


def plain(model: nn.Module, step: StepBatch, pieces: int, precision: str = "fp32") -> Tensor:
    """The loss of gradient accumulation over the same microbatches; leaves gradients behind."""
    cut = cut_step(step, pieces)
    whole = StepBatch([m.batch for m in cut], [m.samples for m in cut])
    loop = MicrobatchLoop(model, F.cross_entropy, Precision(precision), [*model.parameters()])
    computed = loop.run(whole)
    assert computed is not None
    return computed.loss
