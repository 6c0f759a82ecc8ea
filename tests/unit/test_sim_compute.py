"""Step times of simulated workers, against the moments and order statistics of their formulas."""

import json
import math
from itertools import islice
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from scaledtrain.errors import ConfigError
from scaledtrain.sim import (
    ComputeModel,
    Constant,
    CsvTimes,
    Gamma,
    GammaPerMachine,
    LogNormal,
    LogNormalSpeeds,
    Measured,
    MicrobatchNoise,
    Pareto,
    ParetoSpeeds,
    ShiftedExponential,
    SlowWorkers,
    SquareRootSpeeds,
    StepTimes,
    best_count,
    order_statistics,
)

MODELS = [
    Constant(0.5),
    Gamma(0.5),
    GammaPerMachine(0.5),
    ShiftedExponential(0.4, 0.1),
    LogNormal(0.5, sigma=0.5),
    Pareto(0.2, alpha=2.5),
    MicrobatchNoise(Gamma(0.5), mean_noise=0.5, max_noise=5.5),
]


def steps(model: ComputeModel, worker: int, n: int, seed: int = 0) -> list[float]:
    pace = model.pace(worker, seed)
    times = []
    for _ in range(n):
        pace.begin_step()
        times.append(pace.seconds(0.0, 1.0))
    return times


def expect_mean(draws: list[float], mean: float) -> None:
    """Within four standard errors, which are small; the draws are the same in every run."""
    error = np.std(draws, ddof=1) / math.sqrt(len(draws))
    assert abs(np.mean(draws) - mean) < 4 * error < 0.2 * mean


def harmonic(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1))


class TestEveryModel:
    @pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
    def test_a_workers_times_follow_from_seed_and_worker_alone(self, model: ComputeModel) -> None:
        alone = steps(model, worker=3, n=100)
        others = [model.pace(worker, seed=0) for worker in range(5)]
        for _ in range(100):  # the others' draws between its own change nothing
            for pace in others:
                pace.begin_step()
        assert steps(model, worker=3, n=100) == alone

    @pytest.mark.parametrize("model", MODELS[1:], ids=lambda m: type(m).__name__)
    def test_other_workers_and_seeds_have_other_times(self, model: ComputeModel) -> None:
        times = steps(model, worker=3, n=40)
        assert len(set(times)) == 40
        assert not set(times) & {*steps(model, 4, n=40), *steps(model, 3, n=40, seed=1)}
        steps(model, 3, n=1, seed=-1)  # any whole number is a seed

    @pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
    def test_a_factor_multiplies_every_time(self, model: ComputeModel) -> None:
        plain, slow = model.pace(0, seed=0), model.pace(0, seed=0, factor=4.0)
        for _ in range(50):
            plain.begin_step()
            slow.begin_step()
            assert slow.seconds(0.0, 0.5) == 4.0 * plain.seconds(0.0, 0.5)  # exact: a power of two

    def test_a_step_is_shared_out_and_never_shorter_than_what_it_took(self) -> None:
        pace = Constant(2.0).pace(0, seed=0)
        pace.begin_step()
        assert [pace.seconds(0.0, share) for share in (0.25, 0.75)] == [0.5, 1.5]
        assert pace.seconds(elapsed=0.6, share=0.25) == 0.6


class TestMoments:
    """Means over draws against the formulas in the docstrings."""

    @pytest.mark.parametrize(
        ("model", "mean"),
        [
            (Gamma(0.5), 0.5),
            (Gamma(2.0, shape=4.0), 2.0),
            (ShiftedExponential(0.4, 0.1), 0.5),  # 0.4 + 0.1
            (LogNormal(0.5, sigma=0.5), 0.5),
            (Pareto(0.2, alpha=4.0), 0.2 * 4 / 3),  # alpha / (alpha - 1)
        ],
        ids=str,
    )
    def test_mean(self, model: StepTimes, mean: float) -> None:
        expect_mean(list(islice(model.draws(0, seed=0), 20_000)), mean)

    def test_gamma_varies_by_one_over_the_root_of_its_shape(self) -> None:
        times = steps(Gamma(2.0, shape=4.0), 0, 20_000)
        assert np.std(times) == pytest.approx(1.0, rel=0.03)  # 2 / sqrt(4)

    def test_half_of_lognormal_times_are_below_the_median(self) -> None:
        median = 0.5 * math.exp(-(0.8**2) / 2)
        below = [float(t < median) for t in steps(LogNormal(0.5, sigma=0.8), 0, 20_000)]
        expect_mean(below, 0.5)

    def test_pareto_tail(self) -> None:
        times = steps(Pareto(0.5, alpha=1.5), 0, 20_000)
        assert min(times) >= 0.5
        expect_mean([float(t > 2.0) for t in times], 1 / 8)  # (0.5 / 2)^1.5

    def test_gamma_per_machine_has_two_levels(self) -> None:
        model = GammaPerMachine(2.0, machine_variation=0.6, step_variation=0.1)
        machines = [steps(model, worker, 100) for worker in range(2000)]
        means = [float(np.mean(times)) for times in machines]
        expect_mean(means, 2.0)
        assert np.std(means) / 2.0 == pytest.approx(0.6, rel=0.06)
        within = [float(np.std(times) / np.mean(times)) for times in machines]
        assert np.mean(within) == pytest.approx(0.1, rel=0.02)


