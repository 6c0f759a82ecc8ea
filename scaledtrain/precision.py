"""In which number formats a step computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from scaledtrain.errors import ConfigError
from scaledtrain.replica import Replica

__all__ = ["Precision"]

_AS_IT_IS = nullcontext()


@dataclass(frozen=True)
class Precision:
    """How forward and backward compute, and what happens to gradients before the update.

    Args:
        name: ``"fp32"``: parameters, activations and gradients in float32, nothing is scaled.

    Raises:
        ConfigError: any other name.
    """

    name: Literal["fp32"] = "fp32"

    def __post_init__(self) -> None:
        if self.name != "fp32":
            raise ConfigError(f"precision is {self.name!r}; it can be: 'fp32'")

    def autocast(self) -> AbstractContextManager[None]:
        """Context in which the forward pass runs."""
        return _AS_IT_IS

    def scale(self, loss: Tensor) -> Tensor:
        """What backward starts from."""
        return loss

    def unscale_and_clip(
        self, replica: Replica, max_norm: float | None, measure: bool
    ) -> tuple[bool, Tensor | None]:
        """Make the gradients ready for the update.

        Args:
            replica: whose gradients.
            max_norm: clip to this 2-norm; None does not clip.
            measure: give the norm also when nothing is clipped.

        Returns:
            Whether the update may be made, and the norm before clipping (None if not measured).
        """
        if max_norm is not None:
            return True, replica.clip_gradients(max_norm)
        return True, replica.gradient_norm() if measure else None
