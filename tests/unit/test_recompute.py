"""Models whose activations are computed again: the same bits, fewer bytes, within the budget."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

from scaledtrain import Precision, Trainer
from scaledtrain.errors import ConfigError
from scaledtrain.models import GPT
from scaledtrain.recompute import (
    CheckpointEvery,
    CheckpointPolicy,
    CheckpointSqrt,
    MemoryBudget,
    Selective,
    checkpoint_activations,
    measure,
)
from scaledtrain.recompute.apart import Apart, peak_bytes
from scaledtrain.recompute.budget import PlanSearch
from scaledtrain.recompute.dear import contexts_of
from scaledtrain.recompute.execute import Executor
from scaledtrain.recompute.live_bytes import LiveBytes
from scaledtrain.recompute.measure import measure_chain
from scaledtrain.recompute.offload import DiskStore
from scaledtrain.recompute.plan import Keep, Plan, Recompute, cost, every
from scaledtrain.recompute.solver import fastest_plan, smallest_bytes

TOKENS = torch.arange(4 * 32).view(4, 32) % 31


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(31, sequence_length=32, n_layers=8, n_heads=2, d_model=32, dropout=0.1)


class Residual(nn.Module):
    """A block of a convnet, with a buffer that every forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, momentum=0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor]:
        return (x + scale * F.relu(self.norm(self.convolution(x))),)


class Convnet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.stages = nn.ModuleList(Residual() for _ in range(6))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.stages:
            (x,) = block(x, scale=0.5)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def chain_of_layers() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.2)) for _ in range(9))
    return nn.Sequential(*layers)


IMAGES = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]] = {
    "gpt": (gpt, lambda model: model(TOKENS).logsumexp(-1).mean()),
    "convnet": (Convnet, lambda model: model(IMAGES).square().mean()),
    "layers": (chain_of_layers, lambda model: model(ROWS).square().mean()),
}
POLICIES: dict[str, CheckpointPolicy] = {
    "every block": CheckpointEvery(),
    "every 3": CheckpointEvery(3),
    "sqrt": CheckpointSqrt(),
    "selective": Selective(),
    "by name": Selective(["addmm", "convolution"]),
}


def trained(model: nn.Module, sample: Callable[[Any], Tensor]) -> tuple[list[Tensor], int]:
    """Of two microbatches gradients, buffers, and the next random number; bytes at most."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.manual_seed(3)
    with LiveBytes() as counted:
        for _ in range(2):
            sample(model).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*gradients, *model.buffers(), torch.rand(1)], counted.peak


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_bits_in_fewer_bytes(policy: str, case: str) -> None:
    make, sample = CASES[case]
    expected, everything = trained(make(), sample)
    model = make()
    checkpoint_activations(model, POLICIES[policy])
    found, peak = trained(model, sample)
    assert len(expected) == len(found)
    assert all(map(torch.equal, expected, found))
    assert peak < 0.8 * everything


def test_what_is_dear_is_kept_in_the_modules_that_are_named() -> None:
    """The bits of everything, dropout included; in bytes what these modules' layers return."""
    make, sample = CASES["gpt"]
    expected, everything = trained(make(), sample)
    peaks = []
    for policy in (
        CheckpointEvery(1),
        Selective(modules=["attention.projection"]),
        Selective(modules=["attention"]),
        Selective(modules=["attention", "mlp"]),
        Selective(["bmm"], modules=["mlp"]),  # which has none
    ):
        model = make()
        handle = checkpoint_activations(model, policy, sample)
        found, peak = trained(model, sample)
        assert all(map(torch.equal, expected, found))
        peaks.append(peak)
        handle.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # Of 8 blocks all but the last, whose turn it is at the peak, of 4 x 32 tokens of 32 floats.
    unit = 7 * 4 * 32 * 32 * 4
    # The projection returns one. Attention: queries, keys and values, 3; scores of 2 heads and 32
    # tokens, 2; what they weigh, 1; its projection. The MLP: 4 and 1.
    nothing = peaks[0]
    assert [peak - nothing for peak in peaks] == [0, unit, 7 * unit, 12 * unit, 0]
    assert nothing + 12 * unit < everything
    with pytest.raises(ConfigError, match="modules has 'attn', but no module in the blocks has a"):
        checkpoint_activations(model, Selective(modules=["attn"]))
    assert not any("forward" in vars(module) for module in model.modules())
    checkpoint_activations(model, Selective(modules=["mlp"]))


