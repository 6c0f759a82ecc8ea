"""Error feedback: what a codec left out is sent later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scaledtrain.comm.compress.codec import Codec

__all__ = ["Feedback", "if_finite"]


class Feedback:
    """Encodes one list of tensors again and again, and keeps what was left out.

        p = w g + e,  sent: C(p),  e <- p - C(p)

    for a gradient of weight w (1 unless given), with e in float32 at least, since p must not lose
    the small g of half precision to a larger e. So sent + kept = w gradient + kept before, and
    every bit of gradient is sent in the end. A codec that needs no feedback is used as it is. Where
    a gradient is not finite, C(p) shows it and e stays as it was: such a step is skipped. As other
    gradients of the step may be finite, whoever skips it calls ``undo``.

    A crash loses e, about as much as a few gradients.

    Args:
        codec: C.
        like: tensors of the shapes and dtypes to encode; e begins at zero.

    Example:
        >>> from scaledtrain.comm.compress import TopK
        >>> codec, g = TopK(fraction=0.5), torch.tensor([3.0, 2.0])
        >>> feedback = Feedback(codec, [g])
        >>> [codec.decode(feedback.encode([g]), [g])[0].tolist() for _ in range(3)]
        [[3.0, 0.0], [0.0, 4.0], [6.0, 0.0]]

    References:
        Seide et al. 2014; Karimireddy et al. 2019, Error Feedback Fixes SignSGD, arXiv 1901.09847.
    """

    def __init__(self, codec: Codec, like: Sequence[Tensor]) -> None:
        self._codec = codec
        self._kept: list[Tensor] = []
        self._before: list[Tensor] = []
        if codec.needs_feedback:
            self._dtypes = [t.dtype for t in like]
            self._kept = [
                torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in like
            ]
        self._empty: list[dict[str, Tensor]] = [{} for _ in like]

    @torch.no_grad()
    def encode(self, gradients: Sequence[Tensor], weight: float = 1.0) -> list[Tensor]:
        """C(w g + e); the gradients are not changed."""
        if not self._kept:
            weighted = gradients if weight == 1.0 else torch._foreach_mul(list(gradients), weight)
            return self._codec.encode(weighted)
        wanted = torch._foreach_add(self._kept, list(gradients), alpha=weight)
        whole = [w.to(dtype) for w, dtype in zip(wanted, self._dtypes, strict=True)]
        encoded = self._codec.encode(whole)
        sent = self._codec.decode(encoded, whole)
        rests = torch._foreach_sub(wanted, sent)
        self._before = self._kept
        self._kept = [if_finite(r, kept) for r, kept in zip(rests, self._before, strict=True)]
        return encoded

    def confirm(self) -> None:
        """What was encoded last is used: ``undo`` has nothing to undo, and no memory is needed."""
        self._before = []

    def undo(self) -> None:
        """What was encoded last is not used: let e be what it was before."""
        self._kept, self._before = self._before or self._kept, []

    def state_dict(self) -> list[dict[str, Tensor]]:
        """A copy of e, a dictionary for each tensor."""
        return [{"kept": kept.clone()} for kept in self._kept] or self._empty

    def load_state_dict(self, state: Sequence[Mapping[str, Tensor]]) -> None:
        """Restore what ``state_dict`` returned; where that was without feedback, e is zero."""
        for kept, saved in zip(self._kept, state, strict=bool(self._kept)):
            kept.copy_(saved["kept"]) if saved else kept.zero_()


def if_finite(new: Tensor, kept: Tensor) -> Tensor:
    """The new tensor, with the values of the one kept so far if one of its own is not finite.

    A remainder of an overflow would come back in every later step.
    """
    return torch.where(new.isfinite().all(), new, kept, out=new)
