"""What is searched: sweeps of a command line as parameters that Optuna can draw."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from scaledtrain.errors import ConfigError
from scaledtrain.sweeps import texts

__all__ = ["Parameter", "combinations"]

Value = str | int | float


@dataclass(frozen=True)
class Parameter:
    """A key that has another value in each trial.

    Args:
        key: as on the command line, also a group.
        distribution: its values; those of choices are as they are written on the command line.
    """

    key: str
    distribution: BaseDistribution

    @classmethod
    def of(cls, sweep: Override) -> Parameter:
        """The parameter that a sweep means.

        Raises:
            ConfigError: an interval is empty, or reaches to zero or below on a logarithmic scale;
                or values are shuffled.
        """
        values = sweep.value()
        if getattr(values, "shuffle", False):
            raise ConfigError(
                f"{sweep.input_line} has another order at each start, by which a search could not "
                "go on; leave shuffle out: tune.sampler=random draws in no order"
            )
        try:
            return cls(sweep.get_key_element(), _distribution(sweep, values))
        except ValueError as error:
            raise ConfigError(f"{sweep.input_line} cannot be searched: {error}") from error

    def draw(self, trial: Trial) -> Value:
        """Its value in a trial: the one that was drawn before, if there is one."""
        d = self.distribution
        if isinstance(d, FloatDistribution):
            return trial.suggest_float(self.key, d.low, d.high, step=d.step, log=d.log)
        if isinstance(d, IntDistribution):
            return trial.suggest_int(self.key, d.low, d.high, step=d.step, log=d.log)
        assert isinstance(d, CategoricalDistribution)
        chosen = trial.suggest_categorical(self.key, d.choices)
        assert isinstance(chosen, str)
        return chosen


def _distribution(sweep: Override, values: object) -> BaseDistribution:
    log = "log" in getattr(values, "tags", ())
    if isinstance(values, IntervalSweep):
        low, high = values.start, values.end
        assert low is not None
        assert high is not None
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(low, high, log=log)
    if isinstance(values, RangeSweep) and len(texts(sweep)) > 1:
        numbers = sorted(values.range())
        low, step = numbers[0], abs(values.step)  # 0.4 - 0.3 is not quite 0.1
        if all(isinstance(number, int) for number in numbers):
            return IntDistribution(int(low), int(numbers[-1]), step=int(step), log=log)
        return FloatDistribution(low, numbers[-1], step=step, log=log)
    return CategoricalDistribution(list(dict.fromkeys(texts(sweep))))


def combinations(sweeps: Sequence[Override]) -> list[dict[str, Value]]:
    """Every combination of the values, in the order of a grid search; the last key goes fastest.

    Raises:
        ConfigError: one of the keys has an interval.
    """
    columns: list[list[Value]] = []
    for sweep in sweeps:
        written = texts(sweep)
        d = Parameter.of(sweep).distribution
        if isinstance(d, CategoricalDistribution):
            columns.append(list(written))
        elif isinstance(d, IntDistribution):
            columns.append([int(text) for text in written])
        else:
            columns.append([float(text) for text in written])
    keys = [sweep.get_key_element() for sweep in sweeps]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*columns)]
