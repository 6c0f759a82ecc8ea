"""Strategies: what replicas tell each other, and when."""

from scaledtrain.strategies.parameter_server import ParameterServer
from scaledtrain.strategies.strategy import Strategy
from scaledtrain.strategies.sync import Sync

__all__ = ["ParameterServer", "Strategy", "Sync"]
