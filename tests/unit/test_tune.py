"""A search without processes: what is drawn, what is ended early, what is told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import Study
from optuna.trial import TrialState, create_trial

import scaledtrain.tune.search as search_module
from scaledtrain.callbacks import Callback
from scaledtrain.command_line import compose
from scaledtrain.config import Target
from scaledtrain.connection import connect
from scaledtrain.errors import ConfigError
from scaledtrain.jobs import Job
from scaledtrain.report.command import main as report
from scaledtrain.sweeps import split_sweeps
from scaledtrain.train import run
from scaledtrain.tune.command import _main as tune
from scaledtrain.tune.results import importances, rows
from scaledtrain.tune.search import Search
from scaledtrain.tune.settings import Asked, Tuning
from scaledtrain.tune.space import Parameter, combinations
from scaledtrain.tune.study import mend, open_study
from scaledtrain.tune.trial import DIVERGED, PRUNED, Reporter

optuna.logging.set_verbosity(optuna.logging.WARNING)


def tuning(**changes: Any) -> Tuning:
    usual: dict[str, Any] = {
        "trials": 5, "metric": "loss", "best_is": "lowest", "sampler": "tpe", "pruner": "median",
        "startup_trials": 5, "prune_after_steps": 0, "at_once": 1, "seed": 0,
    }  # fmt: skip
    return Tuning(**{**usual, **changes})


def space(*sweeps: str) -> list[Parameter]:
    return [Parameter.of(sweep) for sweep in split_sweeps(sweeps)[1]]


class Trainings:
    """In place of processes: what each trial comes to is a function of its settings."""

    def __init__(self, loss: Callable[[dict[str, str]], float]) -> None:
        self.loss = loss
        self.made: list[dict[str, str]] = []
        self.die_before: int | None = None

    def __call__(
        self, jobs: Iterable[Job], places: Sequence[Any], ended: Any, keep_open: Any = ()
    ) -> None:
        for job in jobs:
            if len(self.made) == self.die_before:
                raise KeyboardInterrupt
            settings = dict(argument.split("=", 1) for argument in job.arguments)
            self.made.append(settings)
            assert job.log is not None
            job.log.parent.mkdir(parents=True, exist_ok=True)
            result = {"seconds": 1.0, "evaluation": {"loss": self.loss(settings)}}
            (job.log.parent / "result.json").write_text(json.dumps({"result": result}))
            ended(job, 0)


def searched(
    folder: Path, trainings: Trainings, options: Tuning, *sweeps: str, points: Any = None
) -> Study:
    folder.mkdir(exist_ok=True)
    study = open_study(folder, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "run_jobs", trainings)
        Search(study, folder, ["model=mlp"], space(*sweeps), points, options).run([{}])
    return study


BOWL = ("optimizer.lr=tag(log,interval(1e-4,1.0))", "optimizer.momentum=interval(0.0,1.0)")


def bowl(settings: dict[str, str]) -> float:
    """Least at a learning rate of 0.01; the momentum does nothing."""
    return (math.log10(float(settings["optimizer.lr"])) + 2) ** 2


class TestSpace:
    def test_hydras_sweeps_are_optunas_distributions(self) -> None:
        parameters = space(
            "model=mlp,convnet", "model.hidden=[64],[8,8],[64]", "a=range(8,33,8)",
            "b=int(interval(1,9))", "c=interval(0.0,0.5)",
            "d=tag(log,interval(1e-4,1))", "e=range(0.0,1.0,0.25)",
            "f=range(0.3,1.0,0.1)", "g=range(9,0,-4)",
        )  # fmt: skip
        assert {p.key: p.distribution for p in parameters} == {
            "model": CategoricalDistribution(["mlp", "convnet"]),
            "model.hidden": CategoricalDistribution(["[64]", "[8,8]"]),
            "a": IntDistribution(8, 32, step=8),
            "b": IntDistribution(1, 9),
            "c": FloatDistribution(0.0, 0.5),
            "d": FloatDistribution(1e-4, 1.0, log=True),
            "e": FloatDistribution(0.0, 0.75, step=0.25),
            "f": FloatDistribution(0.3, 0.9, step=0.1),
            "g": IntDistribution(1, 9, step=4),
        }

    def test_a_grid_has_every_combination_once(self) -> None:
        sweeps = split_sweeps(["model=mlp,convnet", "seed=range(2)"])[1]
        assert combinations(sweeps) == [
            {"model": "mlp", "seed": 0}, {"model": "mlp", "seed": 1},
            {"model": "convnet", "seed": 0}, {"model": "convnet", "seed": 1},
        ]  # fmt: skip
        with pytest.raises(ConfigError, match="write them out"):
            combinations(split_sweeps(["a=interval(0,1)"])[1])

    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            (["seed=0"], ["nothing is searched", "optimizer.lr=0.1,0.01"]),
            (["optimzer.lr=0.1,0.2"], ["optimzer", "did you mean 'optimizer'"]),
            (["model=mlp,convnt"], []),  # the first choice is there: told by its trial
            (["model.width=interval(8,64)", "model=convnet"], ["model.width", "whole number"]),
            (["tune.seed=0,1"], ["tune.seed", "one value"]),
            (["seed=0,1", "seed=2,3"], ["seed", "twice"]),
            (["optimizer.lr=tag(log,interval(0,1.0))"], ["cannot be searched"]),
            (["optimizer.lr=interval(0.1)"], ["interval(0.1)", "cannot be read"]),
            (["seed=range(2,2)"], ["seed=range(2,2)", "no value"]),
            (["seed=shuffle(0,1)"], ["shuffle", "tune.sampler=random"]),
            (["seed=shuffle(range(3))"], ["shuffle", "tune.sampler=random"]),
            (["seed=0,1", "fast_dev_run=true"], ["fast_dev_run", "tune is about"]),
            (["seed=0,1", "tune.trials=0"], ["tune.trials is 0"]),
            (["seed=0,1", "tune.sampler=bayes"], ["tune.sampler", "'tpe'"]),
            (["seed=0,1", "tune.metric=accuracy"], ["tune.best_is"]),
            (["seed=0,1", "tune.metric=loss", "run_dir=search.json/x"], ["cannot be made"]),
        ],
        ids=lambda value: " ".join(value)[:40],
    )
    def test_a_mistake_is_told_before_anything_is_trained(
        self, arguments: list[str], parts: list[str], tmp_path: Path, monkeypatch: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "search.json").touch()
        monkeypatch.setattr(search_module, "run_jobs", lambda *_: None)
        if not parts:
            tune(arguments)
            return
        with pytest.raises(ConfigError) as caught:
            tune(arguments)
        assert all(part in str(caught.value) for part in parts), str(caught.value)

    def test_the_target_says_what_is_good(self) -> None:
        unsaid = tuning(metric=None, best_is=None)
        settled = unsaid.settled(Target("accuracy", at_least=0.9))
        assert (settled.metric, settled.best_is) == ("accuracy", "highest")
        settled = unsaid.settled(Target())
        assert (settled.metric, settled.best_is) == ("loss", "lowest")


class TestSearch:
    def test_the_minimum_of_a_known_function_is_found_and_what_matters_is_told(
        self, tmp_path: Path
    ) -> None:
        trainings = Trainings(bowl)
        study = searched(tmp_path, trainings, tuning(trials=40), *BOWL)
        # Within a factor of 10 ** 0.1 of 0.01, a fortieth of the four decades on either side.
        assert study.best_value < 0.1**2
        shares = importances(study)
        assert list(shares) == ["optimizer.lr", "optimizer.momentum"]
        assert shares["optimizer.lr"] > 3 * shares["optimizer.momentum"]
        assert sum(shares.values()) == pytest.approx(1.0)
        assert {settings["model"] for settings in trainings.made} == {"mlp"}

    def test_interrupted_it_goes_on_as_if_nothing_had_been(self, tmp_path: Path) -> None:
        whole = Trainings(bowl)
        searched(tmp_path / "whole", whole, tuning(trials=12), *BOWL)
        cut = Trainings(bowl)
        cut.die_before = 7  # its settings have been drawn
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path / "cut", cut, tuning(trials=12), *BOWL)
        with (tmp_path / "cut/journal.log").open("a") as journal:
            journal.write('{"op_code":4,"wor')  # as a full disk may leave it
        mend(tmp_path / "cut")
        cut.die_before = None
        study = searched(tmp_path / "cut", cut, tuning(trials=12), *BOWL)
        drop = "run_dir"
        plain = [[{k: v for k, v in s.items() if k != drop} for s in t.made] for t in (whole, cut)]
        assert plain[0] == plain[1]
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 12

    def test_a_grid_is_made_in_its_order_and_no_point_is_lost(self, tmp_path: Path) -> None:
        points = combinations(split_sweeps(["a=1,2", "b=range(2)"])[1])
        options = tuning(sampler="grid", trials=1)
        trainings = Trainings(lambda settings: float(settings["a"]) + float(settings["b"]))
        trainings.die_before = 2
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path, trainings, options, "a=1,2", "b=range(2)", points=points)
        trainings.die_before = None
        study = searched(tmp_path, trainings, options, "a=1,2", "b=range(2)", points=points)
        assert [(s["a"], s["b"]) for s in trainings.made] == [
            ("1", "0"), ("1", "1"), ("2", "0"), ("2", "1"),
        ]  # fmt: skip
        assert rows(study, "loss")[1][0][:2] == ["0", "1.0000"]

    def test_other_arguments_do_not_go_on_in_its_folder(self, tmp_path: Path) -> None:
        Asked.of(["a=1,2", "tune.trials=5"], tuning(), None).begin(tmp_path)
        Asked.of(["a=1,2", "tune.trials=9", "tune.at_once=2"], tuning(), None).begin(tmp_path)
        with pytest.raises(ConfigError, match=r"then: a=1,2; now: a=1,3"):
            Asked.of(["a=1,3"], tuning(), None).begin(tmp_path)
        with pytest.raises(ConfigError, match="holds no search"):
            Asked.load(tmp_path / "nowhere")

    def test_how_trials_end_is_told(self, tmp_path: Path, capsys: Any) -> None:
        """One diverged, one crashes, one was ended from outside, one evaluates to infinity."""
        codes = {"0": 1, "1": 1, "2": 143, "3": 0}
        study = open_study(tmp_path, tuning())

        def trainings(jobs: Iterable[Job], places: Any, ended: Any, keep_open: Any) -> None:
            for job in list(jobs):
                assert job.log is not None
                job.log.parent.mkdir(parents=True)
                job.log.write_text("a line\nValueError: no such thing\n")
                result = {"seconds": 1.0, "evaluation": {"loss": math.inf}}
                job.log.with_name("result.json").write_text(json.dumps({"result": result}))
                if job.name == "0":
                    Reporter(study, 0, tuning(), None).diverged(ArithmeticError("loss was nan"))
                ended(job, codes[job.name])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search_module, "run_jobs", trainings)
            Search(study, tmp_path, [], space(BOWL[0]), None, tuning(trials=4)).run([{}])
        states = [trial.state for trial in study.trials]
        assert states == [
            TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING, TrialState.PRUNED,
        ]  # fmt: skip
        told = capsys.readouterr().err
        assert "trial 0: loss was nan" in told
        assert "trial 1 crashed (exit code 1)" in told
        assert "    ValueError: no such thing" in told
        assert "trial 2: it was interrupted; the same command runs it again" in told
        ended = {row[0]: row[3] for row in rows(study, "loss")[1]}
        assert ended["0"] == "diverged"
        assert (ended["1"], ended["2"]) == ("crashed", "running")

    def test_it_ends_if_the_first_three_trials_crash(self, tmp_path: Path) -> None:
        study = open_study(tmp_path, tuning())

        def crash(jobs: Iterable[Job], places: Any, ended: Any, keep_open: Any) -> None:
            for job in jobs:
                ended(job, 1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search_module, "run_jobs", crash)
            with pytest.raises(ConfigError, match="first 3 trials crashed"):
                Search(study, tmp_path, [], space(BOWL[0]), None, tuning(trials=9)).run([{}])


def past(study: Study, values: Sequence[dict[int, float]]) -> None:
    """Complete trials with these intermediate values."""
    for steps in values:
        last = steps[max(steps)]
        study.add_trial(create_trial(value=last, intermediate_values=steps))


MEDIAN_OF_3 = tuning(startup_trials=3)


class Losses(Callback):
    """Evaluations as they are written here, in a training that is real."""

    def __init__(self, reporter: Reporter, losses: dict[int, float]) -> None:
        self.on_fit_start = reporter.on_fit_start  # type: ignore[method-assign]
        self._reporter = reporter
        self._losses = losses

    def on_evaluation(self, trainer: Any, values: Any) -> None:
        self._reporter.on_evaluation(trainer, {"loss": self._losses[trainer.step_count]})


def trained(study: Study, losses: dict[int, float], tmp_path: Path) -> tuple[int, Any]:
    """The step at which a new trial's training ends, and the trial."""
    number = study.ask().number
    reporter = Reporter(study, number, MEDIAN_OF_3, eval_every=2)
    config = compose(
        ["data=tests.tasks.signs", "data.local_batch_size=32", "max_steps=6", "eval_every=2",
         "console=false", "device=cpu"]
    )  # fmt: skip
    link = connect(device="cpu")
    result = run(config, link, None, [Losses(reporter, losses)])
    link.close()
    return result.step, study.trials[number]


