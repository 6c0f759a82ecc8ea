"""A model that DeepSpeed has, in the shape that the Trainer and strategies work with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError
from scaledtrain.loss_scale import LossScaler
from scaledtrain.parallel.deepspeed.partition import Partition, free_buffers, partition_of
from scaledtrain.parallel.deepspeed.state_dicts import loadable, whole_state
from scaledtrain.replica import MakeOptimizer, Replica

__all__ = ["ZeroModel"]

_AS_IT_WAS = (
    "set zero_optimization.sub_group_size to what it was, and train the same parameters in the "
    "same parameter groups"
)


class ZeroModel:
    """One rank's part of a model under ZeRO.

    Args:
        engine: DeepSpeed's.
        model: that the engine has.
        optimizer: that makes the engine's updates.
        names: of the model's parameters.
        check_batch: called with each step, and how many ranks have one like it.
        rank: of this process, among those that divide the model.
        files: what is closed at the end.

    Attributes:
        model: as given.
        called: what a forward pass calls.
        named_parameters: (name, part), float32, flat.
        in_memory: whether they have values between steps.
        saved_elsewhere: with stage 3 all parameters, on all ranks but the first.
    """

    def __init__(
        self,
        engine: Any,
        model: nn.Module,
        optimizer: Optimizer,
        names: dict[nn.Parameter, str],
        check_batch: Callable[[StepBatch, int], None],
        rank: int,
        files: ExitStack,
    ) -> None:
        self.model = model
        self.called: Callable[..., Any] = engine
        self._engine = engine
        self._check_batch = check_batch
        self._files = files
        self._partition = partition_of(engine, names)
        self._optimizer = DeepSpeedOptimizer(engine, optimizer, self._partition)
        self._scaler = ZeroScaler(engine, self._optimizer)
        self._is_idle = False
        self.named_parameters = self._partition.named_parameters
        self.in_memory = self._partition.in_memory
        everything = list(model.named_parameters(remove_duplicate=False))
        self._is_divided = any(hasattr(p, "ds_id") for _, p in everything)
        self.saved_elsewhere: Collection[str] = ()
        if self._is_divided and rank > 0:
            self.saved_elsewhere = {name for name, _ in everything}

    needs_lockstep = True
    one_by_one = False

    def optimizer(self, usual: MakeOptimizer) -> MakeOptimizer:
        """The engine itself."""
        return self._as_optimizer_of

    def _as_optimizer_of(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        wanted = [id(p) for _, p in named_parameters]
        if wanted != [id(p) for _, p in self.named_parameters]:
            raise ConfigError(
                "engine=deepspeed makes the updates itself, in what it keeps on each rank, but "
                "this strategy makes them elsewhere, on a server or on a part of the parameters; "
                "take engine=fully_shard, or a strategy whose replicas keep their optimizer (sync, "
                "local_sgd, diloco)"
            )
        return self._optimizer

    def scaler(self, usual: Callable[[], LossScaler]) -> LossScaler:
        """What runs the engine's backward passes."""
        return self._scaler

    def begin(self, batch: StepBatch) -> None:
        """A step of as many backward passes as it has microbatches begins."""
        self._check_batch(batch, dist.get_world_size())
        self._partition.begin()
        self._is_idle = not batch.microbatches
        self._scaler.begin(len(batch.microbatches))

    def stand_in(self, blocks: Sequence[str] | None) -> nn.Module:
        """There is none."""
        raise ConfigError(
            "activation_checkpointing is given, but DeepSpeed's hooks gather parameters for each "
            "module's first forward pass, and not for a second one; take engine=fully_shard, or "
            "leave it out"
        )

    def full_state_dict(self, keep: bool) -> dict[str, Any]:
        """As the model computes with it, in its format."""
        return whole_state(self.model, lambda _: keep)

    def state_dict(self, model: nn.Module) -> Mapping[str, Any]:
        """The model's; with stage 3 the first rank has parameters, whole, the others have none."""
        if not self._is_divided:
            return model.state_dict()
        return whole_state(model, lambda name: name not in self.saved_elsewhere)

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; what the first rank has counts."""
        with loadable(model, writer=0):
            model.load_state_dict(state, strict=not self.saved_elsewhere)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """As it is: DeepSpeed divides all parameters together, and not each by itself."""
        return part

    def take_gradients(self) -> tuple[list[nn.Parameter], Sequence[Tensor]]:
        """All parts, and their gradients in the units of the loss; none without a microbatch."""
        return ([], []) if self._is_idle else self._partition.take_gradients()

    def refresh(self) -> None:
        """Let the model have what a strategy wrote into the parts. Collective in the replica."""
        self._partition.refresh()

    def close(self) -> None:
        """Let go of the engine."""
        with self._files:
            try:
                self._engine.destroy()
            finally:
                free_buffers(self.model)


class DeepSpeedOptimizer(Optimizer):
    """The engine's update as an optimizer's.

    Its parameter groups are those of the optimizer inside, so that a learning-rate schedule works.
    """

    def __init__(self, engine: Any, inner: Optimizer, partition: Partition) -> None:
        super().__init__([p for _, p in partition.named_parameters], dict(inner.defaults))
        self.param_groups = inner.param_groups
        self._engine = engine
        self._inner = inner
        self._partition = partition

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parts, if they have gradients, and the model. Collective in the replica."""
        if self._partition.give_gradients():
            self._engine.step()
            self._partition.remember()

    def state_dict(self) -> dict[str, Any]:
        """A copy of this rank's parts, the optimizer's state of them, and the loss scale."""
        all_parts, flat_state = [], []
        for index, flat in enumerate(self._partition.flats):
            with self._partition.present(index) as parts:
                all_parts += [part.clone() for part in parts]
                flat_state.append(copy.deepcopy(dict(self._inner.state[flat])))
        return {
            "parts": all_parts,
            "flat_state": flat_state,
            "groups": [
                {key: value for key, value in group.items() if key != "params"}
                for group in self.param_groups
            ],
            "scale": _numbers(self._engine.optimizer.loss_scaler),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned on this rank. Collective in the replica."""
        flats, flat_state = self._partition.flats, state_dict["flat_state"]
        self._check_sizes(state_dict["parts"], flat_state)
        values = iter(state_dict["parts"])
        for index, (flat, saved) in enumerate(zip(flats, flat_state, strict=True)):
            with torch.no_grad(), self._partition.present(index, written=True) as parts:
                for part in parts:
                    part.copy_(next(values))
                kept = self._inner.state[flat]
                for key, value in saved.items():
                    if isinstance(value, Tensor) and isinstance(kept.get(key), Tensor):
                        kept[key].copy_(value)
                    else:
                        kept[key] = copy.deepcopy(value)
        for group, saved in zip(self.param_groups, state_dict["groups"], strict=True):
            group.update(saved)
        vars(self._engine.optimizer.loss_scaler).update(state_dict["scale"])
        self._partition.refresh()

    def _check_sizes(self, parts: Sequence[Tensor], flat_state: Sequence[dict[str, Any]]) -> None:
        """Of all that is to be copied, before anything is."""
        sizes = self._partition.flat_sizes
        if len(flat_state) != len(sizes):
            raise ConfigError(
                f"the state is of parameters in {len(flat_state)} sub-groups, but here there are "
                f"{len(sizes)}; {_AS_IT_WAS}"
            )
        found = [part.numel() for part in parts]
        own = [part.numel() for _, part in self._partition.named_parameters]
        if found != own:
            raise ConfigError(
                f"the state is of {len(found)} parameters, of which this rank had {sum(found)} "
                f"elements, but here they are {len(own)}, with {sum(own)} or others among them; "
                f"{_AS_IT_WAS}"
            )
        for index, (size, saved) in enumerate(zip(sizes, flat_state, strict=True)):
            for name, value in saved.items():
                if isinstance(value, Tensor) and value.numel() not in (1, size):
                    raise ConfigError(
                        f"the state has {name} of {value.numel()} elements for sub-group {index}, "
                        f"which has {size} here; {_AS_IT_WAS}"
                    )


class ZeroScaler(LossScaler):
    """Runs the engine's backward passes; the loss scale, with float16, is the engine's own."""

    def __init__(self, engine: Any, optimizer: DeepSpeedOptimizer) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._left = 0

    def begin(self, microbatches: int) -> None:
        """So many backward passes make the next step."""
        self._left = microbatches

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients that ZeRO keeps on the ranks."""
        self._left -= 1
        self._engine.set_gradient_accumulation_boundary(self._left == 0)
        self._engine.backward(loss, scale_wrt_gas=False)

    def hand_over(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """As they are."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def check_and_clip(
        self, replica: Replica, max_norm: float | None, measure: bool
    ) -> tuple[bool, Tensor | None]:
        """Clip; with float16 let the engine see to an overflow, see `LossScaler`."""
        may_overflow = self._engine.fp16_enabled()
        if max_norm is None and not measure and not may_overflow:
            return True, None
        norm = replica.gradient_norm() if max_norm is None else replica.clip_gradients(max_norm)
        if may_overflow and not math.isfinite(norm.item()):
            self.overflows += 1
            self._optimizer.step()  # makes none, and lowers the scale
            return False, None
        return True, norm

    def metrics(self) -> Mapping[str, float]:
        """Scale and overflows, where there is one."""
        if not self._engine.fp16_enabled():
            return {}
        return {
            "loss_scale": float(self._engine.optimizer.loss_scale),
            "overflows": self.overflows,
        }

    def state_dict(self) -> dict[str, Any]:
        """Overflows; the scale is among the optimizer's state."""
        return {"overflows": self.overflows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.overflows = state.get("overflows", self.overflows)


def _numbers(scaler: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(scaler).items() if isinstance(v, (bool, int, float))}
