"""What is kept of blocks that run again, and what is offloaded meanwhile: the same bits."""

from __future__ import annotations

import errno
import gc
import math
import mmap
import os
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from scaledtrain.errors import ConfigError
from scaledtrain.recompute import MemoryBudget, checkpoint_activations
from scaledtrain.recompute.apart import peak_bytes
from scaledtrain.recompute.blocks import Compiled
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.kept import ATTENTION, PRODUCTS, keep_results
from scaledtrain.recompute.live_bytes import LiveBytes
from scaledtrain.recompute.measure import measure_chain
from scaledtrain.recompute.offload import DiskStore, HostStore, Offload, Store, storages_of
from scaledtrain.recompute.plan import ELSEWHERE, Keep, Plan, Recompute, cost, every


class Block(nn.Module):
    """Attention over views of one tensor, dropout, a product of two activations, a convolution."""

    def __init__(self, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.3)
        self.mix = nn.Conv1d(16, 16, 3, padding=1)
        self.attention_dropout = attention_dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.attention_dropout
        )
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        x = x + torch.tanh(x @ x.transpose(1, 2)) @ x
        return x + F.gelu(self.mix(x.transpose(1, 2))).transpose(1, 2)


class Operators(TorchDispatchMode):
    """Counts calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


def stores() -> dict[str, Store | None]:
    return {"memory": None, "disk": DiskStore()}


def results(run: Callable[[Tensor], Tensor], block: nn.Module, autocast: bool) -> list[Tensor]:
    """Of a step: output, gradients, and the next random number."""
    torch.manual_seed(1)
    x = torch.randn(2, 8, 16, requires_grad=True)
    block.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = run(x)
    output.float().square().sum().backward()
    gradients = [p.grad for p in block.parameters()]
    return [output.detach(), x.grad, *gradients, torch.rand(1)]  # type: ignore[list-item]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("functions", [ATTENTION, PRODUCTS])
def test_kept_results_change_no_bit(
    functions: frozenset[Callable[..., Any]], where: str, autocast: bool
) -> None:
    torch.manual_seed(0)
    block = Block()
    expected = results(block, block, autocast)
    contexts = keep_results(functions, stores()[where])

    def run(x: Tensor) -> Tensor:
        with LiveBytes():  # as where the budget is measured
            return checkpoint(block, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]

    for _ in range(2):  # the first time nothing is kept
        assert all(map(torch.equal, expected, results(run, block, autocast)))


def test_what_is_kept_is_computed_once() -> None:
    torch.manual_seed(0)
    block = Block()
    contexts = keep_results(ATTENTION)
    x = torch.randn(2, 8, 16, requires_grad=True)
    for _ in range(2):
        with Operators() as seen:
            checkpoint(block, x, use_reentrant=False, context_fn=contexts).sum().backward()
    assert seen.of[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] == 1
    assert seen.of[torch.ops.aten.addmm] == 2 * 2  # of each linear layer, in each pass


class Added(nn.Module):
    """Nothing needs what its last product returns; with a norm behind it, that does."""

    def __init__(self, *behind: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), *behind)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


def test_a_result_that_nothing_has_needed_is_not_kept() -> None:
    contexts = keep_results(PRODUCTS)

    def kept(block: nn.Module) -> tuple[int, int]:
        """Bytes between forward and backward pass; products that were computed."""
        x = torch.ones(8, 16, requires_grad=True)
        expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
        with LiveBytes() as counted, Operators() as seen:
            y = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            n_bytes: int = counted.live
            found = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
        assert all(map(torch.equal, found, expected))
        return n_bytes, seen.of[torch.ops.aten.addmm]

    both, first, last = 8 * (64 + 16) * 4, 8 * 64 * 4, 8 * 16 * 4
    # What the block returns is there, too. Nothing is known the first time.
    assert kept(Added()) == (last, 3)
    assert [kept(Added()) for _ in range(2)] == [(first + last, 2)] * 2
    # Where the same call's result is needed, it is computed once more, and kept from then on.
    normed = Added(nn.LayerNorm(16))
    assert [kept(normed)[1] for _ in range(3)] == [3, 2, 2]
    assert kept(Added()) == (both + last, 2)


def test_neither_a_smaller_batch_nor_other_weights_change_what_is_kept() -> None:
    contexts = keep_results(PRODUCTS)

    def kept(block: nn.Module, rows: int) -> int:
        x = torch.ones(rows, 16, requires_grad=True)
        with LiveBytes() as counted:
            y = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            n_bytes: int = counted.live
            y.sum().backward()
        return n_bytes

    kept(Added(), 8)
    kept(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)), 8)
    assert [kept(Added(), rows) for rows in (8, 7)] == [8 * (64 + 16) * 4, 7 * (64 + 16) * 4]


def test_the_first_step_of_training_keeps_what_was_kept_when_it_was_tried_out() -> None:
    model, ways = nn.Sequential(*(Added() for _ in range(4))), {"products": keep_results(PRODUCTS)}
    x = torch.ones(64, 16)

    def loss_of(called: Any) -> Tensor:
        return called(x).square().mean()  # type: ignore[no-any-return]

    measure_chain(model, list(model), loss_of, ways)
    executor = Executor(model, list(model), (Keep("products"),) * 4, ways)
    tried_out = peak_bytes(model, loss_of)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as counted:
        loss_of(model).backward()  # type: ignore[no-untyped-call]
    assert counted.peak == tried_out
    executor.remove()


def test_attention_with_dropout_runs_again_with_the_same_random_numbers() -> None:
    torch.manual_seed(0)
    block = Block(attention_dropout=0.5)
    expected = results(block, block, False)
    contexts = keep_results(ATTENTION)
    found = results(
        lambda x: checkpoint(block, x, use_reentrant=False, context_fn=contexts), block, False
    )
    assert all(map(torch.equal, expected, found))


def test_a_kept_result_that_is_changed_in_place_is_told() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    x = torch.randn(2, 4, requires_grad=True)
    contexts = keep_results(PRODUCTS)
    loss = checkpoint(block, x, use_reentrant=False, context_fn=contexts).sum()
    with pytest.raises(RuntimeError, match="in-place operation"):
        loss.backward()


def test_a_graph_can_be_gone_through_twice() -> None:
    torch.manual_seed(0)
    block = Block().eval()
    x = torch.randn(2, 8, 16, requires_grad=True)
    for store in (None, DiskStore()):
        contexts = keep_results(PRODUCTS, store)
        loss = checkpoint(block, x, use_reentrant=False, context_fn=contexts).square().sum()
        (once,) = torch.autograd.grad(loss, x, retain_graph=True)
        (twice,) = torch.autograd.grad(loss, x)
        assert torch.equal(once, twice)


TENSORS = {
    "plain": lambda: torch.arange(12.0).view(3, 4),
    "transposed": lambda: torch.arange(12.0).view(3, 4).t(),
    "part": lambda: torch.arange(12.0).view(3, 4)[:, 1:3],
    "offset": lambda: torch.arange(12.0)[5:],
    "expanded": lambda: torch.ones(3, 1).expand(3, 4),
    "nothing": lambda: torch.ones(0, 3),
    "one": lambda: torch.tensor(2.5),
    "bfloat16": lambda: torch.randn(5, 7).bfloat16(),
    "mask": lambda: torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_file_gives_back_what_was_put(kind: str) -> None:
    tensor = TENSORS[kind]()
    expected = tensor.clone()
    store = DiskStore()
    read = store.put(tensor)
    if kind not in ("expanded", "part", "nothing"):  # those are kept as they are
        tensor.zero_()
    for found in (read(), read()):
        assert torch.equal(found, expected)
        assert (found.dtype, found.stride()) == (tensor.dtype, tensor.stride())


def file_size(store: DiskStore) -> int:
    """Bytes."""
    return os.fstat(store._file.number).st_size


PAGE = mmap.ALLOCATIONGRANULARITY


class Counting(DiskStore):
    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = 0  # that were written

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        self.n_bytes += tensor.nbytes
        return super().put(tensor)


@pytest.mark.parametrize("autocast", [False, True])
def test_all_that_a_block_saves_can_wait_elsewhere(autocast: bool) -> None:
    torch.manual_seed(0)
    block = Block()
    expected = results(block, block, autocast)
    store = Counting()

    def run(x: Tensor) -> Tensor:
        with LiveBytes(), Offload(store, storages_of(block)):
            return block(x)  # type: ignore[no-any-return]

    assert all(map(torch.equal, expected, results(run, block, autocast)))
    assert store.n_bytes > 0


def test_memory_that_several_saved_tensors_view_is_written_once_and_gone_meanwhile() -> None:
    given = torch.ones(64, 256, requires_grad=True)
    store = Counting()
    with LiveBytes() as counted:
        x = given + 1.0
        with Offload(store):
            left, right = x.chunk(2, -1)  # neither fills its memory
            y = (left * right).sum()
        del x, left, right
        assert counted.live == 4
        assert store.n_bytes == 65_536
        counted.peak = counted.live
        y.backward()
    # Read once for both, 65,536 bytes; the gradient of their product, the sum's, spread over them,
    # takes none, those of both 32,768 each. Then that of x is put together of one after the other.
    assert counted.peak <= 3 * 65_536
    assert torch.equal(given.grad, torch.full((64, 256), 2.0))  # type: ignore[arg-type]


def test_parameters_and_crumbs_stay() -> None:
    store = Counting()
    block = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256))
    x = torch.ones(64, 256, requires_grad=True)
    with Offload.of_block(store, storages_of(block), x):
        y = block(x)
    # Of x and the norm's output, and neither the weight of 262,144 nor 64 means and deviations.
    assert store.n_bytes == 2 * 65_536
    y.sum().backward()
    assert torch.equal(block[1].bias.grad, torch.full((256,), 64.0))


class Hiding(nn.Module):
    """Its layer is not among its modules, but among the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = (nn.Linear(256, 256),)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](x)  # type: ignore[no-any-return]