class TestPruning:
    """By hand: at step 2 the others have losses 0.2, 0.4, 0.6 (median 0.4), at step 4 0.1, 0.3, 0.5
    (median 0.3). The rule holds a trial's least loss so far against them."""

    OTHERS = ({2: 0.2, 4: 0.1, 6: 0.1}, {2: 0.4, 4: 0.3, 6: 0.3}, {2: 0.6, 4: 0.5, 6: 0.5})

    @pytest.mark.parametrize(
        ("losses", "ends_at"),
        [
            ({2: 0.41, 4: 0.0, 6: 0.0}, 2),  # 0.41 > 0.4
            ({2: 0.4, 4: 0.31, 6: 0.0}, 4),  # not above at first; then 0.31 > 0.3
            ({2: 0.3, 4: 0.9, 6: 0.2}, 6),  # least so far: 0.3, which is not above
            ({2: math.nan, 4: 0.0, 6: 0.0}, 2),
        ],
    )
    def test_a_real_training_ends_where_the_median_rule_says(
        self, losses: dict[int, float], ends_at: int, tmp_path: Path
    ) -> None:
        study = open_study(tmp_path, MEDIAN_OF_3)
        past(study, self.OTHERS)
        step, trial = trained(study, losses, tmp_path)
        assert step == ends_at
        assert trial.user_attrs[PRUNED] == (ends_at if ends_at < 6 else None)
        assert trial.user_attrs[DIVERGED] is None

    def test_an_attempt_before_is_forgotten(self, tmp_path: Path) -> None:
        study = open_study(tmp_path, MEDIAN_OF_3)
        past(study, self.OTHERS)
        storage, number = study._storage, len(study.trials)
        own = storage.create_new_trial(study._study_id)
        storage.set_trial_intermediate_value(own, 4, 0.9)  # it had come to here, and was bad
        storage.set_trial_user_attr(own, PRUNED, 4)
        reporter = Reporter(study, number, MEDIAN_OF_3, eval_every=2)
        trainer: Any = Stub()
        reporter.on_fit_start(trainer)
        for trainer.step_count, loss in ((2, 0.1), (4, 0.1)):
            reporter.on_evaluation(trainer, {"loss": loss})
        assert not trainer.stopped
        assert study.trials[number].user_attrs[PRUNED] is None

    def test_no_trial_is_ended_before_its_time_or_by_too_few_others(self, tmp_path: Path) -> None:
        for options in (tuning(startup_trials=4), tuning(startup_trials=3, prune_after_steps=5)):
            folder = tmp_path / str(options.startup_trials)
            folder.mkdir()
            study = open_study(folder, options)
            past(study, self.OTHERS)
            reporter = Reporter(study, study.ask().number, options, eval_every=2)
            trainer: Any = Stub()
            for trainer.step_count in (2, 4):
                reporter.on_evaluation(trainer, {"loss": 0.9})
            assert not trainer.stopped

    @pytest.mark.parametrize("eval_every", [64, None])  # None: after each epoch of 64 steps
    def test_successive_halving_begins_at_the_first_evaluation(
        self, eval_every: int | None, tmp_path: Path
    ) -> None:
        """Two of eight go on past the first evaluation (rung 0, a quarter), however late it is."""
        options = tuning(pruner="asha")
        study = open_study(tmp_path, options)

        def goes_on(loss: float) -> bool:
            reporter = Reporter(study, study.ask().number, options, eval_every)
            trainer: Any = Stub()
            trainer.step_count = 64
            reporter.on_evaluation(trainer, {"loss": loss})
            return not trainer.stopped

        assert goes_on(0.1)  # the first three go on if they are the best so far
        assert not any(goes_on(0.9) for _ in range(6))
        assert goes_on(0.2)  # the second of eight

    @pytest.mark.parametrize("pruner", ["asha", "hyperband"])
    def test_trials_shorter_than_prune_after_steps_are_not_ended(
        self, pruner: str, tmp_path: Path
    ) -> None:
        options = tuning(pruner=pruner, prune_after_steps=500)
        study = open_study(tmp_path, options)
        past(study, self.OTHERS)
        reporter = Reporter(study, study.ask().number, options, 2)
        trainer: Any = Stub()
        for trainer.step_count in (2, 4, 6):
            reporter.on_evaluation(trainer, {"loss": 0.9})
        assert not trainer.stopped

    def test_a_late_evaluation_counts_at_the_step_it_was_due(self, tmp_path: Path) -> None:
        """Asynchronous ones pass the multiples of eval_every."""
        study = open_study(tmp_path, MEDIAN_OF_3)
        past(study, self.OTHERS)
        reporter = Reporter(study, study.ask().number, MEDIAN_OF_3, eval_every=2)
        trainer: Any = Stub()
        trainer.step_count = 3
        reporter.on_evaluation(trainer, {"loss": 0.41})
        assert trainer.stopped
        with pytest.raises(ConfigError, match=r"'loss'.*has: accuracy"):
            reporter.on_evaluation(trainer, {"accuracy": 0.41})


