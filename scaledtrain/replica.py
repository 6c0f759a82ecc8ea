"""One replica as a strategy sees it: local tensors, their gradients, and how they are updated."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scaledtrain.comm.local import LocalGroup
from scaledtrain.comm.protocols import Group
from scaledtrain.copies import copied
from scaledtrain.errors import ConfigError
from scaledtrain.optim.narrow import Rounding
from scaledtrain.optim.scaling import LearningRateScaling, follow_batch
from scaledtrain.optim.wide_step import WideStep

__all__ = ["MakeOptimizer", "MakeRounding", "MakeScheduler", "Replica", "Updater"]

MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]
MakeRounding = Callable[[], Rounding | None]

_HALF = (torch.float16, torch.bfloat16)


class Updater:
    """An optimizer and its learning-rate schedule, which advance together, once per update.

    A schedule so tied to the updates cannot be stepped once per rank or once per microbatch by
    mistake, wherever the updates are made: on every replica, or on a server.

    Args:
        named_parameters: what is updated.
        make_optimizer: makes the optimizer of them.
        make_scheduler: makes the schedule from the optimizer.
        make_rounding: makes what updates of 16-bit parameters go through, if there are such;
            None: the optimizer works on them as they are.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        make_optimizer: MakeOptimizer,
        make_scheduler: MakeScheduler | None = None,
        make_rounding: MakeRounding | None = None,
    ) -> None:
        self.optimizer = make_optimizer(named_parameters)
        if not isinstance(self.optimizer, Optimizer):
            raise ConfigError(
                f"the optimizer factory returned {type(self.optimizer).__name__}, not a "
                "torch.optim.Optimizer; pass e.g. functools.partial(torch.optim.SGD, lr=0.1)"
            )
        self._scheduler = make_scheduler(self.optimizer) if make_scheduler else None
        groups = self.optimizer.param_groups
        is_narrow = any(p.dtype in _HALF for group in groups for p in group["params"])
        rounding = make_rounding() if make_rounding is not None and is_narrow else None
        self._wide = None if rounding is None else WideStep(self.optimizer, rounding)
        self._scaling, self._batch = LearningRateScaling(), 1.0

    @property
    def has_schedule(self) -> bool:
        """Whether the learning rate follows a schedule."""
        return self._scheduler is not None

    @property
    def learning_rate(self) -> float:
        """Of the next update (of the first parameter group)."""
        return float(self.optimizer.param_groups[0]["lr"]) * self._scaling.factor(self._batch)

    def scale_settings(self, scaling: LearningRateScaling, batch: float) -> None:
        """Bring the settings to a batch in each of the next updates; a schedule sees nothing of it.

        Args:
            scaling: of the settings.
            batch: samples in one update.

        Raises:
            ConfigError: as `LearningRateScaling.scaled`.
        """
        for group in self.optimizer.param_groups:
            scaling.scaled(group, batch)
        self._scaling, self._batch = scaling, batch

    def step(self, scale: float = 1.0) -> None:
        """Make one update from the parameters' ``.grad``.

        Args:
            scale: of its learning rates; a schedule sees nothing of that.
        """
        with self._scaled(scale):
            if self._wide is None:
                self.optimizer.step()
            else:
                self._wide.step()
        if self._scheduler is not None:
            self._scheduler.step()

    def skip(self) -> None:
        """Make no update, but let the schedule advance as if there had been one."""
        if self._scheduler is not None:
            with warnings.catch_warnings():
                # Where it is the first: torch supposes that the calls are in the wrong order.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self._scheduler.step()

    @contextmanager
    def _scaled(self, scale: float) -> Iterator[None]:
        if scale == 1.0 and self._scaling.rule == "none":
            yield
            return
        kept = []
        for group in self.optimizer.param_groups:
            scaled = self._scaling.scaled(group, self._batch)
            kept.append({name: group[name] for name in scaled})
            group.update(scaled, lr=scaled["lr"] * scale)
        try:
            yield
        finally:
            for group, settings in zip(self.optimizer.param_groups, kept, strict=True):
                group.update(settings)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state of the optimizer, of the schedule, and of the rounding."""
        scheduler = self._scheduler.state_dict() if self._scheduler is not None else None
        kinds = [type(self.optimizer).__name__, _schedule_name(self._scheduler)]
        # Copied here and below, since torch's own dictionaries share the tensors in use.
        state = copied({"optimizer": self.optimizer.state_dict(), "scheduler": scheduler})
        rounding = None if self._wide is None else self._wide.state_dict()
        return {**state, "rounding": rounding, "kinds": kinds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Settings that were scaled to a batch are brought to that of this run (`follow_batch`).

        Raises:
            ConfigError: it is of another optimizer, or of another schedule.
        """
        self._check_kinds(*state.get("kinds", [None, None]))
        state = copy.deepcopy(state)
        factor = follow_batch(state["optimizer"], self.optimizer)
        for name in ("base_lrs", "_last_lr"):  # of a schedule that keeps them
            if state["scheduler"] is not None and name in state["scheduler"]:
                state["scheduler"][name] = [lr * factor for lr in state["scheduler"][name]]
        self.optimizer.load_state_dict(state["optimizer"])
        if self._wide is not None and state["rounding"] is not None:
            self._wide.load_state_dict(state["rounding"], state["optimizer"])
        if self._scheduler is not None and state["scheduler"] is not None:
            self._scheduler.load_state_dict(state["scheduler"])

    def _check_kinds(self, optimizer: str | None, schedule: str | None) -> None:
        """Names of the classes whose state it is; None: not known."""
        own, own_schedule = type(self.optimizer).__name__, _schedule_name(self._scheduler)
        if optimizer is not None and optimizer != own:
            raise ConfigError(
                f"the state is of {optimizer}, but the optimizer is {own}, which would read it in "
                f"its own way; go on with {optimizer} (and that run's engine), or begin anew from "
                "its weights alone: init_from=, with its folder"
            )
        if schedule is not None and schedule != own_schedule:
            raise ConfigError(
                f"the state is of a run with {schedule} as its learning-rate schedule, but here it "
                f"is {own_schedule}: the rate would go on from where neither of them has it; go on "
                f"with {schedule}, or begin anew from the weights alone "
                "(scaledtrain.checkpoint.export)"
            )


