"""DropCompute: a slow step leaves out its last microbatches, so that nobody waits for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scaledtrain.errors import ConfigError

__all__ = ["DropCompute", "Threshold", "choose_threshold"]

_MAX_CANDIDATES = 1000
_ROUNDING = 1e-9  # rates nearer than that count as equal


@dataclass(frozen=True)
class DropCompute:
    r"""Begin no further microbatch of a step that has computed for longer than a threshold.

    At least one microbatch is always computed. A replica's gradient is that of the mean over the
    samples it did compute with, and its weight in the mean over replicas is their number, so the
    update is that of one process on exactly the samples that were used::

        g = sum_i sum_(m <= M_i) n_im g_im / sum_i sum_(m <= M_i) n_im

    Samples that were left out are not seen in this epoch; the next one's order decides anew. A
    replica that is slow all the time leaves out more than the others, in every epoch.

    With `Sync` and overlap nothing is sent before a step's last microbatch has begun, so a replica
    that leaves microbatches out has sent nothing with a wrong weight; it sends after backward.

    Args:
        threshold_seconds: on the replica's own clock, since its first microbatch began; infinite:
            nothing is left out. Find one with `choose_threshold`.

    Raises:
        ConfigError: a negative threshold, or NaN.

    Example:
        >>> DropCompute(threshold_seconds=0.5).is_over(0.4)
        False

    References:
        Giladi et al. 2023, DropCompute: simple and more robust distributed synchronous training
        via compute variance reduction, arXiv 2306.10598.
    """

    threshold_seconds: float = math.inf

    def __post_init__(self) -> None:
        if not self.threshold_seconds >= 0.0:
            raise ConfigError(
                f"drop_compute.threshold_seconds is {self.threshold_seconds}; it is a time >= 0, "
                "or infinite to leave nothing out"
            )

    def is_over(self, seconds: float) -> bool:
        """Whether a step that has computed for so long is to begin nothing more."""
        return seconds > self.threshold_seconds


class Threshold(NamedTuple):
    """What `choose_threshold` found."""

    threshold_seconds: float
    """For `DropCompute`; infinite if leaving out does not pay."""
    speedup: float
    """Useful microbatches per second, relative to leaving nothing out."""
    dropped: float
    """Share of the microbatches that are left out."""


def choose_threshold(
    seconds: ArrayLike, communication_seconds: float | Sequence[float] = 0.0
) -> Threshold:
    r"""The threshold with the most useful microbatches per second over a timing log.

    A step of a synchronous run takes as long as its slowest worker, and then communicates. With
    M_nk(T) the microbatches that worker n computes in step k under the threshold T, and t_nk(M)
    the time they take::

        maximise over T:  sum_k sum_n M_nk(T) / sum_k (max_n t_nk(M_nk(T)) + c_k)

    That counts every microbatch alike; it does not know that a smaller batch may be worth less, nor
    that communication may overlap with computing. Of equally good thresholds it takes the largest.

    Args:
        seconds: shape [workers, steps, microbatches]: what each took. ``Trainer.schedule`` has
            those of its last step in ``microbatch_seconds``, without shards and pipelines.
        communication_seconds: c, for each step or for all.

    Raises:
        ConfigError: another shape, or times that are not positive and finite.

    Example:
        One of two workers is late with its last microbatch. At T = 1 both compute two: 4
        microbatches in 2 + 1 s, instead of 6 in 6 + 1 s.

        >>> choice = choose_threshold([[[1, 1, 1]], [[1, 1, 4]]], communication_seconds=1)
        >>> choice.threshold_seconds, round(choice.speedup, 3), round(choice.dropped, 3)
        (1.0, 1.556, 0.333)

    References:
        Giladi et al. 2023, arXiv 2306.10598 (there the step ends at the threshold
        itself; here the microbatch that has begun is finished).
    """
    log = np.asarray(seconds, dtype=np.float64)
    if log.ndim != 3 or log.size == 0:
        raise ConfigError(
            f"the timing log has the shape {log.shape}; it must be [workers, steps, microbatches]"
        )
    communication = np.broadcast_to(np.asarray(communication_seconds, np.float64), log.shape[1])
    if not (np.isfinite(log).all() and (log > 0).all() and (communication >= 0).all()):
        raise ConfigError(
            "the timing log has times that are not positive and finite; leave those steps out"
        )
    ends = log.cumsum(axis=2)
    everything = _rate(ends, communication, math.inf)
    best = Threshold(math.inf, 1.0, 0.0)
    for candidate in _candidates(ends):
        rate = _rate(ends, communication, candidate)
        if rate > best.speedup * everything * (1.0 + _ROUNDING):
            computed = _computed(ends, candidate).sum() / log.size
            best = Threshold(candidate, rate / everything, float(1.0 - computed))
    return best


def _candidates(ends: NDArray[np.float64]) -> list[float]:
    """Thresholds between which nothing changes (evenly thinned, if many), the largest first."""
    values = np.unique(np.append(ends[:, :, :-1], 0.0))
    if len(values) > _MAX_CANDIDATES:
        values = values[np.linspace(0, len(values) - 1, _MAX_CANDIDATES).round().astype(int)]
    return [float(value) for value in values[::-1]]


def _computed(ends: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """Shape [workers, steps]: microbatches that are computed."""
    computed: NDArray[np.int64] = 1 + (ends[:, :, :-1] <= threshold).sum(axis=2)
    return computed


def _rate(ends: NDArray[np.float64], communication: NDArray[np.float64], threshold: float) -> float:
    computed = _computed(ends, threshold)
    took = np.take_along_axis(ends, computed[:, :, None] - 1, axis=2)[:, :, 0]
    return float(computed.sum() / (took.max(axis=0) + communication).sum())
