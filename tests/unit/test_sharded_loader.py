"""Loading sharded data: the same batches for any number of replicas, resumed, read by threads."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaledtrain.data import Column, Ragged, ShardedDataset, ShardedLoader, ShardWriter
from scaledtrain.data.replica_loader import ReplicaLoader
from scaledtrain.data.steps import StepBatch
from scaledtrain.errors import ConfigError, DataError

N = 103


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """103 samples in shards of 20: a number, i % 3 tokens, and 24 bytes more."""
    folder = tmp_path_factory.mktemp("sharded")
    ragged = {"tokens": Column("int32", ragged=True)}
    with ShardWriter(folder, ragged, shard_samples=20) as writer:
        for i in range(N):
            writer.write({"i": i, "x": np.full(3, i, np.float64), "tokens": [i] * (i % 3)})
    return folder


SMALL: dict[str, Any] = {"block_bytes": 300, "buffer_bytes": 1_200}  # some 6 samples, 4 blocks


def loader(folder: Path, batch_size: int = 4, **options: Any) -> ShardedLoader:
    return ShardedLoader(ShardedDataset(folder), batch_size, **{**SMALL, **options})


def samples(batch: Any) -> list[int]:
    found: list[int] = batch["i"].tolist()
    assert batch["x"].tolist() == [[i] * 3 for i in found]
    tokens = batch["tokens"]
    assert isinstance(tokens, Ragged)
    assert [t.tolist() for t in tokens.unbind()] == [[i] * (i % 3) for i in found]
    return found


def of_step(step: StepBatch) -> list[int]:
    return [i for batch in step.microbatches for i in samples(batch)]


@pytest.mark.parametrize("shuffle", ["block", "full", "none"])
def test_an_epoch_has_every_sample_once_in_the_order_of_the_epoch(
    folder: Path, shuffle: Any
) -> None:
    own = loader(folder, shuffle=shuffle)
    assert len(own) == 26  # 103 / 4
    for epoch in range(2):
        batches = [samples(batch) for batch in own]
        assert [len(batch) for batch in batches] == [4] * 25 + [3]
        found = [i for batch in batches for i in batch]
        assert found == own.order().indices(epoch, 0, N).tolist()
        assert sorted(found) == list(range(N))
        assert (found == list(range(N))) == (shuffle == "none")
    assert own.epoch == 2


def test_blocks_and_groups_have_the_bytes_that_were_asked_for(folder: Path) -> None:
    own = loader(folder)
    sample_bytes = own.dataset.sample_bytes
    assert own.order().block_samples == int(300 / sample_bytes)
    assert own.order().buffer_blocks == int(1_200 / (own.order().block_samples * sample_bytes))


@given(
    st.integers(1, 30),
    st.integers(0, 30),
    st.integers(1, 5),
    st.sampled_from(["block", "full", "none"]),
    st.booleans(),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_nth_batch_from_anywhere(
    folder: Path, batch_size: int, start: int, step: int, shuffle: Any, drop_last: bool
) -> None:
    own = loader(folder, batch_size, shuffle=shuffle, drop_last=drop_last, seed=7)
    whole = [samples(batch) for batch in own.batches(epoch=3)]
    assert len(whole) == len(own) == (N if drop_last else N + batch_size - 1) // batch_size
    some = [samples(batch) for batch in own.batches(3, start, step)]
    assert some == whole[start::step]


class TestReplicas:
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_steps_hold_the_same_samples_for_any_number(
        self, folder: Path, accumulation: int
    ) -> None:
        def steps(replicas: int, start: int = 0) -> list[list[int]]:
            own = loader(folder, 8 // replicas)
            each = [
                ReplicaLoader(own, rank=r, replicas=replicas, accumulation=accumulation, seed=5)
                for r in range(replicas)
            ]
            of_all = [list(one.epoch(1, start)) for one in each]
            assert {len(own_steps) for own_steps in of_all} == {each[0].steps_per_epoch - start}
            return [
                sorted(i for step in together for i in of_step(step))
                for together in zip(*of_all, strict=True)
            ]

        one = steps(1)
        for replicas in (2, 4, 8):
            assert steps(replicas) == one
            assert steps(replicas, start=3) == one[3:]

    def test_each_reads_its_own_alone(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[int] = []
        gather = ShardedDataset.gather

        def spy(self: ShardedDataset, indices: Any, *rest: Any, **options: Any) -> Any:
            read.extend(indices.tolist())
            return gather(self, indices, *rest, **options)

        monkeypatch.setattr(ShardedDataset, "gather", spy)
        mine = ReplicaLoader(loader(folder), rank=1, replicas=3)
        seen = [i for step in mine.epoch(0, start=2) for i in of_step(step)]
        assert sorted(read) == sorted(seen), "nothing else, and nothing that was skipped"

    def test_the_seed_is_the_trainers_unless_it_is_given(self, folder: Path) -> None:
        def first(own: ShardedLoader, seed: int) -> list[int]:
            return of_step(next(ReplicaLoader(own, seed=seed).epoch(0)))

        assert first(loader(folder), 1) != first(loader(folder), 2)
        assert first(loader(folder, seed=3), 1) == first(loader(folder, seed=3), 2)
        assert first(loader(folder), 3) == first(loader(folder, seed=3), 0)

    def test_replicas_alone_share_the_sequence_of_epochs(self, folder: Path) -> None:
        """4 batches of 26 and 25 samples, 3 replicas: 0 1 2 0 | 1 2 0 1 | ..."""
        own = loader(folder, 26)
        for rank, counts in enumerate([[2, 1], [1, 2], [1, 1]]):
            alone = ReplicaLoader(own, rank=rank, replicas=3, alone=True)
            assert [len(list(alone.epoch(epoch))) for epoch in (0, 1)] == counts


class TestResuming:
    def test_state_is_what_was_given_not_what_was_read_ahead(self, folder: Path) -> None:
        whole = [samples(b) for b in loader(folder)] + [samples(b) for b in loader_of(folder, 1)]
        for given_batches in (0, 1, 11, 26, 30):
            own = loader(folder)
            seen: list[list[int]] = []
            while len(seen) < given_batches:
                for batch in own:
                    seen.append(samples(batch))
                    if len(seen) == given_batches:
                        break
            state = own.state_dict()
            other = loader(folder)
            other.load_state_dict(state)
            seen += [samples(batch) for batch in other]
            if other.epoch == 1:
                seen += [samples(batch) for batch in other]
            assert seen == whole

    def test_with_another_batch_size(self, folder: Path) -> None:
        own = loader(folder, 4)
        iterator = iter(own)
        seen = [i for _ in range(6) for i in samples(next(iterator))]
        other = loader(folder, 8)
        other.load_state_dict(own.state_dict())  # behind 24 samples
        seen += [i for batch in other for i in samples(batch)]
        assert seen == other.order().indices(0, 0, N).tolist()
        with pytest.raises(ConfigError, match="behind sample 24 .* inside a batch of 5"):
            loader(folder, 5).load_state_dict(own.state_dict())

    def test_another_order_is_refused(self, folder: Path) -> None:
        state = loader(folder).state_dict()
        for options, told in (
            ({"seed": 1}, "seed 0, but this loader has 1"),
            ({"shuffle": "full"}, "shuffle block, .* full"),
            ({"block_bytes": 100}, "block_samples"),
        ):
            with pytest.raises(ConfigError, match=told):
                loader(folder, **options).load_state_dict(state)

    def test_an_iteration_that_was_left_begins_again(self, folder: Path) -> None:
        own = loader(folder)
        first = samples(next(iter(own)))
        assert next(samples(batch) for batch in own) == first


def loader_of(folder: Path, epoch: int) -> ShardedLoader:
    own = loader(folder)
    own.epoch = epoch
    return own


class TestThreads:
    def test_there_are_none_without_an_iteration(self, folder: Path) -> None:
        def running() -> int:
            return sum(t.name.startswith("sharded-loader") for t in threading.enumerate())

        own = loader(folder)
        one, other = own.batches(0), own.batches(0)
        next(one), next(other)
        assert 1 <= running() <= 2, "shared by both"
        one.close()
        assert len(list(other)) == 25
        del one, other
        # That they end is seen by what watches every test for leaks.

    def test_an_error_of_theirs_comes_out_of_the_loop(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path) as writer:
            writer.write({"i": 0})
        own = loader(tmp_path)
        (tmp_path / "shard-00000.safetensors").unlink()
        with pytest.raises(DataError, match="shard-00000.* cannot be read"):
            list(own)

    def test_storage_that_does_not_answer_is_told(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = threading.Event()
        monkeypatch.setattr(ShardedDataset, "gather", lambda *a, **o: answer.wait(10))
        with pytest.raises(DataError, match="no batch came within 0.05 s from .* not answer"):
            next(loader(folder, timeout_seconds=0.05).batches(0))
        answer.set()

    @pytest.mark.parametrize("option", ["batch_size", "block_bytes", "threads", "read_ahead"])
    def test_sizes_are_at_least_one(self, folder: Path, option: str) -> None:
        with pytest.raises(ConfigError, match=f"{option} is 0"):
            loader(folder, **{option: 0})


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about hosts without a CUDA device")
def test_pinned_memory_needs_a_device(folder: Path) -> None:
    with pytest.raises(ConfigError, match="pin_memory is true, but there is no CUDA device"):
        loader(folder, pin_memory=True)


def test_damaged_shards_make_batches_smaller_and_their_weights(tmp_path: Path) -> None:
    """3 shards of 4, batches of 2; the second shard is gone: batches 2 and 3 have nothing."""
    with ShardWriter(tmp_path, shard_samples=4) as writer:
        writer.write_batch({"x": range(12)})
    (tmp_path / "shard-00001.safetensors").unlink()
    data = ShardedDataset(tmp_path, on_damage="skip")
    own = ShardedLoader(data, 2, shuffle="none")
    assert [b["x"].tolist() for b in own] == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert [b and b["x"].tolist() for b in own.batches(0, start=1, step=2)] == [
        [2, 3],
        None,
        [10, 11],
    ]
    steps = list(ReplicaLoader(own, rank=1, replicas=2).epoch(0))
    assert [(len(s.microbatches), s.weight) for s in steps] == [(1, 1.0), (0, 0.0), (1, 1.0)]
    own = ShardedLoader(data, 3, shuffle="none")
    assert [b["x"].tolist() for b in own] == [[0, 1, 2], [3], [8], [9, 10, 11]]


def test_batches_share_little_memory(tmp_path: Path) -> None:
    """A group of 64 MiB would hold all 20 samples; in 8 MiB are 7, with their share of headers."""
    with ShardWriter(tmp_path) as writer:
        writer.write_batch({"x": np.zeros((20, 2**20), np.uint8)})
    held = [
        batch["x"].untyped_storage().nbytes()
        for batch in ShardedLoader(ShardedDataset(tmp_path), batch_size=1)
        if isinstance(batch, dict) and isinstance(batch["x"], torch.Tensor)
    ]
    assert len(held) == 20
    assert max(held) == 7 * 2**20
