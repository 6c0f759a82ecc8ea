"""Synchronous SGD."""

from __future__ import annotations

from typing import Any

import torch

from scaledtrain.comm.compress import Compression
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.replica import Replica
from scaledtrain.strategies.buckets import GradientBuckets
from scaledtrain.strategies.strategy import Strategy

__all__ = ["Sync"]


class Sync(Strategy):
    r"""Every step uses the mean gradient of all replicas: data-parallel training as it is known.

    g = sum_i w_i g_i / sum_i w_i over the replicas i, w_i their numbers of samples, so the update
    is that of one process on the whole batch. Each replica keeps its own optimizer; as all start
    equal and see equal gradients, they stay equal.

    Sent: one all-reduce of the gradients per step, in buckets with ``overlap``; what a compression
    sends instead, its docstring says. Waits: for the slowest replica, in every step. A crash of any
    replica ends the run for all; nothing is lost but the step.

    Args:
        overlap: begin to send gradients during the last backward pass of a step, each bucket when
            it is complete. None: where that is of use, which is where a transport goes on by itself
            (gloo, NCCL; not shared memory, where the ranks' own cores do the work when they wait,
            and not a compression with an exchange of several parts). The result is the same. In a
            loop of your own ``before_forward`` says how many backward passes there will be; without
            it nothing is begun early.
        bucket_bytes: of gradients in a bucket, if there is overlap; a larger one is fewer messages,
            a smaller one begins earlier.
        compression: of what is sent, any of `scaledtrain.comm.compress`; the mean is then an
            approximation, the same on every replica. A single replica sends and compresses nothing.

    Raises:
        ConfigError: ``bucket_bytes`` below 1; (from a backward pass, with overlap) a parameter got
            its gradient more often than was announced, so that it was sent too early.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> import scaledtrain
        >>> model, sync = torch.nn.Linear(2, 1), Sync()
        >>> replica = scaledtrain.Replica(model, partial(torch.optim.SGD, lr=0.1))
        >>> with scaledtrain.connect() as link:
        ...     sync.attach(replica, link)
        ...     sync.before_forward(microbatches=1)
        ...     model(torch.ones(4, 2)).mean().backward()
        ...     sync.reduce_gradients()
        ...     sync.apply_gradients()
        ...     sync.after_step()
        True
        >>> sync.step
        1

    References:
        Goyal et al. 2017, Accurate, Large Minibatch SGD, arXiv 1706.02677; Li et al. 2020, PyTorch
        Distributed: Experiences on Accelerating Data Parallel Training (buckets).
    """

    replicas_equal = True

    def __init__(
        self,
        *,
        overlap: bool | None = None,
        bucket_bytes: int = 25 * 2**20,
        compression: Compression | None = None,
    ) -> None:
        if bucket_bytes < 1:
            raise ConfigError(f"bucket_bytes is {bucket_bytes}; it is the size of a message, >= 1")
        super().__init__()
        self._overlap = overlap
        self._bucket_bytes = bucket_bytes
        self._compression = compression
        self._buckets: GradientBuckets | None = None
        self._some_missing = True  # until a step shows that no parameter is without a gradient

    def attach(self, replica: Replica, link: Link) -> None:
        """Give every replica rank 0's parameters and buffers. Collective; once."""
        super().attach(replica, link)
        if self._group.size > 1:
            self._buckets = GradientBuckets(
                replica.parameters,
                self._group,
                self._compression,
                self._bucket_bytes,
                self._overlap,
            )

    @property
    def gradients_per_step(self) -> int:
        """One of every replica."""
        return self._group.size

    def before_forward(self, microbatches: int = 1, weight: float = 1.0) -> bool:
        """Whether to go on with this step; if so, buckets may be sent during its last backward."""
        going = super().before_forward(microbatches, weight)
        if going and self._buckets is not None:
            self._buckets.expect(microbatches, weight)
        return going

    def reduce_gradients(self, weight: float = 1.0) -> None:
        """Replace the gradients by their mean over the replicas.

        A parameter without a gradient on some replicas counts as zero there; one without a
        gradient on all of them has none, as in a single process. Whether there are such is found
        out in the first step: a parameter that is left out only later counts as zero.
        """
        if self._buckets is None:
            return
        parameters = self._replica.parameters
        start = self._timeline.now()
        present = [p.grad is not None for p in parameters] if self._some_missing else []
        self._buckets.finish(weight)
        self._timeline.add("compute", start)  # packing and encoding: the rest counts by itself
        if self._some_missing:
            flags = torch.tensor(present, device=self._replica.device).to(torch.uint8)
            self._group.all_reduce([flags], "max").wait()
            for parameter, flag in zip(parameters, flags.tolist(), strict=True):
                if not flag:
                    parameter.grad = None
            self._some_missing = not all(flags.tolist())

    def apply_gradients(self) -> None:
        """Let the replica's own optimizer use the gradients."""
        if self._buckets is not None:
            self._buckets.confirm()
        super().apply_gradients()

    def skip_update(self) -> None:
        """Leave out an update, on all replicas: it is as if the batch had never been."""
        if self._buckets is not None:
            self._buckets.undo()

    def state_dict(self) -> dict[str, Any]:
        """Step, optimizer, and what the compression remembers on this replica."""
        kept = [] if self._buckets is None else self._buckets.state_dict()
        return {
            **super().state_dict(),
            "compression": kept,
            "some_missing": self._some_missing,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; after ``attach``."""
        super().load_state_dict(state)
        self._some_missing = state["some_missing"]
        if self._buckets is not None and state["compression"]:
            self._buckets.load_state_dict(state["compression"])
