"""A virtual cluster: what computing, communication and failures cost, as pure models."""

from scaledtrain.sim.cluster import Cluster
from scaledtrain.sim.compute import ComputeModel, Constant, StepPace, StepTimes
from scaledtrain.sim.distributions import (
    Gamma,
    GammaPerMachine,
    LogNormal,
    Pareto,
    ShiftedExponential,
)
from scaledtrain.sim.failures import Failure, Failures, GivenFailures, Outage, RandomFailures
from scaledtrain.sim.network import Network, Queue, bottleneck, seconds_alone
from scaledtrain.sim.noise import MicrobatchNoise
from scaledtrain.sim.order_statistics import best_count, order_statistics
from scaledtrain.sim.recorded import CsvTimes, Measured
from scaledtrain.sim.simulate import Simulation, simulate
from scaledtrain.sim.speeds import (
    LogNormalSpeeds,
    ParetoSpeeds,
    SlowWorkers,
    Speeds,
    SquareRootSpeeds,
)
from scaledtrain.sim.times import Times, simulate_times
from scaledtrain.sim.topology import Nic, Placement, Topology, Wire

__all__ = [
    "Cluster",
    "ComputeModel",
    "Constant",
    "CsvTimes",
    "Gamma",
    "GammaPerMachine",
    "LogNormal",
    "Measured",
    "MicrobatchNoise",
    "Pareto",
    "ShiftedExponential",
    "StepPace",
    "StepTimes",
    "best_count",
    "order_statistics",
    "LogNormalSpeeds",
    "ParetoSpeeds",
    "SlowWorkers",
    "Speeds",
    "SquareRootSpeeds",
    "Network",
    "Nic",
    "Placement",
    "Queue",
    "Topology",
    "Wire",
    "bottleneck",
    "seconds_alone",
    "Failure",
    "Failures",
    "GivenFailures",
    "Outage",
    "RandomFailures",
    "Simulation",
    "Times",
    "simulate",
    "simulate_times",
]
