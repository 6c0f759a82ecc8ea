"""A traced graph cut into pieces, each of which takes what the one before it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from scaledtrain.errors import ConfigError
from scaledtrain.parallel.pipeline.traced_arguments import Pack, Unpack, one_or_all, positional

__all__ = ["Piece", "split"]

_aten = torch.ops.aten
# Eager code does not check these; under autocast they do not hold.
_CHECKS = (
    _aten._assert_tensor_metadata.default,
    _aten._assert_scalar.default,
    _aten.sym_constrain_range_for_size.default,
)
_MODEL = "_model"  # in a piece's graph, the model's tensors are below it
_CONSTANTS = "_constants"


@dataclass(frozen=True)
class Piece:
    """Some consecutive operators."""

    name: str
    """The block's, or that of the first module in it."""
    is_block: bool
    graph: fx.GraphModule
    unpack: Callable[[tuple[Any, ...], dict[str, Any]], Sequence[Any]]
    """The arguments of the graph, from those of the part."""
    pack: Callable[[Any], Any]
    """What the part returns, from what the graph returns."""


def split(
    exported: torch.export.ExportedProgram, tensors: Mapping[str, Tensor], blocks: Sequence[str]
) -> list[Piece]:
    """Cut a model's graph before each block, and after the last one.

    Args:
        exported: a module that has the model as its attribute ``model``, and one argument.
        tensors: the model's parameters and buffers.
        blocks: names of the blocks.

    Raises:
        ConfigError: the model does not call the blocks once each, in this order, or returns more
            than its last part has made.
    """
    return _Splitter(exported, tensors, blocks).pieces()


class _Splitter:
    """The work of `split`.

    A value that operators of a later piece need is carried through all pieces between. One that
    follows from sizes alone (a causal mask, the sizes themselves) is made again where it is needed.
    """

    def __init__(
        self,
        exported: torch.export.ExportedProgram,
        tensors: Mapping[str, Tensor],
        blocks: Sequence[str],
    ) -> None:
        module = exported.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        self._module = module
        self._tensors = tensors
        self._first_name: dict[int, str] = {}
        for name, tensor in tensors.items():
            self._first_name.setdefault(id(tensor), name)
        self._in_spec, self._out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
        self._nodes = _cleaned(module.graph)
        self._order = {node: index for index, node in enumerate(self._nodes)}
        self._place, self._names = _places(self._nodes, blocks)
        self._n_pieces = len(self._names)
        self._from_sizes = self._find_from_sizes()
        self._carried = self._find_carried()

    def pieces(self) -> list[Piece]:
        """In order."""
        return [self._piece(index) for index in range(self._n_pieces)]

    def _input_sizes(self) -> list[list[int | None]]:
        # Here, since sympy comes with it, which a run that traces nothing need not load.
        from torch.fx.experimental.symbolic_shapes import is_concrete_int

        values = [n.meta.get("val") for n in self._nodes if n.op == "placeholder"]
        shapes = [value.shape if isinstance(value, Tensor) else () for value in values]
        return [[int(n) if is_concrete_int(n) else None for n in shape] for shape in shapes]

    def _find_from_sizes(self) -> set[fx.Node]:
        """What can be made again anywhere."""
        found: set[fx.Node] = set()
        for node in self._nodes:
            if node.op == "get_attr":
                free = self._attribute(node)[1] is None
            elif node.op == "call_function" and node.target is not _aten.sym_size.int:
                free = all(source in found for source in node.all_input_nodes)
                free = free and not _is_impure(node) and not any(map(_is_impure, node.users))
            else:
                free = node.target is _aten.sym_size.int
            if free:
                found.add(node)
        return found

    def _attribute(self, node: fx.Node) -> tuple[Any, str | None]:
        """What a node gets, and its name in the model; None: a constant of the graph."""
        target = str(node.target)
        name = target.removeprefix("model.")
        if target != name and name in self._tensors:
            return self._tensors[name], self._first_name[id(self._tensors[name])]
        value: Any = self._module
        for attribute in target.split("."):
            value = getattr(value, attribute)
        return value, None

    def _needs(self, piece: int) -> Iterator[fx.Node]:
        """Tensors that its operators are given."""
        for node in self._nodes:
            if self._is_in(piece, node):
                yield from (s for s in node.all_input_nodes if s not in self._from_sizes)

    def _is_in(self, piece: int, node: fx.Node) -> bool:
        return self._place.get(node) == piece and node not in self._from_sizes

    def _find_carried(self) -> list[list[fx.Node]]:
        """What is given to each piece."""
        needs = [set(self._needs(piece)) for piece in range(self._n_pieces)]
        needs = [{n for n in need if n.op != "get_attr"} for need in needs]
        carried = self._carried_for(needs)
        for piece in range(1, self._n_pieces):
            for size in self._sizes_in(piece):
                source = size.args[0]
                if self._same_size(size, piece, carried[piece]) is None:
                    assert isinstance(source, fx.Node)
                    needs[piece].add(source)
                    carried = self._carried_for(needs)
        return carried

    def _carried_for(self, needs: Sequence[set[fx.Node]]) -> list[list[fx.Node]]:
        carried: list[list[fx.Node]] = [[n for n in self._nodes if n.op == "placeholder"]]
        for piece in range(1, self._n_pieces):
            later = set().union(*needs[piece:])
            here = {node for node in later if self._place[node] < piece}
            # The latest is first: what goes through all blocks.
            carried.append(sorted(here, key=self._order.__getitem__, reverse=True))
        return carried

    def _sizes_in(self, piece: int) -> list[fx.Node]:
        """The sizes that something in a piece follows from."""
        found: dict[fx.Node, None] = {}

        def visit(node: fx.Node) -> None:
            if node.target is _aten.sym_size.int:
                found[node] = None
            elif node in self._from_sizes:
                for source in node.all_input_nodes:
                    visit(source)

        for node in self._nodes:
            if self._is_in(piece, node):
                for source in node.all_input_nodes:
                    visit(source)
        return list(found)

    def _same_size(
        self, size: fx.Node, piece: int, carried: Sequence[fx.Node]
    ) -> tuple[fx.Node, int] | None:
        """A tensor that is there when a piece begins, and its dim of that size."""
        source, dim = size.args
        assert isinstance(source, fx.Node)
        assert isinstance(dim, int)
        if source in carried:
            return source, dim
        wanted = str(size.meta["val"])
        for node in carried:
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                for own, n in enumerate(value.shape):
                    if str(n) == wanted:
                        return node, own
        return None

    def _piece(self, index: int) -> Piece:
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        root: dict[str, Any] = {}
        carried = self._carried[index]
        for node in carried:
            made[node] = graph.placeholder(node.name)

        def get(node: fx.Node) -> fx.Node:
            """The node in the new graph; what follows from sizes is made when it is asked for."""
            if node in made:
                return made[node]
            if node.op == "get_attr":
                value, name = self._attribute(node)
                target = f"{_CONSTANTS}.{node.name}" if name is None else f"{_MODEL}.{name}"
                root[target] = value
                made[node] = graph.create_node("get_attr", target)
            elif node.target is _aten.sym_size.int:
                place = self._same_size(node, index, carried)
                assert place is not None
                arguments = get(place[0]), place[1]
                made[node] = graph.call_function(_aten.sym_size.int, arguments)
            else:
                assert self._place[node] == index or node in self._from_sizes
                made[node] = graph.node_copy(node, get)
            return made[node]

        for node in self._nodes:
            if node.op == "call_function" and self._is_in(index, node):
                get(node)
        last = index == self._n_pieces - 1
        returned = self._returned(index) if last else self._carried[index + 1]
        outputs = [get(n) if isinstance(n, fx.Node) else n for n in returned]
        graph.output(tuple(outputs))
        module = fx.GraphModule(root, graph)
        held = [t.removeprefix(f"{_MODEL}.") for t in root if t.startswith(_MODEL)]
        return Piece(
            self._names[index] or (held[0].rpartition(".")[0] if held else f"operators {index}"),
            bool(self._names[index]),
            module,
            Unpack(self._in_spec, self._input_sizes()) if index == 0 else positional,
            Pack(self._out_spec) if last else one_or_all,
        )

    def _returned(self, last: int) -> list[Any]:
        """What the model returns, which the last piece has to have made."""
        output = self._nodes[-1]
        returned: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        early = {n for n in returned if isinstance(n, fx.Node) and self._place.get(n, last) < last}
        if early:
            raise ConfigError(
                f"the model returns {len(early)} tensors that are made before its last part, so "
                "that all stages would send them on; let it return only what the loss is made of "
                "(model.config.use_cache = False, no hidden states)"
            )
        return returned


