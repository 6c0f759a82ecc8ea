"""Whether any rank says so."""

from __future__ import annotations

import torch

from scaledtrain.comm.protocols import Group

__all__ = ["any_rank"]


def any_rank(group: Group, vote: bool, device: torch.device | None = None) -> bool:
    """Whether a rank of the group votes for it; the same answer on all of them. Collective.

    Args:
        group: which ranks.
        vote: this rank's.
        device: on which the group's tensors have to be; None: the CPU.

    Example:
        >>> from scaledtrain.comm.local import LocalGroup
        >>> any_rank(LocalGroup(), True)
        True
    """
    if group.size == 1:
        return vote
    votes = torch.tensor([int(vote)], device=device)
    group.all_reduce([votes], "max").wait()
    return bool(votes.item())
