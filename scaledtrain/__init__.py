"""scaledtrain: distributed training from synchronous to asynchronous, behind one Trainer."""

from scaledtrain.batch_growth import BatchGrowth
from scaledtrain.callbacks import Callback, StopAtTarget
from scaledtrain.checkpoint import Checkpointing, Preempted
from scaledtrain.drop_compute import DropCompute, choose_threshold
from scaledtrain.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    DeadlockError,
    LossSpikeError,
    NonFiniteLossError,
    PeerLostError,
    RendezvousError,
    ReplayError,
    ScaledTrainError,
    WaitTimeoutError,
)
from scaledtrain.layers import LayerWatch
from scaledtrain.memory import estimate_memory
from scaledtrain.mesh import Mesh
from scaledtrain.noise_scale import NoiseScale
from scaledtrain.precision import Precision
from scaledtrain.rendezvous import connect
from scaledtrain.replica import Replica
from scaledtrain.schedule import Slowdown
from scaledtrain.seeding import seed_everything
from scaledtrain.server import Asynchronous, Server
from scaledtrain.simulate import simulate
from scaledtrain.strategies import DiLoCo, LocalSGD, ParameterServer, Strategy, Sync
from scaledtrain.trainer import FitResult, Trainer
from scaledtrain.watch import Watch

__version__ = "0.1.0"

__all__ = [
    "Asynchronous",
    "BatchGrowth",
    "Callback",
    "CheckpointError",
    "Checkpointing",
    "ClusterError",
    "ConfigError",
    "DeadlockError",
    "DropCompute",
    "DiLoCo",
    "FitResult",
    "LayerWatch",
    "LocalSGD",
    "LossSpikeError",
    "Mesh",
    "NoiseScale",
    "NonFiniteLossError",
    "ParameterServer",
    "PeerLostError",
    "Precision",
    "Preempted",
    "RendezvousError",
    "ReplayError",
    "Replica",
    "ScaledTrainError",
    "Server",
    "Slowdown",
    "StopAtTarget",
    "Strategy",
    "Sync",
    "Trainer",
    "WaitTimeoutError",
    "Watch",
    "choose_threshold",
    "connect",
    "estimate_memory",
    "seed_everything",
    "simulate",
]
