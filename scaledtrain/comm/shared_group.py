"""A `Group` between the processes of one Linux host: collectives through shared memory.

Every rank has a slot in shared memory, twice, and a rank that meets the others at a barrier for the
s-th time uses the slots of parity s. What is written before a barrier is read after it, before the
next one, and overwritten after the next one: so one barrier per step is enough.

* A small payload takes one step: copy into the own slot; barrier; add up all slots.
* A large one passes in chunks that stay in the cache. In step k a rank copies chunk k into its
  slot, adds up its share of chunk k - 1 out of all slots, and copies the sums of chunk k - 2 out.

The sum is taken in the order of ranks, ((x0 + x1) + x2) + ..., wherever it is computed: the result
is the same on every rank, bit by bit, and from run to run.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version

from scaledtrain.comm.flat import bytes_of
from scaledtrain.comm.protocols import ReduceOp
from scaledtrain.comm.reduction import Reduction, divisors, reduce_block, total_weight
from scaledtrain.comm.shared_memory import SharedSegment
from scaledtrain.comm.shared_plan import (
    BLOCK_ELEMENTS,
    CALLS,
    DTYPES,
    HEADER_BYTES,
    SMALL_BYTES,
    Block,
    Piece,
    Plan,
    check_memory,
    describe,
    header_offset,
    memory_bytes,
    result_offset,
    slot_offset,
)
from scaledtrain.errors import ClusterError, ConfigError

__all__ = ["SharedMemoryGroup"]

_HEADER = struct.Struct("<8sdIIQQ")  # digest, weight, call, source, tensors, bytes
_SHORT_BYTES = 16 * 1024
_MAX_PLANS = 64
_MAX_BLOCKS = 4096
_SHORT_SECONDS = 20e-6  # waiting as short as this is what meeting costs, not somebody's delay

Observe = Callable[[Literal["waiting", "communication"], float, float], object]

# (to, from, bytes). The second lets other threads of Python run meanwhile; that costs more than a
# short copy, above all where one of them then keeps the lock.
_MEMMOVE = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
_ADDRESS = ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
_copy_short = ctypes.PYFUNCTYPE(*_MEMMOVE)(_ADDRESS)
_copy_long = ctypes.CFUNCTYPE(*_MEMMOVE)(_ADDRESS)


class SharedMemoryGroup:
    """Ranks of one host that reduce and broadcast tensors on the CPU through shared memory.

    Made by `connect`. An all-reduce is lazy: its handle's ``wait`` does the work, after that of all
    that were begun before. The memory that a group takes is fixed: 1 MiB per rank, and one more.

    After a `ClusterError` or an interrupt the group cannot be used any more, since the ranks may
    have lost step; every later call says so.

    Args:
        segment: what the ranks share, as `connect` makes it.
        timeout_seconds: the longest to wait for another rank.
        observe: called with a phase, its start and its end in seconds of ``time.perf_counter``:
            ``"waiting"`` while other ranks have not come, ``"communication"`` while copying, adding
            and meeting. So it shows what a slow rank costs the others.

    Attributes:
        rank: this rank's place, from 0.
        size: how many ranks there are.
        observe: as given; may be replaced.
        bytes_sent: bytes of the tensors that this rank has handed over, as `Group` counts them.
    """

    overlaps = False

    def __init__(
        self, segment: SharedSegment, timeout_seconds: float, observe: Observe | None = None
    ) -> None:
        rank, size = segment.rank, segment.size
        self.rank = rank
        self.size = size
        self.observe = observe
        self.bytes_sent = 0
        self._segment = segment
        self._timeout_seconds = timeout_seconds
        others = [r for r in range(size) if r != rank]
        # Semaphore i * size + j: rank i waits for rank j. So nobody takes a post meant for another.
        self._posts = [segment.semaphore(r * size + rank) for r in others]
        self._arrivals = [(r, segment.semaphore(rank * size + r)) for r in others]
        self._headers = segment.memory.numpy().data
        base = segment.memory.data_ptr()
        self._slots = [
            [base + slot_offset(size, parity, r) for r in range(size)] for parity in (0, 1)
        ]
        self._results = [base + result_offset(size, parity) for parity in (0, 1)]
        with torch.inference_mode(False):  # else it could not be written outside of it
            self._private = torch.empty(SMALL_BYTES, dtype=torch.uint8, device="cpu")
            self._scratch = torch.empty(2, BLOCK_ELEMENTS * 8, dtype=torch.uint8, device="cpu")
        self._plans: OrderedDict[object, Plan] = OrderedDict()
        self._blocks: dict[tuple[int, bool, Block], tuple[list[Tensor], Tensor]] = {}
        self._pending: deque[_Pending] = deque()
        self._lock = threading.Lock()
        self._ones = [1.0] * size
        self._step = 0  # barriers passed; its parity says which slots are written
        self._since = 0.0  # when what `observe` has not been told yet began
        self._broken: str | None = None

    @classmethod
    def connect(
        cls,
        rank: int,
        size: int,
        store: dist.Store,
        timeout_seconds: float,
        observe: Observe | None = None,
        ranks: Sequence[int] | None = None,
    ) -> SharedMemoryGroup | None:
        """Make the group, or find that these ranks cannot share memory. Collective.

        Args:
            rank: this rank's place, from 0.
            size: how many ranks there are.
            store: where they meet.
            timeout_seconds: the longest to wait for another rank, here and in every collective.
            observe: told what time was spent on; see the class.
            ranks: what they are called in messages; see `SharedSegment.connect`.

        Returns:
            The group; None on every rank if one of them is on another host or in another container,
            or this is no Linux. The log (level INFO) says why.

        Raises:
            RendezvousError: a rank did not come in time.
        """
        segment = SharedSegment.connect(
            store,
            "shared_memory_group",
            rank,
            size,
            n_bytes=memory_bytes(size),
            n_semaphores=size * size,
            ranks=ranks,
            timeout_seconds=timeout_seconds,
        )
        return None if segment is None else cls(segment, timeout_seconds, observe)

    def all_reduce(
        self, tensors: Sequence[Tensor], op: ReduceOp = "sum", weight: float = 1.0
    ) -> _Pending:
        """Begin to replace every tensor, in place, by its reduction over the ranks.

        float16 and bfloat16 are added up in float32 and rounded once. With equal weights of 1 the
        mean is (x0 + x1 + ...) / n, without a product. NaN spreads through "max", too.

        Args:
            tensors: on the CPU; the same shapes and dtypes in the same order on every rank.
                float16, bfloat16, float32, float64; for "sum" and "max" int8 to int64 and uint8,
                too; for "max" also bool. One that is not contiguous costs a copy more.
            op: ``"sum"``, ``"max"`` or ``"mean"``: sum_i w_i x_i / sum_i w_i.
            weight: w of this rank in a mean. A rank of weight 0 does not change the result,
                whatever its tensors hold.

        Returns:
            A handle; its ``wait`` does the work, and raises what is listed here as well.

        Raises:
            ConfigError: a tensor that cannot be reduced so; in ``wait``, on every rank: weights
                that are negative, not finite or all zero. The group can still be used.
            ClusterError: the ranks call different things.
            PeerLostError: a rank died.
            WaitTimeoutError: a rank did not come in time.
        """
        self._raise_broken()
        if op not in DTYPES:
            raise ConfigError(f"op={op!r} is none of 'sum', 'mean', 'max'")
        tensors = list(tensors)
        pending = _Pending(self, tensors, self._plan(tensors, op, 0), weight)
        self.bytes_sent += bytes_of(tensors)
        self._pending.append(pending)
        return pending

    def broadcast(self, tensors: Sequence[Tensor], src: int = 0) -> None:
        """Replace every tensor, in place, by rank ``src``'s; returns when it is there.

        Args:
            tensors: on the CPU, of any dtype; the same shapes and dtypes on every rank.
            src: the rank whose values are copied.

        Raises:
            ConfigError: there is no such rank, or a tensor that cannot be copied.
            ClusterError: the ranks call different things.
            PeerLostError: a rank died.
            WaitTimeoutError: a rank did not come in time.
        """
        self._raise_broken()
        if not 0 <= src < self.size:
            raise ConfigError(f"src={src} is no rank of a group of {self.size}")
        tensors = list(tensors)
        pending = _Pending(self, tensors, self._plan(tensors, "broadcast", src), 1.0)
        if src == self.rank:
            self.bytes_sent += bytes_of(tensors)
        self._pending.append(pending)
        pending.wait()

    def all_gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Every rank's tensors, by rank: each rank broadcasts its own in turn.

        Args:
            tensors: on the CPU, of any dtype; the same shapes and dtypes on every rank.

        Raises:
            ConfigError, ClusterError, PeerLostError, WaitTimeoutError: as `broadcast`.
        """
        gathered = []
        for src in range(self.size):
            own = src == self.rank
            gathered.append(list(tensors) if own else [torch.empty_like(t) for t in tensors])
            self.broadcast(gathered[src], src)
        return gathered

    def close(self) -> None:
        """Give the memory back; ranks that still wait for this one learn that it left."""
        self._broken = self._broken or "it was closed"
        self._pending.clear()
        self._plans.clear()
        self._blocks.clear()
        self._posts, self._arrivals = [], []
        self._headers = memoryview(b"")
        self._segment.close()

    def _plan(self, tensors: Sequence[Tensor], call: str, src: int) -> Plan:
        key = (call, src, *[(t.shape, t.dtype, t.is_cpu) for t in tensors])
        plan = self._plans.get(key)
        if plan is None:
            plan = Plan(tensors, call, src, self.rank, self.size)
            self._plans[key] = plan
            if len(self._plans) > _MAX_PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(key)
        return plan

    def _finish(self, pending: _Pending) -> None:
        """Do what was begun, in that order, up to this."""
        with self._lock:
            while not pending.done:
                self._raise_broken()
                first = self._pending.popleft()
                first.done = True
                try:
                    self._run(first)
                except ConfigError as error:
                    first.error = error  # on every rank at the same place: they are still in step
                except BaseException as error:
                    first.error = error
                    self._broken = f"{type(error).__name__}: {error}"
                    self._pending.clear()
                    self._segment.leave(failed=True)
                    raise

    def _run(self, pending: _Pending) -> None:
        plan = pending.plan
        observe = self.observe
        if observe is not None:
            self._since = time.perf_counter()
        originals = pending.tensors
        tensors = [t if t.is_contiguous() else t.detach().contiguous() for t in originals]
        pointers = [t.data_ptr() for t in tensors]
        check_memory(plan, pointers)
        if plan.call == "broadcast":
            self._broadcast(plan, pointers)
        elif plan.n_bytes <= SMALL_BYTES:
            self._reduce_small(plan, pointers, pending.weight)
        else:
            self._reduce_large(plan, pointers, pending.weight)
        if plan.call != "broadcast" or self.rank != plan.src:
            for original, value in zip(originals, tensors, strict=True):
                if original is not value:
                    original.detach().copy_(value)
            increment_version(originals)  # else autograd would not know that they were written
        pending.tensors = []  # a handle that is kept does not keep them
        if observe is not None:
            observe("communication", self._since, time.perf_counter())

    def _broadcast(self, plan: Plan, pointers: list[int]) -> None:
        sends = self.rank == plan.src
        for k in range(plan.n_chunks):
            parity = self._step & 1
            if sends:
                _copy_in(plan.pieces[k], pointers, self._slots[parity][plan.src])
            if k == 0:
                self._write_header(plan, 1.0)
            elif not sends:
                _copy_out(plan.pieces[k - 1], pointers, self._slots[1 - parity][plan.src])
            self._barrier("broadcast")
            if k == 0:
                self._compare_headers(plan)
        if not sends:
            _copy_out(plan.pieces[-1], pointers, self._slots[1 - (self._step & 1)][plan.src])

    def _reduce_small(self, plan: Plan, pointers: list[int], weight: float) -> None:
        parity = self._step & 1
        slot = self._slots[parity][self.rank]
        for index, _, offset, n_bytes in plan.pieces[0]:
            _copy_short(slot + offset, pointers[index], n_bytes)
        self._write_header(plan, weight)
        self._barrier("all_reduce")
        reduction = self._reduction(plan, self._compare_headers(plan))
        for block in plan.blocks(0):
            self._reduce(reduction, parity, True, block)
        result = self._private.data_ptr()
        for index, _, offset, n_bytes in plan.pieces[0]:
            _copy_short(pointers[index], result + offset, n_bytes)

    def _reduce_large(self, plan: Plan, pointers: list[int], weight: float) -> None:
        n_chunks = plan.n_chunks
        reduction = plan.unweighted
        for k in range(n_chunks + 1):
            parity = self._step & 1
            if k < n_chunks:
                _copy_in(plan.pieces[k], pointers, self._slots[parity][self.rank])
            if k == 0:
                self._write_header(plan, weight)
            else:
                for block in plan.blocks(k - 1):
                    self._reduce(reduction, 1 - parity, False, block)
            if k > 1:
                _copy_out(plan.pieces[k - 2], pointers, self._results[1 - parity])
            self._barrier("all_reduce")
            if k == 0:
                reduction = self._reduction(plan, self._compare_headers(plan))
        _copy_out(plan.pieces[-1], pointers, self._results[1 - (self._step & 1)])

    def _reduce(self, reduction: Reduction, parity: int, private: bool, block: Block) -> None:
        key = (parity, private, block)
        views = self._blocks.get(key)
        if views is None:
            if len(self._blocks) >= _MAX_BLOCKS:
                self._blocks.clear()
            views = self._blocks[key] = self._view(parity, private, block)
        slots, out = views
        reduce_block(reduction, slots, out, self._scratch)

    def _view(self, parity: int, private: bool, block: Block) -> tuple[list[Tensor], Tensor]:
        """The slots of one parity at a block, and where its result goes."""
        dtype, offset, n = block
        tensor, size = self._segment.tensor, self.size
        slots = [tensor(slot_offset(size, parity, r) + offset, [n], dtype) for r in range(size)]
        if private:
            return slots, self._private[offset : offset + n * dtype.itemsize].view(dtype)
        return slots, tensor(result_offset(size, 1 - parity) + offset, [n], dtype)

    def _write_header(self, plan: Plan, weight: float) -> None:
        _HEADER.pack_into(
            self._headers,
            header_offset(self.size, self._step & 1, self.rank),
            plan.digest,
            weight,
            CALLS.index(plan.call),
            plan.src,
            plan.n_tensors,
            plan.n_bytes,
        )

    def _compare_headers(self, plan: Plan) -> list[float]:
        """See that all ranks called the same; returns their weights."""
        parity = 1 - (self._step & 1)
        start = header_offset(self.size, parity, 0)
        headers = [
            _HEADER.unpack_from(self._headers, start + rank * HEADER_BYTES)
            for rank in range(self.size)
        ]
        if any(digest != plan.digest for digest, *_ in headers):
            calls = [f"rank {r}: {describe(*header[2:])}" for r, header in enumerate(headers)]
            raise ClusterError(
                f"the ranks called different collectives at once: {'; '.join(calls)}. Every rank "
                "must make the same calls in the same order, with tensors of the same shapes and "
                "dtypes; where this looks alike, a shape or dtype differs"
            )
        return [header[1] for header in headers]

    def _reduction(self, plan: Plan, weights: list[float]) -> Reduction:
        if plan.call != "mean" or weights == self._ones:
            return plan.unweighted
        terms = tuple((r, w) for r, w in enumerate(weights) if w != 0.0)
        return Reduction("mean", terms, divisors(total_weight(weights)))

    def _barrier(self, doing: str) -> None:
        for semaphore in self._posts:
            semaphore.post()
        observe = self.observe
        start = 0.0 if observe is None else time.perf_counter()
        for rank, semaphore in self._arrivals:
            if not semaphore.try_wait():
                self._segment.wait(semaphore, rank, doing, self._timeout_seconds)
        self._step += 1
        if observe is not None:
            end = time.perf_counter()
            if end - start > _SHORT_SECONDS:
                observe("communication", self._since, start)
                observe("waiting", start, end)
                self._since = end

    def _raise_broken(self) -> None:
        if self._broken is not None:
            raise ClusterError(
                f"rank {self.rank} cannot use this group any more: {self._broken}. Make a new one, "
                "or restart the job"
            )