@pytest.mark.parametrize("share", [0.75, 0.6, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_a_budget_is_kept_and_predicted(case: str, share: float) -> None:
    make, sample = CASES[case]
    expected, everything = trained(make(), sample)
    model = make()
    budget = int(share * everything)
    handle = checkpoint_activations(model, MemoryBudget(budget), sample)
    found, peak = trained(model, sample)
    assert peak <= budget
    assert all(map(torch.equal, expected, found))
    planned = handle.planned
    assert planned is not None
    assert peak <= planned.measured_bytes <= budget
    assert planned.predicted.peak_bytes == pytest.approx(planned.measured_bytes, rel=0.05)
    assert planned.everything.peak_bytes == pytest.approx(everything, rel=0.05)
    ahead = planned.predicted.seconds / planned.everything.seconds - 1.0
    told = f"predicted are {planned.predicted.peak_bytes / 2**20:.1f} MiB and {ahead:+.0%} time"
    assert told in handle.told
    assert f"measured {planned.measured_bytes / 2**20:.1f} MiB of {budget / 2**20:.1f} MiB" in (
        handle.told
    )


@pytest.mark.parametrize("case", CASES)
def test_predicted_bytes_are_measured_bytes(case: str) -> None:
    make, sample = CASES[case]
    model = make()
    blocks = list(model.children()) if case == "layers" else None
    blocks = blocks or list(model.get_submodule("blocks" if case == "gpt" else "stages"))
    ways = {"dear": contexts_of()}
    chain = measure_chain(model, blocks, sample, ways)
    assert len(chain) == len(blocks) + 1
    n, one = len(blocks), Keep()
    nested = (Recompute((Recompute((one, one)), one)), Recompute((one, Keep("dear"))))
    plans: list[Plan] = [(one,) * n, every(1, n), every(2, n), (Keep("dear"),) * n]
    plans.append((*nested, *every(1, n - 5)))
    for plan in plans:
        executor = Executor(model, blocks, plan, ways)
        measured = peak_bytes(model, sample)
        executor.remove()
        assert cost(chain, (*plan, one)).peak_bytes == pytest.approx(measured, rel=0.05)


def test_a_budget_that_cannot_be_kept_names_one_that_can() -> None:
    make, sample = CASES["gpt"]
    with pytest.raises(ConfigError, match=r"do not fit into 50000 bytes") as caught:
        checkpoint_activations(make(), MemoryBudget(50_000), sample)
    found = re.search(r"(\d+) bytes \(", str(caught.value))
    assert found is not None
    model = make()
    checkpoint_activations(model, MemoryBudget(int(found[1])), sample)
    assert peak_bytes(model, sample) <= int(found[1])


def test_a_budget_that_only_the_smallest_plan_keeps_to_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All plans take a byte too much when they are tried out, but for the one that takes least."""
    make, sample = CASES["layers"]
    measured = PlanSearch._measured
    budget = peak_bytes(make(), sample) * 2 // 3

    def too_much(search: PlanSearch, plan: Plan) -> int | None:
        if plan == fastest_plan(search._chain, smallest_bytes(search._chain)):
            return measured(search, plan)
        return budget + 1

    monkeypatch.setattr(PlanSearch, "_measured", too_much)
    model = make()
    checkpoint_activations(model, MemoryBudget(budget), sample)
    assert peak_bytes(model, sample) <= budget


def test_a_plan_that_takes_a_little_too_much_makes_room_for_the_next_smaller_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, sample = CASES["gpt"]
    measured = PlanSearch._measured
    budget = peak_bytes(make(), sample) * 2 // 3
    monkeypatch.setattr(measure, "_seconds", lambda runs, x: [(1.0, 2.0)] * len(runs))
    handle = checkpoint_activations(make(), MemoryBudget(budget), sample)
    assert handle.planned is not None
    much = budget - handle.planned.measured_bytes + 40
    # It is predicted to take much less than the budget, and found to take 40 bytes more.
    monkeypatch.setattr(
        PlanSearch, "_measured", lambda search, plan: (measured(search, plan) or 0) + much
    )
    found = checkpoint_activations(make(), MemoryBudget(budget), sample)
    assert found.planned is not None
    assert found.planned.measured_bytes <= budget
    assert found.planned.predicted_more < handle.planned.predicted_more + 0.1


class Tied(nn.Module):
    """Its embedding waits for a second gradient while the blocks have their backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(4)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.embedding.weight)


@pytest.mark.parametrize("store", [None, DiskStore()], ids=["memory", "disk"])
def test_the_gradient_of_a_tied_embedding_counts(store: DiskStore | None) -> None:
    model, tokens = Tied(), torch.arange(128)
    blocks = list(model.blocks)

    def sample(called: Any) -> Tensor:
        return called(tokens).square().mean()  # type: ignore[no-any-return]

    chain = measure_chain(model, blocks, sample, {}, store)
    for k in (1, 2, 4):
        executor = Executor(model, blocks, every(k, 4))
        measured = peak_bytes(model, sample)
        executor.remove()
        predicted = cost(chain, (*every(k, 4), Keep())).peak_bytes
        assert predicted == pytest.approx(measured, rel=0.01)


def test_measuring_leaves_the_model_as_it_was() -> None:
    make, sample = CASES["convnet"]
    model = make()
    calls: list[int] = []
    weight = next(model.parameters())
    weight.register_post_accumulate_grad_hook(lambda parameter: calls.append(1))  # type: ignore[no-untyped-call]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    handle = checkpoint_activations(model, MemoryBudget("1MiB"), sample)
    assert torch.equal(torch.rand(1), expected)
    assert calls == []
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    handle.remove()
    assert not any("forward" in vars(module) for module in model.modules())


def test_hooks_see_each_call_once_and_are_in_no_group() -> None:
    model = chain_of_layers().eval()
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    expected = model[:2](ROWS)
    handle = checkpoint_activations(model, CheckpointEvery(1))
    seen.clear()
    model(ROWS).sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], expected)
    handle.remove()
    checkpoint_activations(model, CheckpointEvery(3))
    with pytest.raises(ConfigError, match="one of them has hooks"):
        model(ROWS)
    with torch.no_grad():
        model(ROWS)


