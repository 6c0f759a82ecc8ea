"""Replay: traces by hand, simulated runs with failures, the prompt, and what cannot be replayed."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from scaledtrain import Replica, cli, connect
from scaledtrain.build import settle
from scaledtrain.comm.serving.event_log import Event, EventLog, read_events
from scaledtrain.command_line import compose
from scaledtrain.config import check
from scaledtrain.errors import ConfigError, ReplayError
from scaledtrain.replay import Push, replay
from scaledtrain.replay.command import HEADER, Prompt, ReplayConfig, Table, row, verdict
from scaledtrain.replay.history import History
from scaledtrain.server.operations import Kind, Operation
from scaledtrain.sim import Cluster, Constant, SlowWorkers, Topology, Wire, simulate
from scaledtrain.sim.failures import Failure, GivenFailures
from scaledtrain.tasks import Task
from scaledtrain.train import run, run_settled


class One(nn.Linear):
    """One parameter w = 0."""

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)
        nn.init.zeros_(self.weight)


def ones() -> Task:
    """Let w * 1 be 1; there is nothing to evaluate on."""
    data = TensorDataset(torch.ones(64, 1), torch.ones(64, 1))
    return Task(data, loss_fn=F.mse_loss, gathers=True)


class Noisy(nn.Sequential):
    """Draws random numbers in every step."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))


def sums() -> Task:
    """The sum of four numbers."""
    x = torch.randn(96, 4, generator=torch.Generator().manual_seed(3))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return Task(data, data, loss_fn=F.mse_loss, gathers=True)