def test_a_weight_that_is_not_the_blocks_but_the_models_stays() -> None:
    block, store = Hiding(), Counting()
    model = nn.ModuleDict({"block": block, "layer": block.hidden[0]})
    executor = Executor(model, [block], (Keep(ELSEWHERE),), {}, store)
    try:
        block(torch.ones(64, 256, requires_grad=True)).sum().backward()
    finally:
        executor.remove()
    assert store.n_bytes == 65_536  # the input


def test_of_a_small_part_of_something_large_the_part_is_written() -> None:
    everything, store = torch.ones(6_400, 256), Counting()
    weight = torch.ones(256, requires_grad=True)
    with Offload.of_block(store, (), everything[:64]):
        y = (everything[:64] * weight).sum()
    assert store.n_bytes == 64 * 256 * 4
    y.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [64.0] * 256


def test_of_a_part_that_does_not_fill_its_memory_all_is_written_and_gone_meanwhile() -> None:
    """As keys and values of grouped-query attention, of one product with the queries."""
    x, store = torch.ones(64, 256, requires_grad=True), Counting()
    with LiveBytes() as counted:
        with Offload.of_block(store, (), x):
            values = (x + 1.0)[:, :32]
            y = (values * values).sum()
            del values
        assert counted.live == 4
        assert store.n_bytes == 64 * 256 * 4
        y.backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == [4.0] * 32 + [0.0] * 224  # 2 (x + 1)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_that_change_in_place_one_by_one_are_read_as_each_was(
    kind: type[nn.Module], dtype: torch.dtype
) -> None:
    """They share memory, and autograd counts the changes of each by itself."""
    torch.manual_seed(0)
    layer = kind(16, 16).to(dtype)
    shape = (4, 16) if "Cell" in kind.__name__ else (5, 4, 16)

    def trained(offload: AbstractContextManager[Any]) -> list[Tensor]:
        x = torch.linspace(-2.0, 2.0, math.prod(shape), dtype=dtype).view(shape).requires_grad_()
        layer.zero_grad()
        with offload:
            output = layer(x)
            output = output if isinstance(output, Tensor) else output[0]
        output.square().sum().backward()
        return [x.grad, *(p.grad for p in layer.parameters())]  # type: ignore[list-item]

    expected = trained(nullcontext())
    found = trained(Offload(DiskStore(), storages_of(layer)))
    assert all(map(torch.equal, expected, found))


