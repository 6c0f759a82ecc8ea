"""``scaledtrain.replay.replay(...)``, and the command ``python -m scaledtrain.replay``."""

from scaledtrain.replay.rerun import Push, Replayed, replay

__all__ = ["Push", "Replayed", "replay"]
