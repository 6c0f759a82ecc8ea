"""fast_dev_run and overfit_batches, alone, with several ranks, and by config."""

from __future__ import annotations

import tempfile
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
    Strategy,
    Sync,
    Trainer,
    connect,
)
from scaledtrain.command_line import compose
from scaledtrain.config import check
from scaledtrain.errors import ConfigError
from scaledtrain.sim import Cluster, Constant, Topology, Wire, simulate
from scaledtrain.train import run

SGD = partial(torch.optim.SGD, lr=0.1)
FREE = Wire(latency_seconds=0.0, gigabits_per_second=float("inf"))
ONE_HOST = Cluster(Constant(1.0), Topology(ranks_per_host=2, hosts=1, port=FREE))


class Seen(Callback):
    """Which samples each step was made of, by their first number; and learning rates."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.rates: list[float] = []
        self.evaluations = 0

    def needs_own_gradients(self, trainer: Trainer, batch: Any) -> bool:
        self.steps.append([float(v) for x, _ in batch.microbatches for v in x[:, 0]])
        return False

    def on_step_end(self, trainer: Trainer) -> None:
        self.rates.append(trainer.strategy.learning_rate)

    def on_evaluation(self, trainer: Trainer, values: Any) -> None:
        self.evaluations += 1


class Counted(nn.Module):
    """Counts the samples that it is evaluated on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.evaluated = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.evaluated += len(x)
        out: Tensor = self.layer(x)
        return out


def loader(n: int = 24, shuffle: bool = True) -> DataLoader[Any]:
    x = torch.arange(float(n))[:, None]
    return DataLoader(TensorDataset(x, x), batch_size=4, shuffle=shuffle)