def test_what_is_changed_in_place_afterwards_is_read_as_it_was() -> None:
    x = torch.full((8,), 1.0, requires_grad=True)
    with Offload(DiskStore()):
        a = 2 * x
        first = a * a
        a.add_(1.0)
        loss = (first + a * a).sum()
    loss.backward()
    # x = 1: 2 a = 4 with a = 2, 2 a = 6 with a = 3, and a = 2 x + ...: (4 + 6) 2.
    assert torch.equal(x.grad, torch.full((8,), 20.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "smallest"), [(DiskStore, 99), (HostStore, 0)])
def test_a_change_in_place_of_what_stays_is_told(kind: Callable[[], Store], smallest: int) -> None:
    """A store of the host's memory takes nothing that is there."""
    x = torch.full((8,), 1.0, requires_grad=True)
    with Offload(kind(), smallest=smallest):
        a = 2 * x
        loss = (a * a).sum()
        a.add_(1.0)
    with pytest.raises(RuntimeError, match="changed by an in-place operation"):
        loss.backward()


def test_memory_that_comes_after_other_memory_in_the_same_place_is_written_too() -> None:
    x = torch.ones(64, 256, requires_grad=True)
    total = torch.zeros(())
    with Offload(DiskStore()):
        for i in range(6):
            total = total + ((x + i) * (x + i)).sum()
    total.backward()
    # 2 (1 + i): 2 (1 + 2 + ... + 6).
    assert torch.equal(x.grad, torch.full((64, 256), 42.0))  # type: ignore[arg-type]


