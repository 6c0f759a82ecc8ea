"""The noise of gradients from their norms: exact expectations, smoothing, what has no answer."""

from __future__ import annotations

import itertools
import math

import pytest

from scaledtrain.errors import ConfigError
from scaledtrain.optim import GradientNoise, SmoothedNoise, gradient_noise

# The gradient of a sample, one of these three with equal probability: G = (1, 2),
# variances (1 + 1 + 4) / 3 = 2 and (4 + 4 + 0) / 3 = 8/3, so S = 14/3 and |G|^2 = 5.
SAMPLES = ((0.0, 0.0), (0.0, 4.0), (3.0, 2.0))


def _square(vectors: list[tuple[float, float]]) -> float:
    return sum((sum(v[d] for v in vectors) / len(vectors)) ** 2 for d in range(2))


class TestGradientNoise:
    def test_with_equal_sizes_it_is_mccandlish(self) -> None:
        # B_s = 8, B_b = 32, mean |G_s|^2 = (6 + 8 + 4 + 10) / 4 = 7, |G_b|^2 = 4:
        # S = (7 - 4) / (1/8 - 1/32) = 32, |G|^2 = (32 * 4 - 8 * 7) / (32 - 8) = 3.
        noise = gradient_noise([8] * 4, [6.0, 8.0, 4.0, 10.0], 4.0)
        assert noise == GradientNoise(squared_norm=3.0, variance=32.0)
        assert noise.scale == pytest.approx(32 / 3)

    @pytest.mark.parametrize("sizes", [(1, 1), (1, 3), (2, 1, 1), (2, 0, 3)])
    def test_the_expectation_is_exact_whatever_the_sizes(self, sizes: tuple[int, ...]) -> None:
        squared_norm = variance = 0.0
        draws = list(itertools.product(range(3), repeat=sum(sizes)))
        for draw in draws:
            rest = [SAMPLES[i] for i in draw]
            combined = _square(rest)
            squares = []
            for n in sizes:
                squares.append(_square(rest[:n]) if n else 0.0)
                rest = rest[n:]
            noise = gradient_noise(sizes, squares, combined)
            squared_norm += noise.squared_norm / len(draws)
            variance += noise.variance / len(draws)
        assert (squared_norm, variance) == (pytest.approx(5), pytest.approx(14 / 3))

    def test_equal_gradients_have_no_noise_also_where_rounding_says_less(self) -> None:
        noise = gradient_noise([1, 1], [0.09, 0.09], 0.09 * (1 + 1e-15))
        assert noise.variance == 0.0
        assert noise.scale == 0.0

    @pytest.mark.parametrize(
        ("sizes", "squares", "combined", "why"),
        [
            ([4], [1.0], 1.0, "there is 1: train with several replicas"),
            ([0, 0], [0.0, 0.0], 0.0, "there are 0"),
            ([1, 1], [1.0, math.inf], math.inf, "not finite"),
            ([1, 1], [1.0, math.nan], 1.0, "not finite"),
        ],
    )
    def test_what_cannot_be_estimated_says_why(
        self, sizes: list[int], squares: list[float], combined: float, why: str
    ) -> None:
        noise = gradient_noise(sizes, squares, combined)
        assert math.isnan(noise.squared_norm)
        assert math.isnan(noise.scale)
        assert why in noise.undefined == noise.no_scale

    def test_a_gradient_lost_in_noise_has_no_scale_but_a_variance(self) -> None:
        # Opposite gradients: S = (1 * 1 + 1 * 1 - 2 * 0) / 1 = 2, |G|^2 = 0 - 2 / 2 = -1.
        noise = gradient_noise([1, 1], [1.0, 1.0], 0.0)
        assert (noise.squared_norm, noise.variance, noise.undefined) == (-1.0, 2.0, "")
        assert math.isnan(noise.scale)
        assert "estimated as -1" in noise.no_scale


class TestSmoothedNoise:
    def test_both_are_averaged_and_then_divided(self) -> None:
        smoothed = SmoothedNoise(0.5)
        smoothed.add(GradientNoise(squared_norm=-1.0, variance=8.0))
        assert "not positive" in smoothed.noise.no_scale
        smoothed.add(GradientNoise(squared_norm=5.0, variance=2.0))
        # |G|^2 = (0.25 * -1 + 0.5 * 5) / 0.75 = 3, S = (0.25 * 8 + 0.5 * 2) / 0.75 = 4.
        assert smoothed.noise.squared_norm == pytest.approx(3.0)
        assert smoothed.noise.scale == pytest.approx(4 / 3)

    def test_the_first_measurement_counts_whole(self) -> None:
        smoothed = SmoothedNoise(0.99)
        smoothed.add(GradientNoise(2.0, 6.0))
        assert smoothed.noise.scale == pytest.approx(3.0)

    def test_an_undefined_measurement_changes_no_average(self) -> None:
        smoothed = SmoothedNoise(0.5)
        assert smoothed.noise.no_scale == "nothing has been measured yet"
        smoothed.add(gradient_noise([4], [1.0], 1.0))
        assert "there is 1" in smoothed.noise.no_scale
        smoothed.add(GradientNoise(2.0, 6.0))
        smoothed.add(gradient_noise([1, 1], [math.inf, 1.0], math.inf))
        assert smoothed.noise == GradientNoise(2.0, 6.0)

    def test_saved_and_loaded_it_goes_on_as_if_nothing_had_been(self) -> None:
        one, other = SmoothedNoise(0.7), SmoothedNoise(0.7)
        one.add(GradientNoise(2.0, 6.0))
        other.load_state_dict(one.state_dict())
        for smoothed in (one, other):
            smoothed.add(GradientNoise(1.0, 3.0))
        assert one.noise == other.noise

    @pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
    def test_a_weight_out_of_range_is_refused(self, smoothing: float) -> None:
        with pytest.raises(ConfigError, match=r"smoothing is .*in \[0, 1\)"):
            SmoothedNoise(smoothing)
