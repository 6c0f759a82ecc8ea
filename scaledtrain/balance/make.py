"""From what is asked for to what shares samples out in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from scaledtrain.balance.agree import Agree, InLockstep, OnBoard
from scaledtrain.balance.balancer import Balancer
from scaledtrain.balance.policies import Balance
from scaledtrain.errors import ConfigError

if TYPE_CHECKING:
    from scaledtrain.parallel import Layout
    from scaledtrain.strategies import Strategy

__all__ = ["make_balancer"]


def make_balancer(
    balance: Balance | None, strategy: Strategy, layout: Layout, say: Callable[[str], None]
) -> Balancer | None:
    """What shares samples out among the replicas; None: each takes equally many. Collective.

    Args:
        balance: as asked for.
        strategy: of the replicas, attached.
        layout: of each.
        say: shows a line to people.

    Raises:
        ConfigError: that cannot be with this layout, or with this strategy.
    """
    link = layout.link
    if balance is None or balance.is_even:
        return None
    balance.first(link.group.size, link.group.size)  # so that a wrong number of shares is told now
    if link.group.size == 1:
        return None
    if layout.stage_ranks > 1:
        raise ConfigError(
            f"balance is {balance}, but with mesh.pipe the batches of a replica are cut into "
            "microbatches of one size; leave balance out, or set mesh.pipe to 1"
        )
    agree = None if balance.every is None else _agree(balance, strategy, layout)
    return Balancer(balance, link.group.size, link.timeline, link.device, agree, say)


def _agree(balance: Balance, strategy: Strategy, layout: Layout) -> Agree:
    link = layout.link
    if strategy.lockstep.size == link.group.size:
        return InLockstep(strategy.lockstep, layout.pieces, link.device)
    if not strategy.makes_equal_steps:
        raise ConfigError(
            f"balance is {balance}, but the replicas of {strategy} do not wait for each other: a "
            "fast one makes more steps; leave balance out, or give them shares that stay "
            "(balance=fixed)"
        )
    if layout.pieces.size > 1 or link.returned:
        raise ConfigError(
            f"balance is {balance}, which with {strategy} needs replicas of one rank that have all "
            "been there from the start; take balance=fixed or even, or strategy=sync"
        )
    return OnBoard(link.board())
