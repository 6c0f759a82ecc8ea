"""One rank's stage of a model: some of its parts, and nothing of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from scaledtrain.errors import ConfigError
from scaledtrain.parallel.pipeline.parts import ModelParts, call_parts, spread
from scaledtrain.parallel.pipeline.split_points import Cut
from scaledtrain.parallel.pipeline.trace import TracedPart
from scaledtrain.parallel.pipeline.tree import all_tensors, fill

__all__ = ["Held", "Stage", "find_tied", "make_stage"]


class Held(NamedTuple):
    """A parameter that a stage has."""

    stage: int
    name: str


class Stage(nn.Module):
    """Consecutive parts of a model.

    Its parameters and buffers have the names that the model has for them, so that the state dicts
    of all stages together are the model's. A parameter that the model has under several names
    (tied weights) has all of them here, and `named_parameters` gives it once, by the first.

    Made by `make_stage`.

    Args:
        parts: of the whole model.
        of_stage: those of them that are in this stage.
        extra: tensors of the model that no part has, and that this stage keeps for the state dict.
    """

    def __init__(self, parts: ModelParts, of_stage: range, extra: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._is_first = of_stage.start == 0
        self._parts = [parts.modules[index] for index in of_stage]
        fill(self, parts.model, self._parts, extra)
        # A traced block is no submodule of the model; whoever looks for blocks finds these.
        blocks: dict[nn.Module, nn.Module] = {
            part: _Block(part)
            for part in self._parts
            if isinstance(part, TracedPart) and part.is_block
        }
        if blocks:
            self.traced_blocks = nn.ModuleList(blocks.values())
        self._called = [blocks.get(part, part) for part in self._parts]
        self.training = parts.model.training

    @property
    def parts(self) -> Sequence[nn.Module]:
        """In the order in which they are called."""
        return self._called

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the next stage, or the loss, is given.

        Args:
            *args: what the stage before has returned, a tensor or a tuple of tensors; of the first
                stage, what the model is given.
            **kwargs: of the first stage, what the model is given.
        """
        return call_parts(self._called, args if self._is_first else spread(*args), kwargs)

    def train(self, mode: bool = True) -> Stage:
        """As every module's; parts that are no submodules of the model are told, too."""
        super().train(mode)
        for part in self._parts:
            part.train(mode)
        return self

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """With those of parts that are no submodules of it, and have modes of their own."""
        inner = (module for part in self._parts for module in part.modules())
        yield from dict.fromkeys([*super().modules(), *inner])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stage:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for part in self._parts:  # again for what they share, which has moved by now
            part._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class _Block(nn.Module):
    """A traced part without its parameters, which the stage has where the model has them."""

    def __init__(self, part: TracedPart) -> None:
        super().__init__()
        self._part = (part,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._part[0](*args, **kwargs)

    def extra_repr(self) -> str:
        """Which is the same for no other block, that may cost something else."""
        return self._part[0].name


def make_stage(parts: ModelParts, cut: Cut, index: int) -> Stage:
    """One stage of a model.

    It refers to its own parameters alone: when the model and its parts are given up, so are the
    other stages'. Parameters are those of the model, not copies: two stages of one process share
    those that are tied.

    Args:
        parts: of the model.
        cut: where it is cut.
        index: of the stage.

    Example:
        >>> from scaledtrain.parallel.pipeline import find_parts
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 1))
        >>> parts = find_parts(model)
        >>> stage = make_stage(parts, Cut((1, 2)), 1)
        >>> [name for name, _ in stage.named_parameters()]
        ['2.weight', '2.bias', '3.weight', '3.bias']
    """
    if cut.n_parts != len(parts):
        raise ConfigError(
            f"the cut is for {cut.n_parts} parts, but the model has {len(parts)}; make the cut of "
            "these parts"
        )
    is_last = index == len(cut) - 1
    return Stage(parts, cut.parts_of(index), _unused(parts) if is_last else ())


def find_tied(parts: ModelParts, cut: Cut) -> list[tuple[Held, ...]]:
    """Parameters that several stages have.

    Each group is one parameter of the model. Its gradient is the sum of those of all its stages; in
    a norm over the model it counts once.

    Args:
        parts: of the model.
        cut: where it is cut.

    Example:
        >>> from scaledtrain.models import GPT
        >>> from scaledtrain.parallel.pipeline import find_parts
        >>> parts = find_parts(GPT(16, sequence_length=8, n_layers=2, n_heads=2, d_model=32))
        >>> for group in find_tied(parts, Cut((2, 2))):
        ...     print(*group)
        Held(stage=0, name='token_embedding.weight') Held(stage=1, name='token_embedding.weight')
    """
    held: list[set[int]] = []
    for index in range(len(cut)):
        modules = [parts.modules[part] for part in cut.parts_of(index)]
        held.append({id(p) for module in modules for p in module.parameters()})
    groups = []
    for name, parameter in parts.model.named_parameters():
        group = tuple(Held(stage, name) for stage, ids in enumerate(held) if id(parameter) in ids)
        if len(group) > 1:
            groups.append(group)
    return groups


def _unused(parts: ModelParts) -> list[Tensor]:
    used = {id(tensor) for part in parts.modules for tensor in all_tensors(part)}
    return [tensor for tensor in all_tensors(parts.model) if id(tensor) not in used]
