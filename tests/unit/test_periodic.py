"""Periodic strategies: options that cannot be, and how a model is cut into fragments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from scaledtrain import DiLoCo, LocalSGD, Replica, connect
from scaledtrain.errors import ConfigError
from scaledtrain.strategies import SlowMo
from scaledtrain.strategies.outer import split_by_bytes

SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalSGD(0), "sync_every is 0; .* >= 1"),
        (lambda: LocalSGD(8, local_after=-1), "local_after is -1"),
        (lambda: LocalSGD(8, local_after="drop"), "local_after is 'drop'; .* or 'lr_drop'"),
        (lambda: SlowMo(8, slow_momentum=1.0), r"slow_momentum is 1.0; it is in \[0, 1\)"),
        (lambda: SlowMo(8, slow_lr=0.0), "slow_lr is 0.0; it is > 0"),
        (lambda: DiLoCo(0), "sync_every is 0"),
        (lambda: DiLoCo(8, fragments=0), "fragments is 0"),
        (lambda: DiLoCo(8, overlap_steps=8), "overlap_steps is 8 with sync_every 8"),
        (lambda: DiLoCo(8, overlap_steps=-1), "overlap_steps is -1"),
        (lambda: DiLoCo(8, mixing=1.5), "mixing is 1.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_said(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_what_shows_only_with_the_model_is_said() -> None:
    model = nn.Linear(2, 1)
    with connect() as link:
        with pytest.raises(ConfigError, match="fragments is 3, .* only 2 trainable tensors"):
            DiLoCo(8, fragments=3).attach(Replica(model, SGD), link)
        with pytest.raises(ConfigError, match="not a torch.optim.Optimizer"):
            DiLoCo(8, outer_optimizer=lambda _: None).attach(Replica(model, SGD), link)


def cut(elements: list[int], n: int) -> list[list[int]]:
    tensors: list[Tensor] = [torch.zeros(size) for size in elements]
    return [[len(t) for t in part] for part in split_by_bytes(tensors, n)]


def test_fragments_have_about_the_same_bytes() -> None:
    # 16 elements, 4 for each of 4: the cuts closest to 4, 8, 12 are after 4, 8 and 11.
    assert cut([2, 2, 4, 3, 2, 3], 4) == [[2, 2], [4], [3], [2, 3]]
    assert cut([1, 1, 1], 3) == [[1], [1], [1]]
    assert cut([3, 4], 1) == [[3, 4]]


def test_no_fragment_is_empty_beside_a_large_tensor() -> None:
    assert cut([1, 1, 1, 100], 3) == [[1, 1], [1], [100]]
    assert cut([100, 1, 1], 3) == [[100], [1], [1]]


def test_bytes_are_counted_not_elements() -> None:
    tensors = [torch.zeros(2, dtype=torch.float64), torch.zeros(2), torch.zeros(2)]
    assert [len(part) for part in split_by_bytes(tensors, 2)] == [1, 2]  # 16 and 8 + 8


def test_a_learning_rate_that_never_drops_is_told(caplog: pytest.LogCaptureFixture) -> None:
    replica = Replica(nn.Linear(1, 1), partial(torch.optim.SGD, lr=0.1))
    with connect() as link:
        LocalSGD(8, local_after="lr_drop").attach(replica, link)
    assert "has no schedule, so it never drops" in caplog.text
