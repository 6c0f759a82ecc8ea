"""Strategies: what replicas tell each other, and when."""

from scaledtrain.strategies.diloco import DiLoCo
from scaledtrain.strategies.local_sgd import LocalSGD
from scaledtrain.strategies.parameter_server import ParameterServer
from scaledtrain.strategies.periodic import Periodic
from scaledtrain.strategies.slow_momentum import SlowMo
from scaledtrain.strategies.strategy import Strategy
from scaledtrain.strategies.sync import Sync

__all__ = ["DiLoCo", "LocalSGD", "ParameterServer", "Periodic", "SlowMo", "Strategy", "Sync"]
