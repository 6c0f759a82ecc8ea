"""The asynchronous family as one state machine: a server, admission policies and corrections."""

from scaledtrain.server.admission import Admission, ServerView
from scaledtrain.server.correction import Arrival, Context, Corrected, Correction, Uncorrected
from scaledtrain.server.dana import Dana
from scaledtrain.server.ledger import Ledger
from scaledtrain.server.policies import (
    Asynchronous,
    BackupWorkers,
    Rennala,
    Ringmaster,
    SoftSync,
    StaleSynchronous,
    Synchronous,
)
from scaledtrain.server.server import Pushed, Server
from scaledtrain.server.staleness import (
    AdaptiveDelayCompensated,
    DelayAdaptive,
    DelayCompensated,
    GapAware,
    StalenessAware,
)

__all__ = [
    "Admission",
    "Asynchronous",
    "BackupWorkers",
    "Rennala",
    "Ringmaster",
    "ServerView",
    "SoftSync",
    "StaleSynchronous",
    "Synchronous",
    "Correction",
    "AdaptiveDelayCompensated",
    "Dana",
    "DelayAdaptive",
    "DelayCompensated",
    "GapAware",
    "StalenessAware",
    "Uncorrected",
    "Arrival",
    "Context",
    "Corrected",
    "Ledger",
    "Pushed",
    "Server",
]
