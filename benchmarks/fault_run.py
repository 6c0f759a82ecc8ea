"""One run of real processes under faults, started again as torchrun does until it ends."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import random
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import (
    Callback,
    Checkpointing,
    DiLoCo,
    LocalSGD,
    ParameterServer,
    Strategy,
    Sync,
    Trainer,
    connect,
)
from scaledtrain.checkpoint.folder import MANIFEST, saved_steps

STEPS, SAVED_EVERY = 30, 4
STEP_SECONDS = 0.01
RUN_SECONDS = 90.0  # a run that takes longer hangs
WAIT_SECONDS = 15.0  # of one rank for another
STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "sync": Sync,
    "local_sgd": partial(LocalSGD, sync_every=3),
    "diloco": partial(DiLoCo, sync_every=3),
    "async": ParameterServer,
}
# What ranks import when they need it; imported once, before they are forked.
PRELOADED = (
    "scaledtrain.checkpoint.export",
    "scaledtrain.checkpoint.part",
    "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
    "torch._dynamo",
)
KINDS = ("kill", "kill while saving", "damage", "full disk", "slow", "stop", "disconnect")


@dataclass(frozen=True)
class Fault:
    """What happens to one rank when it has made that many steps.

    Args:
        kind: one of `KINDS`.
        rank: to which; the disk is full for all.
        step: when.
        amount: from 0 to 1: how late, how long, how many bytes, which file.
    """

    kind: str
    rank: int
    step: int
    amount: float

    def __str__(self) -> str:
        return f"{self.kind} (rank {self.rank}, step {self.step}, {self.amount:.3f})"


@dataclass(frozen=True)
class Plan:
    """A run and its faults; of one seed always the same."""

    seed: int
    strategy: str
    ranks: int
    transport: str
    asynchronous: bool
    faults: tuple[Fault, ...] = ()

    @classmethod
    def of(cls, seed: int, ranks: Sequence[int] = (2, 2, 3)) -> Plan:
        """Draw one."""
        draw = random.Random(seed)
        n = draw.choice(ranks)
        strategy = draw.choice(list(STRATEGIES))
        transport = draw.choice(["shared_memory", "torch"])
        asynchronous = draw.random() < 0.5
        kinds = KINDS if n > 1 else KINDS[:-1]  # one rank has no connection to lose
        faults = []
        for _ in range(draw.randint(1, 3)):
            kind, rank = draw.choice(kinds), draw.randrange(n)
            if kind == "damage":  # of which only a job that begins again takes notice
                rank = 0
            faults.append(Fault(kind, rank, draw.randrange(1, STEPS), draw.random()))
        return cls(seed, strategy, n, transport, asynchronous, tuple(faults))

    @property
    def undisturbed(self) -> Plan:
        """The same run without faults, which all of its kind are compared with."""
        return Plan(0, self.strategy, self.ranks, self.transport, False)


@dataclass
class Outcome:
    """How a run ended."""

    injected: list[str] = field(default_factory=list)
    restarts: int = 0
    steps_lost: int = 0
    recovery_seconds: list[float] = field(default_factory=list)
    """From each death to the next step of the job that was started again."""
    ends: list[dict[str, Any]] = field(default_factory=list)
    """What the ranks told that came to the end."""
    wrong: str = ""
    """What is not as it has to be."""


class Progress:
    """What ranks and their supervisor see of each other: memory that they share.

    Of each rank the step, when it was made, and that with which it began; of each fault, whether
    it has happened.
    """

    _RANK = struct.Struct("qdq")

    def __init__(self, ranks: int, faults: int) -> None:
        self._ranks = ranks
        self._memory = mmap.mmap(-1, ranks * self._RANK.size + faults + 1)

    def tell(self, rank: int, step: int, began: int) -> None:
        self._RANK.pack_into(self._memory, rank * self._RANK.size, step, time.monotonic(), began)

    def of(self, rank: int) -> tuple[int, float, int]:
        step, seconds, began = self._RANK.unpack_from(self._memory, rank * self._RANK.size)
        return step, seconds, began

    def claim(self, fault: int) -> bool:
        """Whether it had not happened yet; from now on it has."""
        at = self._ranks * self._RANK.size + fault
        first, self._memory[at] = self._memory[at] == 0, 1
        return bool(first)

    def happened(self, fault: int) -> bool:
        return self._memory[self._ranks * self._RANK.size + fault] != 0


# --- A rank -----------------------------------------------------------------------------------


class Faults(Callback):
    """Those that a rank does to itself; tells its steps."""

    def __init__(self, plan: Plan, rank: int, progress: Progress) -> None:
        self._plan, self._rank, self._progress = plan, rank, progress
        self._began: int | None = None
        self._room: int | None = None  # step at which the disk has room again

    def on_fit_start(self, trainer: Trainer) -> None:
        self._began = trainer.step_count
        self._progress.tell(self._rank, -1, self._began)

    def on_step_end(self, trainer: Trainer) -> None:
        step, delay = trainer.step_count, STEP_SECONDS
        assert self._began is not None
        self._progress.tell(self._rank, step, self._began)
        if self._room is not None and step >= self._room:
            self._limit(resource.RLIM_INFINITY)
            self._room = None
        for number, fault in enumerate(self._plan.faults):
            is_mine = fault.rank == self._rank
            if step < fault.step:
                continue
            if fault.kind == "full disk" and step < fault.step + 8 and self._room is None:
                self._progress.claim(number)  # each rank has it
                self._limit(int(fault.amount * 4000))
                self._room = fault.step + 8
            if fault.kind == "slow" and is_mine and step < fault.step + 10:
                self._progress.claim(number)
                delay += 0.05 * fault.amount
            if fault.kind == "disconnect" and is_mine and self._progress.claim(number):
                drop_connection(fault.amount)
            if fault.kind == "kill while saving" and is_mine and self._progress.claim(number):
                kill_at_file_operation(1 + int(12 * fault.amount))
        time.sleep(delay)

    def on_fit_end(self, trainer: Trainer) -> None:
        self._limit(resource.RLIM_INFINITY)

    def _limit(self, n_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))


def kill_at_file_operation(number: int) -> None:
    """Kill this process, as kill -9 does, before it does that many more things to files."""
    left = [number]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def do(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return do

    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))


def drop_connection(amount: float) -> None:
    """Shut down one of this process's TCP connections."""
    connected = []
    for name in sorted(os.listdir("/proc/self/fd")):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as own:
            if own.family in (socket.AF_INET, socket.AF_INET6) and own.getpeername():
                connected.append(int(name))
    if connected:
        with socket.socket(fileno=os.dup(connected[int(amount * len(connected))])) as own:
            own.shutdown(socket.SHUT_RDWR)


