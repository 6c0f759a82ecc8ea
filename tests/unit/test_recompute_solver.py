"""Plans of what is computed again: the solver against all plans that there are."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from scaledtrain.errors import ConfigError
from scaledtrain.recompute.chain import Block, Chain, Way
from scaledtrain.recompute.plan import Keep, Plan, Recompute, cost, every
from scaledtrain.recompute.solver import fastest_plan, smallest_bytes


def plans(chain: Chain, first: int, last: int, again: bool = False) -> Iterator[Plan]:
    """All for some blocks whose last one is kept."""
    for way in chain.blocks[first].ways:
        if again and way.first_pass_only:
            continue
        for offload in (False, True) if way.runs_again and chain.offload_seconds else (False,):
            rests: Iterator[Plan] = iter([()])
            if first < last:
                rests = plans(chain, first + 1, last, again)
            yield from ((Keep(way.name, offload), *rest) for rest in rests)
    for middle in range(first + 1, last + 1):
        inner = list(plans(chain, first, middle - 1, True))
        for offload in (False, True) if chain.offload_seconds else (False,):
            for rest in plans(chain, middle, last, again):
                yield from ((Recompute(plan, offload), *rest) for plan in inner)


def any_block(generator: random.Random) -> Block:
    output, seconds = generator.randint(1, 4), generator.randint(1, 9)
    ways = []
    for name in ("all", "dear")[: generator.randint(1, 2)]:
        kept = generator.randint(0, 9)
        keeps_output = kept >= output and generator.random() < 0.3
        beside = kept - output if keeps_output else kept
        runs_again = generator.random() < 0.5
        ways.append(
            Way(
                name,
                forward_seconds=seconds + generator.randint(0, 2),
                backward_seconds=generator.randint(1, 9),
                kept_bytes=kept,
                forward_bytes=beside + output + generator.randint(0, 4),
                backward_bytes=generator.randint(0, 5),
                stopped_seconds=generator.randint(0, seconds),
                keeps_input=runs_again or generator.random() < 0.7,
                keeps_output=keeps_output,
                runs_again=runs_again,
                first_pass_only=name != "all" and not runs_again and generator.random() < 0.5,
            )
        )
    return Block(tuple(ways), output, seconds, output + generator.randint(0, 3))


@pytest.mark.parametrize("seed", range(24))
def test_the_solver_finds_what_trying_all_plans_finds(seed: int) -> None:
    generator = random.Random(seed)
    n_blocks = generator.randint(1, 4)
    blocks = tuple(any_block(generator) for _ in range(n_blocks))
    base, first_input = generator.randint(0, 3), generator.randint(0, 4)
    late = generator.randint(0, 2)
    chain = Chain(blocks, base, generator.choice([None, 0.25]), first_input, late)
    costs = [cost(chain, plan) for plan in plans(chain, 0, n_blocks - 1)]
    least = min(c.peak_bytes for c in costs)
    assert smallest_bytes(chain) == least
    assert fastest_plan(chain, least - 1) is None
    for budget in range(least, max(c.peak_bytes for c in costs) + 1):
        plan = fastest_plan(chain, budget)
        assert plan is not None
        found = cost(chain, plan)
        assert found.peak_bytes <= budget
        assert found.seconds == min(c.seconds for c in costs if c.peak_bytes <= budget)


KEEPS_ALL = Way("all", 1.0, 2.0, 11, 12, 13, 0.75)
KEEPS_SOME = Way("dear", 1.25, 2.5, 6, 12, 14, 1.25, runs_again=True)
BLOCK = Block((KEEPS_ALL, KEEPS_SOME), output_bytes=1, forward_seconds=1.0, forward_bytes=6)
UNIFORM = Chain((BLOCK,) * 16)


def test_no_fixed_policy_is_faster_in_as_many_bytes() -> None:
    fixed = [(*every(k, 15), Keep()) for k in range(1, 16)]
    fixed += [(Keep(way),) * 16 for way in ("all", "dear")]
    for plan in fixed:
        seconds, peak = cost(UNIFORM, plan)
        best = fastest_plan(UNIFORM, peak)
        assert best is not None
        assert cost(UNIFORM, best).seconds <= seconds


@pytest.mark.parametrize("seed", range(4))
def test_nor_where_sizes_are_anything_and_many_are_less_than_a_unit(seed: int) -> None:
    """Of 40 boundaries of a few bytes, each would count as a thousandth of the budget."""
    generator = random.Random(seed)
    scale = generator.choice([1, 1_000_003, 2**41 - 9])
    kept, output = generator.randint(3_000, 9_000) * scale, generator.randint(1, 9) * scale + 1
    keeps_all = Way("all", 1.1, 2.3, kept, kept + output, kept + 7, 0.7)
    keeps_some = Way("dear", 1.3, 2.9, kept // 3 + 1, kept, kept + 5, 1.3, runs_again=True)
    block = Block((keeps_all, keeps_some), output, 1.01, kept // 2)
    tail = Block((Way("all", 0.1, 0.1, 0, 2, 2, 0.1),), 0, 0.1, 2)
    chain = Chain((block,) * 40 + (tail,), base_bytes=generator.randint(0, 10**6))
    fixed = [(*every(k, 40), Keep()) for k in (1, 2, 5, 13)]
    fixed += [(*(Keep(way),) * 40, Keep()) for way in ("all", "dear")]
    for plan in fixed:
        seconds, peak = cost(chain, plan)
        best = fastest_plan(chain, peak)
        assert best is not None
        assert cost(chain, best).peak_bytes <= peak
        assert cost(chain, best).seconds <= seconds
    least = smallest_bytes(chain)
    assert least <= min(cost(chain, plan).peak_bytes for plan in fixed)
    assert fastest_plan(chain, least) is not None


def test_more_bytes_never_take_longer_and_the_least_is_run_most() -> None:
    least = smallest_bytes(UNIFORM)
    budgets = range(least, 16 * 12 + 5)
    found = [fastest_plan(UNIFORM, budget) for budget in budgets]
    seconds = [cost(UNIFORM, plan).seconds for plan in found if plan is not None]
    assert len(seconds) == len(budgets)
    assert seconds == sorted(seconds, reverse=True)
    # Keeping everything: 16 x (1 + 2). One block's 13 bytes in its backward pass, its input and its
    # gradient are the least: the other blocks run again and again.
    assert seconds[-1] == 48.0
    assert seconds[0] > 80.0
    assert least == 13 + 1 + 1


def test_what_comes_to_what() -> None:
    # The others' 11 bytes each, two inputs, the last gradient, and the last one's 13 in its
    # backward pass.
    three = Chain((BLOCK,) * 3, base_bytes=100)
    assert cost(three, (Keep(),) * 3) == (9.0, 100 + 22 + 2 + 1 + 13)
    # Two inputs of 1 wait while the last block has 13 and a gradient; the others run again,
    # stopped: 2 x (1 + 0.75 + 2) + 3.
    assert cost(three, (*every(1, 2), Keep())) == (10.5, 100 + 2 + 1 + 13)
    # Together, the second one alone is stopped: 1 + 1 + 3, and again 1 + 2 + 0.75 + 2. The first
    # one's 11 bytes and the second one's input wait meanwhile.
    assert cost(three, (*every(2, 2), Keep())) == (10.75, 100 + 12 + 1 + 13)
    # 1 + 1 + 3, again 1 + 0.75 + 2, and the first a third time 0.75 + 2; inputs of 1 wait.
    nested = (Recompute((Recompute((Keep(),)), Keep())), Keep())
    assert cost(three, nested) == (11.5, 100 + 1 + 1 + 13)
    assert cost(three, (Keep("dear"),) * 3) == (3 * 3.75, 100 + 6 * 2 + 2 + 1 + 14)


def test_what_offloading_comes_to() -> None:
    # An input of 1 is 0.5 seconds there and back. The first block's input is always there; the
    # second one's is away during the third one's backward pass, and here again in its own.
    three = Chain((BLOCK,) * 3, base_bytes=100, offload_seconds=0.5)
    plan = (Recompute((Keep(),)), Recompute((Keep(),), offload=True), Keep())
    assert cost(three, plan) == (10.5 + 0.5, 100 + 1 + 1 + 13)
    # All but the last one's 13 bytes and its gradient: 14 in place of 16 bytes for 2 x 0.5.
    plan = (Recompute((Keep(),)), Recompute((Keep(),), offload=True), Keep("dear", offload=True))
    assert cost(three, plan) == (2 * 3.75 + 3.75 + 2 * 0.5, 100 + 1 + 1 + 14)
    best = fastest_plan(three, 100 + 1 + 1 + 13)
    assert best is not None
    assert cost(three, best).seconds == 11.0
    assert fastest_plan(Chain((BLOCK,) * 3, 100), 100 + 1 + 1 + 13) == (
        Recompute((Recompute((Keep(),)), Keep())),
        Keep(),
    )


def test_what_nobody_needs_is_not_counted() -> None:
    # As a linear layer and a tanh: the one needs its input, the other its output, which the next
    # linear layer needs as well. All are of 4 bytes.
    linear = Block((Way("all", 1.0, 2.0, 0, 4, 4, 0.0),), 4, 1.0, 4)
    tanh_way = Way("all", 0.1, 0.1, 4, 4, 4, 0.1, keeps_input=False, keeps_output=True)
    tanh = Block((tanh_way,), 4, 0.1, 4)
    pairs = Chain((linear, tanh) * 2, base_bytes=4)
    # The base, the last gradient, and when the last tanh runs, the other's output, what it is given
    # and returns itself: what the linear layers return is counted as long as it is there.
    assert cost(pairs, (Keep(),) * 4).peak_bytes == 4 + 4 + 4 + 4 + 4


def test_a_long_chain_of_equal_blocks_is_solved() -> None:
    tail = Block((Way("all", 0.1, 0.1, 0, 2, 2, 0.1),), 0, 0.1, 2)
    chain = Chain((BLOCK,) * 200 + (tail,), base_bytes=1)
    everything = cost(chain, (Keep(),) * 201)
    plan = fastest_plan(chain, everything.peak_bytes // 10)
    assert plan is not None
    found = cost(chain, plan)
    assert found.peak_bytes <= everything.peak_bytes // 10
    # Every block once more, at 0.75 to 1 of its 3 seconds: a third more at most.
    assert everything.seconds < found.seconds < everything.seconds * 4 / 3


def test_a_chain_has_blocks_and_they_have_ways() -> None:
    with pytest.raises(ConfigError, match="at least one block"):
        Chain(())
    with pytest.raises(ConfigError, match="block 1 of the chain has no way"):
        Chain((BLOCK, Block((), 1, 1.0, 1)))
