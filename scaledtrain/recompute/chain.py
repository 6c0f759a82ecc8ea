"""What the blocks of a model cost, one after another: time, and bytes that are kept meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scaledtrain.errors import ConfigError

__all__ = ["Block", "Chain", "Way"]


@dataclass(frozen=True)
class Way:
    """One way to run a block so that its backward pass can follow.

    Bytes are those of activations alone, beside parameters and their gradients; what is there
    before the block runs, its input included, is not counted.
    """

    name: str
    """``"all"``: everything is kept that the backward pass needs; others keep it elsewhere, or run
    the block again in the backward pass, but for what they are named after."""
    forward_seconds: float
    backward_seconds: float
    """What is computed again included."""
    kept_bytes: int
    """From the end of the forward pass to the backward pass; the block's output is one of them only
    if the block itself needs it."""
    forward_bytes: int
    """At most, during the forward pass, its output included."""
    backward_bytes: int
    """At most, during the backward pass, beside the gradient of the output: what has been kept
    included."""
    stopped_seconds: float
    """As ``forward_seconds``, of a forward pass that is only made for the backward pass: it stops
    when that has all it needs, so that nobody computes the output."""
    keeps_input: bool = True
    """The backward pass needs the block's input."""
    keeps_output: bool = False
    """The backward pass needs the block's output, and ``kept_bytes`` has it."""
    runs_again: bool = False
    """In the backward pass, from its input, which can be offloaded until then."""
    first_pass_only: bool = False
    """Not for a forward pass that is only made for the backward pass."""


@dataclass(frozen=True)
class Block:
    """A part of the model that takes the output of the one before it."""

    ways: tuple[Way, ...]
    output_bytes: int
    """As many has the gradient of the output."""
    forward_seconds: float
    """Of a forward pass that keeps nothing but the output."""
    forward_bytes: int
    """At most, during such a pass; at least ``output_bytes``."""
    joins: bool = True
    """It can be computed again together with the block before it."""

    def way(self, name: str) -> Way:
        """One of its ways."""
        return next(way for way in self.ways if way.name == name)


@dataclass(frozen=True)
class Chain:
    """All blocks, from the first to the last.

    Whatever comes after the last block that can be run in several ways (a head, the loss) is a
    block, too, with one way.

    Args:
        blocks: in the order in which they run.
        base_bytes: there all the time: what the model keeps before the first block, that one's
            input, if it is there whatever the blocks do.
        offload_seconds: to write a byte of a block's output somewhere else, and to read it again;
            None: there is nowhere else.
        first_input_bytes: of the first block's input, if it is there only for the blocks.
        late_bytes: there during the blocks' backward passes, too, but not before.

    Raises:
        ConfigError: no block, or a block that cannot be run in any way.
    """

    blocks: tuple[Block, ...]
    base_bytes: int = 0
    offload_seconds: float | None = None
    first_input_bytes: int = 0
    late_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ConfigError("a chain needs at least one block")
        for index, block in enumerate(self.blocks):
            if not block.ways:
                raise ConfigError(f"block {index} of the chain has no way to be run")

    def __len__(self) -> int:
        return len(self.blocks)

    def input_bytes(self, block: int) -> int:
        """Of a block's input: what the one before it returned."""
        return self.blocks[block - 1].output_bytes if block else self.first_input_bytes

    def without_keeping(self, first: int, last: int) -> tuple[float, int]:
        """Seconds, and bytes at most, of a forward pass that keeps nothing but the last output."""
        blocks = self.blocks[first : last + 1]
        return sum(block.forward_seconds for block in blocks), most_bytes(blocks)


def most_bytes(blocks: Sequence[Block]) -> int:
    """Of a forward pass in which each block's output is given up when the next one has its own."""
    inputs = [0, *(block.output_bytes for block in blocks)]
    return max(before + block.forward_bytes for before, block in zip(inputs, blocks, strict=False))
