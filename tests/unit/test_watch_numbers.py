"""NaN and loss spikes: the update is left out, or the run goes back, or ends; batches are named."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import (
    Callback,
    Checkpointing,
    LocalSGD,
    ParameterServer,
    Precision,
    Strategy,
    Sync,
    Trainer,
    Watch,
    simulate,
)
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import CheckpointError, ConfigError, LossSpikeError, NonFiniteLossError
from scaledtrain.faults import FaultInjector
from scaledtrain.loss_scale import LossScale
from scaledtrain.sim import Cluster, Constant, Nic, Topology, Wire
from scaledtrain.strategies import Gossip
from scaledtrain.watch import Reaction, find_nonfinite, load_batch
from scaledtrain.watch.spike import LossHistory
from tests.worlds import World

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
Batch = tuple[Tensor, Tensor]


def net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    middle = [nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*middle, nn.Linear(6, 1))


def batches(n: int = 8, bad: dict[int, float] | None = None) -> list[Batch]:
    """`n` batches of 4, in which some have a sample of another value."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for i in range(n):
        x = torch.randn(4, 3, generator=generator)
        y = x.sum(1, keepdim=True)
        if i in (bad or {}):
            x[2, 1] = (bad or {})[i]
        made.append((x, y))
    return made


def trainer(watch: Watch, model: nn.Module | None = None, **options: Any) -> Trainer:
    options = {"console": False, "log_every": 1000, **options}
    return Trainer(model or net(), F.mse_loss, SGD, watch=watch, **options)


def state(t: Trainer) -> dict[str, Tensor]:
    return copy.deepcopy(dict(t.model.state_dict()))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


