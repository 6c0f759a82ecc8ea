"""Plain values of a config parsed as Python types; what does not fit is told with what would.

A `Node` is a part of a config that names a callable as ``_target_``; the keys beside it are checked
against that callable's own signature, so that a new class is usable without a schema beside it.
With ``_partial_: true`` it makes no object but a factory, for an argument that wants one: as in
Hydra, a ``functools.partial`` of the callable, whose other arguments are given when it is called.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from scaledtrain.errors import ConfigError

__all__ = ["Kind", "Misfit", "Node", "class_name", "complete", "did_you_mean", "make", "parse"]

LEFT_OUT = "???"  # as OmegaConf writes a value that is still to be given
_SPECIAL = ("_target_", "_partial_")  # keys of a node that are no arguments
_PART = "a part"

_WORDS = {
    Any: "anything",
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
}


class Node(dict[str, Any]):
    """The name of a callable (``_target_``) and its arguments; `make` calls it, or binds them."""


@dataclass(frozen=True)
class Kind:
    """What a node has besides the arguments in the config: ``Annotated[Node, Kind(...)]``.

    Args:
        besides: a dataclass whose fields are keys of the node, too.
        n_given: leading arguments that the code gives when it calls the target.
        incomplete: required arguments may be left out; `complete` fills them in.
    """

    besides: type | None = None
    n_given: int = 0
    incomplete: bool = False


class Misfit(ConfigError):
    """A value that is not of its key's type."""

    def __init__(self, key: str, value: Any, expected: str) -> None:
        shown = "null" if value is None else repr(value)
        advice = ""
        if expected.startswith(_PART) and isinstance(value, str):
            advice = f"; to choose one write {key.replace('.', '/')}={value}"
        super().__init__(f"{key} is {shown}, but must be {expected}{advice}")
        self.key = key


@dataclass(frozen=True)
class _Argument:
    hint: Any
    required: bool


def parse(key: str, value: Any, hint: Any) -> Any:
    """The value as its type wants it.

    Args:
        key: where the value stands, for messages.
        value: plain: dicts, lists, texts, numbers, None.
        hint: a primitive, ``Literal``, ``Sequence``, ``Mapping``, union, dataclass, `Node` or any
            other class; for the latter the value is a node that makes one.

    Raises:
        ConfigError: the value does not fit; a `Misfit` if it is of another type.

    Example:
        >>> parse("lr", 1, float), parse("hidden", [64, 32], Sequence[int])
        (1.0, [64, 32])
        >>> parse("hidden", "64", Sequence[int])
        Traceback (most recent call last):
            ...
        scaledtrain.schema.Misfit: hidden is '64', but must be a list of whole numbers
    """
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return _node(key, value, args[1])
    if origin is Node:
        return _node(key, value, Kind())
    if origin in (Union, types.UnionType):
        return _union(key, value, hint)
    if origin in (bool, int, float, str):
        return _primitive(key, value, hint)
    if origin is Literal and value in args:
        return value
    if origin in (list, tuple, Sequence, Iterable, Collection) and isinstance(value, (list, tuple)):
        kinds = [kind for kind in args if kind is not Ellipsis] or [Any]
        each = kinds * len(value) if len(kinds) == 1 else kinds
        if len(each) == len(value):
            pairs = zip(value, each, strict=True)
            return [parse(f"{key}[{i}]", item, kind) for i, (item, kind) in enumerate(pairs)]
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        of, to = args or (Any, Any)
        items = value.items()
        return {parse(f"a key of {key}", k, of): parse(f"{key}.{k}", v, to) for k, v in items}
    if isinstance(value, dict) and "_target_" in value:
        return _node(key, value, Kind())
    if origin is Path and isinstance(value, (str, Path)):
        return Path(value)
    understood = isinstance(origin, type) or origin is Literal
    if origin in (Any, object, Callable) or not understood:  # anything goes
        return [parse(key, v, Any) for v in value] if isinstance(value, list) else value
    if isinstance(origin, type) and is_dataclass(origin) and isinstance(value, dict):
        return _dataclass(key, value, origin)
    raise Misfit(key, value, _describe(hint))


