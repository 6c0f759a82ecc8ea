"""The asynchronous family: workers that push gradients to a server and pull parameters from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from scaledtrain.comm.compress import Codec
from scaledtrain.comm.local import LocalGroup
from scaledtrain.comm.protocols import Group, Link, Pulled, ServeOptions
from scaledtrain.comm.serving.partition import Piece
from scaledtrain.errors import ConfigError
from scaledtrain.optim.lamb import LAMB
from scaledtrain.optim.layerwise import needs_whole_tensors
from scaledtrain.replica import Replica, Updater
from scaledtrain.server import Admission, Asynchronous, Correction, Ledger, Server, Uncorrected
from scaledtrain.strategies.strategy import Strategy

__all__ = ["ParameterServer"]

_ALONE = LocalGroup()
_ANCIENT = 2**40  # versions: older than any gradient is


class ParameterServer(Strategy):
    """Each worker pulls parameters, computes a gradient, pushes it, and goes on.

    Which gradients are accepted, how many make an update and who must wait is the admission
    policy's choice, what a stale gradient is worth the correction's; any policy goes with any
    correction, and with any optimizer: see `scaledtrain.server`.

    The server lives on rank 0 beside its worker, or with ``shards`` on several ranks, each with an
    equal part of the parameters, so that none of them carries the load alone. A push is accepted or
    rejected whole, and a pull is of one version, however many shards there are: all of them do the
    same in the order in which the first one decides, so the result is that of one server.

    With ``overlap`` a worker asks for the next parameters when it begins a step instead of when it
    has ended it: they come while it computes, and lack its own last gradient and what the others
    pushed meanwhile. One worker's staleness is one more, that of n equal ones n more (2n - 1
    instead of n - 1), and may want a smaller learning rate. ``Admission.releases`` is then asked
    one step earlier, too: under `StaleSynchronous` a worker's lead may be one more than the bound.

    Where ``mesh.shard`` or ``mesh.pipe`` lays a replica out over several ranks, the replica is one
    worker: its first rank speaks to the server, which has a shard for each piece on the ranks of
    replica 0. They agree on each push, whole, and hear the same from the server. The death of one
    of them is the death of the worker. ``shards``, ``overlap``, ``compression`` and policies that
    stop work under way are refused then.

    A parameter that a step gives no gradient counts as one of gradient zero.

    Sent: parameters down and a gradient up, once per step and worker, in memory that both ranks
    share where they are on one host, else over gloo (NCCL between two GPUs). Waits: only where the
    policy says so. A worker that dies loses the gradient it was computing: the others go on at
    once where its process is seen to end, or after ``timeout_seconds`` of waiting for it; it may
    come back, see `connect`. A gradient that is not finite, or of other shapes, is rejected, and
    the log says whose it was. A crash of a rank that holds a shard ends the run, and loses
    parameters and optimizer (save ``state_dict``).

    Args:
        admission: the policy; default `Asynchronous`.
        correction: of stale gradients; default none.
        shards: ranks over which the parameters and the optimizer's state are divided, by bytes.
        cut_tensors: let a shard hold a part of a tensor, if whole ones would leave them uneven.
            Use False with an optimizer that looks at whole tensors (LARS, LAMB, Adafactor, Muon).
        overlap: pull while computing.
        compression: of the gradients that are pushed, e.g. ``TopK(0.01)``; default none. What it
            leaves out is sent with a later gradient, so that `TopK` and `Sign` want a policy that
            accepts gradients however late they come.

    Raises:
        ConfigError: an overlap with a policy that has no use for gradients that are a version
            older; a compression that keeps what it leaves out, with a policy that rejects late
            gradients; (from ``attach``) more shards than ranks.

    Example:
        >>> from functools import partial
        >>> import scaledtrain
        >>> import torch
        >>> model, server = torch.nn.Linear(2, 1), ParameterServer()
        >>> replica = scaledtrain.Replica(model, partial(torch.optim.SGD, lr=0.1))
        >>> with scaledtrain.connect() as link:
        ...     server.attach(replica, link)
        ...     server.start(max_steps=3)
        ...     while server.before_forward():
        ...         replica.zero_grad()
        ...         model(torch.ones(4, 2)).mean().backward()
        ...         server.apply_gradients()
        ...     server.settle()
        >>> server.step
        3

    References:
        Li et al. 2014, Scaling Distributed Machine Learning with the Parameter Server; Dean et al.
        2012, Large Scale Distributed Deep Networks.
    """

    settles_to_save = True
    pushes_gradients = True

    def __init__(
        self,
        admission: Admission | None = None,
        correction: Correction | None = None,
        *,
        shards: int = 1,
        cut_tensors: bool = True,
        overlap: bool = False,
        compression: Codec | None = None,
    ) -> None:
        super().__init__()
        self.admission = admission if admission is not None else Asynchronous()
        self.correction = correction if correction is not None else Uncorrected()
        self._options = ServeOptions(shards, cut_tensors, overlap, compression)
        if compression is not None and not isinstance(compression, Codec):
            raise ConfigError(
                f"compression is {compression}, which works on a group of ranks at once; a "
                "gradient that is pushed can be compressed by FP16, BF16, TopK or Sign"
            )
        self._learning_rate = 0.0
        self._has_gradient = True
        self._pushed = False
        self.makes_equal_steps = self.admission.waits_for_all
        self.may_abandon = self.admission.abandons(_ANCIENT)
        if overlap:
            self._check_overlap()
        if compression is not None and compression.needs_feedback:
            self._check_feedback(compression)

    def __str__(self) -> str:
        """Policy and correction, and what is not as usual."""
        parts = [str(self.admission)]
        if self.correction != Uncorrected():
            parts.append(str(self.correction))
        if self._options.shards > 1:
            parts.append(f"{self._options.shards} shards")
        if self._options.overlap:
            parts.append("pulls while computing (staler by one step of each worker)")
        if self._options.compression is not None:
            parts.append(str(self._options.compression))
        return f"ParameterServer: {', '.join(parts)}"

    def attach(self, replica: Replica, link: Link) -> None:
        """Start the server with rank 0's parameters."""
        self._replica = replica
        self._group = link.group
        if not link.returned:
            link.group.broadcast([*replica.parameters, *replica.frozen, *replica.buffers])

        def make_server(pieces: Sequence[Piece]) -> Server:
            names = [replica.names[piece.tensor] for piece in pieces]

            def make_updater(parameters: Sequence[nn.Parameter]) -> Updater:
                updater = replica.updater(parameters, names)
                self._check_pieces(updater.optimizer, pieces)
                return updater

            return Server(
                [piece.of(replica.parameters) for piece in pieces],
                make_updater,
                link.group.size,
                self.admission,
                self.correction,
            )

        self._store = link.serve(replica.parameters, make_server, self._options)

    def _check_pieces(self, optimizer: Optimizer, pieces: Sequence[Piece]) -> None:
        """See that an optimizer has all that it looks at.

        Raises:
            ConfigError: other shards have parts of it.
        """
        if needs_whole_tensors(optimizer) and any(piece.rows is not None for piece in pieces):
            raise ConfigError(
                f"{type(optimizer).__name__} looks at whole tensors, but some are cut, to give "
                f"{self._options.shards} server shards equal parts; set strategy.cut_tensors=false"
            )
        if isinstance(optimizer, LAMB) and optimizer.clips and self._options.shards > 1:
            raise ConfigError(
                "LAMB's max_grad_norm clips the norm of all gradients, but each of "
                f"{self._options.shards} server shards has those of its own tensors; leave it out "
                "(the training's max_grad_norm clips each worker's gradient), or take one shard"
            )

    def _check_overlap(self) -> None:
        if self.may_abandon or not self.admission.accepts(0, 1, Ledger(2, self.admission)):
            raise ConfigError(
                f"overlap makes every gradient a version older at least, but {self.admission} "
                + (
                    "stops work under way, for which a worker has to ask the server meanwhile"
                    if self.may_abandon
                    else "does not accept one that is"
                )
                + "; leave overlap out, or take another policy (Asynchronous, SoftSync)"
            )

    def _check_feedback(self, compression: Codec) -> None:
        if self.admission.waits_for_all:  # nothing is late
            return
        if not self.admission.accepts(0, _ANCIENT, Ledger(2, self.admission)):
            raise ConfigError(
                f"{compression} sends a part of a gradient and keeps the rest for later ones, but "
                f"{self.admission} rejects what comes late: the part that was sent would be lost, "
                "the rest of the rejected gradient used; take another policy (Asynchronous, "
                "Synchronous, SoftSync, StaleSynchronous), or FP16 or BF16, which keep nothing"
            )

    @property
    def gradients_per_step(self) -> int:
        """As many as the admission policy asks for."""
        return self.admission.gradients_per_update(self._group.size)

    def start(self, max_steps: int | None) -> None:
        """Wait for all workers; let the server make no update beyond ``max_steps``."""
        self._store.start(max_steps)

    @property
    def learning_rate(self) -> float:
        """Of the server's next update."""
        return self._learning_rate

    @property
    def lockstep(self) -> Group:
        """This worker alone."""
        return _ALONE

    def before_forward(self, microbatches: int = 1, weight: float = 1.0) -> bool:
        """Pull; False once the last update has been made, or somebody asked for the end."""
        pulled = self._store.pull(self._replica.parameters)
        self._note(pulled)
        return not pulled.stopped

    def abandons(self) -> bool:
        """Ask the server how old the work under way has become, if the policy may stop it."""
        return self.may_abandon and self.admission.abandons(self._store.version() - self.step)

    def reduce_gradients(self, weight: float = 1.0) -> None:
        """Nothing is combined here; a replica without samples (weight 0) has nothing to push."""
        self._has_gradient = weight > 0.0

    def apply_gradients(self) -> None:
        """Push the gradient."""
        if self._has_gradient:
            self._store.push(self._replica.gradients(), self.step)
            self._pushed = True

    def after_step(self) -> None:
        """The server keeps the clocks: tell it of a step without a gradient."""
        if not self._pushed:
            self._store.skip()
        self._pushed = False

    def agree_to_stop(self, vote: bool) -> bool:
        """Tell the server, which tells the others when they pull."""
        if vote:
            self._store.stop()
        return vote

    def settle(self) -> None:
        """Wait for all workers; take the final parameters, and rank 0's buffers.

        After a worker was lost every rank keeps its own buffers, since there is no group any more.
        """
        pulled = self._store.settle(self._replica.parameters)
        self._note(pulled)
        if pulled.complete:
            self._group.broadcast(self._replica.buffers)

    def _note(self, pulled: Pulled) -> None:
        self.step = pulled.version
        self._learning_rate = pulled.learning_rate
        self.staleness = pulled.staleness if pulled.staleness >= 0 else None

    def state_dict(self) -> dict[str, Any]:
        """The step, the server's shard that lives on this rank, and this worker's error feedback.

        With one shard at any time; with several, or with ``overlap``, when all workers have
        settled: until then gradients and parameters are on their way.
        """
        return {"step": self.step, "server": self._store.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore step and server, before any worker pulls; all of them take part again."""
        self.step = state["step"]
        if state["server"]:
            self._store.load_state_dict(state["server"])
