"""Weights that several stages have in common, as an embedding and the head of a language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scaledtrain.errors import ConfigError
from scaledtrain.loss_scale import LossScaler
from scaledtrain.parallel.pipeline.mailbox import Form, Mailbox, Message, form_of
from scaledtrain.parallel.pipeline.places import Places

__all__ = ["TiedGroup", "TiedWeights"]

TiedGroup = Sequence[tuple[int, str]]
"""Of each stage that has the weight: the stage, and the weight's name in it."""


class TiedWeights:
    """Gives every copy of a tied weight the gradient of all of them, once in a step.

    The stages compute with stand-ins that share the weights' memory. At the end of a step their
    gradients are added up, in the order of the ranks and with the same bits on all, and the sum is
    handed to each weight as if a backward pass had made it: whoever waits for the weight's gradient
    (an all-reduce in buckets) sees it once, when it is complete. Copies that start equal stay so.

    Args:
        groups: of the whole model; a group of one is no group.
        stages: of this rank.
        rank_of: of each stage its rank.
        mailbox: to the other ranks.
        scaler: of the loss.

    Raises:
        ConfigError: a stage has no such parameter.
    """

    def __init__(
        self,
        groups: Sequence[TiedGroup],
        stages: Mapping[int, nn.Module],
        rank_of: Sequence[int],
        mailbox: Mailbox,
        scaler: LossScaler,
    ) -> None:
        self._mailbox = mailbox
        self._scaler = scaler
        self._own: list[tuple[int, list[int], list[nn.Parameter]]] = []
        for number, group in enumerate(groups):
            members = [_find(stages[s], s, name) for s, name in group if s in stages]
            if members and len(group) > 1:
                ranks = sorted({rank_of[stage] for stage, _ in group})
                # The same object once, although two stages of this rank may have it.
                self._own.append((number, ranks, list(dict.fromkeys(members))))
        self._stand_ins = {p: _stand_in(p) for _, _, members in self._own for p in members}
        self._places = Places(stages.values(), self._stand_ins)
        for number, _, members in self._own:
            form = Form(form_of([_like_gradient(members[0])]).tensors, True)
            mailbox.set_form(Message("tied", number, 0), form)
            mailbox.set_form(Message("tied sum", number, 0), form)
            value = form_of([members[0].detach()])
            mailbox.set_form(Message("tied weight", number, 0), Form(value.tensors, True))

    @torch.no_grad()
    def equalize(self) -> None:
        """Give every copy the values of the first one; between steps."""
        me = self._mailbox.rank
        for number, ranks, members in self._own:
            if me == ranks[0]:
                for rank in ranks[1:]:
                    message = Message("tied weight", number, rank)
                    self._mailbox.send(rank, message, [members[0]])
            else:
                message = Message("tied weight", number, me)
                self._mailbox.expect(ranks[0], [message])
                (value,), _ = self._mailbox.receive(message)
                for parameter in members:
                    parameter.copy_(value)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, backward passes leave gradients in the stand-ins."""
        for parameter, stand_in in self._stand_ins.items():
            stand_in.data = parameter.data
        with self._places.holding(self._stand_ins):
            yield

    def expect(self) -> None:
        """What is sent at the end of this step is expected, after all else."""
        me = self._mailbox.rank
        for number, ranks, _ in self._own:
            if me == ranks[0]:
                for rank in ranks[1:]:
                    self._mailbox.expect(rank, [Message("tied", number, rank)])
            else:
                self._mailbox.expect(ranks[0], [Message("tied sum", number, me)])

    def combine(self) -> None:
        """Exchange the sums, and hand them to the weights."""
        me = self._mailbox.rank
        sums = [self._sum_here(members) for _, _, members in self._own]
        for (number, ranks, _), own in zip(self._own, sums, strict=True):
            if me != ranks[0]:
                self._mailbox.send(ranks[0], Message("tied", number, me), [own])
        for (number, ranks, _), own in zip(self._own, sums, strict=True):
            if me == ranks[0]:
                for rank in ranks[1:]:
                    own += self._mailbox.receive(Message("tied", number, rank))[0][0]
                for rank in ranks[1:]:
                    self._mailbox.send(rank, Message("tied sum", number, rank), [own])
        for i, (number, ranks, members) in enumerate(self._own):
            if me != ranks[0]:
                sums[i] = self._mailbox.receive(Message("tied sum", number, me))[0][0]
            with self._scaler.passes():
                for parameter in members:
                    if parameter.requires_grad:
                        torch.autograd.backward([parameter], [sums[i]])

    def _sum_here(self, members: Sequence[nn.Parameter]) -> Tensor:
        total = torch.zeros_like(_like_gradient(members[0]))
        for parameter in members:
            gradient, self._stand_ins[parameter].grad = self._stand_ins[parameter].grad, None
            if gradient is not None:
                total += gradient
        return total


def _find(stage: nn.Module, index: int, name: str) -> nn.Parameter:
    try:
        return stage.get_parameter(name)
    except AttributeError as error:
        raise ConfigError(
            f"stage {index} has no parameter {name!r} that could be tied to another stage's "
            f"({error})"
        ) from None


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    stand_in = nn.Parameter(parameter.detach(), parameter.requires_grad)
    if parameter.requires_grad:
        stand_in.grad_dtype = _like_gradient(parameter).dtype
    return stand_in


def _like_gradient(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to(parameter.grad_dtype or parameter.dtype)