class Collecting(nn.Module):
    """Uses the output of every block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        three = (nn.Linear, nn.Tanh) * 3
        self.blocks = nn.ModuleList(
            nn.Sequential(*(kind(32, 32) if kind is nn.Linear else kind() for kind in three))
            for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return torch.stack(outputs)


class Adding(Collecting):
    """A block is given more than what the one before it returned."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Skipping(Collecting):
    """Leaves a block out."""

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x) if index != 1 else x
        return x


class Shifting(nn.Module):
    """Changes an argument of its blocks in place after it was used."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Shifted() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.zeros(1)
        for block in self.blocks:
            x = block(x, shift)
            shift.add_(1.0)
        return x


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * torch.cos(shift)
        return out


def test_blocks_that_are_no_plain_chain_run_one_by_one_or_not_at_all() -> None:
    for make, message in (
        (Adding, "returns is used for something else than the next block"),
        (Skipping, "not all blocks that are computed again together were called"),
    ):
        model = make()
        handle = checkpoint_activations(model, CheckpointEvery(2))
        with pytest.raises(ConfigError, match=message):
            model(ROWS).sum().backward()
        handle.remove()
        checkpoint_activations(model, CheckpointEvery(1))
        model(ROWS).sum().backward()
    shifting = Shifting()
    checkpoint_activations(shifting, CheckpointEvery(1))
    with pytest.raises(ConfigError, match="was changed in place after the block was called"):
        shifting(ROWS).sum().backward()


def test_a_budget_groups_only_what_is_a_chain() -> None:
    def sample(called: Any) -> Tensor:
        return called(ROWS).square().mean()

    for make in (Adding, Collecting):
        expected, everything = trained(make(), sample)
        model = make()
        checkpoint_activations(model, MemoryBudget(int(0.75 * everything)), sample)
        found, peak = trained(model, sample)
        assert peak <= 0.75 * everything
        assert all(map(torch.equal, expected, found))
    with pytest.raises(ConfigError, match="returns is used for something else"):
        checkpoint_activations(Collecting(), CheckpointEvery(2), sample)
    checkpoint_activations(Collecting(), CheckpointEvery(1), sample)
    fickle = chain_of_layers()
    draws = iter(range(100))
    with pytest.raises(ConfigError, match="does not compute the same each time: only"):
        checkpoint_activations(
            fickle, MemoryBudget("1MiB"), lambda called: called(ROWS).square().mean() + next(draws)
        )


class Gated(Collecting):
    """Adds up what blocks return, at first times 0, so that its loss does not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ParameterList(torch.zeros(1) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.zeros(())
        for gate, block in zip(self.gates, self.blocks, strict=True):
            x = block(x)
            assert x.shape == (64, 32)
            skip = skip + gate * x
        return x + skip


def test_what_is_used_between_blocks_is_never_another_ones_output() -> None:
    def sample(called: Any) -> Tensor:
        return called(ROWS).square().mean()

    expected, everything = trained(Gated(), sample)
    assert expected[0].abs().sum() > 0  # the gates' gradients: each has its own
    told = (
        r"\d blocks are to be computed again together, but what number 0, a Sequential, returns is "
        r"used for something else than the next block: choose a policy that takes them one by one"
    )
    for policy in (CheckpointEvery(2), CheckpointSqrt()):
        model = Gated()
        with pytest.raises(ConfigError, match=told):
            checkpoint_activations(model, policy, sample)
        handle = checkpoint_activations(model, policy)
        for _ in range(2):
            with pytest.raises(ConfigError, match=told):
                sample(model)
        handle.remove()
        assert all(map(torch.equal, trained(model, sample)[0], expected))
    budget = int(0.75 * everything)
    model = Gated()
    checkpoint_activations(model, MemoryBudget(budget), sample)
    found, peak = trained(model, sample)
    assert peak <= budget
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.register_hook(print),
        lambda x: x.retain_grad(),
        lambda x: x.backward(torch.ones(64, 32)),
        lambda x: x.detach().mean(),
        lambda x: ROWS.clone().copy_(x),
    ],
    ids=["register_hook", "retain_grad", "backward", "detach", "copy"],
)
def test_whatever_a_model_does_with_an_output_that_is_not_there(
    use: Callable[[Tensor], Any],
) -> None:
    class Using(Collecting):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
                use(x)
            return x

    model = Using()
    Executor(model, list(model.blocks), every(3, 6))
    with pytest.raises(ConfigError, match="number 0, a Sequential, returns is used for"):
        model(ROWS)


