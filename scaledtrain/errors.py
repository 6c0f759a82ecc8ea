"""The exceptions that scaledtrain raises on purpose, but for those that end a process as asked.

`Interrupted` is a KeyboardInterrupt, and `Preempted` a SystemExit: neither is an error.

    ScaledTrainError
    ├── ConfigError            what was asked for cannot be: a wrong key, size, model or loader
    ├── NonFiniteLossError     the loss, or a gradient, became NaN or infinite
    ├── LossSpikeError         the loss jumped
    ├── DataError              a data set's files are damaged or missing, or cannot be written
    ├── CheckpointError        a checkpoint is damaged or missing, or cannot be written
    ├── ReplayError            a run that is made again does not come to the same
    └── ClusterError           the ranks of one job cannot work together
        ├── RendezvousError    they never met: a missing rank, a port in use
        ├── WaitTimeoutError   one waited too long for another
        ├── PeerLostError      one died
        └── DeadlockError      simulated ranks wait for each other for ever

A message says what was given, why it cannot be, and what to do.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "DataError",
    "DeadlockError",
    "LossSpikeError",
    "NonFiniteLossError",
    "PeerLostError",
    "RendezvousError",
    "ReplayError",
    "ScaledTrainError",
    "WaitTimeoutError",
]


class ScaledTrainError(Exception):
    """Base of all errors that this library raises on purpose."""


class ConfigError(ScaledTrainError, ValueError):
    """What was asked for cannot be done as asked."""


class NonFiniteLossError(ScaledTrainError, ArithmeticError):
    """The loss, or a gradient, became NaN or infinite."""


class LossSpikeError(ScaledTrainError, ArithmeticError):
    """The loss is far above what it was, and the run was to end then."""


class DataError(ScaledTrainError, RuntimeError):
    """A file of a data set is damaged or missing, or cannot be written; the message names it."""


class CheckpointError(ScaledTrainError, RuntimeError):
    """A checkpoint is damaged or missing, or cannot be written; the message names the file."""


class ReplayError(ScaledTrainError, RuntimeError):
    """A run that is made again by its event log does not come to the same."""


class ClusterError(ScaledTrainError, RuntimeError):
    """The ranks of one job cannot work together."""


class RendezvousError(ClusterError):
    """The ranks never met: one is missing, or the port is taken."""


class WaitTimeoutError(ClusterError, TimeoutError):
    """One rank waited too long for another; the message names both."""


class PeerLostError(ClusterError):
    """A rank that another one needs has died."""


class DeadlockError(ClusterError):
    """Ranks of a simulated cluster wait, and nothing is left that could end it."""