def trainer(model: nn.Module | None = None, seen: Seen | None = None, **options: Any) -> Trainer:
    options = {"optimizer": SGD, "console": False, "callbacks": [seen or Seen()], **options}
    return Trainer(model or nn.Linear(1, 1), F.mse_loss, **options)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    (folder := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


class Looks(Callback):
    """What there is in a folder when the run has been saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[str] = []

    def on_fit_end(self, trainer: Trainer) -> None:
        self.found = [path.name for path in self.folder.glob("*/step-*")]


class TestFastDevRun:
    def test_it_makes_steps_an_evaluation_and_a_checkpoint_and_leaves_nothing(
        self, temporary: Path, tmp_path: Path
    ) -> None:
        model, looks, seen = Counted(), Looks(temporary), Seen()
        run_dir = tmp_path / "run"
        looks.folder = tmp_path  # beside run_dir, where all hosts see it
        with trainer(model, callbacks=[seen, looks], run_dir=run_dir, fast_dev_run=2) as made:
            result = made.fit(loader(), max_epochs=5, eval=loader())
        assert (result.step, seen.evaluations) == (2, 1)
        assert model.evaluated == 2 * 4
        assert looks.found == ["step-000000002"]
        assert [path.name for path in tmp_path.iterdir()] == ["temporary"]
        assert not run_dir.exists()

    def test_no_parents_of_the_folder_are_made(self, temporary: Path, tmp_path: Path) -> None:
        with trainer(run_dir=tmp_path / "runs" / "mine", fast_dev_run=True) as made:
            made.fit(loader())
        assert [path.name for path in tmp_path.iterdir()] == ["temporary"]

    def test_without_a_folder_it_is_saved_among_temporary_files(self, temporary: Path) -> None:
        looks = Looks(temporary)
        with trainer(callbacks=[looks], fast_dev_run=True) as made:
            assert made.fit(loader()).step == 1  # needs no limit
        assert looks.found == ["step-000000001"]
        assert list(temporary.iterdir()) == []

    def test_a_smaller_limit_holds(self, temporary: Path) -> None:
        with trainer(fast_dev_run=5) as made:
            assert made.fit(loader(), max_steps=2).step == 2

    def test_state_that_cannot_be_saved_is_found(self, temporary: Path) -> None:
        class Unsaveable(Callback):
            def state_dict(self) -> dict[str, Any]:
                return {"what": object()}

        with (
            pytest.raises(ConfigError, match="object"),
            trainer(callbacks=[Unsaveable()], fast_dev_run=True) as made,
        ):
            made.fit(loader())
        assert list(temporary.iterdir()) == []

    def test_it_goes_on_from_a_run_which_stays_as_it_is(
        self, temporary: Path, tmp_path: Path
    ) -> None:
        run_dir = tmp_path / "run"
        options: dict[str, Any] = {"run_dir": run_dir, "checkpointing": Checkpointing()}
        with trainer(**options) as made:
            made.fit(loader(), max_steps=3)
        before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
        with trainer(**options, resume="auto", fast_dev_run=2) as made:
            assert made.fit(loader(), max_steps=10).step == 5  # 3 + 2
        assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
        # With nothing there, auto begins.
        with trainer(run_dir=tmp_path / "new", resume="auto", fast_dev_run=2) as made:
            assert made.fit(loader()).step == 2

    @pytest.mark.parametrize(
        ("strategy", "updates"),
        [(Sync, 2), (ParameterServer, 4), (partial(LocalSGD, sync_every=4), 2)],
    )
    def test_each_of_two_replicas_makes_the_steps(
        self, strategy: Any, updates: int, temporary: Path
    ) -> None:
        def program(link: Any) -> int:
            chosen: Strategy = strategy()
            with trainer(strategy=chosen, link=link, fast_dev_run=2) as made:
                return made.fit(loader(), eval=loader()).step

        # Of a server each gradient is an update: 2 x 2.
        assert simulate(program, ONE_HOST, 2).results == [updates, updates]
        assert list(temporary.iterdir()) == []

    @pytest.mark.parametrize("value", [-1, 0.5, "all"])
    def test_what_is_no_number_of_batches_is_refused(self, value: Any) -> None:
        with pytest.raises(ConfigError, match="fast_dev_run is .* number of batches"):
            trainer(fast_dev_run=value)


class TestOverfitBatches:
    def test_it_trains_and_evaluates_on_the_same_batches_in_the_same_order(self) -> None:
        seen, model = Seen(), Counted()
        with trainer(model, seen, overfit_batches=2) as made:
            result = made.fit(loader(), max_epochs=3, eval=loader(1000))
        assert result.step == 6  # 3 epochs of 2 batches
        assert seen.steps[0:2] == seen.steps[2:4] == seen.steps[4:6]
        assert len({*seen.steps[0], *seen.steps[1]}) == 8
        assert model.evaluated == 8  # at the end alone: log_every is 50
        # They are the first ones of a run without.
        usual = Seen()
        with trainer(seen=usual) as made:
            made.fit(loader(), max_steps=2)
        assert usual.steps[:2] == seen.steps[:2]

    def test_two_replicas_share_them_and_come_to_what_one_does(self) -> None:
        def program(link: Any) -> Tensor:
            torch.manual_seed(0)
            model = nn.Linear(1, 1)
            with trainer(
                model,
                optimizer=partial(torch.optim.SGD, lr=1e-3),
                link=link,
                gradient_accumulation_steps=2 // link.group.size,
                overfit_batches=2,
            ) as made:
                made.fit(loader(), max_steps=4)
            return model.weight.detach()

        (one,), two = (simulate(program, ONE_HOST, n).results for n in (1, 2))
        assert one is not None
        assert two[0] is not None
        assert two[1] is not None
        assert torch.equal(two[0], two[1])
        assert torch.allclose(one, two[0], atol=1e-6)

    def test_it_is_resumed_on_the_same_batches(self, tmp_path: Path) -> None:
        def fit(folder: Path, steps: int, resume: str | None = None) -> Tensor:
            torch.manual_seed(0)
            model = nn.Linear(1, 1)
            with trainer(
                model,
                run_dir=folder,
                checkpointing=Checkpointing(),
                resume=resume,
                optimizer=partial(torch.optim.SGD, lr=1e-3),
                overfit_batches=3,
            ) as made:
                made.fit(loader(), max_steps=steps)
            return model.weight.detach()

        fit(tmp_path / "stopped", 4)
        assert torch.equal(fit(tmp_path / "stopped", 7, "auto"), fit(tmp_path / "whole", 7))

    def test_fewer_batches_than_a_step_takes_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="leaves 2 batches, but a step takes 3"):
            trainer(overfit_batches=2, gradient_accumulation_steps=3).fit(loader(), max_steps=1)

    def test_a_share_is_refused(self) -> None:
        with pytest.raises(
            ConfigError, match=r"overfit_batches is 0\.1; it is a number of batches"
        ):
            trainer(overfit_batches=0.1)


class TestByConfig:
    def test_nothing_is_kept(
        self, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        config = check(compose(["fast_dev_run=2", "console=false", "data.eval_batch_size=4"]))
        with connect() as link:
            assert run(config, link).step == 2
        assert [path.name for path in tmp_path.iterdir()] == ["temporary"]

    def test_a_schedule_is_that_of_the_full_run(self, temporary: Path) -> None:
        seen = Seen()
        words = ["lr_scheduler=cosine", "max_steps=100", "console=false", "data.as_images=false"]
        with connect() as link:
            run(check(compose([*words, "fast_dev_run=2"])), link, callbacks=[seen])
        # After 2 of 100: lr (1 + cos(2 pi / 100)) / 2 = 0.999 lr
        lr = compose(words).optimizer.lr
        assert seen.rates[-1] == pytest.approx(0.999013 * lr, rel=1e-5)

    def test_epochs_of_a_schedule_are_those_of_the_few_batches(self) -> None:
        seen = Seen()
        words = ["lr_scheduler=cosine", "max_epochs=4", "console=false", "data.as_images=false"]
        with connect() as link:
            result = run(check(compose([*words, "overfit_batches=2"])), link, callbacks=[seen])
        assert result.step == 8  # 4 epochs of 2 batches
        assert seen.rates[-1] == pytest.approx(0.0, abs=1e-9)  # the cosine has come to its end

    @pytest.mark.parametrize(
        "words", [["compare"], ["simulate"], ["tune", "optimizer.lr=0.1,0.2"], ["ablate"]]
    )
    def test_commands_about_what_runs_leave_refuse_it(
        self,
        words: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        from scaledtrain.cli import main

        monkeypatch.setattr("sys.argv", ["scaledtrain", *words, "fast_dev_run=true"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert "fast_dev_run is True, of which nothing is kept" in capsys.readouterr().err
