"""Virtual workers, and the tables of quality against staleness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import staleness_quality as bench
from benchmarks.staleness_quality import (
    RULES,
    Run,
    batches,
    best_rate,
    cell,
    plan,
    render,
    simulate,
    train,
)
from scaledtrain import Replica
from scaledtrain.models import MLP
from scaledtrain.server import Admission, Asynchronous, Server, StaleSynchronous, Synchronous
from tests.unit.test_benchmarks import WHERE


def server(n_workers: int, admission: Admission | None = None, lr: float = 0.5) -> Server:
    """One parameter, which is 1."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    replica = Replica(model, partial(torch.optim.SGD, lr=lr))
    return Server(replica.parameters, replica.updater, n_workers, admission)


def gradient_of_half_square(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Of x^2 / 2."""
    return [parameters[0].detach().clone()]


@pytest.mark.parametrize("n", [1, 3, 8])
def test_equal_workers_of_asgd_are_stale_by_n_minus_1(n: int) -> None:
    ended = simulate(server(n, lr=0.01), gradient_of_half_square, lambda: 1.0, 10 * n)
    # All pull version 0; in the first round worker i is the i-th to push, and so stale by i. From
    # then on the n - 1 pushes of the others lie between two of its own.
    first_round = dict.fromkeys(range(n - 1), 1)
    assert ended.staleness == {**first_round, n - 1: 10 * n - (n - 1)}


def test_a_hand_computed_trace_of_two_workers() -> None:
    # Worker 0 takes 1, worker 1 takes 1.5, then 1, 1, ...; x <- x - 0.5 g, g = x when pulled.
    # t=1    worker 0 pushes 1 (of version 0):   x = 1 - 0.5 = 0.5;    pulls 0.5
    # t=1.5  worker 1 pushes 1 (of version 0):   x = 0.5 - 0.5 = 0;    pulls 0
    # t=2    worker 0 pushes 0.5 (of version 1): x = 0 - 0.25 = -0.25; staleness 1
    times = iter([1.0, 1.5, 1.0, 1.0])
    two = server(2)
    ended = simulate(two, gradient_of_half_square, lambda: next(times), 3)
    assert two.parameters[0].item() == -0.25
    assert ended.staleness == {0: 1, 1: 2}


def test_synchronous_workers_wait_and_are_never_stale() -> None:
    two = server(2, Synchronous())
    ended = simulate(two, gradient_of_half_square, lambda: 1.0, 6)
    # Three updates with the mean of two equal gradients: 1 -> 0.5 -> 0.25 -> 0.125
    assert two.parameters[0].item() == 0.125
    assert ended.staleness == {0: 6}


def test_a_worker_at_the_bound_waits_for_the_slowest() -> None:
    times = (seconds for _ in count() for seconds in (1.0,))
    slow_first = iter([100.0, *islice(times, 50)])
    bounded = server(2, StaleSynchronous(staleness_bound=2), lr=0.01)
    simulate(bounded, gradient_of_half_square, lambda: next(slow_first), 4)
    # Worker 1 begins at clocks 0, 1 and 2, two ahead of worker 0, and then waits for its push.
    assert bounded.clocks == [1, 3]


def test_a_gradient_that_is_not_finite_ends_the_run() -> None:
    ended = simulate(server(2), lambda p: [torch.full((1, 1), math.nan)], lambda: 1.0, 10)
    assert not ended.is_finite
    assert ended.staleness.total() == 0


@pytest.mark.parametrize(("rule", "momentum"), [("sgd", 0.0), ("sgd_momentum", 0.9)])
def test_one_worker_is_a_plain_loop_bit_for_bit(rule: str, momentum: float) -> None:
    inputs, targets = bench.data("train")
    torch.manual_seed(3)
    model = MLP(64, [bench.HIDDEN], 10)
    lr = 0.3 * (1.0 - momentum)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for batch in islice(batches(len(inputs), seed=3), 60):  # more than the 45 of an epoch
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    inputs, targets = bench.data("test")
    with torch.no_grad():
        loss = F.cross_entropy(model(inputs), targets).item()
    ended = train(rule, 1, 0.3, seed=3, n_gradients=60)
    assert ended.test_loss == loss
    assert (ended.learning_rate, ended.staleness_max) == (pytest.approx(lr), 0)


def test_a_run_is_a_function_of_its_seed() -> None:
    first = train("dana", 4, 0.1, seed=1, n_gradients=40)
    assert first == train("dana", 4, 0.1, seed=1, n_gradients=40)
    assert first.test_loss != train("dana", 4, 0.1, seed=2, n_gradients=40).test_loss


def test_batches_are_whole_epochs() -> None:
    first, second = (
        torch.cat(list(islice(batches(70, seed), 3))) for seed in (0, 1)
    )  # 32 + 32 + 6
    assert first.sort().values.tolist() == list(range(70))
    assert first.tolist() != second.tolist()


def test_rules_are_run_with_the_momentum_of_their_papers() -> None:
    assert RULES["asgd"].learning_rate(0.3) == 0.3
    assert RULES["gap_aware"].learning_rate(0.3) == pytest.approx(0.03)
    assert RULES["dana"].optimizer_momentum == 0.0  # it has one for each worker
    assert all(type(r.admission) in (Asynchronous, Synchronous) for r in RULES.values())


def ended(rule: str, rate: float, error: float, seed: int = 0, **more: Any) -> Run:
    values = {"workers": 8, "staleness_mean": 7.0, "staleness_max": 9, **more}
    peak = values.pop("peak_loss", 2.4)
    loss = 0.5
    return Run(
        rule,
        rate=rate,
        learning_rate=rate,
        seed=seed,
        test_error=error,
        test_loss=loss,
        peak_loss=peak,
        **values,
    )


def some_runs() -> list[Run]:
    return [
        ended("sgd", 0.1, 0.03, workers=1, staleness_mean=0.0, staleness_max=0),
        ended("asgd", 0.03, 0.08),
        ended("asgd", 0.03, 0.10, seed=1),
        ended("asgd", 0.1, 0.04),
        ended("asgd", 0.1, 0.90, seed=1, peak_loss=40.0),
        ended("asgd", 0.3, 0.90, peak_loss=None),
        ended("asgd", 0.3, 0.90, seed=1, peak_loss=2.7),
        ended("staleness_aware", 0.01, 0.80),  # slow: its loss never rose
    ]


def test_a_cell_is_mean_and_standard_error_of_what_did_not_diverge() -> None:
    runs = some_runs()
    two = cell(runs, "asgd", 8, 0.03)
    assert two is not None
    # (8 + 10) / 2 = 9; deviation sqrt(2) over sqrt(2 seeds) = 1
    assert two.text == "9.0 ± 1.0"
    one = cell(runs, "asgd", 8, 0.1)
    assert one is not None
    assert one.text == "4.0 ± 0.0 (1 diverged)"
    none = cell(runs, "asgd", 8, 0.3)
    assert none is not None
    assert none.text == "diverged"
    slow = cell(runs, "staleness_aware", 8, 0.01)
    assert slow is not None
    assert slow.text == "80.0 ± 0.0"
    assert cell(runs, "asgd", 16, 0.3) is None


def test_the_best_rate_is_one_at_which_nothing_diverged() -> None:
    assert best_rate(some_runs(), "asgd", 8) == 0.03  # at 0.1 the mean is better
    assert best_rate(some_runs(), "dana", 8) is None


def test_the_table_shows_rules_beside_the_reference() -> None:
    text = render(some_runs(), WHERE)
    assert "**8 workers: staleness 7.0 on average, at most 9**" in text
    assert "| one worker |  |  | **3.0 ± 0.0** |" in text
    assert "| ASGD |  | **9.0 ± 1.0** | 4.0 ± 0.0 (1 diverged) | diverged |" in text
    assert "DANA" not in text  # it was not run
    assert "mean over 1 to 2 seeds" in text


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    bench.draw(some_runs(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_plan_has_each_reference_once() -> None:
    todo = plan(["sgd", "asgd"], [8, 16], [0])
    # 6 rates x (1 reference + 2 numbers of workers)
    assert len(todo) == len(set(todo)) == 18
    assert todo[0] == ("sgd", 1, 0.01, 0)


def test_the_shipped_readme_shows_the_shipped_results() -> None:
    assert bench.REPORT.is_current()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "nothing"], "--only nothing: it can be some of sgd, sync"),
        (["--workers", "5"], "--workers 5: it can be some of 8, 16, 32"),
        (["--seeds", "0"], "--seeds 0"),
    ],
)
def test_a_wrong_option_is_explained(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert text in capsys.readouterr().err
