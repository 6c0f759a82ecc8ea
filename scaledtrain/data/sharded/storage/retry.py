"""How long, and how often, something remote is tried."""

from __future__ import annotations

import errno
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from scaledtrain.errors import ConfigError, DataError

__all__ = ["Remote", "UnansweredError", "in_daemon", "is_permanent"]

T = TypeVar("T")

_LONGEST_PAUSE_SECONDS = 30.0
_ATTEMPTS_IF_DAMAGED = 2  # the first may have been damaged on its way
# What no other attempt changes, as there being no file, or no room for its copy.
_PERMANENT_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE}

_jitter = random.Random()  # of its own, so that the draws of a seeded program stay what they are
_log = logging.getLogger(__name__)


class UnansweredError(OSError):
    """A request may or may not have had its effect, or may have it later; it is not repeated."""


@dataclass(frozen=True)
class Remote:
    """How a data set at a URL is reached, and how much patience there is with it.

    An attempt that fails is repeated, after a pause that doubles from time to time, of which a
    random part is left out, so that many processes do not come back at once. Each is logged.

    Args:
        retries: attempts after the first.
        timeout_seconds: an attempt that brings nothing for so long is given up.
        total_seconds: for all attempts and pauses together, for one file.
        backoff_seconds: the first pause.
        options: of fsspec for this kind of URL: credentials, an endpoint, ... What is left out, it
            takes from its own configuration files and from the environment.

    Raises:
        ConfigError: a number that is negative, or a time that is 0.
    """

    retries: int = 5
    timeout_seconds: float = 60.0
    total_seconds: float = 240.0
    backoff_seconds: float = 0.5
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ConfigError(f"retries is {self.retries}; it is a whole number >= 0")
        for name in ("timeout_seconds", "total_seconds", "backoff_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is > 0")

    def persist(self, what: str, attempt: Callable[[float], T]) -> T:
        """Try until it works.

        Args:
            what: is tried, for messages: ``"reading s3://bucket/data/shard-00003.safetensors"``.
            attempt: is called with the time, by the monotonic clock, when all has to be over.

        Raises:
            OSError: it cannot work: see `is_permanent`.
            DataError: it did not work in all these attempts or all this time; says what was tried.
        """
        began = time.monotonic()
        deadline = began + self.total_seconds
        for number in itertools.count(1):
            try:
                return attempt(deadline)
            except ConfigError:
                raise
            except Exception as error:
                if is_permanent(error):
                    raise
                most = self.retries + 1
                if isinstance(error, DataError):
                    most = min(most, _ATTEMPTS_IF_DAMAGED)
                now, pause = time.monotonic(), self._pause_seconds(number)
                if number >= most or now + pause >= deadline:
                    raise DataError(
                        f"{what}: {number} of {most} attempts failed within {now - began:.1f} s "
                        f"(of {self.total_seconds:g} s), the last with {_told(error)}; see whether "
                        "the storage can be reached from here, or give more retries or "
                        "total_seconds"
                    ) from error
                told = _told(error)
            _log.warning(
                "%s: attempt %d of %d failed with %s; the next in %.1f s",
                *(what, number, most, told, pause),
            )
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _pause_seconds(self, number: int) -> float:
        longest = min(_LONGEST_PAUSE_SECONDS, self.backoff_seconds * 2.0 ** min(number - 1, 30))
        return longest * _jitter.uniform(0.5, 1.0)

    def within_timeout(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function that may never return; what it does after its time is lost.

        Raises:
            TimeoutError: it did not return in time.
        """
        future = in_daemon(function, *arguments)
        if not wait([future], self.timeout_seconds).done:
            raise TimeoutError(f"no answer within {self.timeout_seconds:g} s")
        return future.result()


def in_daemon(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call a function in a thread that the end of the program does not wait for."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="sharded-storage", daemon=True).start()
    return future


def is_permanent(error: Exception) -> bool:
    """Whether another attempt would fail in the same way."""
    return isinstance(
        error,
        FileNotFoundError
        | PermissionError
        | IsADirectoryError
        | NotADirectoryError
        | NotImplementedError
        | UnansweredError,
    ) or (isinstance(error, OSError) and error.errno in _PERMANENT_NUMBERS)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