class Stub:
    """What the reporter needs of a trainer."""

    def __init__(self) -> None:
        self.step_count = 0
        self.stopped = False
        self.link = self.group = self
        self.rank = 0

    def stop(self) -> None:
        self.stopped = True


def test_the_report_of_a_search_has_its_trials_and_plots(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "search"
    study = searched(folder, Trainings(bowl), tuning(trials=12), *BOWL, "model=mlp,convnet")
    Asked.of([*BOWL], tuning(), None).begin(folder)
    report([str(folder)])
    text = (folder / "report.html").read_text(encoding="utf-8")
    for part in ("course of the search", "what mattered (only a hint: 12 complete trials)",
                 "evaluations of each trial",
                 f"Best: trial {study.best_trial.number}", "trials: 12 complete"):  # fmt: skip
        assert part in text
    tune(["show", str(folder)])
    told = capsys.readouterr().out
    assert f"best: trial {study.best_trial.number}, loss {study.best_value:.4f}" in told
    assert "optimizer.lr" in told.splitlines()[1]


def test_the_report_of_a_search_without_an_ended_trial_says_so(tmp_path: Path) -> None:
    """Under way, or all have crashed."""
    study = open_study(tmp_path, tuning())
    Asked.of([*BOWL], tuning(), None).begin(tmp_path)
    page = tmp_path / "report.html"
    for ask, counts in ((False, "trials: none yet"), (True, "trials: 1 running")):
        if ask:
            space(BOWL[0])[0].draw(study.ask())
        report([str(tmp_path)])
        text = page.read_text(encoding="utf-8")
        assert counts in text
        assert "There are plots once a trial has ended" in text