class Numbered(nn.Module):
    """A block that knows its number, and scales its result by what follows from it."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.layer_idx, self.scale = index, 1 + index / 100

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * self.scale


def test_blocks_that_differ_by_noise_are_planned_as_equal_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(0.01 * i + 0.0001 * (i % 7) for i in range(10**6))  # each step takes about 10 ms
    monkeypatch.setattr("scaledtrain.recompute.measure.time.perf_counter", lambda: next(clock))
    model = nn.Sequential(*(Numbered(i) for i in range(8)))
    *blocks, _ = measure_chain(
        model, list(model), lambda called: called(ROWS).square().mean(), {}
    ).blocks
    assert len(set(blocks)) == 2  # the first one joins none before it
    assert len({block.ways for block in blocks}) == 1


def test_a_policy_says_which_blocks_it_means() -> None:
    model = nn.ModuleDict({"long": nn.ModuleList(nn.Linear(4, 4) for _ in range(5))})
    model["deep"] = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    for names in (["deep"], ["deep.0", "deep.1", "deep.2"]):
        for policy in (CheckpointEvery(blocks=names), Selective(blocks=names)):
            handle = checkpoint_activations(model, policy)
            diverted = [name for name, m in model.named_modules() if "forward" in vars(m)]
            assert diverted == ["deep.0", "deep.1", "deep.2"]
            handle.remove()


def test_a_copy_of_the_model_is_its_own() -> None:
    model = chain_of_layers().eval()
    handle = checkpoint_activations(model, CheckpointEvery(3))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        copied(ROWS).sum().backward()
        assert torch.equal(copied(ROWS), torch.zeros(64, 32))
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(parameter.grad is not None for parameter in copied.parameters())
    with pytest.raises(ConfigError, match="computed again already"):
        checkpoint_activations(model, CheckpointEvery(1))
    handle.remove()
    checkpoint_activations(model, CheckpointEvery(1))


class Noisy(nn.Module):
    """Two operators that draw random numbers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return x + F.dropout(y * torch.rand_like(y), 0.5)


