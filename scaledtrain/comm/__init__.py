"""How bytes move between ranks: the same few calls over shared memory, gloo or NCCL."""

from scaledtrain.comm.protocols import Group, Handle, Link, Pulled, Store

__all__ = ["Group", "Handle", "Link", "Pulled", "Store"]
