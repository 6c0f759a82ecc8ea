"""Fixtures that more than one module asks for."""

from tests.remote_sets import memory, ten  # noqa: F401
