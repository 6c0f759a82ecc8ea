"""Codecs, error feedback, compressed groups: what is sent and kept, and that nothing is lost."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scaledtrain import ParameterServer, Replica, Sync
from scaledtrain.comm.compress import (
    BF16,
    FP16,
    Codec,
    CompressedGroup,
    Compression,
    Feedback,
    PowerSGD,
    Sign,
    TopK,
    bytes_of,
    compressed,
)
from scaledtrain.comm.local import LocalGroup
from scaledtrain.comm.protocols import Handle, Link, ReduceOp
from scaledtrain.comm.serving.encoding import Encoder
from scaledtrain.comm.serving.partition import Partition
from scaledtrain.errors import ConfigError
from scaledtrain.server import (
    Admission,
    Asynchronous,
    BackupWorkers,
    Rennala,
    Ringmaster,
    SoftSync,
    StaleSynchronous,
    Synchronous,
)
from scaledtrain.sim import simulate
from tests.contract.test_replicas import UNEVEN

CODECS: list[Codec] = [FP16(), BF16(), TopK(0.3), TopK(1.0), Sign()]
WITH_FEEDBACK: list[Codec] = [TopK(0.01), TopK(0.3), Sign()]
SHAPES = [(3, 5), (17,), (), (0,), (2, 2, 2)]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAN, INF = float("nan"), float("inf")


def some(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


# Codecs


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_encoded_has_the_promised_shapes_and_decodes_to_the_given_ones(
    codec: Codec, dtype: torch.dtype
) -> None:
    tensors = some(dtype=dtype)
    before = [t.clone() for t in tensors]
    encoded = codec.encode(tensors)
    room = codec.room(tensors)
    assert [(e.shape, e.dtype) for e in encoded] == [(r.shape, r.dtype) for r in room]
    decoded = codec.decode(encoded, tensors)
    assert [(d.shape, d.dtype) for d in decoded] == [(t.shape, t.dtype) for t in tensors]
    for d in decoded:
        d.fill_(7)  # new tensors: what was given stays
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_bytes() -> None:
    like = [torch.zeros(100, 10), torch.zeros(12)]  # 1,012 float32: 4,048 bytes
    assert bytes_of(like) == 4048
    assert bytes_of(FP16().room(like)) == bytes_of(BF16().room(like)) == 2024
    assert bytes_of(TopK(0.01).room(like)) == (10 + 1) * (4 + 4)  # 1 % of 1,000; of 12: one
    assert bytes_of(Sign().room(like)) == (125 + 4) + (2 + 4)  # ceil(12 / 8) = 2


def test_top_k_sends_the_largest_exactly() -> None:
    g = torch.tensor([[0.1, -5.0], [3.0, 0.2]])
    codec = TopK(0.5)
    assert torch.equal(codec.decode(codec.encode([g]), [g])[0], torch.tensor([[0, -5.0], [3.0, 0]]))


def test_sign_sends_the_mean_magnitude() -> None:
    """Nine entries, so that two bytes are needed: mean |g| = (1 + 2 + .. + 9) / 9 = 5."""
    g = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, -9])
    bits, mean = Sign().encode([g])
    assert bits.tolist() == [0b01010101, 0]  # entry i is bit i
    assert mean.tolist() == [5.0]
    expected = [5.0, -5, 5, -5, 5, -5, 5, -5, -5]
    assert Sign().decode([bits, mean], [g])[0].tolist() == expected


def test_16_bits_round_to_the_nearest() -> None:
    """1 + 2^-11 lies between two of float16's numbers; bfloat16 has 2^-7 steps at 1."""
    g = torch.tensor([1 + 3 * 2**-12, 1 + 3 * 2**-9])
    assert FP16().decode(FP16().encode([g]), [g])[0].tolist() == [1 + 2**-10, 1 + 3 * 2**-9]
    assert BF16().decode(BF16().encode([g]), [g])[0].tolist() == [1.0, 1 + 2**-7]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 4])
def test_what_is_not_finite_is_seen_after_decoding(codec: Codec, bad: float, place: int) -> None:
    g = torch.tensor([1.0, -2, 3, -4, 5])
    g[place] = bad
    decoded = codec.decode(codec.encode([g]), [g])[0]
    assert not decoded[place].isfinite()


