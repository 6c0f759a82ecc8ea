"""The largest number of samples whose bytes fit."""

from __future__ import annotations

from collections.abc import Callable

from scaledtrain.errors import ConfigError

__all__ = ["largest"]

_MOST = 2**40  # samples


def largest(bytes_of: Callable[[int], int], memory: int) -> int:
    """The n from 1 on of which ``bytes_of(n)`` is at most ``memory``, but of n + 1 is not; or 0.

    The next number that is looked at is where the line through two others crosses the limit, which
    finds it at once where bytes grow by as many for each; later on, every second one is in the
    middle, so that it never takes long.

    Args:
        bytes_of: grows with its argument.
        memory: bytes.

    Raises:
        ConfigError: it does not grow.

    Example:
        >>> largest(lambda n: 100 + 7 * n, 1000)  # 100 + 7 * 128 = 996
        128
    """
    fits, fitting = 0, 0
    fits_not, not_fitting = 0, 0  # 0: not known yet
    guess = 1
    for turn in range(200):
        found = bytes_of(guess)
        if found > memory:
            fits_not, not_fitting = guess, found
        else:
            slope = max(0.0, (found - fitting) / (guess - fits)) if fits else 0.0
            fits, fitting = guess, found
        if fits_not == fits + 1:
            return fits
        if fits_not and turn > 6 and turn % 2:
            guess = (fits + fits_not) // 2
        elif fits_not and fits:
            slope = (not_fitting - fitting) / (fits_not - fits)
            guess = fits + int((memory - fitting) / slope)
        elif fits_not:
            guess = fits_not // 2
        else:
            guess = fits + int((memory - fitting) / slope) if slope else 2 * fits
        guess = max(fits + 1, min(guess, fits_not - 1 if fits_not else _MOST))
        if fits >= _MOST:
            break
    raise ConfigError(
        f"{fitting} bytes are enough for {fits} samples as well, so memory does not limit the "
        "batch; the first dimension of the batch's tensors has to be that of the samples"
    )
