"""What a Trainer needs to go on: its state, taken and restored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from scaledtrain.copies import copied
from scaledtrain.errors import ConfigError
from scaledtrain.seeding import generator_states, set_generator_states

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scaledtrain.callbacks import Callback
    from scaledtrain.data.steps import Steps
    from scaledtrain.trainer import Trainer

__all__ = ["Resumed", "restore", "state_of"]


class Resumed(NamedTuple):
    """The part of a state that waits for the next fit."""

    loader: Mapping[str, Any] | None = None
    """State of what was trained on."""
    step_size: tuple[int, int | None] | None = None
    """Batches of a step, of all replicas, and samples of a batch."""
    steps_per_epoch: int | None = None
    generators: Mapping[str, Any] | None = None
    """States of the generators of random numbers."""

    def restore_generators(self) -> None:
        """Once more, right before the first batch, since making things may have drawn numbers."""
        if self.generators is not None:
            set_generator_states(self.generators)

    def find_place(self, trainer: Trainer, loader: Steps) -> None:
        """Go on in the epoch where the run was, also if steps have another size now."""
        then, now = self.step_size, loader.step_size
        if then is not None:
            trainer.steps_in_epoch = loader.moved(trainer.steps_in_epoch, then)
            before, after = _samples_of(then), _samples_of(now)
            if None not in (before, after) and before != after:
                trainer.metrics.say(
                    f"steps had {before} samples, and have {after} from here on; settings that "
                    "lr_scaling made (learning rate, betas, eps) follow, others stay as saved"
                )
            long, is_long = self.steps_per_epoch, loader.steps_per_epoch
            if then == now and None not in (long, is_long) and long != is_long:
                trainer.metrics.say(
                    f"the data have another size: an epoch had {long} steps, and has {is_long} "
                    "from here on, in another order, so that this one misses some samples or has "
                    "some twice"
                )
        if self.loader is not None:
            loader.load_state_dict(self.loader)


def state_of(trainer: Trainer, seed: int, loader: Steps | None) -> dict[str, Any]:
    """As `Trainer.state_dict`.

    Args:
        trainer: whose.
        seed: of it.
        loader: what it trains on; None: nothing yet.
    """
    balancer = trainer.balancer
    return {
        "model": copied(trainer.layout.state_dict()),
        "strategy": trainer.strategy.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "epoch": trainer.epoch,
        "steps_in_epoch": trainer.steps_in_epoch,
        "seed": seed,
        "loader": None if loader is None else copy.deepcopy(loader.state_dict()),
        "step_size": None if loader is None else loader.step_size,
        "steps_per_epoch": None if loader is None else loader.steps_per_epoch,
        "generators": generator_states(),
        "metrics": trainer.metrics.state_dict(),
        "callbacks": [[type(c).__name__, c.state_dict()] for c in trainer.callbacks],
        "balance": None if balancer is None else balancer.state_dict(),
    }


def restore(trainer: Trainer, seed: int, state: Mapping[str, Any]) -> Resumed:
    """As `Trainer.load_state_dict`.

    Args:
        trainer: of the same parts.
        seed: of it.
        state: as `state_of` returned it.

    Returns:
        What only the next fit can restore.

    Raises:
        ConfigError: it is of a run with another seed.
    """
    if state["seed"] != seed:
        raise ConfigError(
            f"the state is of a run with seed {state['seed']}, this one has {seed}, by which the "
            "samples come in another order; give it the same seed"
        )
    trainer.layout.load_state_dict(state["model"])
    trainer.strategy.load_state_dict(state["strategy"])
    trainer.scaler.load_state_dict(state["scaler"])
    trainer.epoch = state["epoch"]
    trainer.steps_in_epoch = state["steps_in_epoch"]
    trainer.metrics.load_state_dict(state["metrics"], trainer.step_count)
    if trainer.balancer is not None and state.get("balance") is not None:
        trainer.balancer.load_state_dict(state["balance"])
    _restore_callbacks(trainer.callbacks, state.get("callbacks", []))
    resumed = Resumed(
        state["loader"],
        state["step_size"],
        state.get("steps_per_epoch"),
        state.get("generators"),
    )
    resumed.restore_generators()
    return resumed


def _restore_callbacks(callbacks: Sequence[Callback], saved: Sequence[Any]) -> None:
    """Of several of a class, the first gets the first's."""
    left = list(saved)
    for callback in callbacks:
        own = next((s for s in left if s[0] == type(callback).__name__), None)
        if own is not None:
            left.remove(own)
            callback.load_state_dict(own[1])


def _samples_of(step_size: tuple[int, int | None]) -> int | None:
    batches, samples = step_size
    return None if samples is None else batches * samples
