"""Strategies in a training loop that is written for Hugging Face's Accelerate, in two lines.

Import `Accelerator` from here instead of from ``accelerate``, and give it a strategy.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from scaledtrain.connection import Connection, connect
from scaledtrain.errors import ConfigError
from scaledtrain.replica import Replica
from scaledtrain.strategies import Strategy

try:
    import accelerate
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as missing:
    raise ConfigError(
        f"scaledtrain.accelerate needs Accelerate, which cannot be imported ({missing}); install "
        "it: pip install 'scaledtrain[accelerate]'"
    ) from missing

__all__ = ["Accelerator"]

_WHOLE = ("NO", "MULTI_CPU", "MULTI_GPU")


class Accelerator(accelerate.Accelerator):  # type: ignore[misc]
    """Accelerate's Accelerator, whose processes tell each other what a strategy says.

    Everything else is a user's own loop as it was::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = loss_fn(model(inputs), targets)
                accelerator.backward(loss)          # the last of a step: gradients are combined
                optimizer.step()                    # then: the strategy's update, and its clock
                optimizer.zero_grad()
        accelerator.end_training()                  # all processes end with the same parameters

    The model is not wrapped in DistributedDataParallel, which would average gradients whatever the
    strategy is. ``accelerator.clip_grad_norm_`` sees what the strategy has made of the gradients.
    Every process counts the same in a mean, as Accelerate's loaders give all of them equally many
    samples. In the middle of a period the processes' parameters differ: ``accelerator.consensus()``
    is the context to evaluate in, and ``settle()`` ends the period, before a model is saved, say.

    Args:
        strategy: any, of one model and one optimizer. One with a server updates by a copy of the
            optimizer there, which no learning-rate schedule reaches.
        options: as ``accelerate.Accelerator`` takes them.

    Raises:
        ConfigError: Accelerate itself divides the model among processes (FSDP, DeepSpeed, ...), or
            scales the loss (fp16); use `Trainer` for both.
    """

    def __init__(self, *, strategy: Strategy, **options: Any) -> None:
        super().__init__(**options)
        self.strategy = strategy
        kind = str(self.distributed_type.value)
        if kind not in _WHOLE:
            raise ConfigError(
                f"Accelerate is configured for {kind}, but here each process has the whole model; "
                "choose multi-CPU or multi-GPU (accelerate config), or use scaledtrain.Trainer("
                "engine=...), which has strategies for models that are divided"
            )
        if self.scaler is not None:
            raise ConfigError(
                "Accelerate scales the loss (mixed_precision is fp16), and skips updates of which "
                "the strategy's clock would not know; take mixed_precision='bf16', or "
                "scaledtrain.Trainer(precision='fp16-mixed')"
            )
        self._link: Connection | None = None
        self._trained: nn.Module | None = None
        self._stepped: _StrategyOptimizer | None = None

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Move a model to its device; never wrap it."""
        # What evaluation mode leaves out is the wrapping for training.
        prepared = cast(nn.Module, super().prepare_model(model, device_placement, True))
        if not evaluation_mode and any(p.requires_grad for p in model.parameters()):
            if self._trained is not None and self._trained is not prepared:
                raise ConfigError(
                    "a second model to train was prepared, but a strategy keeps one; put both into "
                    "one torch.nn.Module, or prepare it with evaluation_mode=True"
                )
            self._trained = prepared
            self._attach()
        return prepared

    def prepare_optimizer(
        self, optimizer: Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        """Let the strategy make this optimizer's updates."""
        if isinstance(optimizer, AcceleratedOptimizer):
            return super().prepare_optimizer(optimizer, device_placement)
        if self._stepped is not None:
            raise ConfigError(
                "a second optimizer was prepared, but a strategy has one; give it all parameters, "
                "in groups"
            )
        self._stepped = _StrategyOptimizer(optimizer, self.strategy)
        self._optimizers.append(self._stepped)
        self._attach()
        return self._stepped

    def _attach(self) -> None:
        if self._trained is None or self._stepped is None:
            return
        self._link = connect(device=self.device)
        model = self.unwrap_model(self._trained)
        recipe = _Recipe(self._stepped.optimizer)
        self.strategy.attach(Replica(model, recipe), self._link)
        self.strategy.start(None)
        self._stepped.begin()

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """As Accelerate's; after the last backward pass of a step gradients are combined."""
        super().backward(loss, **kwargs)
        if self.sync_gradients and self._link is not None:
            self.strategy.reduce_gradients()

    def consensus(self) -> Any:
        """Context in which the model has the parameters that it would end with now; collective."""
        return self.strategy.consensus()

    def settle(self) -> None:
        """End with the same parameters in all processes, which call this together."""
        if self._link is not None:
            self.strategy.settle()

    def end_training(self) -> None:
        """As Accelerate's, after ``settle``; the strategy's connections are closed."""
        self.settle()
        if self._link is not None:
            self._link.close()
            self._link = None
        super().end_training()


class _StrategyOptimizer(AcceleratedOptimizer):  # type: ignore[misc]
    """At the end of a step: the strategy's update, its clock, and what a new step begins with."""

    def __init__(self, optimizer: Optimizer, strategy: Strategy) -> None:
        super().__init__(optimizer)
        self._strategy = strategy
        self._is_accelerate_prepared = True

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            raise ConfigError("a strategy's update takes no closure: call optimizer.step()")
        if self.gradient_state.sync_gradients:
            self._strategy.apply_gradients()
            self._strategy.after_step()
            self.begin()

    def begin(self) -> None:
        # How many backward passes there will be is not known: no gradient is sent before the last.
        self._strategy.before_forward(microbatches=0)


class _Recipe:
    """The user's optimizer for its own parameters; for others a copy of it, without state."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def __call__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        parameters = [p for _, p in named_parameters]
        groups = self._optimizer.param_groups
        own = {id(p) for group in groups for p in group["params"]}
        if any(id(p) in own for p in parameters):
            return self._optimizer
        if len(groups) > 1:
            raise ConfigError(
                "the optimizer has several parameter groups, and the strategy updates copies of "
                "parameters on a server, of which it is not known to which group they belong; use "
                "one group, or a strategy whose replicas keep their optimizer"
            )
        made = copy.copy(self._optimizer)
        made.param_groups = [{**groups[0], "params": parameters}]
        made.state = defaultdict(dict)
        return made
