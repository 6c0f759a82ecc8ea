"""Gradients reduced in buckets, each as soon as it is complete, while backward still runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from scaledtrain.comm.compress import CompressedGroup, Compression, compressed
from scaledtrain.comm.flat import bytes_of
from scaledtrain.comm.protocols import Group, Handle
from scaledtrain.errors import ClusterError, ConfigError

__all__ = ["GradientBuckets", "cut_into_buckets"]


def cut_into_buckets(
    parameters: Sequence[nn.Parameter], bucket_bytes: int
) -> list[list[nn.Parameter]]:
    """Parameters in reverse order, about as their gradients become ready, cut by size.

    Args:
        parameters: in the model's order.
        bucket_bytes: the most that a bucket holds; a larger parameter has one of its own.

    Example:
        >>> a, b, c = (nn.Parameter(torch.zeros(n)) for n in (1, 2, 3))  # 4, 8 and 12 bytes
        >>> [[len(p) for p in bucket] for bucket in cut_into_buckets([a, b, c], bucket_bytes=12)]
        [[3], [2, 1]]
    """
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in reversed(parameters):
        size = bytes_of([parameter])
        if size > room or not buckets:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(parameter)
        room -= size
    return buckets


class GradientBuckets:
    """Replaces gradients by their weighted mean over the ranks, bucket by bucket.

    With ``overlap`` a bucket's all-reduce begins during the backward pass in which its gradients
    become complete: the last of the microbatches that `expect` announced. Every rank begins bucket
    i only after bucket i - 1, and `finish` begins what is left, so the order is the same everywhere
    whatever a rank computes: also nothing, or fewer microbatches than announced, since then none of
    its buckets began early with a weight that turned out wrong.

    Its hooks are gone when it is.

    Args:
        parameters: in the same order on every rank.
        group: of the ranks.
        compression: of each bucket.
        bucket_bytes: as in `cut_into_buckets`; without overlap there is one bucket.
        overlap: begin early; None: if the group then goes on by itself while this rank computes.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: Group,
        compression: Compression | None,
        bucket_bytes: int,
        overlap: bool | None,
    ) -> None:
        if overlap is None:
            overlap = compressed(group, compression, _gradients_of(parameters)).overlaps
        cut = cut_into_buckets(parameters, bucket_bytes) if overlap else [list(parameters)]
        self._parameters = parameters
        self._buckets = [
            _Bucket(bucket, compressed(group, compression, _gradients_of(bucket))) for bucket in cut
        ]
        self._handles: list[Handle] = []
        self._microbatches = 0
        self._weight = 1.0
        if overlap:
            self._watch()

    def _watch(self) -> None:
        me = weakref.ref(self)
        removable = [
            p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(_gradient_came, me, index)
            )
            for index, bucket in enumerate(self._buckets)
            for p in bucket.parameters
        ]
        finalizer = weakref.finalize(self, lambda: [hook.remove() for hook in removable])
        finalizer.atexit = False

    def expect(self, microbatches: int, weight: float) -> None:
        """A step begins: so many backward passes will be made, if none is left out.

        Raises:
            ClusterError: the last step was broken off when it had begun to communicate.
        """
        if self._handles:
            raise ClusterError(
                f"a new step begins, but {len(self._handles)} all-reduces of the last one have "
                "begun and were not finished, so the ranks are out of step: call "
                "reduce_gradients() after every backward pass, and end the job after an error "
                "inside one"
            )
        self._microbatches, self._weight = microbatches, weight
        for bucket in self._buckets:
            bucket.begin()

    def gradient_came(self, bucket: int, parameter: nn.Parameter) -> None:
        """A backward pass has added to the gradient of a parameter in that bucket."""
        if self._microbatches == 0:  # no step is under way that was announced
            return
        times = self._buckets[bucket].count(parameter, self._microbatches)
        if times > self._microbatches:
            raise ConfigError(
                f"a parameter of shape {tuple(parameter.shape)} got a gradient {times} times in a "
                f"step that was announced as {self._microbatches} microbatches, so its all-reduce "
                "may have begun too early: tell before_forward(microbatches=...) how often "
                "backward will run, use checkpoint(..., use_reentrant=False), or overlap=False"
            )
        while len(self._handles) < len(self._buckets):
            following = self._buckets[len(self._handles)]
            if not following.is_complete:
                return
            self._handles.append(following.launch(self._weight))

    def finish(self, weight: float) -> None:
        """Begin what did not begin by itself, and wait; a missing gradient counts as zero.

        Raises:
            ConfigError: buckets began early with another weight.
        """
        early = len(self._handles)
        if early and weight != self._weight:
            raise ConfigError(
                f"reduce_gradients has the weight {weight}, but before_forward announced "
                f"{self._weight}, with which {early} buckets have been sent already; give both the "
                "same if all announced microbatches were computed"
            )
        self._microbatches = 0
        self._handles += [bucket.launch(weight) for bucket in self._buckets[early:]]
        for handle in self._handles:
            handle.wait()
        self._handles = []

    def confirm(self) -> None:
        """An update is made of what was reduced."""
        for bucket in self._buckets:
            bucket.group.confirm()

    def undo(self) -> None:
        """None is made, on any rank: what the compression remembers is as before."""
        for bucket in self._buckets:
            bucket.group.undo()

    def state_dict(self) -> list[dict[str, Tensor]]:
        """What the compression remembers of each parameter, in their order."""
        by_parameter = {
            parameter: state
            for bucket in self._buckets
            for parameter, state in zip(bucket.parameters, bucket.group.state_dict(), strict=True)
        }
        return [by_parameter[parameter] for parameter in self._parameters]

    def load_state_dict(self, state: Sequence[Mapping[str, Tensor]]) -> None:
        """Restore what ``state_dict`` returned; the buckets may be cut differently now.

        Raises:
            ConfigError: it is of another compression.
        """
        for mine, saved in zip(self.state_dict(), state, strict=True):
            if mine and saved and _shapes(mine) != _shapes(saved):
                raise ConfigError(
                    f"the saved state has {_shapes(saved)} of a gradient, but this compression "
                    f"keeps {_shapes(mine)}; resume with the compression that it was saved with"
                )
        by_parameter = dict(zip(self._parameters, state, strict=True))
        for bucket in self._buckets:
            bucket.group.load_state_dict([by_parameter[p] for p in bucket.parameters])


class _Bucket:
    """Some parameters, and how often each got a gradient in this step."""

    def __init__(self, parameters: list[nn.Parameter], group: CompressedGroup) -> None:
        self.parameters = parameters
        self.group = group
        self.begin()

    def begin(self) -> None:
        self._times: dict[nn.Parameter, int] = {}
        self._incomplete = len(self.parameters)

    def count(self, parameter: nn.Parameter, microbatches: int) -> int:
        times = self._times[parameter] = self._times.get(parameter, 0) + 1
        self._incomplete -= times == microbatches
        return times

    @property
    def is_complete(self) -> bool:
        return self._incomplete == 0

    def launch(self, weight: float) -> Handle:
        return self.group.all_reduce(list(self._gradients()), "mean", weight)

    def _gradients(self) -> Iterator[Tensor]:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            yield parameter.grad


def _gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Tensors like their gradients, which may be of another dtype."""
    return [p.detach().to(p.grad_dtype or p.dtype) for p in parameters]


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in state.items()}


def _gradient_came(
    buckets: weakref.ref[GradientBuckets], bucket: int, parameter: nn.Parameter
) -> None:
    owner = buckets()
    if owner is not None:
        owner.gradient_came(bucket, parameter)
