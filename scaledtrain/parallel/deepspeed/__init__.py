"""DeepSpeed's ZeRO under our Trainer and strategies; it is imported when it is used."""

from scaledtrain.parallel.deepspeed.engine import DeepSpeed

__all__ = ["DeepSpeed"]
