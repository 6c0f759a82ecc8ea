"""The noise scale of real steps: exact values on gradients that are known, and a batch that grows.

The gradient of a sample x is x itself: the model is x . w, its loss the mean output, and lr 0. So
those of a step's batches are the means of their samples, whatever else happens.
"""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scaledtrain import Callback, LocalSGD, NoiseScale, ParameterServer, Strategy, Sync, Trainer
from scaledtrain.balance import Fixed
from scaledtrain.batch_growth import BatchGrowth
from scaledtrain.comm.protocols import Link
from scaledtrain.errors import ConfigError
from scaledtrain.optim import LearningRateScaling
from scaledtrain.replica import Updater
from scaledtrain.sim import Cluster, Constant, Nic, Topology, Wire, simulate
from tests.worlds import World, WorldLink

MEAN = torch.tensor([1.0, -2.0, 0.0, 0.0], dtype=torch.float64)  # |G|^2 = 5
DEVIATIONS = torch.tensor([4.0, 2.0, 1.0, 2.0], dtype=torch.float64)  # S = 16 + 4 + 1 + 4 = 25


def samples(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return MEAN + DEVIATIONS * torch.randn(n, 4, generator=generator, dtype=torch.float64)


class Dot(nn.Module):
    """Remembers which samples it has seen."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dim, dtype=torch.float64))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return x @ self.w


def mean_output(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean()


def batches(x: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(part, part[:, 0]) for part in x.split(size)]


def make_trainer(noise: NoiseScale, link: Link | None = None, **options: Any) -> Trainer:
    return Trainer(
        Dot(),
        mean_output,
        partial(torch.optim.SGD, lr=0.0),
        **{"callbacks": [noise], "console": False, "link": link, **options},
    )


def measure(x: Tensor, size: int, link: Link | None = None, **options: Any) -> tuple[float, float]:
    noise = NoiseScale(every=1, smoothing=0.0)
    with make_trainer(noise, link, **options) as trainer:
        trainer.fit(batches(x, size), max_epochs=1)
    return noise.noise.squared_norm, noise.noise.variance


def by_hand(groups: list[Tensor]) -> tuple[float, float]:
    """S is the variance between groups as in an analysis of variance, sum n (g_i - g)^2 / (k-1)."""
    whole = torch.cat(groups)
    between = sum(len(g) * (g.mean(0) - whole.mean(0)).square().sum() for g in groups)
    variance = float(between) / (len(groups) - 1)
    return float(whole.mean(0).square().sum()) - variance / len(whole), variance


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(r) for r in (run_dir / "metrics-rank0.jsonl").read_text().splitlines()]


class TestMeasured:
    @pytest.mark.parametrize("sync", [Sync(overlap=True, bucket_bytes=1), Sync(overlap=False)])
    def test_two_replicas_are_two_microbatches(self, sync: Sync) -> None:
        # 8 samples in batches of 5 and 3: sizes that differ. Of one step each.
        x = samples(8)
        expected = pytest.approx(by_hand([x[:5], x[5:]]), rel=1e-9)
        assert measure(x, 5, gradient_accumulation_steps=2) == expected
        alike = [Sync(overlap=sync._overlap, bucket_bytes=sync._bucket_bytes) for _ in range(2)]
        two = World(2).run(lambda link: measure(x, 5, link, strategy=alike[link.rank]))
        assert two == [expected, expected]

    def test_replicas_compare_theirs_also_with_accumulation(self) -> None:
        # Batches 0 and 2 are replica 0's, 1 and 3 replica 1's.
        x = samples(16)
        parts = x.split(4)
        expected = by_hand([torch.cat([parts[0], parts[2]]), torch.cat([parts[1], parts[3]])])
        two = World(2).run(lambda link: measure(x, 4, link, gradient_accumulation_steps=2))
        assert two == [pytest.approx(expected, rel=1e-9)] * 2

    @pytest.mark.parametrize("make", [lambda: LocalSGD(sync_every=4), ParameterServer])
    def test_replicas_by_themselves_compare_their_microbatches(self, make: Any) -> None:
        x = samples(12)
        parts = x.split(2)
        found = World(2).run(
            lambda link: measure(x, 2, link, strategy=make(), gradient_accumulation_steps=3)
        )
        assert found[0] == pytest.approx(by_hand([*parts[0::2]]), rel=1e-9)
        assert found[1] == pytest.approx(by_hand([*parts[1::2]]), rel=1e-9)

    def test_shares_that_differ_are_weighted_by_their_samples(self) -> None:
        # Steps of 8 samples, of which replica 0 has 7; the last one has 6, of which it has 5, more
        # than the 4 of an even share.
        x = samples(22)
        noises = [NoiseScale(every=1, smoothing=0.0) for _ in range(2)]

        def run(link: WorldLink) -> float:
            with make_trainer(noises[link.rank], link, balance=Fixed([7, 1])) as trainer:
                trainer.fit(batches(x, 4), max_epochs=1)
            return noises[link.rank].metrics()["batch_size"]

        assert World(2).run(run) == [8, 8]  # of whole steps
        expected = pytest.approx(by_hand([x[16:21], x[21:]]), rel=1e-9)
        assert [(n.noise.squared_norm, n.noise.variance) for n in noises] == [expected, expected]

    def test_replicas_by_themselves_that_count_by_their_samples(self) -> None:
        # 6 of 8 samples in batches of 2, and 2 in two batches: one is to be accumulated at least.
        x = samples(8)
        options = {"gradient_accumulation_steps": 2, "balance": Fixed([3, 1])}
        found = World(2).run(
            lambda link: measure(x, 2, link, strategy=ParameterServer(), **options)
        )
        assert found[0] == pytest.approx(by_hand([*x[:6].split(2)]), rel=1e-9)
        assert found[1] == pytest.approx(by_hand([x[6:7], x[7:]]), rel=1e-9)

    def test_averages_come_to_the_true_noise(self) -> None:
        # 4 groups of 2 in each of 1,000 steps, all with about the same weight: the relative
        # deviation of S is below sqrt(2 / 3,000) = 2.6%, so 4 of them are 10%.
        noise = NoiseScale(every=1, smoothing=0.9999)
        with make_trainer(noise, gradient_accumulation_steps=4) as trainer:
            trainer.fit(batches(samples(8_000), 2), max_epochs=1)
        assert noise.noise.variance == pytest.approx(25, rel=0.1)
        assert noise.noise.squared_norm == pytest.approx(5, rel=0.1)
        assert noise.noise.scale == pytest.approx(5, rel=0.15)

    def test_a_loss_scale_is_divided_out(self) -> None:
        x = samples(8)
        scaled = measure(x, 4, gradient_accumulation_steps=2, precision="fp16-mixed")
        # The products are of 11 bits: 2^-11 for each x.
        assert scaled == pytest.approx(by_hand([*x.split(4)]), rel=5e-3)

    def test_it_is_measured_before_clipping(self) -> None:
        x = samples(8)
        clipped = measure(x, 4, gradient_accumulation_steps=2, max_grad_norm=1e-3)
        assert clipped == pytest.approx(by_hand([*x.split(4)]), rel=1e-9)

    def test_it_changes_nothing_in_training(self) -> None:
        def weights(*callbacks: Callback) -> Tensor:
            torch.manual_seed(0)
            model = nn.Linear(4, 1).double()
            with Trainer(
                model,
                nn.functional.mse_loss,
                partial(torch.optim.SGD, lr=0.01),
                callbacks=callbacks,
                gradient_accumulation_steps=3,
                console=False,
            ) as trainer:
                trainer.fit([(x, x[:, :1]) for x in samples(30).split(2)], max_epochs=2)
            return model.weight.detach()

        assert torch.equal(weights(), weights(NoiseScale(every=2)))

    def test_what_cannot_be_measured_is_said(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        noise = NoiseScale(every=1)
        with make_trainer(noise, run_dir=tmp_path, log_every=1, console=True) as trainer:
            trainer.fit(batches(samples(8), 4), max_epochs=1)
        assert math.isnan(noise.noise.scale)
        assert "train with several replicas in step, or with gradient" in capsys.readouterr().err
        (record, _) = records(tmp_path)
        assert record["batch_size"] == 4
        assert "noise_scale" not in record

    def test_records_and_console_tell_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        noise = NoiseScale(every=2, smoothing=0.0)
        x = samples(32)
        with make_trainer(
            noise, run_dir=tmp_path, log_every=2, console=True, gradient_accumulation_steps=2
        ) as trainer:
            trainer.fit(batches(x, 4), max_epochs=1)
        (_, record) = records(tmp_path)
        squared_norm, variance = by_hand([x[16:20], x[20:24]])  # step 3 of 4 is the last measured
        assert record["gradient_variance"] == pytest.approx(variance)
        assert record["gradient_squared_norm"] == pytest.approx(squared_norm)
        scale = variance / squared_norm
        assert record["noise_scale"] == pytest.approx(scale)
        told = f"noise scale {scale:.0f} -> critical batch about {scale:.0f} samples; you use 8"
        assert told in capsys.readouterr().err

    def test_what_is_left_at_the_end_of_an_epoch_is_not_the_batch_size(self) -> None:
        noise = NoiseScale(every=1)
        with make_trainer(noise, gradient_accumulation_steps=2) as trainer:
            loader = DataLoader(TensorDataset(samples(14), samples(14)[:, 0]), batch_size=4)
            trainer.fit(loader, max_epochs=1)  # steps of 8 and of 6 samples
        assert noise.metrics()["batch_size"] == 8

    def test_settings_out_of_range_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="every is 0"):
            NoiseScale(every=0)


class SaveAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step
        self.state: dict[str, Any] = {}

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.step_count == self.step:
            self.state = trainer.state_dict()


class Steps(Callback):
    """Samples of this replica in each step."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def needs_own_gradients(self, trainer: Trainer, batch: Any) -> bool:
        self.sizes.append(batch.samples)
        return False


def noisy() -> Tensor:
    """101 samples with |G|^2 = 5000 / 64 and S = 5000: a noise scale of 64.

    In so many dimensions single estimates are close to that: their deviation is sqrt(2 / 5000) = 2%
    of S, and that of S / 4, a third of |G|^2, for |G|^2 from 4 samples.
    """
    x = torch.randn(101, 5000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x + 1 / 8


class Grown(NamedTuple):
    sizes: list[int]
    """Samples of this replica in each step."""
    seen: Tensor
    """A number of each of them, in order."""
    learning_rate: float
    state: dict[str, Any]
    """Of the Trainer, where it was to be saved."""
    weights: Tensor


def grow(
    link: Link | None, epochs: int, state: Any = None, save_at: int = 0, **options: Any
) -> Grown:
    steps, save = Steps(), SaveAt(save_at)
    growth = {"max_batch_size": 32, "patience": 2, "lr_scaling": "sqrt", **options}
    with Trainer(
        Dot(5000),
        mean_output,
        partial(torch.optim.SGD, lr=0.01, momentum=0.5),
        callbacks=[steps, NoiseScale(every=1, grow=BatchGrowth(**growth)), save],
        gradient_accumulation_steps=2 if link is None else 1,
        console=False,
        link=link,
    ) as trainer:
        if state is not None:
            trainer.load_state_dict(state)
        x = noisy()
        loader = DataLoader(TensorDataset(x, x[:, 0]), batch_size=2, shuffle=True)
        trainer.fit(loader, max_epochs=epochs)
        model = trainer.model
        assert isinstance(model, Dot)
        return Grown(
            steps.sizes,
            torch.cat([x[:, 0] for x in model.seen]),
            trainer.strategy.learning_rate,
            save.state,
            model.w.detach().clone(),
        )


# Steps of 4 samples, twice; then, with patience 2, of 8, 16 and 32, where the bound is. 101 samples
# are 51 batches of 2, the last of 1: 2 * 4 + 2 * 8 + 2 * 16 + 32 = 88 leave 13 for the last step.
FIRST_EPOCH = [4, 4, 8, 8, 16, 16, 32, 13]


class TestGrowth:
    def test_it_doubles_up_to_the_bound_and_uses_every_sample_once(self) -> None:
        run = grow(None, epochs=2)
        assert run.sizes == [*FIRST_EPOCH, 32, 32, 32, 5]
        for epoch in run.seen.split(101):
            assert sorted(epoch.tolist()) == sorted(noisy()[:, 0].tolist())
        assert run.learning_rate == pytest.approx(0.01 * math.sqrt(32 / 4))

    @pytest.mark.parametrize("saved_at", [3, 4, 10])
    def test_resumed_it_goes_on_exactly(self, saved_at: int) -> None:
        whole = grow(None, epochs=2, save_at=saved_at)
        rest = grow(None, epochs=2, state=whole.state)
        assert rest.sizes == whole.sizes[saved_at:]
        assert torch.equal(rest.seen, whole.seen[sum(whole.sizes[:saved_at]) :])
        assert torch.equal(rest.weights, whole.weights)

    def test_replicas_grow_together_and_share_the_epoch(self) -> None:
        zero, one = World(2).run(lambda link: grow(link, 1))
        # Half of each step is either's; of the last 13 samples, in batches of 2, replica 0 has the
        # batches 0, 2, 4 and 6, of which the last has 1 sample.
        assert zero.sizes == [n // 2 for n in FIRST_EPOCH[:-1]] + [7]
        assert one.sizes == [n // 2 for n in FIRST_EPOCH[:-1]] + [6]
        assert sorted(torch.cat([zero.seen, one.seen]).tolist()) == sorted(noisy()[:, 0].tolist())
        assert torch.equal(zero.weights, one.weights)
        # The same steps of the same samples as of one process.
        torch.testing.assert_close(zero.weights, grow(None, 1).weights, rtol=1e-10, atol=1e-14)

    def test_simulated_a_larger_step_takes_longer(self) -> None:
        card = Nic(Wire(latency_seconds=0.0, gigabits_per_second=math.inf))
        cluster = Cluster(Constant(1.0), Topology(nic=card))
        run = simulate(lambda link: grow(link, 1).sizes, cluster, 2)
        assert run.results == [[2, 2, 4, 4, 8, 8, 16, 7], [2, 2, 4, 4, 8, 8, 16, 6]]
        # 1 s for 2 samples of a replica, 1 + 1 + 2 + 2 + 4 + 4 + 8; an uneven last step takes the
        # time of a whole one, 8.
        assert run.seconds == pytest.approx(30.0)

    def test_it_waits_for_patience_and_needs_the_noise(self) -> None:
        assert grow(None, 1, patience=3).sizes[:7] == [4, 4, 4, 8, 8, 8, 16]
        x = MEAN.expand(40, 4).contiguous()  # no noise at all
        noise = NoiseScale(every=1, grow=BatchGrowth(max_batch_size=32, patience=1))
        with make_trainer(noise, gradient_accumulation_steps=2) as trainer:
            trainer.fit(DataLoader(TensorDataset(x, x[:, 0]), batch_size=2), max_epochs=1)
            assert trainer.step_count == 10

    def test_it_begins_with_the_least_batch(self) -> None:
        assert grow(None, 1, min_batch_size=13).sizes[:3] == [16, 16, 32]  # the next multiple of 4

    def test_a_bound_between_is_reached_by_less_than_doubling(self) -> None:
        growth = BatchGrowth(max_batch_size=27)
        assert [growth.following(m, 4) for m in (1, 2, 4, 6)] == [2, 4, 6, 6]

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"patience": 0}, "patience is 0"),
            ({"min_batch_size": 64}, "between min_batch_size 64 and max_batch_size 32"),
            ({"lr_scaling": "cubic"}, "lr_scaling.rule is 'cubic'; it is one of none, linear"),
            ({"max_batch_size": 7}, "a step has 4 samples already"),
        ],
    )
    def test_settings_that_cannot_be_are_refused(self, options: Any, why: str) -> None:
        with pytest.raises(ConfigError, match=why):
            grow(None, 1, **options)

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({}, "nothing to compare; set gradient_accumulation_steps=2"),
            ({"strategy": ParameterServer()}, "under ParameterServer.* take strategy=sync"),
            ({"strategy": LocalSGD(sync_every=2)}, "under LocalSGD"),
        ],
    )
    def test_runs_whose_batch_cannot_grow_are_refused(
        self, options: dict[str, Strategy], why: str
    ) -> None:
        noise = NoiseScale(grow=BatchGrowth(max_batch_size=64))
        x = samples(8)
        loader = DataLoader(TensorDataset(x, x[:, 0]), batch_size=4)
        with make_trainer(noise, **options) as trainer, pytest.raises(ConfigError, match=why):
            trainer.fit(loader, max_epochs=1)

    def test_a_loader_without_a_batch_size_is_refused(self) -> None:
        noise = NoiseScale(grow=BatchGrowth(max_batch_size=64))
        trainer = make_trainer(noise, gradient_accumulation_steps=2)
        with trainer, pytest.raises(ConfigError, match="does not say how many samples"):
            trainer.fit(batches(samples(8), 4), max_epochs=1)