class TestMicrobatchNoise:
    def test_mean_of_the_bounded_noise(self) -> None:
        # m = 0.5, s = 1, c = 5.5:
        # 0.5 Phi(log(11) - 0.5) + 5.5 Phi(log(1/11) - 0.5) = 0.5 * 0.97112 + 5.5 * 0.00188 = 0.4959
        phi = NormalDist().cdf
        noise = 0.5 * phi(math.log(11) - 0.5) + 5.5 * phi(-math.log(11) - 0.5)
        assert noise == pytest.approx(0.4959, abs=1e-4)
        model = MicrobatchNoise(Constant(1.0), mean_noise=0.5, max_noise=5.5)
        times = steps(model, 0, 50_000)
        expect_mean(times, 1.0 + noise)
        assert max(times) == 6.5  # the bound is reached

    def test_each_microbatch_is_delayed_for_itself(self) -> None:
        pace = MicrobatchNoise(Constant(8.0), mean_noise=0.5, max_noise=5.5).pace(0, seed=0)
        pace.begin_step()
        times = [pace.seconds(0.0, share=1 / 8) for _ in range(8)]
        assert len(set(times)) == 8
        assert all(1.0 < t <= 6.5 for t in times)
        assert pace.seconds(elapsed=100.0, share=1 / 8) == 100.0


class TestSpeeds:
    def test_factors(self) -> None:
        assert [SlowWorkers({1: 4.0}).factor(w, seed=0) for w in range(3)] == [1.0, 4.0, 1.0]
        assert [SquareRootSpeeds().factor(w, seed=0) for w in (0, 1, 9, 16)] == [1.0, 2.0, 4.0, 5.0]

    def test_lognormal_over_workers(self) -> None:
        factors = [LogNormalSpeeds(0.5).factor(w, seed=0) for w in range(4000)]
        expect_mean([math.log(f) + 1.0 for f in factors], 1.0)  # median 1
        assert np.std(np.log(factors)) == pytest.approx(0.5, rel=0.05)

    def test_pareto_over_workers(self) -> None:
        factors = [ParetoSpeeds(2.0).factor(w, seed=0) for w in range(4000)]
        assert min(factors) >= 1.0
        expect_mean([float(f > 3.0) for f in factors], 1 / 9)  # 3^-2

    def test_they_have_draws_of_their_own(self) -> None:
        """A worker with a slow start is not for that a slow worker."""
        drawn = {ParetoSpeeds(2.5).factor(w, seed=0) for w in range(20)}
        assert not drawn & {next(Pareto(1.0, 2.5).draws(w, seed=0)) for w in range(20)}


