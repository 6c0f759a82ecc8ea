"""Merging statistics of parts: equal to those of the whole, whatever the parts are."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from scaledtrain.data.sharded.columns import Array
from scaledtrain.data.sharded.histogram import Histogram
from scaledtrain.data.sharded.moments import Covariance, Moments

EPS = np.finfo(np.float64).eps


@st.composite
def arrays(draw: st.DrawFn, least: int = 1) -> Array:
    """[features, n]: of float32, some far from 0, some constant, some missing, some all missing."""
    features, n = draw(st.integers(1, 3)), draw(st.integers(least, 30))
    numbers = st.floats(-100, 100, width=32)
    values = draw(npst.arrays(np.float32, (features, n), elements=numbers)).astype(np.float64)
    values += draw(st.sampled_from([0.0, 1e-3, 1e6, -1e8]))
    values = values.astype(np.float32).astype(np.float64)
    missing = draw(st.sampled_from([0.0, 0.3, 1.0]))
    places = np.random.default_rng(draw(st.integers(0, 99))).random(values.shape) < missing
    return np.where(places, np.nan, values)


def split(draw: st.DataObject, values: Array) -> list[Array]:
    n = values.shape[1]
    cuts = sorted(draw.draw(st.lists(st.integers(0, n), max_size=4)))
    return [values[:, low:high] for low, high in pairwise([0, *cuts, n])]


@given(arrays(), st.data())
def test_moments_of_parts_are_those_of_the_whole(values: Array, data: st.DataObject) -> None:
    parts = [Moments.of(part) for part in split(data, values)]
    found = reduce(Moments.merge, parts)
    for feature, row in enumerate(values):
        there = row[~np.isnan(row)]
        assert found.count[feature] == len(there)
        assert found.missing[feature] == len(row) - len(there)
        if not len(there):
            assert np.isnan([found.mean, found.minimum, found.maximum]).all(0)[feature]
            assert found.m2[feature] == 0
            continue
        assert found.minimum[feature] == there.min()
        assert found.maximum[feature] == there.max()
        # Against exact fractions. A mean is right to a few of its last digits; a wrong mean moves
        # the deviations, so M2 is right to so many parts of what that is, relative to their size.
        exact = [Fraction(float(x)) for x in there]
        mean = sum(exact) / len(exact)
        m2 = float(sum((x - mean) ** 2 for x in exact))
        largest = np.abs(there).max()
        assert abs(found.mean[feature] - float(mean)) <= 8 * EPS * largest
        n = len(there)
        bound = 32 * EPS * (m2 + np.sqrt(m2 * n) * largest) + n * (8 * EPS * largest) ** 2
        assert abs(found.m2[feature] - m2) <= bound


@given(arrays(), st.data())
def test_constants_have_no_variance_at_all(values: Array, data: st.DataObject) -> None:
    first = values[:, :1]
    assume(not np.isnan(first).any())
    constant = np.where(np.isnan(values), np.nan, first)
    found = reduce(Moments.merge, [Moments.of(part) for part in split(data, constant)])
    assert found.m2.tolist() == [0.0] * len(values)
    assert found.mean.tolist() == first[:, 0].tolist()


def test_a_large_mean_costs_no_digits() -> None:
    """10^8, 10^8 + 8, 10^8 + 8: 8^2 * 2/9; their squares are whole twos, so that is lost there."""
    values = np.tile(np.array([[1e8, 1e8 + 8, 1e8 + 8]], np.float32).astype(np.float64), 1_000)
    naive = np.square(values).mean() - values.mean() ** 2
    assert abs(naive - 128 / 9) > 0.1
    parts = [Moments.of(values[:, low : low + 7]) for low in range(0, 3_000, 7)]
    found = reduce(Moments.merge, parts)
    assert found.m2[0] / 3_000 == pytest.approx(128 / 9, rel=1e-9)
    assert found.mean[0] == pytest.approx(1e8 + 16 / 3, rel=1e-15)


@given(arrays(), st.data())
def test_covariance_of_parts_is_that_of_the_whole(values: Array, data: st.DataObject) -> None:
    found = reduce(Covariance.merge, [Covariance.of(part) for part in split(data, values)])
    whole = values[:, ~np.isnan(values).any(0)]
    assert found.count == whole.shape[1]
    if not found.count:
        assert found.matrix.tolist() == np.zeros((len(values),) * 2).tolist()
        return
    distance = whole - whole.mean(1, keepdims=True)
    expected = distance @ distance.T / found.count
    largest, spread = np.abs(whole).max(), np.sqrt(expected.diagonal().max())
    tolerance = 64 * EPS * (spread**2 + spread * largest) + (8 * EPS * largest) ** 2
    np.testing.assert_allclose(found.matrix, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.mean, whole.mean(1), rtol=0, atol=8 * EPS * largest)
    assert (found.matrix == found.matrix.T).all()


def histogram(values: Array, bins: int, whole: bool = False) -> Histogram:
    moments = Moments.of(values)
    return Histogram.of(values, moments.minimum, moments.maximum, bins, whole)


class TestHistogram:
    @given(
        npst.arrays(
            np.float64,
            st.tuples(st.integers(1, 3), st.integers(0, 30)),
            elements=st.one_of(
                st.floats(allow_infinity=False),
                st.floats(-1, 1),
                st.integers(-10, 10).map(float),
                st.sampled_from([0.0, 5e-324, -5e-324, 1.7e308, -1.7e308, 1 + EPS]),
            ),
        ),
        st.integers(2, 9),
        st.booleans(),
        st.data(),
    )
    @settings(max_examples=60)
    def test_parts_come_to_the_same_as_the_whole(
        self, values: Array, bins: int, whole: bool, data: st.DataObject
    ) -> None:
        if whole:
            values = np.floor(values)
        found, moments = None, None
        for part in split(data, values):
            of_part = Moments.of(part)
            one = Histogram.of(part, of_part.minimum, of_part.maximum, bins, whole)
            moments = of_part if moments is None else moments.merge(of_part)
            found = one if found is None else found.merge(one, moments.minimum, moments.maximum)
        expected = histogram(values, bins, whole)
        assert found is not None
        assert found.exponent.tolist() == expected.exponent.tolist()
        assert found.first.tolist() == expected.first.tolist()
        assert found.counts.tolist() == expected.counts.tolist()
        # And the whole against exact fractions, value by value.
        for feature, row in enumerate(values):
            width = Fraction(2) ** int(expected.exponent[feature])
            there = row[~np.isnan(row)].tolist()
            places = Counter(Fraction(x) // width - int(expected.first[feature]) for x in there)
            assert {int(bin_): n for bin_, n in places.items()} == {
                bin_: n for bin_, n in enumerate(expected.counts[feature].tolist()) if n
            }
            if there and width > max(
                Fraction(2) ** -1074, 1 if whole else 0, Fraction(max(map(abs, there))) / 2**52
            ):
                half = width / 2
                taken = Fraction(max(there)) // half - Fraction(min(there)) // half + 1
                assert taken > bins, "no narrower bins would do"

    def test_equals_numpy_with_the_same_edges(self) -> None:
        values = np.random.default_rng(0).normal(3, 2, (2, 10_000))
        found = histogram(values, 64)
        for feature in (0, 1):
            expected, _ = np.histogram(values[feature], found.edges[feature])
            assert found.counts[feature].tolist() == expected.tolist()
            assert (found.counts[feature] > 0).sum() > 20  # at least 32 bins, some tails empty

    def test_each_small_whole_number_has_its_bin(self) -> None:
        found = histogram(np.array([[3.0, 5.0, 3.0, 9.0]]), 8, whole=True)
        assert found.edges.tolist() == [[3, 4, 5, 6, 7, 8, 9, 10, 11]]
        assert found.counts.tolist() == [[2, 0, 1, 0, 0, 0, 1, 0]]