def records(run_dir: Path, rank: int = 0) -> list[dict[str, Any]]:
    lines = (run_dir / f"metrics-rank{rank}.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "trouble"]


def test_a_skipped_update_is_one_that_was_never_made() -> None:
    """Parameters, momentum and running statistics are those of a loop without batch 3."""
    t = trainer(Watch(on_nonfinite="skip"))
    t.fit(batches(bad={3: math.nan}), max_epochs=1)
    model = net()
    optimizer = SGD(model.parameters())
    for i, (x, y) in enumerate(batches()):
        if i != 3:
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(state(t), dict(model.state_dict()))
    assert t.step_count == 8  # clocks count the step, as after an overflow


def test_what_does_not_come_again_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """NaN in the gradients alone, which are not there when the batch is computed once more."""
    faults = FaultInjector().nan_at(0, 4)
    trainer(Watch(on_nonfinite="skip"), callbacks=[faults]).fit(batches(), max_epochs=1)
    (message,) = caplog.messages
    assert "when it was computed again, all was finite; gradients not finite: 0.weight" in message


@pytest.mark.parametrize("in_gradients_only", [False, True])
def test_nothing_is_watched_unless_asked_for(in_gradients_only: bool) -> None:
    """Without `on_nonfinite` NaN reach the parameters, and the record ends the run."""
    bad = {} if in_gradients_only else {3: math.nan}

    def made(watch: Watch) -> Trainer:
        faults = [FaultInjector().nan_at(0, 4)] if in_gradients_only else []
        return trainer(watch, callbacks=faults, log_every=8)

    with pytest.raises(NonFiniteLossError):
        made(Watch()).fit(batches(bad=bad), max_epochs=1)
    t = made(Watch(on_nonfinite="skip"))
    t.fit(batches(bad=bad), max_epochs=1)
    assert all(bool(v.isfinite().all()) for v in t.model.state_dict().values())


def rolled_back(watch: Watch, bad: float, **options: Any) -> Trainer:
    """Copies after 0, 3, 6, ... steps; the batch of step 5 (place 4) is bad."""
    t = trainer(watch, net(dropout=0.5), **options)
    t.fit(batches(bad={4: bad}), max_epochs=1)
    t.close()
    return t


def test_a_rollback_has_the_bits_of_a_run_that_never_saw_the_batch(tmp_path: Path) -> None:
    """From the copy after step 3 on with batch 5: the batches 3 and 4 have had no effect."""
    t = rolled_back(Watch(on_nonfinite="rollback", copy_every=3), math.nan, run_dir=tmp_path)
    first = trainer(Watch(), net(dropout=0.5))
    first.fit(batches(), max_steps=3)
    there = first.state_dict()
    there["steps_in_epoch"] = 5
    second = trainer(Watch(), net(dropout=0.5))
    second.load_state_dict(there)
    second.fit(batches(), max_epochs=1)
    assert_same(state(t), state(second))
    assert t.step_count == second.step_count == 6  # 3, and the batches 5, 6, 7
    (record,) = records(tmp_path)
    assert (record["in_step"], record["step"], record["step_in_epoch"]) == (5, 3, 4)


def test_what_was_saved_after_the_copy_is_set_aside(tmp_path: Path) -> None:
    """Saved at 2 and 4; back at step 3, so that 4 is another run's. Resuming goes on from the end.

    Copies at 0 and 3; 8 batches: steps 1 to 4, back to 3, steps 4, 5, 6.
    """
    watch = Watch(on_nonfinite="rollback", copy_every=3)
    saving = Checkpointing(every_steps=2, keep_last=9)
    t = rolled_back(watch, math.nan, run_dir=tmp_path, checkpointing=saving)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == [f"step-00000000{n}" for n in (2, 4)] + [
        "step-000000004.aside-1",
        "step-000000006",
    ]
    again = trainer(watch, net(dropout=0.5), run_dir=tmp_path, checkpointing=saving, resume="auto")
    assert again.step_count == 6
    assert_same(state(again), state(t))
    again.close()


class CrashInTheSixthStep(Callback):
    """However many updates have been made by then."""

    left = 6

    def on_step_end(self, trainer: Trainer) -> None:
        self.left -= 1
        if not self.left:
            raise ZeroDivisionError


def test_copies_in_memory_of_the_way_that_was_left_are_not_taken(tmp_path: Path) -> None:
    """Copies of 3 and 4 are there when step 5 goes back to 3; then it crashes before another."""
    watch = Watch(on_nonfinite="rollback", copy_every=3)
    saving = Checkpointing(memory_every_steps=1, memory_folder=str(tmp_path))
    t = trainer(watch, run_dir=tmp_path, checkpointing=saving, callbacks=[CrashInTheSixthStep()])
    with pytest.raises(ZeroDivisionError), t:
        t.fit(batches(bad={4: math.nan}), max_epochs=1)
    with trainer(watch, run_dir=tmp_path, checkpointing=saving, resume="auto") as again:
        assert again.step_count == 3
        again.fit(batches(), max_epochs=1)
        assert again.step_count == 8
    assert not list(tmp_path.glob("scaledtrain-*/*"))  # none stay when it has ended


def test_records_and_evaluations_follow_the_run_where_it_goes_back(tmp_path: Path) -> None:
    """Steps 1 to 5, back to 3, 4 to 6: 8 steps, of which 7 trained on 4 samples each."""
    t = trainer(Watch(on_nonfinite="rollback", copy_every=3), run_dir=tmp_path, log_every=8)
    t.fit(batches(bad={4: math.nan}), max_epochs=1, eval=batches(2), eval_every=2)
    rows = list(map(json.loads, (tmp_path / "metrics-rank0.jsonl").read_text().splitlines()))
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [2, 4, 6]
    (row,) = (row for row in rows if row["kind"] == "step")
    assert row["samples_per_second"] * row["step_seconds"] == pytest.approx(7 * 4 / 8)


def test_stop_ends_the_run_before_the_update() -> None:
    t = trainer(Watch(on_nonfinite="stop"))
    with pytest.raises(NonFiniteLossError, match="trouble in step 4 of rank 0, not finite"):
        t.fit(batches(bad={3: math.nan}), max_epochs=1)
    before = trainer(Watch())
    before.fit(batches(), max_steps=3)
    for got, want in zip(t.model.parameters(), before.model.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("reaction", ["skip", "rollback"])
def test_too_many_end_the_run(reaction: Reaction) -> None:
    t = trainer(Watch(on_nonfinite=reaction, at_most=2))
    with pytest.raises(NonFiniteLossError, match="more than watch.at_most=2"):
        t.fit(batches(bad=dict.fromkeys((2, 4, 6), math.inf)), max_epochs=1)


def test_a_spike_is_judged_by_the_last_losses(caplog: pytest.LogCaptureFixture) -> None:
    """The loss is (w - y)^2 with lr 0: 1.0 and 1.21 by turns, so m = 1.105, d = 0.105.

    A deviation is 0.1557; y = 3 makes 9, which is 50.7 of them; y = 1.5 makes 2.25: 7.4.
    """

    def loader(last: float) -> list[Batch]:
        values = [1.0, 1.1] * 10 + [last]
        return [(torch.zeros(1, 1), torch.tensor([[v]])) for v in values]

    model = nn.Linear(1, 1)
    nn.init.zeros_(model.bias)
    still = partial(torch.optim.SGD, lr=0.0)

    def fit(last: float, reaction: Reaction) -> None:
        t = Trainer(model, F.mse_loss, still, watch=Watch(on_spike=reaction), console=False)
        t.fit(loader(last), max_epochs=1)

    fit(1.5, "stop")
    assert not caplog.messages
    fit(3.0, "skip")
    assert "a loss spike: 9, 50.7 deviations above the last ones" in caplog.messages[0]
    with pytest.raises(LossSpikeError, match="step 21"):
        fit(3.0, "stop")


def test_losses_that_hardly_vary_do_not_make_spikes() -> None:
    history = LossHistory(window=30, sigmas=8.0)
    for _ in range(19):
        history.add(2.0)
    assert not history.is_spike(100.0)  # one too few
    history.add(2.0)
    # Deviations of at least 1 % of 2.0.
    assert not history.is_spike(2.15)
    assert history.is_spike(2.17)
    history.forget()
    assert not history.is_spike(100.0)


def test_an_overflow_of_the_loss_scale_is_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    scale = LossScale(initial=2.0**120)
    precision = Precision("fp16-mixed", loss_scale=scale)
    t = trainer(Watch(on_nonfinite="stop"), precision=precision)
    t.fit(batches(), max_epochs=1)
    assert t.scaler.overflows > 0
    assert not caplog.messages
    with pytest.raises(NonFiniteLossError, match="step 4"):  # but a loss of NaN is
        trainer(Watch(on_nonfinite="stop"), precision=precision).fit(
            batches(bad={3: math.nan}), max_epochs=1
        )


class Broken(nn.Module):
    """The logarithm of what may be negative."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def test_module_parameters_and_samples_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first layer gives x itself; sample 13 is the only negative one."""
    x = torch.rand(40, 1) + 0.5
    x[13] = -1.0
    model = nn.Sequential(nn.Linear(1, 1, bias=False), Broken(), nn.Linear(1, 1))
    nn.init.ones_(model[0].weight)
    watch = Watch(on_nonfinite="skip", dump=True)
    t = Trainer(
        model, F.mse_loss, partial(torch.optim.SGD, lr=0.0), watch=watch, run_dir=tmp_path,
        max_grad_norm=1.0, gradient_accumulation_steps=2, console=False,
    )  # fmt: skip
    t.fit(DataLoader(TensorDataset(x, x), batch_size=4, shuffle=True), max_epochs=1)
    t.close()
    (record,) = records(tmp_path)
    assert record["where"] == "the output of 1 (Broken)"
    assert record["parameters"] == ["0.weight", "2.weight", "2.bias"]
    assert len(record["samples"]) == 2  # batches of 4
    assert 13 in [index for indices in record["samples"] for index in indices]
    assert "first not finite: the output of 1 (Broken)" in caplog.text

    batch = load_batch(record["dump"])
    assert batch.facts["samples"] == record["samples"]
    for (inputs, targets), indices in zip(batch.microbatches, record["samples"], strict=True):
        assert torch.equal(inputs, x[indices])
        assert torch.equal(targets, x[indices])
    found = find_nonfinite(t.model, batch.microbatches, F.mse_loss)
    assert found.where == record["where"]
    (tmp_path / "other").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="holds no batch"):
        load_batch(tmp_path / "other")


def test_a_worker_does_not_push_what_is_bad() -> None:
    """The server's momentum and parameters are those of a loop without that batch."""
    t = trainer(Watch(on_nonfinite="skip"), strategy=ParameterServer())
    t.fit(batches(bad={3: math.nan}), max_epochs=1)
    want = trainer(Watch())
    good = batches()
    want.fit(good[:3] + good[4:], max_epochs=1)
    assert_same(state(t), state(want))


@pytest.mark.parametrize("make", [ParameterServer, Gossip])
def test_a_rollback_that_cannot_be_is_refused(make: Callable[[], Strategy]) -> None:
    with pytest.raises(ConfigError, match="each goes its own way"):
        World(2).run(ranks_with, make, Watch(on_nonfinite="rollback"), [])


def ranks_with(
    link: Link, make: Callable[[], Strategy], watch: Watch, given: list[Any], **options: Any
) -> dict[str, Tensor]:
    """The state of one rank after one epoch; ranks make their models one after the other."""
    t = trainer(watch, copy.deepcopy(MODEL), strategy=make(), link=link, **options)
    t.fit(given, max_epochs=1)
    t.close()
    return state(t)


MODEL = net()


def test_replicas_skip_together_and_the_one_to_blame_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of 8 batches rank 1 has 1, 3, 5, 7; with batch 3 all leave out step 2, batch 2 included."""
    got = World(2).run(ranks_with, Sync, Watch(on_nonfinite="skip"), batches(bad={3: math.nan}))
    good = batches()
    want = World(2).run(ranks_with, Sync, Watch(), good[:2] + good[4:])
    for rank in range(2):
        assert_same(got[rank], want[rank])
    (message,) = caplog.messages
    assert "trouble in step 2 of rank 1" in message
    assert "first not finite: the batch" in message


def test_replicas_with_updates_of_their_own_skip_alone() -> None:
    """Rank 1 leaves out its second of four steps; nobody waits for anybody but at the end."""
    local = partial(LocalSGD, sync_every=4)
    got = World(2).run(ranks_with, local, Watch(on_nonfinite="skip"), batches(bad={3: math.nan}))
    ends = []
    for rank in range(2):
        model = copy.deepcopy(MODEL)
        optimizer = SGD(model.parameters())
        for i, (x, y) in enumerate(batches()[rank::2]):
            if (rank, i) != (1, 1):
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(list(model.parameters()))
    for name, zero, one in zip(dict(MODEL.named_parameters()), *ends, strict=True):
        torch.testing.assert_close(got[0][name], (zero + one) / 2)
        assert torch.equal(got[0][name], got[1][name])


def rate_at_the_end(link: Link, make: Callable[[], Strategy]) -> float:
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    bad = batches(bad={1: math.nan})  # the first one of rank 1
    with trainer(
        Watch(on_nonfinite="skip"), copy.deepcopy(MODEL), strategy=make(), link=link,
        lr_scheduler=decay,
    ) as t:  # fmt: skip
        t.fit(bad, max_epochs=1)
        return t.strategy.learning_rate


@pytest.mark.parametrize(
    ("make", "updates"),
    [
        (Sync, 3),  # of 4 steps: all leave one out
        (partial(LocalSGD, sync_every=4), 4),
        (Gossip, 4),
    ],
)
def test_a_replica_that_skips_alone_keeps_the_others_learning_rate(
    make: Callable[[], Strategy], updates: int
) -> None:
    rates = World(2).run(rate_at_the_end, make)
    assert rates == [0.1 * 0.5**updates] * 2


def test_replicas_go_back_together() -> None:
    """Each of four replicas has two batches: copies at 0 and 1; rank 3's second one is bad."""
    local = partial(LocalSGD, sync_every=1)
    watch = Watch(on_nonfinite="rollback", copy_every=1)
    got = World(4).run(ranks_with, local, watch, batches(bad={7: math.nan}))
    want = World(4).run(ranks_with, local, Watch(), batches(4))
    for rank in range(4):  # running statistics are each rank's own
        assert_same(got[rank], want[rank])


def test_in_a_simulated_cluster_numbers_are_watched_as_well() -> None:
    card = Nic(Wire(latency_seconds=1e-5, gigabits_per_second=100.0))
    steps = []

    def program(link: Link) -> None:
        watch = Watch(step_seconds=1.0, ranks_every=1, on_nonfinite="skip")
        t = trainer(watch, strategy=Sync(), link=link)
        t.fit(batches(bad={3: math.nan}), max_epochs=1)
        steps.append(bool(torch.cat([p.flatten() for p in t.model.parameters()]).isfinite().all()))

    simulate(program, Cluster(Constant(0.1), Topology(nic=card)), 2)
    assert steps == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_seconds": 0.0}, "watch.step_seconds is 0.0; it is > 0, or None"),
        ({"step_times": 1.0}, "step_times is 1.0; it is > 1"),
        ({"ranks_every": 0}, "ranks_every is 0"),
        ({"slow_factor": 1.0}, "slow_factor is 1.0"),
        ({"spike_window": 3}, "spike_window is 3"),
        ({"on_spike": "explode"}, "on_spike is 'explode'; it is one of 'skip', 'rollback', 'stop'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Watch(**options)


def test_a_dump_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="set run_dir"):
        trainer(Watch(on_nonfinite="skip", dump=True))


def test_what_cannot_be_dumped_is_said_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(list[Any]):
        pass

    caplog.set_level(logging.WARNING)
    bad = batches(bad={3: math.nan})
    t = trainer(Watch(on_nonfinite="skip", dump=True), run_dir=tmp_path)
    (tmp_path / "troubles").write_text("a file where the folder should be")
    t.fit(bad, max_epochs=1)
    t.close()
    assert "the bad batch could not be written" in caplog.text
    assert t.step_count == 8
