"""The gradient noise scale of a run under way, and a batch that follows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from scaledtrain.batch_growth import BatchGrowth
from scaledtrain.callbacks import Callback
from scaledtrain.comm.votes import any_rank
from scaledtrain.errors import ConfigError
from scaledtrain.optim.noise_scale import GradientNoise, SmoothedNoise, gradient_noise

if TYPE_CHECKING:
    from scaledtrain.data.steps import StepBatch
    from scaledtrain.trainer import Trainer

__all__ = ["NoiseScale"]


class NoiseFollower(Protocol):
    """Who is told of every measurement, before the update that its gradients make."""

    def observe(self, noise: GradientNoise, batch: float) -> None:
        """Take in a measurement.

        Args:
            noise: of this step's gradients alone.
            batch: samples in the step.
        """

    @property
    def is_over(self) -> bool:
        """Whether the run has come to its end."""

    def metrics(self) -> Mapping[str, float]:
        """What a record should tell, by name."""


class NoiseScale(Callback):
    r"""Measures how noisy gradients are, and so which batch size is worth its samples.

    The gradient noise scale B = S / \|G\|^2 is, in samples, about the critical batch size: with
    batches far below it twice the samples in a step save half of the steps, far above it almost
    none. S and \|G\|^2 are estimated as in `scaledtrain.optim.gradient_noise`, from what there is:

    * several replicas whose gradients are combined (`Sync`): the gradient of each, before, and the
      combined one. One number per replica is sent.
    * else two microbatches or more of this replica's step: the gradient of each. That takes the
      memory of two more gradients in a step that is measured. Where replicas train by themselves
      each has its own estimate, and rank 0's is the one in TensorBoard.

    Each measured step takes a few norms; with `Sync` and overlap its gradients are sent after
    backward, and not meanwhile. Ranks that have a replica together add up the squares of their
    pieces; a loss scale is divided out before. Records get ``noise_scale`` (where there is an
    estimate), ``gradient_variance`` (S), ``gradient_squared_norm`` and ``batch_size``, the samples
    of the last whole step that was measured. A compression changes the combined gradient: with one
    that keeps little of it (top-k, sign) the estimate is of no use.

    Every rank needs one of the same settings. A crash loses nothing that was saved: averages and
    growth are in the Trainer's state.

    Args:
        every: steps between measurements.
        smoothing: see `scaledtrain.optim.SmoothedNoise`.
        grow: how the batch follows; None: it does not.

    Raises:
        ConfigError: a value out of its range; (in ``fit``) the batch is to grow, and cannot.

    Example:
        >>> from functools import partial
        >>> from scaledtrain import Trainer
        >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> batches = [(x[i : i + 8], x[i : i + 8].sum(1, keepdim=True)) for i in range(0, 64, 8)]
        >>> noise = NoiseScale(every=1)
        >>> trainer = Trainer(nn.Linear(2, 1), nn.functional.mse_loss,
        ...                   partial(torch.optim.SGD, lr=0.01), console=False,
        ...                   gradient_accumulation_steps=2, callbacks=[noise])
        >>> trainer.fit(batches, max_epochs=1).step
        4
        >>> 0.5 < noise.noise.scale < 50
        True

    References:
        McCandlish et al. 2018, An Empirical Model of Large-Batch Training, arXiv 1812.06162.
    """

    def __init__(
        self, *, every: int = 10, smoothing: float = 0.9, grow: BatchGrowth | None = None
    ) -> None:
        if every < 1:
            raise ConfigError(f"every is {every}; it is the steps between measurements, >= 1")
        self._every = every
        self._grow = grow
        self._smoothed = SmoothedNoise(smoothing)
        self._steps = 0
        self._measuring: _Gradients | None = None
        self._batch_size = 0.0
        self._multiple = 0  # of the configured step; 0: not chosen yet
        self._configured = 0  # samples of that
        self._follower: NoiseFollower | None = None
        self._calls = 0  # measurements in a row that called for a larger batch

    @property
    def noise(self) -> GradientNoise:
        """The smoothed estimate."""
        return self._smoothed.noise

    def lead(self, follower: NoiseFollower) -> None:
        """Tell somebody, as `scaledtrain.optim.AdaScale`, of every measurement before its update.

        Args:
            follower: instead of who was told until now.
        """
        self._follower = follower

    def on_fit_start(self, trainer: Trainer) -> None:
        """Begin with the batch that there was."""
        if self._follower is not None and not trainer.strategy.replicas_equal:
            raise ConfigError(
                f"AdaScale follows the gradient noise of updates, but under {trainer.strategy} "
                "replicas do not make the same updates together; take strategy=sync, or "
                "another lr_scaling.rule"
            )
        if self._follower is not None and self._grow is None:
            _check_compares(trainer, 1, "AdaScale is to follow the gradient noise")
        if self._grow is None:
            return
        configured = _configured(trainer)
        multiple = self._multiple * self._configured / configured  # in a resumed run
        self._multiple = max(round(multiple), self._grow.first(configured))
        self._multiple = min(self._multiple, self._grow.largest(configured))
        self._configured = configured
        _check_can_grow(trainer, self._multiple)
        scaling = self._grow.scaling(configured)
        # Rather now than when the batch has grown.
        trainer.strategy.scale_settings(scaling, self._grow.largest(configured) * configured)
        self._use_multiple(trainer, self._grow)

    def needs_own_gradients(self, trainer: Trainer, batch: StepBatch) -> bool:
        """In each step that is measured."""
        if self._steps % self._every:
            self._measuring = None
            trainer.schedule.tell(None)
        else:
            self._measuring = _Gradients(trainer, batch)
            trainer.schedule.tell(self._measuring.add_microbatch)
        return self._measuring is not None

    def on_gradients(self, trainer: Trainer) -> None:
        """See how long those of this replica are."""
        if self._measuring is not None:
            self._measuring.add_replicas()

    def on_reduced(self, trainer: Trainer) -> None:
        """Compare them with the combined gradient."""
        if self._measuring is not None:
            samples, measured = self._measuring.compare()
            self._smoothed.add(measured)
            if self._follower is not None:
                self._follow(trainer, self._follower, measured, samples)
            if self._measuring.is_full or not self._batch_size:
                self._batch_size = samples

    def on_step_end(self, trainer: Trainer) -> None:
        """Count the step; let the batch grow."""
        self._steps += 1
        if self._measuring is not None and self._grow is not None:
            self._decide(trainer, self._grow)
        self._measuring = None
        if self._follower is not None and self._follower.is_over:
            trainer.stop()

    def on_fit_end(self, trainer: Trainer) -> None:
        """Say what it has come to."""
        trainer.schedule.tell(None)
        noise = self.noise
        if noise.no_scale:
            trainer.metrics.say(f"no gradient noise scale: {noise.no_scale}")
        else:
            trainer.metrics.say(
                f"noise scale {noise.scale:.0f} -> critical batch about {noise.scale:.0f} samples; "
                f"you use {self._batch_size:.0f}"
            )

    def metrics(self) -> Mapping[str, float]:
        """What there is of the estimate."""
        noise = self.noise
        values = {
            "batch_size": self._batch_size or math.nan,
            "noise_scale": noise.scale,
            "gradient_variance": noise.variance,
            "gradient_squared_norm": noise.squared_norm,
        }
        if self._follower is not None:
            values |= self._follower.metrics()
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def state_dict(self) -> dict[str, Any]:
        """Averages, steps, and how far the batch has grown."""
        return {
            "smoothed": self._smoothed.state_dict(),
            "steps": self._steps,
            "batch_size": self._batch_size,
            "multiple": self._multiple,
            "configured": self._configured,
            "calls": self._calls,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._smoothed.load_state_dict(state["smoothed"])
        self._steps = state["steps"]
        self._batch_size = state["batch_size"]
        self._multiple, self._configured = state["multiple"], state["configured"]
        self._calls = state["calls"]

    def _decide(self, trainer: Trainer, grow: BatchGrowth) -> None:
        configured, scale = _configured(trainer), self.noise.scale
        following = grow.following(self._multiple, configured)
        called = following > self._multiple and scale >= following * configured
        self._calls = self._calls + 1 if called else 0
        grows = self._calls >= grow.patience  # all ask, since rounding may differ
        grows = any_rank(trainer.strategy.lockstep, grows, trainer.link.device)
        if trainer.layout.agree(grows):
            self._multiple, self._calls = following, 0
            self._use_multiple(trainer, grow)
            trainer.metrics.say(
                f"step {trainer.step_count}  noise scale {scale:.0f}: from now on a step takes "
                f"{following * configured} samples, the learning rate is "
                f"{trainer.strategy.learning_rate:.3g}"
            )

    def _use_multiple(self, trainer: Trainer, grow: BatchGrowth) -> None:
        trainer.batch_multiple = self._multiple
        scaling = grow.scaling(self._configured)
        trainer.strategy.scale_settings(scaling, self._multiple * self._configured)

    def _follow(
        self, trainer: Trainer, follower: NoiseFollower, measured: GradientNoise, samples: float
    ) -> None:
        """Let all replicas follow the same numbers, should rounding differ."""
        told = torch.tensor(
            [measured.squared_norm, measured.variance, samples],
            dtype=torch.float64,
            device=trainer.link.device,
        )
        trainer.strategy.lockstep.broadcast([told])
        squared_norm, variance, samples = told.tolist()
        follower.observe(replace(measured, squared_norm=squared_norm, variance=variance), samples)


class _Gradients:
    """Those of one step: sizes and squared norms of what it is made of, and of the whole.

    Args:
        trainer: makes the step.
        batch: of this rank.
    """

    def __init__(self, trainer: Trainer, batch: StepBatch) -> None:
        self._trainer = trainer
        self._combined_after = trainer.strategy.replicas_equal and _replicas(trainer) > 1
        self.is_full = batch.is_full
        self._own = float(batch.samples)  # of this rank
        self._samples = self._own  # by which the sum over those of the replica is divided
        if batch.gradient_samples is not None:
            self._samples = batch.gradient_samples * trainer.layout.data_ranks
        self._sizes: list[float] = []
        self._squares: list[Tensor] = []
        self._before: dict[nn.Parameter, Tensor] = {}

    def add_microbatch(self, samples: int) -> None:
        """The gradients are those of the microbatches so far, of which the last had so many."""
        self._sizes.append(samples)
        if self._combined_after:
            return
        now = {p: _wide(p.grad) for p in self._trainer.replica.parameters if p.grad is not None}
        added = [g - self._before[p] if p in self._before else g for p, g in now.items()]
        self._squares.append(nn.utils.get_total_norm(added).double().square())
        self._before = {p: g.clone() for p, g in now.items()}

    def add_replicas(self) -> None:
        """The gradients are those of each replica: let all have each other's squared norms."""
        self._before = {}
        if not self._combined_after:
            return
        group = self._trainer.strategy.lockstep
        own = torch.zeros(2, group.size, dtype=torch.float64, device=self._trainer.link.device)
        computed = sum(self._sizes)  # fewer where some were left out
        alone = self._trainer.layout.data_ranks == 1 and computed > 0
        own[0, group.rank] = computed if alone else self._samples
        own[1, group.rank] = self._trainer.replica.gradient_norm().double().square()
        group.all_reduce([own], "sum").wait()
        self._sizes, self._squares = own[0].tolist(), list(own[1])

    def compare(self) -> tuple[float, GradientNoise]:
        """The gradients are those of the step: its samples, and the estimate."""
        trainer = self._trainer
        combined = float(trainer.replica.gradient_norm().double().square())
        if trainer.layout.updated_together.size != trainer.layout.pieces.size:
            return self._samples, GradientNoise(
                undefined="stages of an asynchronous pipeline have no gradient of the same batch"
            )
        if not self._combined_after:
            if not trainer.schedule.one_by_one:
                return self._samples, GradientNoise(
                    undefined="a pipeline, and DeepSpeed, have no gradients of single microbatches "
                    "to compare; train with several replicas (mesh.replicate)"
                )
            combined /= self._add_up_pieces() ** 2
        squares = [float(square) for square in self._squares]
        return sum(self._sizes), gradient_noise(self._sizes, squares, combined)

    def _add_up_pieces(self) -> float:
        """Of microbatches that added n_i g_i / N to the gradients, on all ranks of the replica.

        Returns:
            What the shares n_i / N of a whole step add up to: 1, unless replicas that go their own
            way count by their samples (``balance=fixed``).
        """
        device = self._trainer.link.device
        told = torch.zeros(2, 1 + len(self._sizes), dtype=torch.float64, device=device)
        told[0, 0] = self._own
        for i, (size, square) in enumerate(zip(self._sizes, self._squares, strict=True), 1):
            told[0, i], told[1, i] = size, square
        self._trainer.layout.sum(told)
        self._sizes = told[0, 1:].tolist()
        shares = told[0] / self._samples
        self._squares = list(torch.where(shares > 0, told[1] / shares.square(), 0.0)[1:])
        return float(shares[0])


