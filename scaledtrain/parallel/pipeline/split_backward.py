"""A backward pass in two parts: gradients of the inputs now, those of the parameters later.

What stage i - 1 waits for is only the first part; the second fills what would be idle time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["SplitBackward"]

Gradients = tuple[Tensor | None, ...]


class SplitBackward:
    """One backward pass of a stage.

    The first part runs the nodes of the graph that lie between outputs and inputs, and notes the
    gradients that arrive where a branch to parameters leaves that path. The second part runs the
    branches from there. Each parameter's hooks run in the second part, once, with all of its
    gradient. Nothing is computed twice, except between the places where one parameter is used
    several times.

    Args:
        roots: of the outputs that have gradients.
        gradients: of those.
        inputs: leaves, whose gradients are wanted first.
        parameters: whose gradients are wanted later; may be more than there are in the graph.

    Attributes:
        input_gradients: of the inputs, as soon as this is made; None for those that are not used.

    References:
        Qi et al. 2024, Zero Bubble Pipeline Parallelism, arXiv 2401.10241.
    """

    def __init__(
        self,
        roots: Sequence[GradientEdge],
        gradients: Sequence[Tensor],
        inputs: Sequence[Tensor],
        parameters: Iterable[nn.Parameter],
    ) -> None:
        of_node = {get_gradient_edge(p).node: p for p in parameters if p.requires_grad}
        ends = {get_gradient_edge(x).node for x in inputs}
        branches, apart = _branches([root.node for root in roots], ends, of_node)
        self._came: dict[Node, Gradients] = {}
        self._apart = apart
        self._groups = list(_groups(branches))
        for root, gradient in zip(roots, gradients, strict=True):
            if root.node in apart:
                came = list(self._came.get(root.node, ()))
                came += [None] * (root.output_nr + 1 - len(came))
                before = came[root.output_nr]
                came[root.output_nr] = gradient if before is None else before + gradient
                self._came[root.node] = tuple(came)
        hooks = [node.register_prehook(self._note(node)) for node in branches]
        try:
            self.input_gradients = torch.autograd.grad(
                roots, list(inputs), list(gradients), retain_graph=True, allow_unused=True
            )
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, node: Node):  # type: ignore[no-untyped-def]
        def hook(gradients: Gradients) -> None:
            self._came[node] = gradients

        return hook

    def finish(self) -> None:
        """Add the parameters' gradients to their ``.grad``."""
        # From one of several nodes to another the path is run again, through others' nodes.
        keep = any(len(nodes) > 1 for nodes, _ in self._groups)
        while self._groups:
            nodes, parameters = self._groups.pop()
            came = {node: self._came.pop(node) for node in nodes if node in self._came}
            edges = [
                (GradientEdge(node, i), gradient)
                for node, gradients in came.items()
                for i, gradient in enumerate(gradients)
                if gradient is not None
            ]
            if not edges:
                continue
            # What flows from one of several nodes to another has been counted in the first part.
            several = came.keys() - self._apart if len(came) > 1 else ()
            hooks = [node.register_prehook(_only(came[node])) for node in several]
            try:
                torch.autograd.backward(
                    [edge for edge, _ in edges],
                    [gradient for _, gradient in edges],
                    retain_graph=keep,
                    inputs=parameters,
                )
            finally:
                for hook in hooks:
                    hook.remove()


def _only(gradients: Gradients):  # type: ignore[no-untyped-def]
    def hook(_: Gradients) -> Gradients:
        return gradients

    return hook


def _branches(
    roots: Sequence[Node], ends: set[Node], of_node: dict[Node, nn.Parameter]
) -> tuple[dict[Node, list[nn.Parameter]], set[Node]]:
    """Node at which branches leave the path to the inputs -> the parameters that they lead to.

    And those of them that are not on the path: outputs that come of parameters alone.
    """
    order = _from_the_ends(roots)
    on_path: set[Node] = set()
    leads_to: dict[Node, dict[nn.Parameter, None]] = {}  # of nodes beside the path; ordered sets
    branches: dict[Node, list[nn.Parameter]] = {}
    for node in order:
        following = [n for n, _ in node.next_functions if n is not None]
        found: dict[nn.Parameter, None] = {}
        if node in of_node:
            found[of_node[node]] = None
        for n in following:
            found.update(leads_to.get(n, {}))
        if node in ends or any(n in on_path for n in following):
            on_path.add(node)
            if found:
                branches[node] = list(found)
        else:
            leads_to[node] = found
    apart = {root for root in roots if leads_to.get(root)}
    branches.update((root, list(leads_to[root])) for root in apart)
    return branches, apart


def _from_the_ends(roots: Sequence[Node]) -> list[Node]:
    """All nodes of a graph, each after those that follow it."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(n, False) for n, _ in node.next_functions if n is not None]
    return order


def _groups(
    branches: dict[Node, list[nn.Parameter]],
) -> Iterator[tuple[list[Node], list[nn.Parameter]]]:
    """Nodes that share parameters, directly or by others, and all parameters of theirs."""
    nodes_of: dict[nn.Parameter, list[Node]] = {}
    for node, parameters in branches.items():
        for parameter in parameters:
            nodes_of.setdefault(parameter, []).append(node)
    left = dict.fromkeys(branches)
    while left:
        nodes: dict[Node, None] = {}
        shared: dict[nn.Parameter, None] = {}
        reached = [next(iter(left))]
        while reached:
            node = reached.pop()
            if node in nodes:
                continue
            nodes[node] = None
            del left[node]
            for parameter in branches[node]:
                shared[parameter] = None
                reached += nodes_of[parameter]
        yield list(nodes), list(shared)
