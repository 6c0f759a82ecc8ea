"""What divides a model among the ranks of ``mesh.shard``, and what it then offers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from scaledtrain.data.steps import StepBatch, Weigh
from scaledtrain.errors import ConfigError
from scaledtrain.loss_scale import LossScaler
from scaledtrain.mesh import Mesh
from scaledtrain.precision import Precision
from scaledtrain.replica import MakeOptimizer
from scaledtrain.schedule import Abandon, Computed, LossFn, Schedule, Told

__all__ = ["Divided", "DividedSchedule", "Engine", "Recipe", "check_engine"]


class Recipe(NamedTuple):
    """What an engine may have to know of the training that it is for."""

    precision: Precision
    optimizer: MakeOptimizer
    only_updates_write: bool
    """Whether the strategy leaves the parameters alone between the optimizer's updates."""
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    compile: str | None = None
    loss_fn: LossFn | None = None
    """Of outputs and targets; None: the model computes its loss."""
    recomputed: bool = False
    """Whether activations are: `Divided.stand_in` will be asked for, once."""
    loss_weight: Weigh | None = None
    """How much a batch's loss counts in a mean; None: as its samples."""
    parts_before: Sequence[int] | None = None
    """Of the model in each stage, in the run that this one goes on from; None: not known."""


class Divided(Protocol):
    """One rank's part of a model."""

    named_parameters: list[tuple[str, nn.Parameter]]
    """(name, this rank's part), plain tensors, also frozen ones."""
    called: Callable[..., Any]
    """What runs the model, on all ranks together."""
    needs_lockstep: bool
    """Whether strategies may write into the parts only when they do so in all replicas at once."""
    in_memory: bool
    """Whether the parts have their values between steps; else only the optimizer's update has."""
    one_by_one: bool
    """Whether gradients may be taken after each of any number of backward passes."""
    saved_elsewhere: Collection[str]
    """Names of parameters that `state_dict` has on another of the ranks, and not here."""

    def optimizer(self, usual: MakeOptimizer) -> MakeOptimizer:
        """What makes the optimizer of the parts."""

    def scaler(self, usual: Callable[[], LossScaler]) -> LossScaler:
        """What runs backward passes."""

    def begin(self, batch: StepBatch) -> None:
        """A step with these microbatches begins."""

    def take_gradients(self) -> tuple[list[nn.Parameter], Sequence[Tensor]]:
        """Parts that have got a gradient since the last time, and it; the model forgets it."""

    def refresh(self) -> None:
        """Let the model compute with the values that the parts have now. Collective."""

    def stand_in(self, blocks: Sequence[str] | None) -> nn.Module:
        """A whole model on this rank that computes as this one, to try a policy out with.

        Args:
            blocks: names of submodules that a policy is for; None: those that it finds.

        Raises:
            ConfigError: activations cannot be computed again with this engine.
        """

    def full_state_dict(self, keep: bool) -> dict[str, Any]:
        """The whole model's state dict, in the host's memory; all ranks take part.

        Args:
            keep: whether this rank is to have it; else it gets an empty one.
        """

    def state_dict(self, model: nn.Module) -> Mapping[str, Any]:
        """What this rank saves of the model. Collective.

        Args:
            model: this rank's piece, that was divided.
        """

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned. Collective."""

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole of a tensor that is divided as that parameter is; else the part as it is."""

    def close(self) -> None:
        """The training is over."""


class DividedSchedule:
    """Hands gradients over from a divided model to the parts that the optimizer has.

    Args:
        loop: runs the model.
        parts: of it, on this rank.
        scaler: of the loss.
    """

    def __init__(self, loop: Schedule, parts: Divided, scaler: LossScaler) -> None:
        self._loop = loop
        self._parts = parts
        self._scaler = scaler

    def run(self, batch: StepBatch, abandon: Abandon = None) -> Computed | None:
        """As the schedule inside; ``abandon`` is not asked: the other ranks go on, too."""
        self._parts.refresh()
        self._parts.begin(batch)
        computed = self._loop.run(batch)
        self._scaler.hand_over(*self._parts.take_gradients())
        return computed

    def backward_passes(self, batch: StepBatch) -> int:
        """Not known: gradients are handed over all at once."""
        return 0

    def weight(self, batch: StepBatch) -> float:
        """As the schedule inside."""
        return self._loop.weight(batch)

    def predict(self, batch: StepBatch) -> tuple[list[Any] | None, Tensor]:
        """As the schedule inside."""
        return self._loop.predict(batch)

    def outputs(self, batch: Any) -> Any:
        """As the schedule inside."""
        return self._loop.outputs(batch)

    @property
    def pending(self) -> int:
        """As the schedule inside."""
        return self._loop.pending

    @property
    def one_by_one(self) -> bool:
        """Whether schedule and engine can."""
        return self._loop.one_by_one and self._parts.one_by_one

    def tell(self, told: Told) -> None:
        """Call this after each microbatch, whose gradient is then handed over at once."""
        if told is None:
            self._loop.tell(None)
            return

        def hand_over(samples: int) -> None:
            self._scaler.hand_over(*self._parts.take_gradients())
            told(samples)

        self._loop.tell(hand_over)


def check_engine(engine: Engine | None, mesh: Mesh) -> None:
    """Raise ConfigError where an engine has nothing to do."""
    if engine is None or mesh.shard > 1 or (engine.offloads and mesh.pipe == 1):
        return
    why = "which stages on one rank each cannot have" if mesh.pipe > 1 else "and offloads nothing"
    raise ConfigError(
        f"engine is {engine}, but mesh.shard is 1: it has nothing to divide, {why}; set mesh.shard "
        "to the number of ranks that have a replica, or a stage, together, leave engine out, or "
        "let it offload (engine.offload) what one rank has"
    )


class Engine(Protocol):
    """Divides a model among ranks."""

    takes_stages: ClassVar[bool]
    """Whether it can divide stages of a pipeline, too."""
    makes_own_groups: ClassVar[bool]
    """Whether it makes the optimizer of parameter groups of its own, before a strategy is there."""

    @property
    def offloads(self) -> bool:
        """Whether something is kept in other memory than where it computes: for one rank, too."""

    def apply(self, roots: Sequence[nn.Module], group: ProcessGroup, recipe: Recipe) -> Divided:
        """Divide a model, in place, among the ranks of a group. Collective.

        Args:
            roots: the model, or stages of it, on the device on which they compute, the same on
                every rank.
            group: the ranks.
            recipe: of the training.

        Raises:
            ConfigError: it cannot be done.
        """