class Saves(torch.autograd.Function):
    """As fused losses, which save a parameter's gradient, and return it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return ctx.saved_tensors[0], None


def test_a_gradient_that_was_saved_is_not_what_others_have_saved() -> None:
    weight, other = (torch.ones(64, requires_grad=True) for _ in range(2))
    with Offload(DiskStore(), lends=True):
        gradient = torch.full((64,), 2.0)
        saved = (other * gradient).sum()
        total = Saves.apply(weight, gradient)  # type: ignore[no-untyped-call]
        del gradient
    total.backward()
    assert weight.grad is not None
    weight.grad.mul_(10.0)
    saved.backward()
    assert weight.grad.tolist() == [20.0] * 64
    assert other.grad is not None
    assert other.grad.tolist() == [2.0] * 64


class Keeps(torch.autograd.Function):
    """As fused losses, which compute their gradient in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.full_like(x, 3.0))
        return x.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return ctx.saved_tensors[0]  # type: ignore[no-any-return]


class Behind(nn.Module):
    """Changes what is saved without autograd's knowing, between two saves."""

    def forward(self, x: Tensor) -> Tensor:
        a = 2.0 * x
        first = a * a
        a.data.add_(1.0)
        return first + a * a


def test_a_block_that_changes_what_it_saves_behind_autograds_back_keeps_it() -> None:
    model, x = nn.Sequential(Behind(), nn.Linear(64, 64)), torch.full((64, 64), 0.1)
    chain = measure_chain(model, list(model), lambda called: called(x).sum(), {}, DiskStore())
    ways = [[way.name for way in block.ways] for block in chain.blocks]
    assert ways == [["all"], ["all", ELSEWHERE], ["all"]]


def test_a_gradient_that_is_what_was_read_may_be_changed() -> None:
    x = torch.ones(8, requires_grad=True)
    with Offload(DiskStore()):
        y = Keeps.apply(x)  # type: ignore[no-untyped-call]
    y.backward(retain_graph=True)
    assert x.grad is not None
    x.grad.zero_()
    y.backward()
    assert x.grad.tolist() == [3.0] * 8


def test_nothing_is_left_for_the_garbage_collector() -> None:
    table, x = torch.ones(64, 256), torch.ones(64, 256, requires_grad=True)
    store = DiskStore()
    gc.disable()
    try:
        for _ in range(5):
            with Offload(store):
                y = (x * table).sum()
            y.backward()
            del y
        assert file_size(store) == PAGE + 65_536  # it begins with one
        file = weakref.ref(store._file)
        del store
        assert file() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("sizes", [range(4, 44), range(43, 3, -1)], ids=["longer", "shorter"])
