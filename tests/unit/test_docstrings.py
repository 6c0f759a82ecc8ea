"""Examples in docstrings run and show what they say; those of what is exported are complete.

That a section names no argument that is not there, and all if any, is ruff's matter (D417, DOC).
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any

import pytest

import scaledtrain


def modules() -> list[str]:
    names = [m.name for m in pkgutil.walk_packages(scaledtrain.__path__, "scaledtrain.")]
    return [name for name in names if not name.endswith("__main__")]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


@pytest.mark.parametrize("name", modules())
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in examples(module):
        runner.run(test)
    assert runner.summarize().failed == 0


# A summary that begins so does not say what is returned.
IMPERATIVES = {"Compute", "Find", "Give", "Join", "Load", "Make", "Measure", "Read", "Run", "Write"}


def exported() -> dict[str, Any]:
    """The classes and functions in ``__all__`` of every package, by the name of one that has it."""
    packages = [m.name for m in pkgutil.walk_packages(scaledtrain.__path__, "scaledtrain.") if m[2]]
    found: dict[int, tuple[str, Any]] = {}
    for package in ("scaledtrain", *packages):
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", []):
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found.setdefault(id(thing), (f"{package}.{name}", thing))
    return dict(found.values())


def missing(thing: Any) -> Iterator[str]:
    """What its docstring lacks."""
    text = inspect.getdoc(thing) or ""
    is_made = "__init__" in vars(thing) and not getattr(thing, "_is_protocol", False)
    has_arguments = inspect.isfunction(thing) or is_made
    # A field of a dataclass may have its own docstring; an estimator refers to its function.
    if has_arguments and not is_dataclass(thing) and "Arguments, and" not in text:
        section = _section(text, "Args")
        told = re.findall(r"^    \*{0,2}(\w+)(?: \(.*\))?: ", section, re.MULTILINE)
        target = thing.__init__ if inspect.isclass(thing) else thing
        yield from set(inspect.signature(target).parameters) - {"self"} - set(told)
    if inspect.isfunction(thing) and text.split()[0] in IMPERATIVES:
        returns = inspect.signature(thing).return_annotation
        if returns != "None" and not _section(text, "Returns"):
            yield "Returns"


def _section(text: str, name: str) -> str:
    match = re.search(rf"^{name}:\n((?:    .*\n|\n)+)", f"{text}\n", re.MULTILINE)
    return match[1] if match else ""


def test_what_is_exported_tells_its_arguments_and_what_it_returns() -> None:
    lacking = {name: list(missing(thing)) for name, thing in exported().items()}
    assert len(lacking) > 200
    assert {name: lacks for name, lacks in lacking.items() if lacks} == {}


@pytest.mark.parametrize("name", scaledtrain.__all__)
def test_what_is_at_the_top_has_an_example(name: str) -> None:
    thing = getattr(scaledtrain, name)
    if not (inspect.isclass(thing) and issubclass(thing, Exception)):
        assert ">>> " in inspect.getdoc(thing)
