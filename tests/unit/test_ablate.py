"""An ablation without processes: what a config has on, the arithmetic, what is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import scaledtrain.ablate.command as command
from scaledtrain.ablate.command import _main as ablate
from scaledtrain.ablate.components import COMPONENTS, components_in
from scaledtrain.ablate.interval import Interval, t_quantile
from scaledtrain.ablate.plan import FULL, Plan
from scaledtrain.ablate.results import MIB, Measured, effects, sentence, told
from scaledtrain.command_line import compose
from scaledtrain.config import check, to_yaml
from scaledtrain.errors import ConfigError
from scaledtrain.run_config import dotted
from tests.run_folders import step_record, write


class TestInterval:
    def test_three_seeds_by_hand(self) -> None:
        # Mean 0.02, deviations -0.01, 0, 0.01: s = sqrt(0.0002 / 2) = 0.01; t(2) = 4.3027:
        # 4.3027 x 0.01 / sqrt(3) = 0.024842
        interval = Interval.of([0.01, 0.02, 0.03])
        assert interval.mean == pytest.approx(0.02)
        assert interval.half_width == pytest.approx(0.024842, abs=1e-6)
        assert interval.holds_zero
        assert not Interval.of([0.019, 0.02, 0.021]).holds_zero

    def test_one_value_has_no_bar_and_equal_ones_have_none_either(self) -> None:
        assert math.isinf(Interval.of([3.0]).half_width)
        assert Interval.of([3.0, 3.0]) == Interval(3.0, 0.0)
        assert not Interval.of([3.0, 3.0]).holds_zero
        assert Interval.of([0.0, 0.0]).holds_zero

    def test_quantiles_are_those_of_scipy(self) -> None:
        stats = pytest.importorskip("scipy.stats")
        for degrees in (1, 2, 3, 4, 5, 8, 13, 30, 101):
            for probability in (0.6, 0.975, 0.995):
                expected = stats.t.ppf(probability, degrees)
                assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9)


# A config that has a component on, for each line of the table.
CLIPPED = ["max_grad_norm=1.0"]
SHARDED = ["data=sharded", "data.path=x"]
HAVING = {
    "lr_scheduler.warmup=0": ["lr_scheduler=gradual_warmup"],
    "lr_scheduler.pct_start=0.0": ["lr_scheduler=warmup_cosine"],
    "lr_scheduler=null": ["lr_scheduler=cosine"],
    "lr_scaling.rule=none": ["lr_scaling.rule=linear"],
    "optimizer=sgd": ["optimizer=lars", "optimizer.lr=8.0", "optimizer.trust_coefficient=0.002"],
    "optimizer=adamw": ["optimizer=lamb"],
    "optimizer.momentum=0.0": [],
    "optimizer.weight_decay=0.0": ["optimizer=adamw"],
    "weight_decay_on=all": ["weight_decay_on=matrices"],
    "max_grad_norm=null": CLIPPED,
    "optimizer.max_grad_norm=null": ["optimizer=lamb", "optimizer.max_grad_norm=1.0"],
    "zero_gamma=false": ["zero_gamma=true"],
    "model.dropout=0.0": ["model=gpt", "data=stdlib_text", "model.dropout=0.1"],
    "model.tied_embedding=false": ["model=gpt", "data=stdlib_text"],
    "precision=fp32": ["precision=fp16-mixed"],
    "activation_checkpointing=null": ["activation_checkpointing=every_k"],
    "compile=null": ["compile=inductor"],
    "strategy.compression=null": ["strategy/compression=power_sgd"],
    "strategy.correction=null": ["strategy=async", "strategy/correction=dc_asgd"],
    "strategy.overlap=false": ["strategy=async", "strategy.overlap=true"],
    "drop_compute.threshold_seconds=.inf": ["drop_compute.threshold_seconds=1.0"],
    "balance=even": ["balance=auto"],
    "batch.grow=null": ["batch=adaptive"],
    "data.normalize=standardize": [*SHARDED, "data.normalize=whiten"],
    "data.normalize=null": [*SHARDED, "data.normalize=standardize"],
    "data.balance_classes=null": [*SHARDED, "data.balance_classes=loss"],
}


class TestComponents:
    @pytest.mark.parametrize("component", COMPONENTS, ids=lambda c: f"{c.name} {c.off}")
    def test_each_line_of_the_table_changes_exactly_that(self, component: Any) -> None:
        given = list(HAVING[component.off])
        if component.only_if.startswith("data.normalize.kind"):
            given[-1] = "data.normalize={kind: whiten, method: pca}"
        having = compose(given)
        without = component.taken_from(having)
        assert without is not None
        before, after = (dotted(read(to_yaml(check(c)))) for c in (having, without))
        key = component.off.partition("=")[0]
        changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
        assert changed
        assert all(k == key or k.startswith(f"{key}.") for k in changed)
        assert component.taken_from(without) is None  # it is off

    def test_what_takes_its_place_keeps_its_own_settings(self) -> None:
        without = components_in(compose(HAVING["optimizer=sgd"]))["lars"]
        assert without.optimizer == compose(["optimizer=sgd"]).optimizer

    @pytest.mark.parametrize(
        ("experiment", "names"),
        [
            ("digits_mlp", ["momentum"]),
            ("digits_convnet", ["lr_scheduler", "weight_decay"]),
            ("digits_large_batch", ["warmup", "lr_scheduler", "lr_scaling", "momentum",
                                    "weight_decay", "decay_of_matrices_only", "zero_gamma"]),
            ("stdlib_gpt", ["warmup", "lr_scheduler", "weight_decay", "clipping",
                            "tied_embedding"]),
        ],
    )  # fmt: skip
    def test_the_shipped_experiments_have(self, experiment: str, names: list[str]) -> None:
        assert list(components_in(compose([f"experiment={experiment}"]))) == names


def read(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.create(text))


def measured(without: str, seed: int, quality: float | None, speed: float, mib: float) -> Measured:
    return Measured(without, seed, quality, speed, mib * MIB, 1.0)


class TestEffects:
    def test_differences_are_of_the_same_seed(self) -> None:
        """The seeds differ by far more than the component does."""
        runs = [
            measured(FULL, 0, 0.90, 1000, 100), measured("warmup", 0, 0.88, 1100, 90),
            measured(FULL, 1, 0.70, 1000, 100), measured("warmup", 1, 0.67, 1100, 90),
            measured(FULL, 2, 0.50, 2000, 100), measured("warmup", 2, 0.46, 2200, 90),
            measured("warmup", 3, 0.1, 1.0, 1.0),  # its pair has not been made
        ]  # fmt: skip
        (effect,) = effects(runs)
        # -0.02, -0.03, -0.04: mean -0.03, s = 0.01, 4.3027 x 0.01 / sqrt(3) = 0.024842
        assert effect.quality is not None
        assert effect.quality.mean == pytest.approx(-0.03)
        assert effect.quality.half_width == pytest.approx(0.024842, abs=1e-6)
        assert effect.speed == Interval(pytest.approx(10.0), pytest.approx(0.0, abs=1e-9))
        assert effect.memory == Interval(-10.0, 0.0)
        assert effect.seeds == 3
        plan = Plan(Path(), [FULL, "warmup"], [0, 1, 2], "accuracy", "highest")
        assert sentence(effect, plan) == "is good for accuracy; costs speed; costs memory"

    def test_what_may_be_chance_is_called_so(self) -> None:
        runs = [
            *(measured(FULL, seed, 0.9, 1000, 100) for seed in range(3)),
            *(measured("x", seed, 0.9 + d, 1000, 100) for seed, d in enumerate((-0.1, 0.1, 0.03))),
        ]
        (effect,) = effects(runs)
        plan = Plan(Path(), [FULL, "x"], [0, 1, 2], "accuracy", "highest")
        assert sentence(effect, plan) == "not distinguishable in accuracy and speed and memory"

    def test_a_run_without_a_finite_evaluation_counts_for_speed_alone(self) -> None:
        runs = [measured(FULL, 0, 0.9, 1000, 100), measured("x", 0, None, 500, 100)]
        (effect,) = effects(runs)
        assert effect.quality is None
        assert effect.speed.mean == pytest.approx(-50.0)

    def test_what_has_no_run_yet_is_named(self) -> None:
        plan = Plan(Path(), [FULL, "x"], [0], "accuracy", "highest")
        assert told(plan, [measured(FULL, 0, 0.9, 1000, 100)]).endswith(
            "x: no pair of runs has come to its end"
        )


def made(job: Any, value: float) -> None:
    """As a training leaves its folder."""
    folder = job.log.parent
    record = step_record(
        step=2, seconds=1.0, steps=2, samples=64, samples_per_second=64, step_seconds=0.5,
        compute=0.5, waiting=0.0,
    )  # fmt: skip
    write(folder, [[record]])
    result = {"evaluation": {"loss": value}, "seconds": 1.0}
    (folder / "result.json").write_text(json.dumps({"result": result}))


class TestCommand:
    def test_seeds_are_interleaved_a_crash_ends_nothing_and_it_goes_on(
        self, tmp_path: Path, monkeypatch: Any, capsys: Any
    ) -> None:
        asked = [f"run_dir={tmp_path}/a", *CLIPPED, "ablate.seeds=[0,1]", "ablate.without.wide="
                 "[model.hidden=[8,8],log_every=10]"]  # fmt: skip
        started: list[str] = []
        crash = {"wide-seed1"}

        def jobs_run(jobs: Any, places: Any, ended: Any, keep_open: Any) -> None:
            for job in jobs:
                started.append(job.name)
                if job.name not in crash:
                    made(job, 0.5 if job.name.startswith("full") else 0.75)
                ended(job, int(job.name in crash))

        monkeypatch.setattr(command, "run_jobs", jobs_run)
        with pytest.raises(SystemExit):
            ablate(asked)
        # Each seed begins with another one.
        assert started == [
            "full-seed0", "momentum-seed0", "clipping-seed0", "wide-seed0",
            "momentum-seed1", "clipping-seed1", "wide-seed1", "full-seed1",
        ]  # fmt: skip
        assert "1 crashed: wide-seed1" in capsys.readouterr().err
        crash.clear()
        ablate(asked)
        assert started[8:] == ["wide-seed1"]
        told = capsys.readouterr().out
        assert "clipping: is good for loss; not distinguishable in speed and memory" in told
        lines = [json.loads(s) for s in (tmp_path / "a/ablation.jsonl").read_text().splitlines()]
        assert len(lines) == 8
        assert lines[0] == {"without": "full", "seed": 0, "quality": 0.5, "samples_per_second": 64,
                            "memory_bytes": 1.0, "seconds": 1.0}  # fmt: skip
        assert (tmp_path / "a/ablation.png").read_bytes()[:4] == b"\x89PNG"
        ablate(["show", f"{tmp_path}/a"])
        assert capsys.readouterr().out == told
        with pytest.raises(ConfigError, match="full was another training"):
            ablate([*asked, "optimizer.lr=0.2"])

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            (["ablate.only=[warmup]"], ["'warmup'", "it has: momentum"]),
            (["ablate.only=[momentm]"], ["did you mean 'momentum'"]),
            (["optimizer=plain_sgd"], ["nothing can be taken away"]),
            (["seed=1"], ["ablate.seeds"]),
            (["fast_dev_run=3"], ["fast_dev_run is 3", "ablate is about"]),
            (["ablate.seeds=[]"], ["ablate.seeds is []"]),
            (["ablate.seeds=[1,1]"], ["each once"]),
            (["ablate.without.same=[optimizer.lr=0.1]"], ["changes nothing"]),
            (["ablate.without.x=[optimzer.lr=0.1]"], ["no training without x", "optimzer"]),
            (["ablate.metric=accuracy"], ["ablate.best_is"]),
            (["show", "nowhere"], ["holds no ablation"]),
        ],
        ids=lambda value: " ".join(value)[:40],
    )
    def test_a_mistake_is_told_before_anything_is_trained(
        self, arguments: list[str], parts: list[str], tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError) as caught:
            ablate(arguments)
        assert all(part in str(caught.value) for part in parts), str(caught.value)
