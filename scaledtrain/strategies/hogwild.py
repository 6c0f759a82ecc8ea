"""Hogwild: all ranks of a host train one model in shared memory, without locks."""

from __future__ import annotations

import torch

from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.replica import Replica
from scaledtrain.strategies.alone import Alone
from scaledtrain.strategies.roster import Roster

__all__ = ["Hogwild"]


class Hogwild(Alone):
    r"""All ranks read and write the same parameters, each with an optimizer of its own.

    x <- x - lr g by each rank as soon as it has a gradient, with nothing that orders who reads and
    who writes. What is not guaranteed, therefore: a forward pass may see some parameters before and
    some after another rank's update, and its backward pass others again; of two updates of one
    number at the same moment one may be lost; no two runs are equal. Where gradients are sparse
    that is rare; where they are dense it acts as noise, and the more so the more ranks there are.
    Momenta and the like are each rank's own, and so is the learning-rate schedule: it advances with
    the rank's own updates, of n ranks about an n-th of ``step``. One rank is plain training, bit
    for bit.

    What a rank evaluates moves meanwhile, unless the run is over.

    ``step`` counts the steps of all ranks, also those without an update, and ``staleness`` those
    that other ranks made between the begin of a rank's forward pass and its update. ``max_steps``
    may be passed by one update of each other rank.

    Sent: nothing; the parameters are the same memory, of one Linux host and its CPUs. Waits: for
    nobody, but at the begin of a run (`start`) and its end. A rank that crashes may leave an update
    half made; the others go on, and end with the same parameters, but buffers of their own.

    Raises:
        ConfigError: (in `attach`) the parameters are not on the CPU, or the ranks not on one host.

    Example:
        >>> from functools import partial
        >>> import scaledtrain
        >>> model, hogwild = torch.nn.Linear(2, 1), Hogwild()
        >>> replica = scaledtrain.Replica(model, partial(torch.optim.SGD, lr=0.1))
        >>> with scaledtrain.connect() as link:
        ...     hogwild.attach(replica, link)
        ...     hogwild.start(max_steps=3)
        ...     while hogwild.before_forward():
        ...         replica.zero_grad()
        ...         model(torch.ones(4, 2)).mean().backward()
        ...         hogwild.apply_gradients()
        ...         hogwild.after_step()
        ...     hogwild.settle()
        >>> hogwild.step
        3

    References:
        Niu, Recht, Re, Wright 2011, Hogwild!: A Lock-Free Approach to Parallelizing Stochastic
        Gradient Descent (arXiv 1106.5730).
    """

    def attach(self, replica: Replica, link: Link) -> None:
        """Give every replica rank 0's state, and make the memory that they will share."""
        if link.pieces.size > 1:
            raise ConfigError(
                "Hogwild lets all ranks compute with the same memory, so that each needs a whole "
                "replica in it, but mesh.shard or mesh.pipe divides one over "
                f"{link.pieces.size} ranks; set both to 1, or take another strategy: "
                "Gossip, PushSum, ParameterServer, AsyncLocalSGD, LocalSGD or DiLoCo"
            )
        super().attach(replica, link)
        counts = torch.zeros(link.group.size, dtype=torch.int64)
        *self._shared, self._counts = link.share([*replica.parameters, counts])
        self._roster = Roster(link.board(), link.group.rank, link.timeline.now)
        self._mapped = False
        self._before = 0  # updates of earlier runs
        self._seen = 0

    @property
    def gradients_per_step(self) -> int:
        """Every rank's gradient is an update."""
        return 1

    def start(self, max_steps: int | None) -> None:
        """Begin with rank 0's parameters, from now on in shared memory. Collective."""
        super().start(max_steps)
        own = self._replica.parameters
        step = torch.tensor(self.step)
        self._group.broadcast([*own, step])
        self.step = self._before = int(step.item())
        self._counts[self._group.rank] = 0
        if self._group.rank == 0:
            for parameter, shared in zip(own, self._shared, strict=True):
                shared.copy_(parameter.detach())
        self._roster.begin()
        self._group.all_reduce([torch.zeros(1)]).wait()  # all is in place before anyone writes
        for parameter, shared in zip(own, self._shared, strict=True):
            parameter.data = shared
        self._mapped = True

    def before_forward(self, microbatches: int = 1, weight: float = 1.0) -> bool:
        """False once the ranks together have made the last update, or one asked for the end."""
        if not self._mapped:
            raise ConfigError("Hogwild: each rank would train alone; call start() first, on all")
        self._count()
        self._seen = self.step
        return not self._roster.stopped and super().before_forward(microbatches, weight)

    def reduce_gradients(self, weight: float = 1.0) -> None:
        """Nothing is combined."""
        self.staleness = None

    def apply_gradients(self) -> None:
        """Write the update into the memory of all."""
        super().apply_gradients()
        self._count()
        self.staleness = self.step - self._seen

    def after_step(self) -> None:
        """Count this rank's step with the others'."""
        self._counts[self._group.rank] += 1  # nobody else writes there
        self._count()
        self._roster.beat()

    def _count(self) -> None:
        self.step = self._before + int(self._counts.sum())

    def agree_to_stop(self, vote: bool) -> bool:
        """Tell the others, who look before each step."""
        if vote:
            self._roster.stop()
        return vote

    def settle(self) -> None:
        """Wait for all ranks; each takes the parameters into memory of its own."""
        complete = self._roster.leave("the end of Hogwild")
        for parameter in self._replica.parameters:
            parameter.data = parameter.detach().clone()
        self._mapped = False
        self._count()
        if complete:
            super().settle()
