"""What ranks keep for each other to reach, as pure logic: no clock, no threads, no I/O."""

from scaledtrain.peers.averaging import AveragingPeer, averaging_neighbours
from scaledtrain.peers.push_sum import PushSumPeer, exponential_neighbour

__all__ = ["AveragingPeer", "PushSumPeer", "averaging_neighbours", "exponential_neighbour"]