def _schedule_name(scheduler: LRScheduler | None) -> str:
    return "none" if scheduler is None else type(scheduler).__name__


class Replica:
    """The trainable tensors of one copy of a model, and the recipe of their optimizer.

    Where several ranks have a copy together, they are this rank's plain tensors, and norms are
    those of all ranks'.

    Args:
        model: any module with at least one parameter that requires a gradient.
        make_optimizer: makes the optimizer from (name, parameter) pairs; it is called where the
            updates are made, so pass a factory: ``functools.partial(torch.optim.SGD, lr=0.1)``.
        make_scheduler: makes the learning-rate schedule from the optimizer; one step per update.
        make_rounding: makes what updates of 16-bit parameters go through; None: nothing.
        named_parameters: this rank's tensors of the model; None: the model's own parameters.
        pieces: the ranks that have the copy together; None: this one.
        counted_elsewhere: names of parameters that another of these ranks has as well, and counts
            in norms.
        in_memory: whether they have their values between updates.

    Raises:
        ConfigError: the model has nothing to train, or ``make_optimizer`` is an optimizer.

    Example:
        >>> from functools import partial
        >>> replica = Replica(nn.Linear(2, 1), partial(torch.optim.SGD, lr=0.1))
        >>> [tuple(p.shape) for p in replica.parameters]
        [(1, 2), (1,)]
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        make_scheduler: MakeScheduler | None = None,
        make_rounding: MakeRounding | None = None,
        *,
        named_parameters: Sequence[tuple[str, nn.Parameter]] | None = None,
        pieces: Group | None = None,
        counted_elsewhere: Collection[str] = (),
        in_memory: bool = True,
    ) -> None:
        if isinstance(make_optimizer, Optimizer):
            name = type(make_optimizer).__name__
            raise ConfigError(
                f"optimizer is a {name} already made, but a strategy may keep the parameters that "
                "are updated elsewhere (on a server); pass a factory instead: "
                f"functools.partial(torch.optim.{name}, lr=...)"
            )
        everything = named_parameters or list(model.named_parameters())
        named = [(name, p) for name, p in everything if p.requires_grad]
        if not named:
            raise ConfigError(
                f"{type(model).__name__} has no parameter with requires_grad=True, so there is "
                "nothing to train; unfreeze a part of it"
            )
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self._counted = [p for name, p in named if name not in counted_elsewhere]
        # Frozen parameters are not trained but must be equal everywhere like all other state.
        self.frozen = [p for _, p in everything if not p.requires_grad]
        self._pieces: Group = pieces or LocalGroup()
        self._in_memory = in_memory
        self._model = model
        self._make_optimizer = make_optimizer
        self._make_scheduler = make_scheduler
        self._make_rounding = make_rounding

    @property
    def buffers(self) -> list[Tensor]:
        """State that is not trained by gradients (running statistics), as it is now."""
        return list(self._model.buffers())

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.parameters[0].device

    def updater(
        self,
        parameters: Sequence[nn.Parameter] | None = None,
        names: Sequence[str] | None = None,
    ) -> Updater:
        """Make the optimizer over this replica's parameters, or over a server's copy of them.

        Args:
            parameters: the copy; None: the replica's own.
            names: of these, if they are not a copy of all.
        """
        own = self.parameters if parameters is None else parameters
        named = zip(self.names if names is None else names, own, strict=True)
        return Updater(list(named), self._make_optimizer, self._make_scheduler, self._make_rounding)

    def sha256(self) -> str:
        """SHA-256 of the bytes of all parameters, in order: equal if, and only if, every bit is.

        Raises:
            ConfigError: an engine has them in files.
        """
        if not self._in_memory:
            raise ConfigError(
                "SHA-256 is asked for of parameters that are in files between updates (engine."
                "offload=nvme); take that of full_state_dict(), or engine.offload=cpu"
            )
        digest = hashlib.sha256()
        for parameter in self.parameters:
            value = parameter.detach().cpu().contiguous().reshape(-1)
            digest.update(value.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def zero_grad(self) -> None:
        """Forget all gradients (they become None, so that backward need not add to zeros)."""
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Gradient of every parameter, in order; a missing one is made: it counts as zero."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
        return [p.grad for p in self.parameters if p.grad is not None]

    def largest(self, value: float) -> float:
        """The largest of what the ranks that have pieces of the replica found; all call this."""
        if self._pieces.size == 1:
            return value
        found = torch.tensor([value], dtype=torch.float64)
        self._pieces.all_reduce([found], "max").wait()
        return float(found.item())

    def gradient_norm(self) -> Tensor:
        """2-norm of all gradients together, a scalar on the replica's device; float32 at least.

        Ranks that have pieces of the replica call this together.
        """
        norm = self._norm_here()
        if self._pieces.size == 1:
            return norm
        squared = norm.double().square()
        self._pieces.all_reduce([squared], "sum").wait()
        return squared.sqrt().to(norm.dtype)

    def _norm_here(self) -> Tensor:
        present = [p.grad for p in self._counted if p.grad is not None]
        if any(g.dtype in _HALF for g in present):
            # Of float16 it would be infinite where it is above 65504, of bfloat16 8 bits.
            norms = torch._foreach_norm(present, 2.0, torch.float32)
            norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
            return norm
        return nn.utils.get_total_norm(present)

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale all gradients to a norm of at most ``max_norm``; returns the norm before.

        Of one that is not finite nothing is scaled, so that it can be seen which gradients are not.
        """
        norm = self.gradient_norm()
        finite = norm.nan_to_num(0.0, posinf=0.0)
        nn.utils.clip_grads_with_norm_(self.parameters, max_norm, finite)
        return norm
