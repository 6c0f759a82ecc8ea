"""scaledtrain: distributed training from synchronous to asynchronous, behind one Trainer.

What most runs need is here. Other strategies are in `scaledtrain.strategies`, policies of the
server in `scaledtrain.server`, layouts and engines in `scaledtrain.parallel`, errors in
`scaledtrain.errors`, and so on by subject.
"""

from scaledtrain.callbacks import Callback, StopAtTarget
from scaledtrain.checkpoint import Checkpointing
from scaledtrain.connection import connect
from scaledtrain.drop_compute import DropCompute
from scaledtrain.errors import ScaledTrainError
from scaledtrain.layers import LayerWatch
from scaledtrain.memory import estimate_memory
from scaledtrain.mesh import Mesh
from scaledtrain.noise_scale import NoiseScale
from scaledtrain.precision import Precision
from scaledtrain.replica import Replica
from scaledtrain.seeding import seed_everything
from scaledtrain.simulate import simulate
from scaledtrain.strategies import DiLoCo, LocalSGD, ParameterServer, Strategy, Sync
from scaledtrain.trainer import Trainer
from scaledtrain.watch import Watch

__version__ = "0.1.0"

__all__ = [
    "Trainer",
    "Callback",
    "StopAtTarget",
    "Checkpointing",
    "Precision",
    "Mesh",
    "Watch",
    "LayerWatch",
    "DropCompute",
    "NoiseScale",
    "Strategy",
    "Sync",
    "ParameterServer",
    "LocalSGD",
    "DiLoCo",
    "Replica",
    "connect",
    "simulate",
    "estimate_memory",
    "seed_everything",
    "ScaledTrainError",
]