def test_a_scaled_update_leaves_the_learning_rate_to_the_schedule() -> None:
    w = nn.Parameter(torch.tensor([1.0]))
    updater = Updater(
        [("w", w)],
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    )
    for scale, expected in ((2.0, 1 - 0.1 * 2), (4.0, 0.8 - 0.05 * 4)):
        w.grad = torch.tensor([1.0])
        updater.step(scale)
        assert w.item() == pytest.approx(expected)
    assert updater.learning_rate == 0.025


def adam_with(
    grow: BatchGrowth | None, batch: int, state: Any = None, steps: int = 1
) -> tuple[Any, Any, Trainer]:
    """Some steps of a run with Adam, tuned for batches of 4; its settings inside the last one."""
    seen: dict[str, Any] = {}

    class Spy(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            seen.update({key: self.param_groups[0][key] for key in ("lr", "betas", "eps")})
            return super().step(closure)

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = Spy(parameters, lr=0.1, betas=(0.9, 0.99), eps=1e-8)
        LearningRateScaling("sqrt", reference_batch=4).apply(optimizer, batch)
        return optimizer

    with Trainer(
        Dot(),
        mean_output,
        make,
        callbacks=[NoiseScale(grow=grow)],
        gradient_accumulation_steps=2,
        console=True,
    ) as trainer:
        if state is not None:
            trainer.load_state_dict(state)
        x = samples(64)
        loader = DataLoader(TensorDataset(x, x[:, 0]), batch_size=batch // 2)
        trainer.fit(loader, max_steps=trainer.step_count + steps)
        return seen, trainer.state_dict(), trainer


class TestAdam:
    """kappa: lr 0.1 kappa^0.5, 1 - beta = 0.1 kappa and 0.01 kappa, eps 1e-8 / kappa^0.5."""

    def test_betas_and_eps_follow_a_batch_that_grows(self) -> None:
        seen, _, trainer = adam_with(BatchGrowth(32, min_batch_size=16, lr_scaling="sqrt"), 8)
        assert seen["lr"] == pytest.approx(0.2)  # kappa 2 by the step, 2 by growth
        assert seen["betas"] == pytest.approx((0.6, 0.96))
        assert seen["eps"] == pytest.approx(0.5e-8)
        assert trainer.strategy.learning_rate == pytest.approx(0.2)

    def test_growth_beyond_what_betas_allow_is_refused_at_once(self) -> None:
        with pytest.raises(ConfigError, match=r"betas .* the rule holds up to 40 samples"):
            adam_with(BatchGrowth(64, lr_scaling="sqrt"), 8)

    def test_resumed_with_another_batch_settings_follow_and_it_is_told(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        first, state, _ = adam_with(None, 4, steps=4)
        assert (first["lr"], first["betas"], first["eps"]) == (0.1, (0.9, 0.99), 1e-8)
        seen, _, _ = adam_with(None, 16, state)
        assert seen["lr"] == pytest.approx(0.2)
        assert seen["betas"] == pytest.approx((0.6, 0.96))
        assert seen["eps"] == pytest.approx(0.5e-8)
        assert "steps had 4 samples, and have 16 from here on" in capsys.readouterr().err


def test_the_rates_of_a_schedule_follow_a_resumed_batch() -> None:
    def updater(batch: int) -> Updater:
        def make(parameters: Any) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(parameters, lr=0.1)
            LearningRateScaling("linear", reference_batch=4).apply(optimizer, batch)
            return optimizer

        w = nn.Parameter(torch.tensor([1.0]))
        decay = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4)
        return Updater([("w", w)], make, decay)

    small, large, resumed = updater(4), updater(8), updater(8)
    for _ in range(2):
        small.step()
        large.step()
    resumed.load_state_dict(small.state_dict())
    for _ in range(2):
        assert resumed.learning_rate == pytest.approx(large.learning_rate)
        resumed.step()
        large.step()


def test_a_grown_batch_keeps_its_samples_where_a_run_goes_on_with_other_steps() -> None:
    noise = NoiseScale(grow=BatchGrowth(64, min_batch_size=32))
    x = samples(64)
    with make_trainer(noise, gradient_accumulation_steps=2) as trainer:
        trainer.fit(DataLoader(TensorDataset(x, x[:, 0]), batch_size=4), max_steps=1)
        assert trainer.batch_multiple == 4  # of 8
    resumed = NoiseScale(grow=BatchGrowth(64, min_batch_size=2))
    resumed.load_state_dict(noise.state_dict())
    with make_trainer(resumed, gradient_accumulation_steps=2) as trainer:
        trainer.fit(DataLoader(TensorDataset(x, x[:, 0]), batch_size=2), max_steps=1)
        assert trainer.batch_multiple == 8  # of 4