def work(plan: Plan, rank: int, folder: Path, progress: Progress) -> None:
    """Be a rank, from the newest checkpoint to the end."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Linear(16, 1))
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)
    transport: Any = plan.transport
    with (
        connect(transport=transport, timeout_seconds=WAIT_SECONDS) as link,
        Trainer(
            model,
            nn.functional.mse_loss,
            partial(torch.optim.AdamW, lr=0.01),
            strategy=STRATEGIES[plan.strategy](),
            callbacks=[Faults(plan, rank, progress)],
            checkpointing=Checkpointing(every_steps=SAVED_EVERY, asynchronous=plan.asynchronous),
            resume="auto",
            run_dir=folder,
            log_every=1,
            console=False,
            link=link,
        ) as trainer,
    ):
        tested = DataLoader(loader.dataset, batch_size=64)
        result = trainer.fit(loader, max_steps=STEPS, eval=tested)
        loss = result.evaluation.get("loss")
        told = {"step": result.step, "sha256": trainer.replica.sha256(), "loss": loss}
        (folder / f"end-{rank}.json").write_text(json.dumps(told))


# --- Their supervisor -------------------------------------------------------------------------


class Supervisor:
    """Starts the ranks of a run, does to them what is planned, and starts them again."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        for module in PRELOADED:
            importlib.import_module(module)
        self._plan, self._folder = plan, folder
        self._progress = Progress(plan.ranks, len(plan.faults))
        self._outcome = Outcome()
        self._damages: list[Fault] = []
        self._died_at: float | None = None
        self._reached = 0

    def run(self) -> Outcome:
        """Until the run has ended, or hangs."""
        plan, outcome = self._plan, self._outcome
        deadline = time.monotonic() + RUN_SECONDS
        while not self._life(deadline):
            if time.monotonic() > deadline:
                outcome.wrong = f"it had not ended after {RUN_SECONDS:g} s"
                return outcome
            outcome.restarts += 1
            if outcome.restarts > 2 * len(plan.faults) + 1:
                outcome.wrong = "it failed more often than there were faults"
                return outcome
        outcome.injected = [str(f) for n, f in enumerate(plan.faults) if self._progress.happened(n)]
        outcome.ends = [
            json.loads(file.read_text()) for file in sorted(self._folder.glob("end-*.json"))
        ]
        return outcome

    def _life(self, deadline: float) -> bool:
        """One job; whether it came to the end."""
        for file in self._folder.glob("end-*.json"):
            file.unlink()
        self._reached = max(
            self._reached, *(self._progress.of(r)[0] for r in range(self._plan.ranks))
        )
        for rank in range(self._plan.ranks):
            self._progress.tell(rank, -2, 0)
        port = free_port()
        running = {self._fork(rank, port): rank for rank in range(self._plan.ranks)}
        stopped: dict[int, float] = {}
        codes: dict[int, int] = {}
        try:
            while running:
                time.sleep(0.001)
                now = time.monotonic()
                self._note_recovery()
                self._inject(running, stopped, now)
                for pid in list(running):
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        rank = running.pop(pid)
                        codes[rank] = os.waitstatus_to_exitcode(status)
                if not self._goes_on(codes) and self._died_at is None:
                    self._died_at = now
                if now > deadline or not self._goes_on(codes):
                    break
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        ended = not running and self._goes_on(codes) and codes[0] == 0
        if not ended:
            for fault in self._damages:
                damage(self._folder / "checkpoints", fault.amount)
            self._damages = []
        return ended

    def _note_recovery(self) -> None:
        """From the first death that has not been recovered from to the first step after it."""
        step, seconds, began = self._progress.of(0)
        if self._died_at is not None and step > began:
            self._outcome.recovery_seconds.append(seconds - self._died_at)
            self._outcome.steps_lost += max(self._reached - began, 0)
            self._died_at, self._reached = None, 0

    def _goes_on(self, codes: Mapping[int, int]) -> bool:
        """A job in lockstep ends with any of its ranks, one with a server with rank 0."""
        if self._plan.strategy == "async":
            return all(code == 0 or (code < 0 and rank) for rank, code in codes.items())
        return not any(codes.values())

    def _inject(self, running: Mapping[int, int], stopped: dict[int, float], now: float) -> None:
        for pid, until in list(stopped.items()):
            if now >= until:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                del stopped[pid]
        for number, fault in enumerate(self._plan.faults):
            pid = next((p for p, rank in running.items() if rank == fault.rank), None)
            step, seconds, _ = self._progress.of(fault.rank)
            late = fault.amount * STEP_SECONDS  # anywhere in what follows the step
            if pid is None or step < fault.step or now < seconds + late:
                continue
            if fault.kind in ("kill", "damage") and self._progress.claim(number):
                os.kill(pid, signal.SIGKILL)
                if fault.kind == "damage":
                    self._damages.append(fault)
            if fault.kind == "stop" and self._progress.claim(number):
                os.kill(pid, signal.SIGSTOP)
                stopped[pid] = now + fault.amount

    def _fork(self, rank: int, port: int) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            log = os.open(self._folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            ranks = str(self._plan.ranks)
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            work(self._plan, rank, self._folder, self._progress)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def damage(folder: Path, amount: float) -> None:
    """Flip a bit of a file of the newest checkpoint, cut it, remove it, or remove the manifest."""
    there = saved_steps(folder)
    if not there:
        return
    draw = random.Random(amount)
    files = sorted(path for path in there[-1].path.iterdir())
    file = draw.choice(files)
    way = draw.choice(["flip", "cut", "remove", "remove the manifest"])
    if way == "flip":
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    elif way == "cut":
        os.truncate(file, draw.randrange(file.stat().st_size))
    else:
        (file if way == "remove" else file.with_name(MANIFEST)).unlink()


def free_port() -> int:
    """On which nobody listens, outside the range of outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as candidate, suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port


def judge(plan: Plan, outcome: Outcome, undisturbed: Outcome, folder: Path) -> str:
    """What is wrong with how a run ended; empty: nothing.

    In lockstep all ranks have the parameters of the undisturbed run, bit for bit. Asynchronous runs
    are never the same: the right step, a finite loss, and a last checkpoint of that version.
    """
    if outcome.wrong:
        return outcome.wrong
    lost = 0 if plan.strategy != "async" else plan.ranks - 1
    if len(outcome.ends) < plan.ranks - lost:
        return f"only {len(outcome.ends)} of {plan.ranks} ranks came to the end"
    for end in outcome.ends:
        if plan.strategy == "async":
            loss = end["loss"]
            if loss is not None and not 0.0 <= loss < 100.0:
                return f"the loss is {loss}"
            continue
        if end["step"] != STEPS:
            return f"a rank ended at step {end['step']} instead of {STEPS}"
        if end["sha256"] != undisturbed.ends[0]["sha256"]:
            return "the parameters are others than those of the undisturbed run"
    if plan.strategy == "async" and outcome.ends[0]["step"] != STEPS:
        return f"the server ended at version {outcome.ends[0]['step']} instead of {STEPS}"
    is_full = any("full disk" in each for each in outcome.injected)
    there = saved_steps(folder / "checkpoints")
    if not is_full and (not there or there[-1].step != STEPS):
        return f"the last checkpoint is of step {there[-1].step if there else None}"
    if not is_full and (damage_found := there[-1].damage()):
        return damage_found
    return ""