def test_an_overflow_of_float16_is_infinite_and_not_of_bfloat16() -> None:
    g = torch.tensor([1e5])
    assert FP16().decode(FP16().encode([g]), [g])[0].isinf().all()
    assert BF16().decode(BF16().encode([g]), [g])[0].isfinite().all()


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, NAN])
def test_a_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        TopK(fraction)


# Error feedback


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), min_size=1),
    st.floats(0.01, 1.0),
)
def test_top_k_sends_and_keeps_every_entry_unchanged(rows: list[list[float]], f: float) -> None:
    """Each entry of g + e is either sent or kept, as it is: no rounding."""
    tensors = [torch.tensor(row) for row in rows]
    codec = TopK(f)
    feedback = Feedback(codec, tensors)
    kept = [torch.zeros_like(t) for t in tensors]
    for _ in range(3):
        wanted = [t + e for t, e in zip(tensors, kept, strict=True)]
        sent = codec.decode(feedback.encode(tensors), tensors)
        kept = [state["kept"] for state in feedback.state_dict()]
        for w, s, k in zip(wanted, sent, kept, strict=True):
            assert torch.equal(s + k, w)
            assert torch.equal(torch.where(s == 0, k, s), w)


def test_sign_keeps_what_it_does_not_send() -> None:
    """e <- p - C(p) is one rounding: 2^-24 of the larger of the two."""
    codec = Sign()
    feedback = Feedback(codec, some())
    kept = [torch.zeros_like(t) for t in some()]
    for step in range(5):
        g = some(step)
        sent = codec.decode(feedback.encode(g), g)
        new = [state["kept"] for state in feedback.state_dict()]
        for s, n, k, t in zip(sent, new, kept, g, strict=True):
            torch.testing.assert_close(s + n, t + k, rtol=2**-22, atol=2**-22)
        kept = new


def test_feedback_by_hand() -> None:
    """Top 1 of 2 with g = (3, 2) every time: p = g + e.

    p = (3, 2): sends 3, keeps (0, 2); p = (3, 4): sends 4, keeps (3, 0); p = (6, 2): sends 6.
    """
    codec, g = TopK(0.5), torch.tensor([3.0, 2.0])
    feedback = Feedback(codec, [g])
    sent = [codec.decode(feedback.encode([g]), [g])[0].tolist() for _ in range(3)]
    assert sent == [[3, 0], [0, 4], [6, 0]]
    assert feedback.state_dict()[0]["kept"].tolist() == [0, 2]
    assert g.tolist() == [3, 2]


@pytest.mark.parametrize("codec", WITH_FEEDBACK, ids=str)
def test_an_overflow_is_not_kept(codec: Codec) -> None:
    """The step is skipped; the next one goes on as if it had not been."""
    feedback = Feedback(codec, [torch.zeros(3)])
    feedback.encode([torch.tensor([1.0, 2.0, 4.0])])
    before = feedback.state_dict()[0]["kept"]
    for bad in (NAN, INF):
        feedback.encode([torch.tensor([1.0, bad, bad])])
        assert torch.equal(feedback.state_dict()[0]["kept"], before)


@pytest.mark.parametrize("codec", [*WITH_FEEDBACK, FP16()], ids=str)
def test_feedback_is_saved_and_restored(codec: Codec) -> None:
    one, two = Feedback(codec, some()), Feedback(codec, some())
    one.encode(some(1))
    state = one.state_dict()
    first = one.encode(some(2))
    two.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(two.encode(some(2)), first, strict=True))
    two.load_state_dict([{} for _ in SHAPES])  # without feedback: begins anew
    fresh = Feedback(codec, some()).encode(some(3))
    assert all(torch.equal(a, b) for a, b in zip(two.encode(some(3)), fresh, strict=True))


@pytest.mark.parametrize("admission", [BackupWorkers(2), Rennala(2), Ringmaster(5)], ids=str)
@pytest.mark.parametrize("codec", WITH_FEEDBACK, ids=str)
def test_what_is_left_out_of_a_gradient_that_may_be_rejected_cannot_be_kept(
    codec: Codec, admission: Admission
) -> None:
    message = f"{re.escape(str(codec))} sends.*{re.escape(str(admission))} rejects.*, or FP16 or"
    with pytest.raises(ConfigError, match=message):
        ParameterServer(admission, compression=codec)
    ParameterServer(admission, compression=FP16())