def _cleaned(graph: fx.Graph) -> list[fx.Node]:
    """All nodes without checks, and what only checks need."""
    for node in list(graph.nodes):
        if node.target in _CHECKS:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return list(graph.nodes)


def _is_impure(node: fx.Node) -> bool:
    """It changes something, or is another time something else."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function" and not _is_arithmetic(node)
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return node.target._schema.is_mutable or random


def _is_arithmetic(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") in {"_operator", "math", "torch"}


def _places(
    nodes: Sequence[fx.Node], blocks: Sequence[str]
) -> tuple[dict[fx.Node, int], list[str]]:
    """In which piece each operator is, and the pieces' names: the block's, or nothing."""
    of_block = {f"model.{name}": index for index, name in enumerate(blocks)}
    inside: dict[fx.Node, int] = {}
    for node in nodes:
        stack = node.meta.get("nn_module_stack") or {}
        for path, _ in stack.values():
            block = of_block.get(path.partition("@")[0])  # what comes after counts calls
            if block is not None and node.op == "call_function":
                inside[node] = block
    missing = set(range(len(blocks))) - set(inside.values())
    if missing:
        raise ConfigError(
            f"the model does not call its block {blocks[min(missing)]}, or it does nothing; name "
            "the blocks that make the chain (blocks=[...])"
        )
    end = max(index for index, node in enumerate(nodes) if inside.get(node) == len(blocks) - 1)
    places: dict[fx.Node, int] = {}
    current = 0
    for index, node in enumerate(nodes):
        if node.op != "call_function":
            continue
        if node in inside:
            if inside[node] + 1 < current:
                raise ConfigError(
                    f"the model calls its block {blocks[current - 1]} before "
                    f"{blocks[inside[node]]} is done; name blocks that are called one after "
                    "another (blocks=[...])"
                )
            current = inside[node] + 1
        elif index > end:
            current = len(blocks) + 1
        sources = [places[source] for source in node.all_input_nodes if source in places]
        if node.target is getitem and sources:
            places[node] = sources[0]
        elif node.target is _aten.copy_.default and node.all_input_nodes[0].op == "get_attr":
            places[node] = max(sources, default=current)  # a buffer is given its new values
        else:
            places[node] = current
    used = sorted(set(places.values()))
    found = {node: used.index(place) for node, place in places.items()}
    ends = {"placeholder": 0, "output": len(used) - 1}
    found |= {node: ends[node.op] for node in nodes if node.op in ends}
    return found, [["", *blocks, ""][place] for place in used]
