"""The asynchronous family as one state machine: a server and its admission policies."""

from scaledtrain.server.admission import Admission, Asynchronous, ServerView
from scaledtrain.server.server import Pushed, Server

__all__ = ["Admission", "Asynchronous", "Pushed", "Server", "ServerView"]