def test_what_draws_random_numbers_is_never_kept() -> None:
    """If it were, it would not draw again, and what comes after it would draw its numbers."""
    gradients = []
    for policy in (None, Selective(["rand_like", "addmm"])):
        torch.manual_seed(0)
        model = nn.Sequential(Noisy(), Noisy(), Noisy())
        if policy is not None:
            checkpoint_activations(model, policy)
        model(torch.ones(4, 8)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_under_autocast_the_budget_holds_and_bits_stay() -> None:
    def sample(called: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return called(ROWS).float().square().mean()

    expected, everything = trained(chain_of_layers(), sample)
    model = chain_of_layers()
    checkpoint_activations(model, MemoryBudget(int(0.75 * everything)), sample)
    found, peak = trained(model, sample)
    assert peak <= 0.75 * everything
    assert all(map(torch.equal, expected, found))


def test_the_trainer_trains_to_the_same_bits_and_plans_at_the_first_batch() -> None:
    data = [(TOKENS[i : i + 2], TOKENS[i : i + 2]) for i in (0, 2)] * 4

    def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def run(policy: CheckpointPolicy | None) -> str:
        with Trainer(
            gpt(), loss_fn, partial(torch.optim.SGD, lr=0.1), activation_checkpointing=policy,
            precision=Precision(), gradient_accumulation_steps=2, console=False,
        ) as trainer:  # fmt: skip
            trainer.fit(data, max_steps=4)
            return trainer.replica.sha256()

    expected = run(None)
    for policy in (CheckpointEvery(2), Selective(), MemoryBudget("600KiB")):
        assert run(policy) == expected
    with pytest.raises(ConfigError, match="do not fit into 10000 bytes"):
        run(MemoryBudget(10_000))


def allocated_bytes(model: nn.Module, sample: Callable[[Any], Tensor]) -> int:
    """At most in a step, as torch's allocator tells it, which sees compiled code, too."""
    with Apart(model) as apart, torch.profiler.profile(profile_memory=True) as seen:
        sample(apart).backward()  # type: ignore[no-untyped-call]
    events = seen.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())))


# Says torch, and hides it, where a graph is given what is not a leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_with_a_budget_blocks_really_are_compiled_and_keep_to_it() -> None:
    """Torch never compiles what it met under a mode that sees operators, as when bytes are counted.

    So runs of graphs are counted.
    """
    make, sample = CASES["gpt"]
    torch._dynamo.reset()
    runs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled = aot_eager(graph, inputs)

        def run(*args: Any) -> Any:
            nonlocal runs
            runs += 1
            return compiled(*args)

        return run

    model = make()
    everything = peak_bytes(model, sample)
    assert allocated_bytes(model, sample) == everything
    # 8 blocks run forward, and those again that a plan does not keep.
    for share, least, most in ((2.0, 8, 8), (0.4, 9, 8 * 8)):
        model, budget, runs = make(), int(share * everything), 0
        handle = checkpoint_activations(model, MemoryBudget(budget), sample, compile=counting)
        assert runs == 0  # tried out as they are written
        sample(model).backward()  # type: ignore[no-untyped-call]
        assert least <= runs <= most
        assert allocated_bytes(model, sample) <= budget
        handle.remove()
    torch._dynamo.reset()