@pytest.mark.parametrize(
    "admission", [Asynchronous(), Synchronous(), SoftSync(2), StaleSynchronous(1)], ids=str
)
def test_where_all_gradients_are_accepted_it_can(admission: Admission) -> None:
    ParameterServer(admission, compression=Sign())


@pytest.mark.parametrize("weight", [1.0, 0.0], ids=["all", "not_rank_1"])
@pytest.mark.parametrize("overlap", [False, True], ids=["at_once", "overlap"])
@pytest.mark.parametrize("compression", [TopK(0.3), Sign(), PowerSGD(1)], ids=str)
def test_a_step_that_is_skipped_leaves_no_trace(
    compression: Compression, overlap: bool, weight: float
) -> None:
    """Only the first of two gradients overflows, and only on rank 0: all the others are finite."""

    def run(overflow: bool, link: Link) -> list[Tensor]:
        model = nn.ParameterList([torch.zeros(4, 6), torch.zeros(6, 4)])
        sync = Sync(compression=compression, overlap=overlap, bucket_bytes=100)  # a tensor has 96
        sync.attach(replica := Replica(model, partial(torch.optim.SGD, lr=1.0)), link)
        generator = torch.Generator().manual_seed(link.group.rank)
        for step in range(4):
            is_skipped = step == 2
            factors = [torch.randn(p.shape, generator=generator) for p in model]
            if is_skipped and not overflow:
                continue
            if is_skipped and link.group.rank == 0:
                factors[0][0, 0] = torch.inf
            replica.zero_grad()
            share = weight if is_skipped and link.group.rank == 1 else 1.0
            sync.before_forward(1, share)
            sum((f * p).sum() for f, p in zip(factors, model, strict=True)).backward()
            sync.reduce_gradients(share)
            assert all(p.grad.isfinite().all() for p in model) != is_skipped
            sync.skip_update() if is_skipped else sync.apply_gradients()
            sync.after_step()
        kept = [t for state in sync.state_dict()["compression"] for t in state.values()]
        return [*(p.detach() for p in model), *kept]

    skipping, without = (simulate(partial(run, it), UNEVEN, 2).results for it in (True, False))
    for one, other in zip(skipping, without, strict=True):
        assert len(one) >= 4
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("compression", [TopK(0.1), Sign(), PowerSGD(1)], ids=str)
def test_what_is_kept_counts_with_the_weight_that_its_gradient_had(
    compression: Compression,
) -> None:
    """Of every mean, sum_i w_i g_i / sum_i w_i, all is used sooner or later: none counts more."""

    def run(link: Link) -> tuple[Tensor, Tensor, Tensor]:
        group = compressed(link.group, compression, [torch.zeros(6, 8)])
        generator = torch.Generator().manual_seed(link.group.rank)
        used, given = torch.zeros(6, 8), torch.zeros(6, 8)
        changing = [
            (1.0, 1.0),
            (1.0, 1 / 32),
            (0.25, 0.0),
            (0.0, 2.0),
            (1 / 32, 1 / 32),
            (0.1, 1.0),
        ]
        for weights in changing:
            weight = weights[link.group.rank]
            g = torch.randn(6, 8, generator=generator)
            given += weight / sum(weights) * g
            group.all_reduce([g], "mean", weight).wait()
            used += g
        return used, given, group.state_dict()[0]["kept"]

    (used, given, kept), (also_used, also_given, also_kept) = simulate(run, UNEVEN, 2).results
    assert torch.equal(used, also_used)
    left = (kept + also_kept) / 2
    torch.testing.assert_close(used + left, given + also_given, rtol=0.0, atol=1e-5)


def test_a_push_is_not_taken_back_so_that_no_memory_is_kept_for_it() -> None:
    like = [torch.zeros(4)]
    encoder = Encoder(TopK(0.5), Partition(like, 1), like, shards=1)
    encoder.encode([torch.tensor([3.0, 2.0, 1.0, 4.0])])
    (feedback,) = encoder._feedback
    assert not feedback._before
    assert encoder.state_dict()[0][0]["kept"].tolist() == [0.0, 2.0, 1.0, 0.0]


