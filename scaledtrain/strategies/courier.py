"""One message at a time to another rank's peer, which may have died."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from scaledtrain.comm.protocols import Handle, Peers
from scaledtrain.errors import PeerLostError
from scaledtrain.strategies.roster import Roster
from scaledtrain.timeline import Timeline

__all__ = ["Courier"]


class Courier:
    """Carries messages, and tells the roster of a rank that turns out to be dead.

    Args:
        peers: who carries them.
        roster: who takes part.
        timeline: where the time is recorded.
    """

    def __init__(self, peers: Peers, roster: Roster, timeline: Timeline) -> None:
        self._peers = peers
        self._roster = roster
        self._timeline = timeline
        self._rank = -1
        self._handle: Handle | None = None
        self._under_way = False

    def begin(self, rank: int, message: Sequence[Tensor], answer: Sequence[Tensor] = ()) -> None:
        """Begin to send; message and answer are the courier's until `end`."""
        start = self._timeline.now()
        self._rank, self._under_way = rank, True
        try:
            self._handle = self._peers.call(rank, message, answer)
        except PeerLostError:
            self._handle = None
        self._timeline.add("communication", start)

    def end(self) -> bool | None:
        """Wait until the message under way was received; whether it was, None if there is none.

        Raises:
            WaitTimeoutError: the other rank lives, but does not take the message.
        """
        if not self._under_way:
            return None
        handle, self._handle, self._under_way = self._handle, None, False
        start = self._timeline.now()
        try:
            if handle is not None:
                handle.wait()
                self._timeline.add("communication", start)
                return True
        except PeerLostError:
            pass
        self._roster.lost(self._rank)
        return False