class _Pending:
    """A collective that was begun; ``wait`` does it."""

    __slots__ = ("_group", "done", "error", "plan", "tensors", "weight")

    def __init__(
        self, group: SharedMemoryGroup, tensors: list[Tensor], plan: Plan, weight: float
    ) -> None:
        self._group = group
        self.tensors = tensors
        self.plan = plan
        self.weight = weight
        self.done = False
        self.error: BaseException | None = None

    def wait(self) -> None:
        """Do this, and first what was begun before; returns when the result is in the tensors."""
        if not self.done:
            self._group._finish(self)
        if self.error is not None:
            raise self.error


def _copy_in(pieces: list[Piece], pointers: list[int], slot: int) -> None:
    for index, tensor_offset, chunk_offset, n_bytes in pieces:
        copy = _copy_short if n_bytes <= _SHORT_BYTES else _copy_long
        copy(slot + chunk_offset, pointers[index] + tensor_offset, n_bytes)


def _copy_out(pieces: list[Piece], pointers: list[int], slot: int) -> None:
    for index, tensor_offset, chunk_offset, n_bytes in pieces:
        copy = _copy_short if n_bytes <= _SHORT_BYTES else _copy_long
        copy(pointers[index] + tensor_offset, slot + chunk_offset, n_bytes)
