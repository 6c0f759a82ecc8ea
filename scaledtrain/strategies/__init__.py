"""Strategies: what replicas tell each other, and when."""

from scaledtrain.strategies.async_local_sgd import AsyncLocalSGD
from scaledtrain.strategies.diloco import DiLoCo
from scaledtrain.strategies.easgd import EASGD
from scaledtrain.strategies.gossip import Gossip
from scaledtrain.strategies.hogwild import Hogwild
from scaledtrain.strategies.local_sgd import LocalSGD
from scaledtrain.strategies.parameter_server import ParameterServer
from scaledtrain.strategies.periodic import Periodic
from scaledtrain.strategies.push_sum import PushSum
from scaledtrain.strategies.slow_momentum import SlowMo
from scaledtrain.strategies.strategy import Strategy
from scaledtrain.strategies.sync import Sync

__all__ = [
    "AsyncLocalSGD",
    "DiLoCo",
    "EASGD",
    "Gossip",
    "Hogwild",
    "LocalSGD",
    "ParameterServer",
    "Periodic",
    "PushSum",
    "SlowMo",
    "Strategy",
    "Sync",
]
