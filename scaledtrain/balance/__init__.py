"""How many samples of a step each replica trains on."""

from scaledtrain.balance.policies import Auto, Balance, Even, Fixed

__all__ = ["Auto", "Balance", "Even", "Fixed"]