def descend(codec: Codec, keep: bool, steps: int) -> float:
    """Gradient descent on f(x) = (x1^2 + (x2 / 10)^2) / 2 from (0, 10), lr 0.1; the last x2.

    The gradient is (x1, x2 / 100), with a noise of +-1 in the first entry.
    """
    x = torch.tensor([0.0, 10.0])
    feedback = Feedback(codec, [x])
    for step in range(steps):
        noise = 1.0 if step % 2 else -1.0
        g = torch.stack([x[0] + noise, x[1] / 100])
        encoded = feedback.encode([g]) if keep else codec.encode([g])
        x = x - 0.1 * codec.decode(encoded, [g])[0]
    return float(x[1])


def test_without_feedback_top_1_never_sends_the_small_entry() -> None:
    """|g2| = x2 / 100 <= 0.1, while |g1| = |x1 +- 1| is at least 1: x2 does not move at all.

    With feedback every bit of g2 is sent in the end: like plain descent, which has the factor
    1 - 0.1 / 100 for each of 2,000 steps: 10 x 0.999^2000 = 1.35.
    """
    assert descend(TopK(0.5), keep=False, steps=2000) == 10.0
    # The entry is sent when |e2| has reached |p1|, about 1, so x2 lags by at most 0.1 x 1.1.
    assert descend(TopK(0.5), keep=True, steps=2000) == pytest.approx(10 * 0.999**2000, abs=0.11)


# Compressed groups on one rank: the mean is what is sent.


def everything() -> list[Compression | None]:
    return [None, FP16(), BF16(), TopK(0.3), Sign(), PowerSGD(rank=1)]


