"""``scaledtrain.replay.replay(...)``, and the command ``python -m scaledtrain.replay``."""

from scaledtrain.replay.rerun import replay
from scaledtrain.replay.results import Push, Replayed

__all__ = ["Push", "Replayed", "replay"]
