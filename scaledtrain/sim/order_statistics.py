"""How long it takes until the k fastest of M workers are done, and how many it pays to wait for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scaledtrain.errors import ConfigError
from scaledtrain.sim.compute import StepPace

__all__ = ["best_count", "order_statistics"]


def order_statistics(
    pace: Callable[[int, int], StepPace], n_workers: int, *, n_steps: int, seed: int = 0
) -> NDArray[np.float64]:
    """E[T_(k:M)], the k-th shortest of M workers' times for the same step, by drawing.

    Args:
        pace: from worker and seed to its times, as ``pace`` of a compute model, or of a `Cluster`.
        n_workers: M.
        n_steps: over which the mean is taken; its standard error falls as 1 / sqrt(n_steps).
        seed: of the draws.

    Returns:
        Shape [M], rising: in seconds, for k = 1 to M. The last is what a synchronous step takes.

    Raises:
        ConfigError: less than one worker or step.

    Example:
        >>> from scaledtrain.sim.compute import Constant
        >>> order_statistics(Constant(2.0).pace, n_workers=3, n_steps=5).tolist()
        [2.0, 2.0, 2.0]
    """
    if n_workers < 1 or n_steps < 1:
        raise ConfigError(
            f"order statistics of {n_workers} workers over {n_steps} steps; both must be >= 1"
        )
    times = np.empty((n_workers, n_steps))
    for worker in range(n_workers):
        of_worker = pace(worker, seed)
        for step in range(n_steps):
            of_worker.begin_step()
            times[worker, step] = of_worker.seconds(0.0, 1.0)
    mean: NDArray[np.float64] = np.sort(times, axis=0).mean(axis=1)
    return mean


def best_count(times: ArrayLike) -> int:
    """For how many of M workers a synchronous step should wait: the k with the most per second.

    ::

        maximise over k:  k / E[T_(k:M)]

    The others are backup workers, whose late gradients are dropped. It counts gradients, and does
    not know that a smaller batch may be worth less per gradient, or more.

    Args:
        times: shape [M]: E[T_(k:M)] for k = 1 to M, what communication takes included.

    Returns:
        k; of equally good ones the largest.

    References:
        Chen et al. 2016, Revisiting Distributed Synchronous SGD, arXiv 1604.00981.

    Example:
        Two in 1 s are more per second than three in 2 s:

        >>> best_count([1.0, 1.0, 2.0])
        2
    """
    expected = np.asarray(times, dtype=np.float64)
    rates = np.arange(1, len(expected) + 1) / expected
    return len(rates) - int(rates[::-1].argmax())