class Recording(LocalGroup):
    """Notes the bytes of every all-reduce."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ReduceOp]] = []

    def all_reduce(
        self, tensors: Sequence[Tensor], op: ReduceOp = "sum", weight: float = 1.0
    ) -> Handle:
        self.calls.append((bytes_of(tensors), op))
        return super().all_reduce(tensors, op, weight)


@pytest.mark.parametrize("compression", everything(), ids=str)
def test_what_is_no_sum_or_mean_of_floats_is_exact(compression: Compression | None) -> None:
    group = compressed(LocalGroup(), compression, some())
    largest = torch.tensor([1.001, 70000.0])
    group.all_reduce([largest], "max").wait()
    assert largest.tolist() == pytest.approx([1.001, 70000.0])
    count = torch.tensor([2**24 + 1])
    group.all_reduce([count], "sum").wait()
    assert count.item() == 2**24 + 1
    assert group.all_gather([largest])[0][0] is largest
    group.broadcast([largest])
    assert (group.rank, group.size, group.bytes_sent) == (0, 1, 0)


@pytest.mark.parametrize("compression", everything(), ids=str)
def test_a_group_belongs_to_its_tensors(compression: Compression | None) -> None:
    group = compressed(LocalGroup(), compression, [torch.zeros(4, 2)])
    with pytest.raises(ConfigError, match=r"made for tensors of shapes \[\(4, 2\)\], but got"):
        group.all_reduce([torch.zeros(2, 4)], "mean")


@pytest.mark.parametrize("compression", everything(), ids=str)
def test_a_handle_does_its_work_once(compression: Compression | None) -> None:
    g = torch.arange(12.0).view(4, 3)
    handle = compressed(LocalGroup(), compression, [g]).all_reduce([g], "mean")
    handle.wait()
    once = g.clone()
    handle.wait()
    assert torch.equal(g, once)


def low_rank(rank: int, rows: int = 12, columns: int = 20, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator)
    return left @ torch.randn(rank, columns, generator=generator)


def reduce(group: CompressedGroup, *tensors: Tensor) -> list[Tensor]:
    copies = [t.clone() for t in tensors]
    group.all_reduce(copies, "mean").wait()
    return copies


class TestPowerSGD:
    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_a_gradient_of_that_rank_is_exact(self, rank: int) -> None:
        """P spans the columns of M, so P P^T M = M; rounding: some dozens of 2^-24."""
        m = low_rank(rank)
        got = reduce(compressed(LocalGroup(), PowerSGD(rank), [m]), m)[0]
        torch.testing.assert_close(got, m, rtol=1e-4, atol=1e-4)

    def test_sent_and_kept_are_the_gradient(self) -> None:
        group = compressed(LocalGroup(), PowerSGD(1), [torch.zeros(12, 20)])
        kept = torch.zeros(12, 20)
        for seed in range(4):
            m = low_rank(5, seed=seed)
            sent = reduce(group, m)[0]
            new = group.state_dict()[0]["kept"]
            assert torch.linalg.matrix_rank(sent) == 1
            torch.testing.assert_close(sent + new, m + kept, rtol=1e-5, atol=1e-5)
            kept = new

    def test_warm_start_finds_the_best_subspace(self) -> None:
        """Without feedback: the error approaches that of the best matrix of rank 2 (Eckart-Young).

        The singular values fall by a half each, so an iteration shrinks the wrong part by 4.
        """
        u = torch.linalg.qr(low_rank(5, 12, 5)).Q
        v = torch.linalg.qr(low_rank(5, 20, 5, seed=1)).Q
        m = u @ torch.diag(torch.tensor([16.0, 8, 4, 2, 1])) @ v.T
        group = compressed(LocalGroup(), PowerSGD(2), [m])
        for _ in range(12):
            group.load_state_dict([{**group.state_dict()[0], "kept": torch.zeros_like(m)}])
            got = reduce(group, m)[0]
        best = (4**2 + 2**2 + 1**2) ** 0.5
        assert float((m - got).norm()) == pytest.approx(best, rel=1e-3)

    def test_vectors_and_small_matrices_are_sent_as_they_are(self) -> None:
        """r (n + m) >= n m for 3 x 3 at r = 2 (12 >= 9), not for 12 x 20 (64 < 240)."""
        below = Recording()
        vector, small, large = torch.randn(100), torch.randn(3, 3), low_rank(9)
        group = compressed(below, PowerSGD(2), [vector, small, large])
        got = reduce(group, vector, small, large)
        assert torch.equal(got[0], vector)
        assert torch.equal(got[1], small)
        assert not torch.allclose(got[2], large)
        # P [12, 2] with the exact ones, then Q [20, 2].
        assert below.calls == [(4 * (12 * 2 + 100 + 9), "mean"), (4 * 20 * 2, "mean")]

    def test_a_zero_gradient_does_not_stop_it(self) -> None:
        """As below a layer that begins at zero. The basis of a zero P is the first axis.

        Later gradients have a first row of zeros, as the padding of an embedding: if Q had become
        M^T P = 0, no step would find them again. Q is as before, so a rank of 1 goes whole.
        """
        m = torch.outer(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.ones(6))
        group = compressed(LocalGroup(), PowerSGD(1), [m])
        assert torch.equal(reduce(group, torch.zeros_like(m))[0], torch.zeros_like(m))
        torch.testing.assert_close(reduce(group, m)[0], m, rtol=1e-5, atol=1e-5)

    def test_an_overflow_is_seen_and_not_kept(self) -> None:
        m = low_rank(3)
        group = compressed(LocalGroup(), PowerSGD(1), [m])
        reduce(group, m)
        before = group.state_dict()[0]
        bad = m.clone()
        bad[3, 3] = INF
        assert not reduce(group, bad)[0].isfinite().all()
        after = group.state_dict()[0]
        assert all(torch.equal(before[name], after[name]) for name in ("q", "kept"))

    def test_half_precision_gradients(self) -> None:
        m = low_rank(1).to(torch.bfloat16)
        got = reduce(compressed(LocalGroup(), PowerSGD(1), [m]), m)[0]
        assert got.dtype is torch.bfloat16
        # bfloat16 is exact to 2^-9, and m itself is of rank 1 only to that.
        torch.testing.assert_close(got, m, rtol=0.02, atol=0.05)

    def test_random_numbers_of_others_are_left_alone(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        reduce(compressed(LocalGroup(), PowerSGD(1), [low_rank(1)]), low_rank(1))
        assert torch.equal(torch.rand(1), expected)

    def test_a_rank_is_at_least_1(self) -> None:
        with pytest.raises(ConfigError, match="rank is 0"):
            PowerSGD(0)


@pytest.mark.parametrize("compression", everything(), ids=str)
def test_a_state_is_a_copy_and_restores_what_was(compression: Compression | None) -> None:
    first, second = low_rank(4), low_rank(4, seed=1)
    parameter = torch.nn.Parameter(first.clone())
    group = compressed(LocalGroup(), compression, [parameter])
    reduce(group, first)
    state = group.state_dict()
    expected = reduce(group, second)[0]
    other = compressed(LocalGroup(), compression, [parameter])
    other.load_state_dict(state)
    assert torch.equal(reduce(other, second)[0], expected)
    assert not any(t.requires_grad for t in state[0].values())