class TestOrderStatistics:
    """What it costs to wait for others: exact values."""

    @pytest.mark.parametrize(("n", "expected"), [(8, 1.147), (32, 1.218)])
    def test_slowest_of_gamma_times(self, n: int, expected: float) -> None:
        # E max = integral of 1 - F(t)^n, with F the regularised incomplete gamma function.
        t = torch.linspace(0.0, 3.0, 30_001, dtype=torch.float64)
        cdf = torch.special.gammainc(torch.full_like(t, 100.0), 100.0 * t)
        exact = float(torch.trapezoid(1.0 - cdf**n, t))
        assert exact == pytest.approx(expected, abs=1e-3)
        # Standard deviation of the maximum about 0.06, of the mean of 4,000 about 0.001.
        drawn = order_statistics(Gamma(1.0).pace, n, n_steps=4000)[-1]
        assert drawn == pytest.approx(exact, abs=4e-3)

    def test_exponential_times_are_harmonic_numbers(self) -> None:
        # H_4 = 1 + 1/2 + 1/3 + 1/4; E T_(k:4) = H_4 - H_(4-k)
        expected = [1 / 4, 1 / 4 + 1 / 3, 1 / 4 + 1 / 3 + 1 / 2, 25 / 12]
        assert expected == pytest.approx([harmonic(4) - harmonic(4 - k) for k in range(1, 5)])
        drawn = order_statistics(ShiftedExponential(0.0, 1.0).pace, 4, n_steps=40_000)
        assert drawn == pytest.approx(expected, abs=0.02)  # 4 of 1.19 / sqrt(40,000)

    @pytest.mark.parametrize(("n", "expected"), [(8, 1.156), (32, 1.278)])
    def test_slowest_of_shifted_exponential_times(self, n: int, expected: float) -> None:
        exact = 1.0 + 0.1 * harmonic(n)  # 1.2718 and 1.4058; relative to the mean 1.1:
        assert exact / 1.1 == pytest.approx(expected, abs=1e-3)
        drawn = order_statistics(ShiftedExponential(1.0, 0.1).pace, n, n_steps=4000)
        k = n // 2
        assert drawn[-1] == pytest.approx(exact, abs=8e-3)  # 4 of 0.127 / sqrt(4,000)
        halfway = 1.0 + 0.1 * (harmonic(n) - harmonic(n - k))
        assert drawn[k - 1] == pytest.approx(halfway, abs=8e-3)

    def test_best_number_of_backup_workers(self) -> None:
        times = order_statistics(Gamma(1.0).pace, 100, n_steps=2000)
        backups = 100 - best_count(times)
        assert abs(backups - 4) <= 1

    def test_of_equal_workers_one_waits_for_all(self) -> None:
        assert best_count(order_statistics(Constant(0.1).pace, 7, n_steps=3)) == 7

    def test_numbers_that_cannot_be(self) -> None:
        with pytest.raises(ConfigError, match="of 0 workers over 5 steps; both must be >= 1"):
            order_statistics(Constant(1.0).pace, 0, n_steps=5)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Constant(0.0), "seconds of Constant is 0.0; it must be positive and finite"),
        (lambda: Gamma(1.0, shape=-1.0), "shape of Gamma is -1.0"),
        (lambda: GammaPerMachine(1.0, step_variation=0.0), "step_variation of GammaPerMachine"),
        (lambda: ShiftedExponential(-1.0, 1.0), "shift_seconds of ShiftedExponential is -1.0"),
        (lambda: ShiftedExponential(1.0, math.inf), "mean_delay_seconds .* is inf"),
        (lambda: LogNormal(math.nan, 1.0), "seconds of LogNormal is nan"),
        (lambda: Pareto(1.0, alpha=0.0), "alpha of Pareto is 0.0"),
        (lambda: MicrobatchNoise(Constant(1.0), 0.5, 0.0), "max_noise of MicrobatchNoise is 0.0"),
        (lambda: SlowWorkers({2: 0.0}), "the factor of worker 2 is 0.0"),
        (lambda: LogNormalSpeeds(0.0), "sigma of LogNormalSpeeds is 0.0"),
        (lambda: ParetoSpeeds(-1.0), "alpha of ParetoSpeeds is -1.0"),
    ],
)
def test_what_cannot_be_is_told(make: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make()  # type: ignore[operator]


def write_run(folder: Path, rank: int, intervals: list[tuple[int, float]]) -> None:
    """Metrics of a rank: (steps, mean compute seconds of a step) of each interval."""
    lines = []
    for i, (n_steps, compute) in enumerate(intervals):
        phases = {f"{p}_seconds": 0.0 for p in ("data", "communication", "waiting", "evaluation")}
        lines.append(
            {
                "kind": "step",
                "step": i + 1,
                "seconds": 1.0,
                "steps": n_steps,
                "samples": 1,
                "samples_per_second": 1.0,
                "step_seconds": 1.0,
                "compute_seconds": compute,
                "staleness_counts": {},
                **phases,
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"metrics-rank{rank}.jsonl").write_text(text)


class TestMeasured:
    def test_means_of_intervals_as_often_as_there_were_steps(self, tmp_path: Path) -> None:
        write_run(tmp_path, 0, [(2, 0.1), (1, 0.4)])
        write_run(tmp_path, 1, [(1, 0.2)])
        model = Measured(tmp_path, order="recorded")
        assert model.times == [[0.1, 0.1, 0.4], [0.2]]
        assert steps(model, 0, 5) == [0.1, 0.1, 0.4, 0.1, 0.1]  # from the first again
        assert steps(model, 2, 3) == [0.1, 0.1, 0.4]  # worker 2 is like rank 2 mod 2
        assert steps(model, 3, 2) == [0.2, 0.2]

    def test_a_trace_has_every_step(self, tmp_path: Path) -> None:
        write_run(tmp_path, 0, [(2, 9.0)])
        spans = [
            ["data", 0.0, 1.0],
            ["communication", 2.0, 3.0],  # inside the backward pass of 1.0 to 5.0: 3 s are left
            ["compute", 1.0, 5.0],
            ["communication", 5.0, 6.0],
            ["compute", 6.0, 6.5],  # the optimizer: 3.5 s in all
            ["data", 6.5, 7.0],
            ["compute", 7.0, 9.0],
            ["evaluation", 9.0, 20.0],
            ["data", 20.0, 20.1],  # and found no batch
        ]
        trace = "".join(json.dumps(span) + "\n" for span in spans)
        (tmp_path / "trace-rank0.jsonl").write_text(trace)
        assert Measured(tmp_path).times == [[3.5, 2.0]]

    def test_shuffled_draws_with_replacement(self, tmp_path: Path) -> None:
        write_run(tmp_path, 0, [(3, 0.125), (1, 0.5)])
        model = Measured(tmp_path)
        times = steps(model, 0, 8000)
        assert set(times) == {0.125, 0.5}
        expect_mean(times, 0.21875)  # (3 * 0.125 + 0.5) / 4
        assert times[:20] != steps(model, 1, 20)  # of the same rank, but drawn for itself

    def test_what_is_no_run_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="holds no metrics-rank0.jsonl"):
            Measured(tmp_path)
        write_run(tmp_path, 0, [(3, 0.0)])
        with pytest.raises(ConfigError, match=r"rank 0 of .* recorded no time of computing"):
            Measured(tmp_path)


class TestCsvTimes:
    def times(self, folder: Path, text: str) -> list[list[float]]:
        file = folder / "times.csv"
        file.write_text(text)
        return [list(times) for times in CsvTimes(file).times]

    def test_a_line_for_each_step(self, tmp_path: Path) -> None:
        text = "worker,seconds\n0,0.101\n1,0.250\n\n0, 0.099\n"
        assert self.times(tmp_path, text) == [[0.101, 0.099], [0.25]]

    def test_a_column_for_each_worker(self, tmp_path: Path) -> None:
        assert self.times(tmp_path, "0,1\n0.101,0.250\n0.099,\n") == [[0.101, 0.099], [0.25]]
        model = CsvTimes(tmp_path / "times.csv", order="recorded")
        assert steps(model, 2, 3) == [0.101, 0.099, 0.101]  # worker 2 mod 2

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("", "begins with ''; its header must be 'worker,seconds', or the numbers"),
            ("rank,time\n0,1\n", "begins with 'rank,time'"),
            ("0,2\n1,1\n", "begins with '0,2'"),
            ("worker,seconds\n0,0.1\n0,fast\n", "line 3: 'fast' is no time in seconds"),
            ("worker,seconds\n0,-1\n", "line 2: '-1' is no time in seconds, positive and finite"),
            ("worker,seconds\n0,inf\n", "line 2: 'inf' is no time"),
            ("worker,seconds\nx,1\n", "line 2: the worker 'x' is no whole number"),
            ("worker,seconds\n0,1,2\n", "line 2 has 3 values, but the header 2"),
            ("worker,seconds\n1,0.5\n", "has no time of worker 0"),
            ("worker,seconds\n", "has no time of worker 0"),
            ("0,1\n0.5,\n", "has no time of worker 1"),
        ],
    )
    def test_what_is_wrong_is_told_with_its_line(
        self, tmp_path: Path, text: str, told: str
    ) -> None:
        with pytest.raises(ConfigError, match=told):
            self.times(tmp_path, text)

    def test_a_file_that_is_not_there_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"nowhere.csv cannot be read \(No such file"):
            CsvTimes(tmp_path / "nowhere.csv")
