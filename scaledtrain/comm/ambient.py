"""The link that code runs under when it is given none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from scaledtrain.comm.protocols import Link

__all__ = ["ambient_link", "under"]

_link: ContextVar[Link | None] = ContextVar("link", default=None)


def ambient_link() -> Link | None:
    """The innermost link of `under`; None outside."""
    return _link.get()


@contextmanager
def under(link: Link) -> Iterator[None]:
    """Inside, a `Trainer` that is given no link takes this one.

    Example:
        >>> import scaledtrain
        >>> with scaledtrain.connect() as link, under(link):
        ...     ambient_link() is link
        True
    """
    token = _link.set(link)
    try:
        yield
    finally:
        _link.reset(token)