def test_batches_of_many_lengths_need_the_file_of_the_longest(
    sizes: Iterable[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it has long ceased to double, as one that has gigabytes."""
    monkeypatch.setattr("scaledtrain.recompute.offload._DOUBLES_TO", 2 * PAGE)
    store = DiskStore()
    for size in sizes:
        reads = [store.put(torch.full((size * PAGE,), i, dtype=torch.uint8)) for i in range(10)]
        assert [read()[-1].item() for read in reads] == list(range(10))
        del reads
    # The longest are 10 of 43 pages. By an eighth it grows, of which the last may stay unused.
    assert file_size(store) <= 430 * PAGE * 9 / 8


def test_what_is_given_back_while_a_place_is_taken_does_not_make_it_free() -> None:
    """As by garbage that is collected meanwhile."""
    store = DiskStore()
    garbage = [store.put(torch.zeros(32))]
    behind_all = store._file._behind_all

    def meanwhile(room: int) -> Any:
        place = behind_all(room)
        garbage.clear()
        return place

    store._file._behind_all = meanwhile  # type: ignore[method-assign]
    one, other = store.put(torch.ones(48)), store.put(torch.full((64,), 2.0))
    assert one().tolist() == [1.0] * 48
    assert other().tolist() == [2.0] * 64


def test_what_is_given_back_while_a_free_place_is_looked_for_is_no_fault() -> None:
    store = DiskStore()
    garbage = [store.put(torch.zeros(n * PAGE)) for n in (1, 2, 3)]  # in parts of their own

    class Free(defaultdict[int, list[Any]]):
        def get(self, room: int, default: Any = None) -> Any:
            garbage.clear()
            return super().get(room, default)

    store._file._free = Free(list)
    reads = [store.put(torch.full((n * PAGE,), float(n))) for n in (2, 4)]
    assert [read().unique().tolist() for read in reads] == [[2.0], [4.0]]


def test_a_block_with_something_sparse_is_measured() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacent", torch.eye(64).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            adjacent: Tensor = self.adjacent
            return x + torch.sparse.mm(adjacent, x).tanh()

    block, store = Sparse(), Counting()
    x = torch.ones(64, 8, requires_grad=True)
    with Offload.of_block(store, storages_of(block), x):
        y = block(x).sum()
    y.backward()
    assert x.grad is not None
    # 1 + (1 - tanh(1)^2)
    assert torch.allclose(x.grad, 2 - torch.tanh(torch.ones(())) ** 2)
    assert store.n_bytes == 64 * 8 * 4  # tanh's result
    model = nn.Sequential(block, nn.Tanh())
    chain = measure_chain(model, list(model), lambda called: called(x).sum(), {}, store)
    assert [way.name for way in chain.blocks[0].ways] == ["all", ELSEWHERE]


def test_blocks_that_keep_everything_elsewhere_need_what_is_predicted() -> None:
    expected = gradients(Chain())
    model, store = Chain(), DiskStore()
    blocks = list(model.blocks)
    chain = measure_chain(model, blocks, sample, {}, store)
    everything = cost(chain, (Keep(),) * 9).peak_bytes
    plans: list[Plan] = [(Keep(ELSEWHERE),) * 8, (*every(2, 4), *(Keep(ELSEWHERE),) * 4)]
    for plan in plans:
        executor = Executor(model, blocks, plan, {}, store)
        measured = peak_bytes(model, sample)
        smaller = peak_bytes(model, lambda called: sample(called, 3))
        model.zero_grad()
        assert all(map(torch.equal, expected, gradients(model)))
        executor.remove()
        predicted = cost(chain, (*plan, Keep())).peak_bytes
        assert predicted == pytest.approx(measured, rel=0.05)
        assert predicted < everything / 3
        assert smaller <= 0.8 * measured  # of three rows in place of four


def test_what_compiled_blocks_save_stays() -> None:
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(2)]
    model, x = nn.Sequential(*blocks), torch.ones(64, 64)
    compiled = Compiled(blocks, "eager")
    chain = measure_chain(model, blocks, lambda called: called(x).sum(), {}, DiskStore())
    assert [way.name for block in chain.blocks for way in block.ways] == ["all"] * 3
    compiled.remove()
    chain = measure_chain(model, blocks, lambda called: called(x).sum(), {}, DiskStore())
    assert [way.name for way in chain.blocks[0].ways] == ["all", ELSEWHERE]


def test_places_in_the_file_are_used_again() -> None:
    store = DiskStore()
    n = PAGE // 16
    stays = store.put(torch.full((n,), 7.0))
    for number in range(5):
        reads = [store.put(torch.full((n,), 10.0 * number + i)) for i in range(3)]
        assert [read()[0].item() for read in reads] == [10.0 * number + i for i in range(3)]
        del reads
    assert file_size(store) == PAGE  # of four times as many
    assert stays()[0].item() == 7.0


def test_the_offloaded_input_is_gone_meanwhile() -> None:
    layer = nn.Linear(256, 256)

    def live(store: Store | None) -> int:
        with LiveBytes() as counted:
            x = layer(torch.ones(64, 256))  # the layer needs its input of 65,536 bytes, not this
            if store is None:
                y = checkpoint(torch.exp, x, use_reentrant=False)
            else:
                with Offload(store):
                    y = checkpoint(torch.exp, x, use_reentrant=False)
            del x
            kept: int = counted.live
            y.sum().backward()
        return kept

    assert live(None) - live(DiskStore()) == 64 * 256 * 4


class Chain(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Block, n: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(block() for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


def sample(called: Any, rows: int = 4) -> Tensor:
    x = torch.linspace(-1.0, 1.0, 4 * 32 * 16).view(4, 32, 16)[:rows]
    return called(x).square().mean()  # type: ignore[no-any-return]


def gradients(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(3)
    for _ in range(2):
        sample(model).backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in model.parameters() if p.grad is not None]


class Pooled(Chain):
    """Nobody has the first block's input but that block, nor the last one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def test_what_is_around_the_blocks_counts_only_while_somebody_has_it() -> None:
    model, store = Pooled(), DiskStore()
    blocks, n_bytes = list(model.blocks), 4 * 32 * 16 * 4
    without = measure_chain(model, blocks, sample, {})
    assert without.blocks[0].way("all").keeps_input
    assert (without.base_bytes, without.first_input_bytes) == (2 * n_bytes, 0)  # and the sample's
    assert without.late_bytes == 8  # the loss and its gradient
    chain = measure_chain(model, blocks, sample, {}, store)
    assert (chain.base_bytes, chain.first_input_bytes) == (n_bytes, n_bytes)
    assert not chain.blocks[-1].way("all").keeps_input
    for step in (Keep(ELSEWHERE), Recompute((Keep(),), offload=True)):
        plan: Plan = (step,) * 8
        executor = Executor(model, blocks, plan, {}, store)
        measured = peak_bytes(model, sample)
        executor.remove()
        assert cost(chain, (*plan, Keep())).peak_bytes == pytest.approx(measured, rel=0.01)


def test_with_a_disk_a_budget_needs_less_and_changes_no_bit() -> None:
    expected = gradients(Chain())
    model = Chain()
    everything = peak_bytes(model, sample)
    with pytest.raises(ConfigError, match="or offload to disk") as caught:
        checkpoint_activations(model, MemoryBudget(1), sample)
    least = int(str(caught.value).partition("again, ")[2].split()[0])
    budget = MemoryBudget(int(0.35 * everything), offload="disk")
    handle = checkpoint_activations(model, budget, sample)
    assert peak_bytes(model, sample) <= budget.n_bytes
    assert all(map(torch.equal, expected, gradients(model)))
    handle.remove()
    with pytest.raises(ConfigError, match="do not fit into 1 bytes") as caught:
        checkpoint_activations(model, MemoryBudget(1, offload="disk"), sample)
    # Every plan without a disk is one with a disk; the sizes are rounded, as `smallest_bytes` says.
    rounding = everything / 1000
    assert int(str(caught.value).partition("again, ")[2].split()[0]) <= least + rounding


def test_a_full_disk_and_a_missing_folder_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be offloaded to /nowhere/at/all"):
        DiskStore("/nowhere/at/all")
    store = DiskStore()

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    reads = [store.put(torch.ones(PAGE // 4))]
    with pytest.raises(ConfigError, match=rf"{PAGE} bytes of activations cannot be .*space"):
        store.put(torch.ones(PAGE // 4))
    reads.clear()
    assert store.put(torch.ones(PAGE // 4))().sum() == PAGE // 4  # in the place of the first
    with pytest.raises(ConfigError, match=r"cannot be offloaded to .*written and mapped"):
        DiskStore()


def test_what_is_left_of_a_write_that_failed_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    store, write = DiskStore(), os.pwrite

    def almost_full(file: int, data: Any, place: int) -> int:
        if place > PAGE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:PAGE], place)

    monkeypatch.setattr(os, "pwrite", almost_full)
    with pytest.raises(ConfigError, match=f"after {PAGE} bytes: .*No space left"):
        store.put(torch.ones(PAGE))
    assert file_size(store) == PAGE


def test_wrong_places_are_refused() -> None:
    with pytest.raises(ConfigError, match="offload is 'tape'"):
        MemoryBudget("1GiB", offload="tape")
    with pytest.raises(ConfigError, match="offload is None, which needs none"):
        MemoryBudget("1GiB", offload_folder="/tmp")
    with pytest.raises(ConfigError, match="is in the host's memory already"):
        checkpoint_activations(Chain(), MemoryBudget("1GiB", offload="host"), sample)