def _wide(gradient: Tensor) -> Tensor:
    gradient = gradient.detach()
    return gradient if gradient.dtype.itemsize >= 4 else gradient.float()


def _replicas(trainer: Trainer) -> int:
    return trainer.strategy.lockstep.size


def _configured(trainer: Trainer) -> int:
    """Samples of a step as configured, of all replicas."""
    batches, samples = trainer.step_size
    if samples is None:
        raise ConfigError(
            "the batch is to grow, but the loader does not say how many samples its batches have; "
            "give a DataLoader with a batch_size, or a ShardedLoader"
        )
    return batches * samples


def _check_can_grow(trainer: Trainer, multiple: int) -> None:
    if not trainer.strategy.replicas_equal:
        raise ConfigError(
            f"the batch is to grow (batch=adaptive), but under {trainer.strategy} replicas do not "
            "make steps of one batch together; take strategy=sync, or batch=measured"
        )
    if not trainer.schedule.one_by_one:
        raise ConfigError(
            "the batch is to grow (batch=adaptive), but a pipeline and DeepSpeed make every step "
            "of the same number of microbatches; take batch=measured, or a layout without "
            "mesh.pipe and with engine=fully_shard"
        )
    _check_compares(
        trainer, multiple, "the batch is to grow with the gradient noise (batch=adaptive)"
    )


def _check_compares(trainer: Trainer, multiple: int, aim: str) -> None:
    if _replicas(trainer) > 1:
        return
    if not trainer.schedule.one_by_one:
        raise ConfigError(
            f"{aim}, but a pipeline, and DeepSpeed, have no gradients of single microbatches to "
            "compare; train with several replicas (mesh.replicate)"
        )
    if trainer.step_size[0] // trainer.layout.data_ranks * multiple < 2:
        raise ConfigError(
            f"{aim}, but a step has one batch of one replica, and there is nothing to compare; set "
            "gradient_accumulation_steps=2 (and half the batch size), or train with several "
            "replicas"
        )