def make(node: Node, *given: Any) -> Any:
    """Call what a parsed node names, first the nodes among its arguments.

    Example:
        >>> halve = make(Node(_target_="builtins.divmod", _partial_=True), 7)
        >>> halve(2)
        (3, 1)
    """
    arguments = {key: _made(value) for key, value in node.items() if key not in _SPECIAL}
    target = _find("_target_", node["_target_"])
    if node.get("_partial_", False):
        return partial(target, *given, **arguments)
    return target(*given, **arguments)


def _made(value: Any) -> Any:
    if isinstance(value, Node):
        return make(value)
    if isinstance(value, dict):
        return {key: _made(item) for key, item in value.items()}
    return [_made(item) for item in value] if isinstance(value, list) else value


def complete(node: Node, known: Mapping[str, Any], n_given: int = 0) -> tuple[Node, list[str]]:
    """Fill in what a node leaves out and ``known`` has under the same name.

    Args:
        node: parsed with `Kind.incomplete`.
        known: values by name.
        n_given: as in `Kind`.

    Returns:
        The node, and the required arguments that it still lacks.
    """
    target = _find("_target_", node["_target_"])
    arguments, _ = _arguments(target, n_given)
    wanted = {name for name, argument in arguments.items() if argument.required}
    wanted |= {name for name, value in node.items() if value == LEFT_OUT}
    wanted -= {name for name, value in node.items() if value != LEFT_OUT}
    filled = {name: known[name] for name in wanted & known.keys()}
    return Node({**node, **filled}), sorted(wanted - known.keys())