HERE = "tests.unit.test_replay"
ASYNC = ["strategy=async", "console=false", "data.local_batch_size=8"]
BY_HAND = [
    *ASYNC, f"data={HERE}.ones", f"model={HERE}.One", "optimizer=plain_sgd", "optimizer.lr=0.25",
    "max_steps=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Loss (w - 1)^2 from w = 0 at learning rate 1/4: each step halves the distance to 1."""
    folder = tmp_path_factory.mktemp("by-hand") / "run"
    with connect() as link:
        run(compose(BY_HAND), link, folder)
    return folder


@pytest.fixture
def copied(by_hand: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(by_hand, tmp_path / "run"))


def cluster(**more: Any) -> Cluster:
    wire = Wire(latency_seconds=0.001, gigabits_per_second=1.0)
    one_host = Topology(ranks_per_host=3, hosts=1, port=wire)
    return Cluster(Constant(0.1), one_host, SlowWorkers({2: 2.5}), **more)


def simulated(folder: Path, overrides: list[str], **more: Any) -> Path:
    """A run of three simulated workers."""
    settings = [*ASYNC, f"data={HERE}.sums", f"model={HERE}.Noisy", *overrides]
    config, task = settle(check(compose(settings)))
    simulate(lambda link: run_settled(config, task, link, folder), cluster(**more), 3)
    return folder


class TestSteps:
    def test_each_push_is_shown_with_what_it_did(self, by_hand: Path) -> None:
        seen: list[tuple[Any, ...]] = []

        def see(push: Push) -> bool:
            assert push.seconds > 0.0
            assert push.accepted
            seen.append(
                (
                    (push.number, push.worker, push.step, push.version, push.staleness),
                    push.gradient[0].item(),
                    (push.before[0].item(), push.after[0].item()),
                    (push.gradient_norm, push.update_norm),
                    (push.loss_before, push.loss_after),
                )
            )
            return True

        replayed = replay(by_hand, see)
        # Events: LIMIT, then PULL and PUSH in turn. w: 0 -> 1/2 -> 3/4 -> 7/8; g = 2 (w - 1).
        assert seen == [
            ((3, 0, 1, 0, 0), -2.0, (0.0, 0.5), (2.0, 0.5), (1.0, 0.25)),
            ((5, 0, 2, 1, 0), -1.0, (0.5, 0.75), (1.0, 0.25), (0.25, 0.0625)),
            ((7, 0, 3, 2, 0), -0.5, (0.75, 0.875), (0.5, 0.125), (0.0625, 0.015625)),
        ]
        assert replayed.equal
        assert replayed.parameters["weight"].tolist() == [[0.875]]
        assert (replayed.pushes, replayed.accepted, replayed.workers) == (3, 3, 1)

    def test_a_callback_ends_the_replay(self, by_hand: Path) -> None:
        replayed = replay(by_hand, lambda push: push.number < 5)
        assert (replayed.events, replayed.pushes) == (5, 2)
        assert replayed.parameters["weight"].item() == 0.75
        assert replayed.equal is None

    def test_a_table(self, by_hand: Path) -> None:
        output = io.StringIO()
        assert "this was not its end" in verdict(replay(by_hand, Table(4, 6, output)))
        header, line = output.getvalue().splitlines()
        assert header == HEADER
        assert line.split()[0] == "5"
        assert line.split()[2:] == [
            "0", "2", "1", "0", "yes", "1", "0.25", "0.25000", "0.06250"
        ]  # fmt: skip

    def test_a_table_without_a_push_says_so(self, by_hand: Path) -> None:
        output = io.StringIO()
        replay(by_hand, Table(4, 4, output))
        assert output.getvalue() == "no event from 4 to 4 is a push\n"

    @pytest.mark.parametrize(
        ("answers", "shown"),
        [
            ("\n\n\n", [3, 5, 7]),
            ("7\n\n", [3, 7]),
            ("w 0\nc\n", [3, 5]),
            ("w 1\n", [3]),
            ("2\nnonsense\n\nq\n", [3, 5]),
            ("", [3]),
        ],
    )
    def test_the_prompt_goes_where_it_is_told(
        self, by_hand: Path, answers: str, shown: list[int]
    ) -> None:
        output = io.StringIO()
        replayed = replay(by_hand, Prompt(io.StringIO(answers), output))
        rows = [line.removeprefix("> ").split() for line in output.getvalue().splitlines()[2:]]
        assert [int(words[0]) for words in rows if words and words[0].isdecimal()] == shown
        assert (replayed.equal is None) == (answers == "" or answers.endswith("q\n"))
        assert ("has happened already" in output.getvalue()) == answers.startswith("2")
        assert ("c, or q" in output.getvalue()) == ("nonsense" in answers)

    def test_a_row_says_what_was_rejected(self, tmp_path: Path) -> None:
        overrides = ["strategy/admission=rennala", "strategy.admission.batch=2", "max_steps=12"]
        rows: list[str] = []

        def see(push: Push) -> bool:
            if not push.accepted:
                rows.append(row(push))
                assert push.update_norm == 0.0
                assert push.loss_before == push.loss_after
            return True

        replayed = replay(simulated(tmp_path, overrides), see)
        assert replayed.equal
        assert replayed.accepted == 2 * 12
        assert len(rows) == replayed.pushes - replayed.accepted > 0
        assert {line.split()[6] for line in rows} == {"no"}


class TestSimulated:
    def test_workers_that_die_and_return_do_so_again(self, tmp_path: Path) -> None:
        """Worker 1 dies twice and returns, 2 for good; each new process begins its data anew."""
        given = GivenFailures([Failure(1, 0.77, 0.3), Failure(1, 1.9, 0.2), Failure(2, 1.1)])
        overrides = ["max_steps=60", "strategy.overlap=true"]
        replayed = replay(simulated(tmp_path, overrides, failures=given))
        assert replayed.equal
        events = [event.operation for event in read_events(tmp_path / "events.bin")]
        processes = [o.version for o in events if o.kind == Kind.ADD and o.worker == 1]
        assert processes[:2] == [1, 2]

    @pytest.mark.parametrize(
        "overrides",
        [
            ["strategy.shards=2", "strategy/compression=sign", "optimizer=adamw"],
            ["strategy/admission=ringmaster", "strategy.admission.stop=true",
             "strategy.admission.delay_threshold=2"],
            ["strategy/correction=dana", "optimizer=plain_sgd", "strategy/admission=softsync"],
            ["strategy/admission=synchronous", "lr_scheduler=cosine"],
        ],
    )  # fmt: skip
    def test_they_are_replayed_like_real_ones(self, tmp_path: Path, overrides: list[str]) -> None:
        assert replay(simulated(tmp_path, [*overrides, "max_steps=25"])).equal

    def test_the_loss_is_asked_without_touching_random_numbers(self, tmp_path: Path) -> None:
        simulated(tmp_path, ["max_steps=10"])

        def see(push: Push) -> bool:
            torch.randn(1)
            return push.loss_before > 0.0

        assert replay(tmp_path, see).equal


class TestHistory:
    @staticmethod
    def of(*kinds: Kind | tuple[Kind, int]) -> History:
        """Of one worker."""
        both = [kind if isinstance(kind, tuple) else (kind, -1) for kind in kinds]
        return History([Event(Operation(k, 0, version), 0.0) for k, version in both], 1)

    def test_a_worker_that_was_given_up_pushes_in_vain(self) -> None:
        history = self.of(Kind.PULL, Kind.REMOVE, (Kind.ADD, 0), Kind.PULL, Kind.PUSH)
        life = history.first(0)
        life.happened()
        assert not life.ends()
        assert life.expects(Kind.PUSH) == "ignored"
        assert life.expects(Kind.PULL) == "next"
        life.happened()
        assert life.expects(Kind.PUSH) == "next"
        assert history.losses == {1}

    def test_a_new_process_is_another_life(self) -> None:
        history = self.of(Kind.PULL, Kind.REMOVE, (Kind.ADD, 1), Kind.PULL)
        first, second = history.first(0), history.of_event[3]
        first.happened()
        assert first.expects(Kind.PUSH) == "never"
        assert second is not None
        assert (second.attempt, second.next_number) == (1, 3)

    def test_the_end_of_a_worker(self) -> None:
        """It is told to end at a pull, or does not pull any more; the last event is a meeting's."""
        history = self.of(Kind.PULL, Kind.PUSH, Kind.REMOVE, Kind.READ, Kind.ADD)
        life = history.first(0)
        life.happened()
        assert not life.ends()
        life.happened()
        assert life.ends()
        assert life.expects(Kind.PULL) == "over"
        assert life.expects(Kind.READ) == "next"
        assert history.losses == set()

    def test_work_is_abandoned_where_a_pull_follows_a_pull(self) -> None:
        life = self.of(Kind.PULL, Kind.PULL, Kind.SKIP, Kind.PULL, Kind.PUSH).first(0)
        life.happened()
        assert life.abandons
        life.happened()
        assert not life.abandons  # a step without a gradient


def told(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def tell(folder: Path, **changes: Any) -> None:
    (folder / "result.json").write_text(json.dumps(told(folder) | changes))


def reconfigure(folder: Path, **changes: Any) -> None:
    """As if the run had been made so."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    tell(folder, config_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def rewrite(folder: Path, events: list[Event]) -> None:
    log = EventLog(folder / "events.bin")
    for event in events:
        log.add(event.operation, event.accepted, event.staleness)
    log.close()


class TestRefusals:
    def test_what_is_no_run_with_a_server(self, copied: Path) -> None:
        with pytest.raises(ConfigError, match=r"has no config\.yaml"):
            replay(copied.parent)
        (copied / "events.bin").unlink()
        with pytest.raises(ConfigError, match="train again with the same config and seed"):
            replay(copied)

    def test_a_config_that_was_changed(self, copied: Path) -> None:
        with (copied / "config.yaml").open("a") as file:
            file.write("\n")
        with pytest.raises(ConfigError, match="was changed after the run"):
            replay(copied)

    def test_data_that_was_changed(self, copied: Path) -> None:
        tell(copied, data={"train_sha256": "abc"})
        with pytest.raises(ConfigError, match="the data is not that of the run"):
            replay(copied)

    def test_a_damaged_log(self, copied: Path) -> None:
        log = copied / "events.bin"
        content = bytearray(log.read_bytes())
        content[32 * 4 + 5] ^= 1  # the head is as long as an event: in the fourth
        log.write_bytes(content)
        with pytest.raises(ConfigError, match=r"event 4 of .* is damaged"):
            replay(copied)

    def test_a_log_that_lacks_its_end(self, copied: Path) -> None:
        log = copied / "events.bin"
        log.write_bytes(log.read_bytes()[: 32 * 6 + 7])
        with pytest.raises(ReplayError, match="ends after event 5, where the run had not ended"):
            replay(copied)

    def test_what_time_has_decided(self, copied: Path) -> None:
        reconfigure(copied, drop_compute={"threshold_seconds": 0.5})
        with pytest.raises(ConfigError, match=r"threshold_seconds was 0\.5: time decided"):
            replay(copied)
        strategy = {
            "_target_": "scaledtrain.strategies.AsyncLocalSGD", "proportional_steps": True
        }  # fmt: skip
        reconfigure(copied, strategy=strategy, drop_compute={})
        with pytest.raises(ConfigError, match="proportional_steps was true"):
            replay(copied)

    def test_a_run_whose_replicas_were_not_plain(self, copied: Path) -> None:
        reconfigure(copied, engine={"_target_": "scaledtrain.parallel.FullyShard", "offload": True})
        with pytest.raises(ConfigError, match="the run had an engine, but a replay has whole"):
            replay(copied)

    def test_a_run_on_a_gpu(self, copied: Path) -> None:
        tell(copied, environment=told(copied)["environment"] | {"device": "NVIDIA H100"})
        with pytest.raises(ConfigError, match="was made on NVIDIA H100"):
            replay(copied)

    def test_a_run_of_another_version_is_noted(self, copied: Path) -> None:
        tell(copied, environment=told(copied)["environment"] | {"torch": "1.0"})
        (note,) = replay(copied).notes
        assert note.startswith("the run was made with torch 1.0, and this is ")

    def test_a_log_that_is_not_of_this_run(self, copied: Path) -> None:
        events = list(read_events(copied / "events.bin"))
        kinds = [Kind.LIMIT, *[Kind.PULL, Kind.PUSH] * 3, Kind.PULL, Kind.REMOVE]
        assert [e.operation.kind for e in events] == [*kinds, Kind.READ, Kind.ADD]
        rewrite(copied, [*events[:3], *events[4:]])
        with pytest.raises(
            ReplayError,
            match="event 4 of the log: worker 0 pushes, but in the replay it pulls; the code or",
        ):
            replay(copied)
        other = events[4]._replace(operation=Operation(Kind.PUSH, 0, 0))
        rewrite(copied, [*events[:4], other, *events[5:]])
        with pytest.raises(ReplayError, match="of version 0, but in the replay one of version 1"):
            replay(copied)
        rewrite(copied, [*events[:4], events[4]._replace(accepted=False), *events[5:]])
        with pytest.raises(ReplayError, match="was rejected with staleness 0, but .* accepted"):
            replay(copied)

    def test_a_worker_that_ends_too_early(self, copied: Path) -> None:
        events = list(read_events(copied / "events.bin"))
        rewrite(copied, [*events, Event(Operation(Kind.PULL, 0), 9.0)])
        with pytest.raises(ReplayError, match="event 12 of the log: worker 0 pulls, but in the"):
            replay(copied)

    def test_a_run_that_was_killed_is_replayed_up_to_the_end_of_its_log(self, copied: Path) -> None:
        (copied / "result.json").unlink()
        log = copied / "events.bin"
        log.write_bytes(log.read_bytes()[: 32 * 6 + 7])
        replayed = replay(copied)
        assert (replayed.events, replayed.pushes) == (5, 2)
        assert replayed.parameters["weight"].item() == 0.75
        assert "the run did not come to its end, so there are no" in verdict(replayed)
        assert "with how many threads" in replayed.notes[0]


class TestCommand:
    def call(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["scaledtrain", "replay", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    def test_without_a_terminal_there_is_the_verdict(
        self, by_hand: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.call(monkeypatch, str(by_hand)) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == (
            "11 events of 1 workers: 3 pushes, 3 of them accepted; the parameters at the end are "
            "equal to those of the run, bit for bit"
        )
        assert self.call(monkeypatch, str(by_hand), "events=[3,5]") == 0
        assert capsys.readouterr().out.splitlines()[0] == HEADER

    def test_other_parameters_are_an_error(
        self, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = yaml.safe_load((copied / "config.yaml").read_text())
        reconfigure(copied, optimizer=config["optimizer"] | {"lr": 0.5})
        assert self.call(monkeypatch, str(copied)) == 1
        assert "the parameters at the end are not those of the run" in capsys.readouterr().err

    def test_what_is_asked_wrongly(
        self, by_hand: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.call(monkeypatch) == 2
        assert "no runs were given" in capsys.readouterr().err
        assert self.call(monkeypatch, str(by_hand), "events=[5,3]") == 2
        assert "events is [5, 3]" in capsys.readouterr().err
        assert self.call(monkeypatch, "--help") == 0
        assert "w 3        the next push of worker 3" in capsys.readouterr().out
        with pytest.raises(ConfigError, match="counted from 1"):
            ReplayConfig([0, 3])


def test_the_hash_is_that_of_the_bytes_in_their_order() -> None:
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [2.0]]))
        model.bias.copy_(torch.tensor([0.0, -1.0]))
    replica = Replica(model, partial(torch.optim.SGD, lr=0.1))
    # Little-endian floats: 1, 2, 0, -1.
    expected = bytes.fromhex("0000803f 00000040 00000000 000080bf")
    assert replica.sha256() == hashlib.sha256(expected).hexdigest()
    model.bfloat16()
    halves = bytes.fromhex("803f 0040 0000 80bf")
    assert replica.sha256() == hashlib.sha256(halves).hexdigest()
