"""How the ranks of a job meet: at a key-value store, within a time."""

from __future__ import annotations

import errno
import json
import secrets
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from scaledtrain.errors import PeerLostError, RendezvousError
from scaledtrain.ranks import RankInfo

__all__ = ["life_of", "meet"]

_POLL_SECONDS = 0.02
_LIFE = "scaledtrain/life"
_FIRST_LIFE = "0"


def meet(info: RankInfo, timeout_seconds: float) -> tuple[dist.Store, int]:
    """Come to the key-value store of the job, and wait for every other rank.

    Returns:
        The store, and how often this rank has come back to a job that went on without it.

    Raises:
        RendezvousError: a rank did not come.
        PeerLostError: who has the store, rank 0 or the launcher, left.
    """
    where = f"{info.master_address}:{info.master_port}"
    deadline = time.monotonic() + timeout_seconds
    is_master = info.rank == 0 and not info.has_agent
    if is_master:
        _check_port(info)
    else:
        _wait_for_port(info, deadline, timeout_seconds)
    try:
        store: dist.Store = dist.TCPStore(
            info.master_address,
            info.master_port,
            info.size,
            is_master=is_master,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
        )
        if info.is_elastic:
            life = _begin_life(info, store, deadline, timeout_seconds)
            return dist.PrefixStore(f"scaledtrain/{life}", store), 0
        store = dist.PrefixStore(f"scaledtrain/{_FIRST_LIFE}", store)
        attempt = store.add(f"attempts/{info.rank}", 1) - 1
        if store.check(["met"]):
            return store, attempt
        store.set(f"here/{info.rank}", "1")
        missing = list(range(info.size))
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
            time.sleep(_POLL_SECONDS if missing else 0.0)
    except RendezvousError:
        raise
    except (RuntimeError, dist.DistError) as error:
        raise PeerLostError(
            f"{_host(info)} at {where} left while rank {info.rank} met the others; its own message "
            f"says why ({str(error).splitlines()[0]})"
        ) from error
    if missing:
        raise _missed(info, missing, timeout_seconds)
    store.set("met", "1")
    return store, 0


def _missed(info: RankInfo, missing: Sequence[int], timeout_seconds: float) -> RendezvousError:
    return RendezvousError(
        f"rank {info.rank} waited {timeout_seconds:g} s at {info.master_address}:"
        f"{info.master_port} for rank{'s' if len(missing) > 1 else ''} "
        f"{', '.join(map(str, missing))} of {info.size}, which did not come; see whether it "
        "started (its own output, or the scheduler's), that WORLD_SIZE is the number of processes, "
        "and that no firewall is between"
    )


def _host(info: RankInfo) -> str:
    """Who has the job's store."""
    return "the launcher" if info.has_agent else "rank 0"


def life_of(store: dist.Store) -> str:
    """Prefix of the keys that the ranks which met last have in a store."""
    return store.get(_LIFE).decode() if store.check([_LIFE]) else _FIRST_LIFE


def _begin_life(info: RankInfo, store: dist.Store, deadline: float, timeout_seconds: float) -> str:
    """Meet those that the launcher started together with this rank.

    The store may hold what ranks of earlier rounds wrote, and a launcher that joined later counts
    restarts from 0. So rank 0 draws a new word; each other rank answers under it with a word of its
    own, which comes back when all have: then both are of this round.

    Raises:
        RendezvousError: a rank did not come.
    """
    own, life, missing = secrets.token_hex(8), "", [0]
    if info.rank == 0:
        life, missing = own, list(range(1, info.size))
        store.set(_LIFE, life)
    while missing and time.monotonic() < deadline:
        if info.rank == 0:
            missing = [r for r in missing if not store.check([f"scaledtrain/{life}/here/{r}"])]
        else:
            if (newest := life_of(store)) not in (life, _FIRST_LIFE):
                life = newest
                store.set(f"scaledtrain/{life}/here/{info.rank}", own)
            met = f"scaledtrain/{life}/met"
            if life and store.check([met]) and own in json.loads(store.get(met)):
                missing = []
        time.sleep(_POLL_SECONDS if missing else 0.0)
    if missing:
        raise _missed(info, missing, timeout_seconds)
    if info.rank == 0:
        others = range(1, info.size)
        words = [store.get(f"scaledtrain/{life}/here/{r}").decode() for r in others]
        store.set(f"scaledtrain/{life}/met", json.dumps(words))
    return life


def _wait_for_port(info: RankInfo, deadline: float, timeout_seconds: float) -> None:
    """Return when somebody listens; torch's own waiting would write warnings meanwhile."""
    address = (info.master_address, info.master_port)
    while True:
        try:
            socket.create_connection(address, timeout=1.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"rank {info.rank} of {info.size} did not find {_host(info)} at {address[0]}:"
                    f"{address[1]} within {timeout_seconds:g} s; start it, or check MASTER_ADDR, "
                    f"MASTER_PORT and firewalls ({error})"
                ) from error
        time.sleep(_POLL_SECONDS)


def _check_port(info: RankInfo) -> None:
    """Find out whether rank 0 can listen, since the store's own error does not say what to do."""
    family = socket.AF_INET6 if ":" in info.master_address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", info.master_port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return
            raise RendezvousError(
                f"port {info.master_port} on {info.master_address} is in use by another program, "
                "so rank 0 cannot be met there; set MASTER_PORT (torchrun: --master-port) to a "
                "free port, or use torchrun --standalone, which finds one"
            ) from error
