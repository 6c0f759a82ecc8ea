"""Staleness corrections and DANA, traced by hand on a quadratic with two parameters.

Worker w has the loss (a x^2 + b y^2) / 2 and so the gradient (a x, b y) with its own (a, b). The
server starts at (4, 2) with plain SGD, learning rate 1/2, and all workers have pulled version 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from scaledtrain.errors import ConfigError
from scaledtrain.replica import Updater
from scaledtrain.server import (
    AdaptiveDelayCompensated,
    Admission,
    Arrival,
    Asynchronous,
    BackupWorkers,
    Context,
    Corrected,
    Correction,
    Dana,
    DelayAdaptive,
    DelayCompensated,
    GapAware,
    Pushed,
    Rennala,
    Ringmaster,
    Server,
    SoftSync,
    StalenessAware,
    StaleSynchronous,
    Synchronous,
    Uncorrected,
)

Pair = tuple[float, float]
MakeOptimizer = Callable[..., torch.optim.Optimizer]

CORRECTIONS: list[Correction] = [
    Uncorrected(),
    StalenessAware(),
    DelayAdaptive(),
    DelayCompensated(),
    AdaptiveDelayCompensated(),
    GapAware(),
]
POLICIES: list[Admission] = [
    Asynchronous(),
    Synchronous(),
    BackupWorkers(2),
    SoftSync(2),
    StaleSynchronous(1),
    Rennala(2),
    Ringmaster(2),
    Ringmaster(2, stop=True),
]
OPTIMIZERS: list[MakeOptimizer] = [
    partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    partial(torch.optim.AdamW, lr=0.1),
    partial(torch.optim.Adam, lr=0.1, weight_decay=0.1),
    partial(torch.optim.RMSprop, lr=0.1),
    partial(torch.optim.Adagrad, lr=0.1),
]
SGD = partial(torch.optim.SGD, lr=1 / 2)


def name(value: object) -> str:
    if isinstance(value, partial):
        options = "-".join(key for key in value.keywords if key != "lr")
        return f"{value.func.__name__}-{options}" if options else value.func.__name__
    return repr(value)


def make_server(
    n_workers: int,
    admission: Admission | None = None,
    correction: Correction | None = None,
    optimizer: MakeOptimizer = SGD,
    gamma: float = 1.0,
    start: Sequence[Tensor] = (torch.tensor([4.0, 2.0]),),
) -> Server:
    def make(parameters: Sequence[nn.Parameter]) -> Updater:
        named = [(str(i), p) for i, p in enumerate(parameters)]
        return Updater(named, optimizer, partial(ExponentialLR, gamma=gamma))

    return Server(list(start), make, n_workers, admission, correction)


class Cluster:
    """Workers that compute when they are told to."""

    def __init__(self, correction: Correction, curvatures: Sequence[Pair], **server: Any) -> None:
        self.curvatures = [torch.tensor(pair) for pair in curvatures]
        self.server = make_server(len(curvatures), correction=correction, **server)
        self.computing: dict[int, tuple[Tensor, int]] = {}
        for worker in range(len(curvatures)):
            self.pull(worker)

    def pull(self, worker: int) -> Pair:
        """Returns what the worker was sent."""
        (sent,) = self.server.pull(worker)
        self.computing[worker] = self.curvatures[worker] * sent.detach(), self.server.version
        x, y = sent.tolist()
        return x, y

    def push(self, worker: int) -> int:
        """Returns the staleness."""
        gradient, version = self.computing.pop(worker)
        pushed = self.server.push(worker, [gradient], version)
        assert pushed.accepted
        return pushed.staleness

    @property
    def x(self) -> Pair:
        x, y = self.server.parameters[0].tolist()
        return x, y


def test_staleness_aware() -> None:
    c = Cluster(StalenessAware(), [(1, 2)] * 3)  # gradient (4, 4) everywhere
    assert c.push(0) == 0
    assert c.x == (2, 0)  # (4, 2) - (4, 4)/2
    assert c.push(1) == 1
    assert c.x == (0, -2)  # eta / 1: (2, 0) - (4, 4)/2
    assert c.push(2) == 2
    assert c.x == (-1, -3)  # eta / 2: (0, -2) - (4, 4)/4
    assert c.server.learning_rate == 1 / 2


def test_staleness_aware_in_an_update_of_several() -> None:
    """(1/c) sum of g_i / tau_i, as the paper has it."""
    c = Cluster(StalenessAware(), [(1, 2)] * 4, admission=SoftSync(2))
    c.push(0)
    c.pull(0)  # (4, 4) again
    c.push(0)
    assert c.x == (2, 0)  # (4, 2) - (4, 4)/2
    c.pull(0)  # (2, 0)
    c.push(0)
    c.pull(0)  # (2, 0) again
    c.push(0)
    assert c.x == (1, 0)  # (2, 0) - (2, 0)/2
    c.pull(0)  # (1, 0)
    assert c.push(1) == 2  # (4, 4), counts half
    assert c.push(0) == 0  # (1, 0)
    assert c.x == (1 / 4, -1 / 2)  # (1, 0) - 1/2 * ((4, 4)/2 + (1, 0))/2


def test_delay_adaptive() -> None:
    c = Cluster(DelayAdaptive(), [(1, 2)] * 2)
    for expected in (2, 0), (1, 0), (1 / 2, 0), (1 / 4, 0):
        c.push(0)
        assert c.x == expected  # each step halves x; y is 0 after the first
        c.pull(0)
    assert c.push(1) == 4  # (4, 4) with eta * 2 / max(2, 4) = 1/4
    assert c.x == (-3 / 4, -1)  # (1/4, 0) - (4, 4)/4
    assert c.push(0) == 1  # (1/4, 0) with eta * 2 / max(2, 1) = 1/2
    assert c.x == (-7 / 8, -1)


def test_delay_adaptive_counts_those_that_take_part() -> None:
    c = Cluster(DelayAdaptive(), [(1, 2)] * 4)
    for _ in range(4):
        c.push(0)
        c.pull(0)
    c.server.remove(2)
    c.server.remove(3)
    c.push(1)
    assert c.x == (-3 / 4, -1)  # as with two workers


def test_delay_compensated() -> None:
    c = Cluster(DelayCompensated(lambda0=1 / 16), [(1, 2)] * 2)
    c.push(0)  # (4, 4), fresh
    assert c.x == (2, 0)
    c.pull(0)  # (2, 0)
    # (4, 4), taken at (4, 2): 4 + 16/16 * (2 - 4) = 2 and 4 + 16/16 * (0 - 2) = 2
    assert c.push(1) == 1
    assert c.x == (1, -1)  # (2, 0) - (2, 2)/2
    c.pull(1)
    # (2, 0), taken at (2, 0): 2 + 4/16 * (1 - 2) = 7/4. What worker 1 pulled since does not matter.
    assert c.push(0) == 1
    assert c.x == (1 / 8, -1)  # (1, -1) - (7/4, 0)/2


def test_delay_compensated_adaptive() -> None:
    c = Cluster(AdaptiveDelayCompensated(lambda0=0.2, decay=0.6), [(1, 2)] * 2)
    c.push(0)  # (4, 4), fresh; m = 0.4 * 16 = 6.4
    assert c.x == (2, 0)
    c.pull(0)  # (2, 0)
    # m = 0.6 * 6.4 + 0.4 * 16 = 10.24, its root 3.2, lambda = 0.2/3.2 = 1/16: as above.
    c.push(1)
    assert c.x == pytest.approx((1, -1), abs=1e-6)
    # m_x = 0.6 * 10.24 + 0.4 * 4 = 7.744, its root 2.782804, lambda = 0.0718699
    # 2 + 0.0718699 * 4 * (1 - 2) = 1.712520, and 1 - 1.712520/2 = 0.143740. In y the gradient is 0.
    c.push(0)
    assert c.x == pytest.approx((0.143740, -1), abs=1e-6)


def test_gap_aware() -> None:
    # Gradients at (4, 2): worker 0 (5, 5), worker 1 (2, 2).
    c = Cluster(GapAware(decay=1 / 2), [(5 / 4, 5 / 2), (1 / 2, 1)])
    c.push(0)  # fresh. v = (5, 5), mean of v v: (25/2) / (1/2) = 25, C = 1/2 * 5 = 5/2
    assert c.x == (3 / 2, -1 / 2)
    c.pull(0)  # (15/8, -5/4)
    # Moved by 5/2 = 1 C: (2, 2) is divided by 2.
    c.push(1)
    assert c.x == pytest.approx((1, -1), abs=1e-6)  # (3/2, -1/2) - (1, 1)/2
    # v = (1, 1), mean: (25/4 + 1/2) / (3/4) = 9, C = 1/2 * 3. Moved by 1/2 = C/3: divided by 4/3.
    c.push(0)  # (15/8, -5/4) * 3/4 = (45/32, -15/16)
    assert c.x == pytest.approx((1 - 45 / 64, -1 + 15 / 32), abs=1e-6)


def test_gap_aware_divides_weight_decay_too() -> None:
    optimizer = partial(SGD, weight_decay=1 / 4)
    c = Cluster(GapAware(decay=1 / 2), [(1, 2)] * 2, optimizer=optimizer)
    c.push(0)  # (4, 4) + (4, 2)/4 = (5, 9/2): (4, 2) - (5, 9/2)/2 = (3/2, -1/4), moved by 1 C
    assert c.x == (3 / 2, -1 / 4)
    c.push(1)  # ((4, 4) + (3/2, -1/4)/4) / 2 = (35/16, 63/32)
    assert c.x == pytest.approx((3 / 2 - 35 / 32, -1 / 4 - 63 / 64), abs=1e-6)


def test_gap_aware_leaves_decoupled_weight_decay_to_the_optimizer() -> None:
    def divided(weight_decay: float) -> Tensor:
        x = [nn.Parameter(torch.tensor([4.0, 2.0]))]
        optimizer = torch.optim.AdamW(x, lr=1 / 2, weight_decay=weight_decay)
        context, rule = Context(x, optimizer, 2, 1), GapAware()
        rule.start(context)
        late = Arrival(1, [torch.tensor([4.0, 4.0])], 1, [torch.tensor([5.0, 5.0])])
        with torch.no_grad():
            return rule.correct(late, context).gradient[0]

    assert torch.equal(divided(0.5), divided(0.0))


def test_gap_aware_measures_in_steps_of_the_largest_learning_rate() -> None:
    curvatures = [(5 / 4, 5 / 2), (1 / 2, 1), (1 / 2, 1)]
    c = Cluster(GapAware(decay=1 / 2), curvatures, gamma=1 / 2)  # the rate is halved each time
    c.push(0)  # (5, 5) at 1/2: (3/2, -1/2), moved by 5/2 = 1/2 * 5 = 1 C
    assert c.server.learning_rate == 1 / 4
    c.push(1)  # (2, 2) is divided by 2
    assert c.x == pytest.approx((5 / 4, -3 / 4), abs=1e-6)  # (3/2, -1/2) - (1, 1)/4
    # v = (1, 1), mean 9 as above, C = 1/2 * 3 although the rate is 1/8 now.
    # Moved by 11/4 = 11/6 C: (2, 2) is divided by 17/6.
    c.push(2)
    assert c.x == pytest.approx((5 / 4 - 3 / 34, -3 / 4 - 3 / 34), abs=1e-6)


def test_gap_aware_measures_the_momentum_buffer_of_sgd() -> None:
    c = Cluster(GapAware(decay=0.0), [(1, 2)] * 2, optimizer=partial(SGD, momentum=0.9))
    c.push(0)
    c.push(1)
    buffer = c.server._updater.optimizer.state[c.server.parameters[0]]["momentum_buffer"]
    torch.testing.assert_close(c.server._context.shared["mean_square_step"][0], buffer**2)


def test_gap_aware_ignores_steps_of_learning_rate_0() -> None:
    """As in the first update of a warmup: nothing moves, and nothing is learned of steps."""
    c = Cluster(GapAware(), [(1, 2)] * 2, optimizer=partial(SGD, lr=0.0))
    assert [c.push(0), c.push(1)] == [0, 1]
    assert c.x == (4, 2)


def test_dana() -> None:
    c = Cluster(Dana(momentum=1 / 2), [(1, 2)] * 2)
    c.push(0)  # v0 = (4, 4)
    assert c.x == (2, 0)  # (4, 2) - (4, 4)/2
    assert c.pull(0) == (1, -1)  # (2, 0) - 1/4 * (4, 4); gradient (1, -2)
    c.push(1)  # v1 = (4, 4)
    assert c.x == (0, -2)  # (2, 0) - (4, 4)/2
    assert c.pull(1) == (-2, -4)  # (0, -2) - 1/4 * (8, 8); gradient (-2, -8)
    c.push(0)  # v0 = (4, 4)/2 + (1, -2) = (3, 0)
    assert c.x == (-3 / 2, -2)
    c.push(1)  # v1 = (4, 4)/2 + (-2, -8) = (0, -6)
    assert c.x == (-3 / 2, 1)
    assert c.pull(0) == (-9 / 4, 5 / 2)  # (-3/2, 1) - 1/4 * (3, -6)
    c.server.remove(1, done=True)
    c.server.add(1)
    assert c.pull(0) == (-9 / 4, 5 / 2)  # it was only done for now: v1 counts
    c.server.remove(1)
    assert c.pull(0) == (-9 / 4, 1)  # without v1: (-3/2, 1) - 1/4 * (3, 0)


def test_dana_over_updates_of_several_is_momentum_of_their_mean() -> None:
    c = Cluster(Dana(momentum=1 / 2), [(1, 2), (3, 2)], admission=Synchronous())
    c.push(0)  # (4, 4)
    c.push(1)  # (12, 4)
    assert c.x == (0, 0)  # (4, 2) - (8, 4)/2
    assert c.pull(0) == (-2, -1)  # (0, 0) - 1/2 * 1/2 * (8, 4)


def test_dana_with_one_worker_is_nesterov() -> None:
    """v <- mu v + g(x - eta mu v), x <- x - eta v: not plain SGD."""
    c = Cluster(Dana(momentum=0.9), [(1, 2)], optimizer=partial(SGD, lr=0.25))
    x, v, curvature = torch.tensor([4.0, 2.0]), torch.zeros(2), torch.tensor([1.0, 2.0])
    for _ in range(10):
        v = 0.9 * v + curvature * (x - 0.25 * 0.9 * v)
        x = x - 0.25 * v
        c.push(0)
        c.pull(0)
    torch.testing.assert_close(c.server.parameters[0].detach(), x)


def test_dana_has_the_only_momentum() -> None:
    with pytest.raises(ConfigError, match="make it with momentum=0"):
        Cluster(Dana(), [(1, 2)], optimizer=partial(SGD, momentum=0.9))


def test_momentum_of_many_diverges_where_dana_does_not() -> None:
    """Sixteen workers in turn on f = x^2 / 2."""

    def distance(correction: Correction, momentum: float) -> float:
        optimizer = partial(torch.optim.SGD, lr=0.02, momentum=momentum)
        server = make_server(16, None, correction, optimizer, start=[torch.ones(1)])
        held = [(server.pull(w)[0].detach().clone(), 0) for w in range(16)]
        for i in range(16 * 40):
            gradient, version = held[i % 16]
            server.push(i % 16, [gradient], version)
            held[i % 16] = server.pull(i % 16)[0].detach().clone(), server.version
        return abs(server.parameters[0].item())

    assert distance(Uncorrected(), 0.9) > 1e3
    assert distance(Dana(0.9), 0.0) < 1e-2


# --- what leaves training as it is, bit for bit ---------------------------------------------------


def batch_gradient(parameters: Sequence[Tensor], i: int) -> list[Tensor]:
    """Deterministic, different at each step, no exact fractions."""
    generator = torch.Generator().manual_seed(i)
    return [torch.sin(p.detach() + torch.randn(p.shape, generator=generator)) for p in parameters]


def start() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, generator=generator), torch.randn(2, 3, generator=generator)]


def plainly(optimizer: MakeOptimizer, per_update: int, n_updates: int) -> list[Tensor]:
    parameters = [nn.Parameter(p) for p in start()]
    named = [(str(i), p) for i, p in enumerate(parameters)]
    updater = Updater(named, optimizer, partial(ExponentialLR, gamma=0.9))
    for update in range(n_updates):
        sums = [torch.zeros_like(p) for p in start()]
        for i in range(per_update):
            gradient = batch_gradient(parameters, update * per_update + i)
            torch._foreach_add_(sums, gradient)
        for p, total in zip(parameters, sums, strict=True):
            p.grad = total / per_update
        updater.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=name)
@pytest.mark.parametrize("correction", CORRECTIONS, ids=name)
def test_one_worker_is_plain_training(correction: Correction, optimizer: MakeOptimizer) -> None:
    """Under every policy. Those that gather c gradients are plain training on c batches."""
    for policy in POLICIES:
        per_update = policy.gradients_per_update(1)
        expected = plainly(optimizer, per_update, 6)
        server = make_server(1, policy, correction, optimizer, gamma=0.9, start=start())
        for i in range(6 * per_update):
            assert server.may_go_on(0)
            gradient = batch_gradient(server.pull(0), i)
            assert server.push(0, gradient, server.version) == Pushed(True, 0)
        for p, q in zip(server.parameters, expected, strict=True):
            assert torch.equal(p, q), policy


def in_turn(server: Server, n_rounds: int, first: int = 0) -> list[Tensor]:
    """All workers pull and push in turn; the later in a round, the staler."""
    for i in range(first, first + n_rounds):
        held = {}
        for worker in sorted(server.members):
            if server.may_go_on(worker):
                gradient = batch_gradient(server.pull(worker), i * server.n_workers + worker)
                held[worker] = gradient, server.version
        for worker, (gradient, version) in held.items():
            server.push(worker, gradient, version)
    return [p.detach().clone() for p in server.parameters]


@pytest.mark.parametrize(
    "nothing", [DelayCompensated(0.0), AdaptiveDelayCompensated(0.0), Dana(0.0)], ids=name
)
def test_strength_0_is_asgd_bit_for_bit(nothing: Correction) -> None:
    optimizer = partial(torch.optim.SGD, lr=0.1, weight_decay=0.1)
    plain = in_turn(make_server(3, None, None, optimizer, start=start()), 10)
    other = in_turn(make_server(3, None, nothing, optimizer, start=start()), 10)
    assert all(map(torch.equal, plain, other))


@pytest.mark.parametrize("correction", CORRECTIONS[1:], ids=name)
def test_where_nothing_is_stale_nothing_changes(correction: Correction) -> None:
    for policy in (Synchronous(), BackupWorkers(2), Rennala(2), Ringmaster(1)):
        plain = in_turn(make_server(3, policy, start=start()), 5)
        other = in_turn(make_server(3, policy, correction, start=start()), 5)
        assert all(map(torch.equal, plain, other)), policy


@pytest.mark.parametrize("correction", CORRECTIONS[1:], ids=name)
def test_where_something_is_stale_something_changes(correction: Correction) -> None:
    """Eight workers, since delay-adaptive asks for more staleness than there are workers."""

    def end(rule: Correction) -> Tensor:
        server = make_server(2, None, rule, start=start())
        late = batch_gradient(server.pull(1), 99)
        for i in range(4):
            server.push(0, batch_gradient(server.pull(0), i), server.version)
        server.push(1, late, 0)
        return server.parameters[0].detach()

    assert not torch.equal(end(correction), end(Uncorrected()))


# --- any policy, any correction, any optimizer ----------------------------------------------------


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=name)
@pytest.mark.parametrize("correction", [*CORRECTIONS, Dana()], ids=name)
def test_all_go_together_and_resume(correction: Correction, optimizer: MakeOptimizer) -> None:
    """Saved while a gradient waits and others are under way, restored, and equal to not stopped."""
    if isinstance(correction, Dana) and "momentum" in optimizer.keywords:  # type: ignore[attr-defined]
        optimizer = partial(torch.optim.SGD, lr=0.1)
    for policy in POLICIES:
        one, two = (
            make_server(3, policy, correction, optimizer, 0.9, start=start()) for _ in range(2)
        )
        in_turn(one, 3)
        held = [(batch_gradient(one.pull(w), 50 + w), one.version) for w in range(3)]
        one.push(0, *held[0])
        two.load_state_dict(one.state_dict())
        for server in (one, two):
            server.push(2, *held[2])
            server.push(1, *held[1])
            in_turn(server, 3, first=20)
        assert equal(one.state_dict(), two.state_dict()), policy
        assert one.version >= 3
        assert all(p.isfinite().all() for p in one.parameters)


def test_a_schedule_does_not_see_the_scale() -> None:
    """Chained schedules compute each learning rate from the one they find."""
    c = Cluster(StalenessAware(), [(1, 2)] * 4, gamma=1 / 2)
    for worker in range(4):
        c.push(worker)
    assert c.server.learning_rate == 1 / 2 * (1 / 2) ** 4


def test_an_optimizer_that_normalises_cannot_undo_the_scale() -> None:
    """Adam's step does not depend on a gradient's length, but on the learning rate it does."""

    def last_step(rule: Correction) -> float:
        server = make_server(4, None, rule, partial(torch.optim.Adam, lr=0.1))
        for worker in range(4):
            before = server.parameters[0][0].item()
            server.push(worker, [torch.tensor([1.0, 1.0])], 0)
        return before - server.parameters[0][0].item()

    assert last_step(StalenessAware()) == pytest.approx(last_step(Uncorrected()) / 3, rel=1e-4)


def test_a_failing_step_leaves_the_learning_rate() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("no")

    server = make_server(2, None, StalenessAware(), partial(Broken, lr=0.5), gamma=1.0)
    server.ledger.version = 3
    with pytest.raises(RuntimeError, match="no"):
        server.push(0, [torch.ones(2)], 0)
    assert server.learning_rate == 0.5


def test_a_correction_of_ones_own() -> None:
    @dataclass(frozen=True)
    class SquareRoot(Correction):
        def correct(self, arrival: Arrival, server: Context) -> Corrected:
            return Corrected(arrival.gradient, (1 + arrival.staleness) ** -0.5)

    c = Cluster(SquareRoot(), [(1, 2)] * 4)
    for worker in range(3):
        c.push(worker)
    x, y = c.x
    c.push(3)  # staleness 3: half
    assert c.x == pytest.approx((x - 1, y - 1))


def test_a_scale_of_0_is_an_error() -> None:
    class Never(Correction):
        def correct(self, arrival: Arrival, server: Context) -> Corrected:
            return Corrected(arrival.gradient, 0.0)

    with pytest.raises(ConfigError, match="scales the learning rate by 0"):
        make_server(1, None, Never()).push(0, [torch.ones(2)], 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DelayCompensated(-1.0), "DelayCompensated: lambda0 is -1.0"),
        (lambda: AdaptiveDelayCompensated(float("nan")), "lambda0 is nan"),
        (lambda: AdaptiveDelayCompensated(decay=1.0), r"decay is 1.0; it is in \[0, 1\)"),
        (lambda: GapAware(decay=-0.1), "GapAware: decay is -0.1"),
        (lambda: Dana(1.0), r"Dana: momentum is 1.0; it is in \[0, 1\)"),
    ],
)
def test_what_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_copies_of_what_was_sent_are_few() -> None:
    """One for each version in use, however many workers use it; none for work that was given up."""
    server = make_server(8, Ringmaster(2, stop=True), DelayCompensated())
    for worker in range(8):
        server.pull(worker)
    copies = server._sent._copies
    assert list(copies) == [0]
    for version in range(20):  # worker 0 is fast, worker 7 gives up again and again
        server.push(0, [torch.ones(2)], version)
        server.pull(0)
        for worker in server.to_abandon():
            server.pull(worker)
        assert len(copies) <= 4
    for worker in range(1, 8):
        server.remove(worker)
    assert list(copies) == [20]