# Says torch, and hides it, where a graph is given what is not a leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_are_computed_again_to_the_same_bits() -> None:
    make, sample = CASES["gpt"]
    expected, everything = trained(make(), sample)
    for policy in (CheckpointEvery(2), MemoryBudget(int(0.6 * everything))):
        model = make()
        handle = checkpoint_activations(model, policy, sample, compile="aot_eager")
        found, peak = trained(model, sample)
        assert all(map(torch.equal, expected, found))
        assert peak <= 0.6 * everything
        handle.remove()
        assert not any("forward" in vars(module) for module in model.modules())
    handle = checkpoint_activations(model, CheckpointEvery(1))
    with pytest.raises(ConfigError, match="computed again already"):
        checkpoint_activations(model, CheckpointEvery(1), compile="aot_eager")
    handle.remove()
    with pytest.raises(ConfigError, match="operators in compiled blocks are not seen"):
        checkpoint_activations(model, Selective(), sample, compile="aot_eager")
    assert not any("forward" in vars(module) for module in model.modules())
    torch._dynamo.reset()


class Cache:
    """What a model might hand from block to block."""


def test_what_cannot_be_computed_again_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no nn.Sequential or nn.ModuleList"):
        checkpoint_activations(nn.Linear(2, 2), CheckpointEvery())
    with pytest.raises(ConfigError, match="blocks has 'layer', which GPT has not"):
        checkpoint_activations(gpt(), CheckpointEvery(blocks=["layer"]))
    with pytest.raises(ConfigError, match="blocks is 'deep'; it is a list of names"):
        checkpoint_activations(gpt(), CheckpointEvery(blocks="deep"))
    model = Convnet()
    checkpoint_activations(model, CheckpointEvery())
    with pytest.raises(ConfigError, match="given a Cache, which may change"):
        model.stages[0](torch.randn(1, 4, 6, 6), scale=Cache())
    with pytest.raises(ConfigError, match="without a tensor as its first positional argument"):
        model.stages[0](x=torch.randn(1, 4, 6, 6))
    in_place = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="changes its input in place"):
        checkpoint_activations(
            in_place, MemoryBudget("1MiB"), lambda called: called(torch.randn(2, 4)).sum()
        )
    model = Convnet()
    checkpoint_activations(model, CheckpointEvery(2))
    (x,) = model.stages[0](torch.randn(1, 4, 6, 6), scale=0.5)
    with pytest.raises(ConfigError, match="and the same other arguments"):
        model.stages[1](x, scale=0.25)
    twice = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="a block comes twice"):
        checkpoint_activations(nn.Sequential(twice, twice), CheckpointEvery())
    normed = nn.Sequential(
        *(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)) for _ in "ab")
    )
    checkpoint_activations(normed, CheckpointEvery())
    with pytest.raises(ConfigError, match="changes its buffers in its forward pass"):
        normed(torch.randn(2, 4))
    frozen = chain_of_layers().requires_grad_(False)
    with pytest.raises(ConfigError, match="no gradient comes to the last block"):
        checkpoint_activations(frozen, MemoryBudget("1MiB"), CASES["layers"][1])
    with pytest.raises(ConfigError, match="needs a sample: .* Stages that are sharded .* choose"):
        checkpoint_activations(gpt(), MemoryBudget(10_000))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CheckpointEvery(0), "k is 0"),
        (lambda: MemoryBudget("2 gigs"), "'2 gigs' is not understood"),
        (lambda: MemoryBudget(0), "holds nothing"),
        (lambda: Selective(modules="attention"), "modules is 'attention'; it is a list"),
        (lambda: Selective(["matmull"]), "'matmull', which torch.ops.aten has not"),
    ],
)
def test_wrong_policies_are_refused(make: Callable[[], CheckpointPolicy], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