def class_name(node: Mapping[str, Any]) -> str:
    """Of what a part of a config names, without its module.

    Example:
        >>> class_name({"_target_": "torch.optim.SGD", "lr": 0.1})
        'SGD'
    """
    return str(node["_target_"]).rpartition(".")[2]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`` (did you mean 'strategy'?)``, or nothing if no choice is close.

    Example:
        >>> did_you_mean("strategi", ["model", "strategy"]), did_you_mean("lr", ["optimizer.lr"])
        (" (did you mean 'strategy'?)", " (did you mean 'optimizer.lr'?)")
    """
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1)
    if not close:  # a key inside a part, written without the part's name
        full = {choice.rpartition(".")[2]: choice for choice in choices}
        close = [full[last] for last in difflib.get_close_matches(word, full, n=1, cutoff=0.8)]
    return f" (did you mean {close[0]!r}?)" if close else ""


def _union(key: str, value: Any, hint: Any) -> Any:
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    nullable = len(kinds) < len(get_args(hint))
    if nullable and (value is None or value == {}):
        return None
    for kind in kinds if value is not None else []:
        try:
            return parse(key, value, kind)
        except Misfit as misfit:
            if misfit.key != key:  # it is of this kind, but something inside it is wrong
                raise
    raise Misfit(key, value, _describe(hint))


def _primitive(key: str, value: Any, hint: type) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is float and is_number:
        return float(value)
    if hint is int and is_number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if hint is int and isinstance(value, str) and value.isdecimal():  # a key of a mapping
        return int(value)
    if hint is str and (is_number or isinstance(value, str)):
        return str(value)
    raise Misfit(key, value, _WORDS[hint])


def _dataclass(key: str, value: dict[str, Any], hint: type) -> Any:
    dot = f"{key}." if key else ""
    hints = get_type_hints(hint, include_extras=True)
    known = {field.name: field for field in fields(hint)}
    for name in value:
        if name not in known:
            inside = [f"{k}.{n}" for k, v in value.items() if isinstance(v, dict) for n in v]
            keys = ", ".join(known)
            guess = did_you_mean(name, [*known, *inside])
            raise ConfigError(f"there is no key '{dot}{name}'{guess}; the keys are: {keys}")
    parsed = {name: parse(f"{dot}{name}", v, hints[name]) for name, v in value.items()}
    for name, field in known.items():
        if name not in parsed and field.default is field.default_factory is MISSING:
            raise ConfigError(f"{dot}{name} is missing; give it a value ({_describe(hints[name])})")
    return hint(**parsed)


def _node(key: str, value: Any, kind: Kind) -> Node:
    path = value.get("_target_") if isinstance(value, dict) else None
    if not isinstance(path, str) or path == LEFT_OUT:
        raise Misfit(key, value, _describe(Node))
    target = _find(key, path)
    known, open_ended = _arguments(target, kind.n_given)
    if kind.besides is not None:
        for name, hint in get_type_hints(kind.besides).items():
            known[name] = _Argument(hint, required=False)
    node = Node(_target_=path)
    is_factory = parse(f"{key}._partial_", value.get("_partial_", False), bool)
    if is_factory:
        node["_partial_"] = True
    for name, item in value.items():
        if name in _SPECIAL:
            continue
        if name not in known and not open_ended:
            raise ConfigError(
                f"there is no key '{key}.{name}'{did_you_mean(name, known)}; {target.__name__} "
                f"takes{': ' + ', '.join(known) if known else ' no arguments'}"
            )
        if item != LEFT_OUT or kind.incomplete:
            hint = known[name].hint if name in known and item != LEFT_OUT else Any
            node[name] = parse(f"{key}.{name}", item, hint)
    if kind.besides is not None:  # it may refuse them
        kind.besides(**{f.name: node[f.name] for f in fields(kind.besides) if f.name in node})
    for name, argument in known.items():
        if argument.required and name not in node and not kind.incomplete and not is_factory:
            wanted = _describe(argument.hint)
            raise ConfigError(f"{target.__name__} needs {key}.{name}; give it a value ({wanted})")
    return node


def _find(key: str, path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{key} names {path!r}, which cannot be imported ({error}); write "
            "package.module.Class, and see that Python finds the package: put its folder on "
            "PYTHONPATH, or install it"
        ) from error
    if not callable(target):
        raise ConfigError(f"{key} names {path!r}, which is no class or function")
    return target  # type: ignore[no-any-return]


def _arguments(target: Callable[..., Any], n_given: int) -> tuple[dict[str, _Argument], bool]:
    """What may be given by name, and whether any other name may be, too."""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except ValueError:  # a builtin that does not tell
        return {}, True
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers only
        hints = {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    arguments = {}
    for p in parameters[n_given:]:
        if p.kind in named:
            hint = hints.get(p.name, Any)
            if p.default is None:  # as in ``width: int = None``
                hint = Union[hint, None]  # noqa: UP007
            arguments[p.name] = _Argument(hint, p.default is inspect.Parameter.empty)
    return arguments, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        plain = [kind for kind in args if (get_origin(kind) or kind) in _WORDS]
        others = [kind for kind in args if kind not in plain]
        # Beside a number, a class (a tensor) is something for Python code only.
        shown = plain if any(kind in (int, float, str) for kind in plain) else [*others, *plain]
        return " or ".join(_describe(kind) for kind in shown)
    if origin is Annotated or origin is Node:
        return f"{_PART} of its own (a class as _target_, and its arguments)"
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (dict, Mapping):
        return f"a mapping {{{', '.join(_describe(kind) for kind in args)}}}"
    if origin in (list, tuple, Sequence, Iterable, Collection):
        kinds = [_describe(kind) for kind in args if kind is not Ellipsis] or ["values"]
        if len(kinds) > 1:
            return f"a list of {len(kinds)}: {', '.join(kinds)}"
        return f"a list of {kinds[0].removeprefix('a ')}{'s' if kinds[0].startswith('a ') else ''}"
    if origin in _WORDS:
        return _WORDS[origin]
    name = getattr(origin, "__name__", str(origin))
    return f"{_PART} that makes one (a class of {name} as _target_, and its arguments)"
