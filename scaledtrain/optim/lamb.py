"""LAMB: Adam whose learning rate follows the norms of each tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scaledtrain.errors import ConfigError
from scaledtrain.optim.layerwise import Adapt, LayerwiseOptimizer, Piece

__all__ = ["LAMB"]


class LAMB(LayerwiseOptimizer):
    r"""Layer-wise adaptive moments: AdamW for batches of many thousand samples.

    For each tensor w with gradient g::

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        m^ = m / (1 - beta1^t),   v^ = v / (1 - beta2^t)
        u = m^ / (sqrt(v^) + eps) + weight_decay w
        w <- w - lr r u,   r = |w| / |u|               (1 where |w| or |u| is 0)

    Public versions disagree on what is around this; here each choice is an argument. Memory: two
    buffers of the parameters' size. torch has no fused kernel for it, so neither is there one here.
    Not capturable in a CUDA graph, since the norms come to the host.

    Args:
        params: parameters, or (name, parameter) pairs, or groups.
        lr: >= 0.
        betas: each in [0, 1).
        eps: >= 0.
        weight_decay: >= 0.
        bias_correction: divide m and v by 1 - beta^t. Without, which some versions do, the first
            steps are as long (r sees to that), but weigh weight decay more.
        weight_norm_range: |w| in r is brought into this range: (0, 10) in the first version of the
            paper and in NVIDIA's.
        max_grad_norm: scale all gradients of the optimizer to this 2-norm, together, if they are
            above it, before all else; 1.0 in NVIDIA's.
        adapt: which tensors have an r, others have 1: ``"matrices"``, those of two dims or more, so
            not norms and biases; ``"decayed"``, those with weight decay, as in NVIDIA's; ``"all"``.
        decay_in_trust_ratio: False: w <- w - lr (r u + weight_decay w), u without weight decay, so
            that decay is as strong for all tensors, as in AdamW.
        maximize: go uphill.
        foreach: True: all tensors together, which costs temporaries of the parameters' size;
            False: a stretch of a tensor after another; None: what is faster on the device.

    Raises:
        ConfigError: an argument is outside its range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = LAMB([w], lr=0.1, eps=0.0)
        >>> w.grad = torch.tensor([[0.5, -2.0]])
        >>> optimizer.step()         # u = (1, -1), r = 5 / sqrt(2) = 3.5355
        >>> [round(x, 4) for x in w.flatten().tolist()]
        [2.6464, 4.3536]

    References:
        You et al. 2019, Large Batch Optimization for Deep Learning, arXiv 1904.00962.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        weight_norm_range: tuple[float, float] = (0.0, math.inf),
        max_grad_norm: float | None = None,
        adapt: Adapt = "matrices",
        decay_in_trust_ratio: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ConfigError(f"LAMB: {name} is {value}; it is >= 0")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"LAMB: betas are {tuple(betas)}; each is in [0, 1)")
        low, high = weight_norm_range
        if not 0.0 <= low <= high:
            raise ConfigError(
                f"LAMB: weight_norm_range is {(low, high)}; it is (low, high), 0 <= low <= high"
            )
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ConfigError(
                f"LAMB: max_grad_norm is {max_grad_norm}; it is > 0, or None not to clip"
            )
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "weight_norm_range": (low, high),
            "adapt": adapt,
            "decay_in_trust_ratio": decay_in_trust_ratio,
            "maximize": maximize,
        }
        self._max_grad_norm = max_grad_norm
        self._clip = 1.0  # what multiplies the gradients of this step
        self._room: dict[torch.dtype, Tensor] = {}
        super().__init__(params, defaults, foreach)

    @property
    def clips(self) -> bool:
        """Whether a step looks at the norm of all gradients together."""
        return self._max_grad_norm is not None

    @property
    def couples_tensors(self) -> bool:
        """Whether a step has to be made of all gradients at once."""
        return self.clips or self.is_sharded

    def _before(self, pieces: Sequence[Piece]) -> None:
        if self._max_grad_norm is None:
            return
        norms, _ = self._norms(pieces, lambda i: [pieces[i].gradients])
        norm = math.hypot(*norms.values())
        self._clip = self._max_grad_norm / norm if norm > self._max_grad_norm else 1.0

    def _update(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self._take_gradients(piece)
        # Of shards the directions of all tensors would have to be kept: they are made twice.
        keeps = not (self._sums and any(piece.is_stretch for piece in pieces))
        rooms = self._rooms(pieces, keeps)
        kept = [_directions(*both) for both in zip(pieces, rooms, strict=True)] if keeps else []

        def directions(i: int) -> list[Tensor]:
            return kept[i] if keeps else _directions(pieces[i], rooms[i])

        factors = self._factors(pieces, directions)
        for i, piece in enumerate(pieces):
            _move(piece, directions(i), [factors[owner] for owner in piece.owners])

    def _take_gradients(self, piece: Piece) -> None:
        (beta1, beta2), (m, v) = piece.group["betas"], piece.state
        clip = -self._clip if piece.group["maximize"] else self._clip
        if clip == 1.0:
            torch._foreach_lerp_(m, piece.gradients, 1.0 - beta1)
        else:
            torch._foreach_mul_(m, beta1)
            torch._foreach_add_(m, piece.gradients, alpha=(1.0 - beta1) * clip)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, piece.gradients, piece.gradients, (1.0 - beta2) * clip * clip)

    def _rooms(self, pieces: Sequence[Piece], keeps: bool) -> list[Tensor | None]:
        """Memory for the direction of each stretch; None where foreach takes its own.

        It is kept for the next tensor and the next step, since a system takes long to give memory.
        """
        sizes = [piece.parameters[0].numel() if piece.is_stretch else 0 for piece in pieces]
        like, needed = pieces[0].parameters[0], sum(sizes) if keeps else max(sizes, default=0)
        room = self._room.get(like.dtype)
        if needed and (room is None or room.numel() < needed):
            room = self._room[like.dtype] = torch.empty(needed, dtype=like.dtype)
        ends = list(accumulate(sizes)) if keeps else sizes
        return [
            room[end - size : end] if piece.is_stretch and room is not None else None
            for piece, size, end in zip(pieces, sizes, ends, strict=True)
        ]

    def _factors(
        self, pieces: Sequence[Piece], directions: Callable[[int], Sequence[Tensor]]
    ) -> dict[int, float]:
        """By parameter: what multiplies its direction."""
        weights, lengths = self._norms(
            pieces, lambda i: [pieces[i].parameters, directions(i)] if pieces[i].adapted else []
        )
        factors = {}
        for piece in pieces:
            scale = _Terms.of(piece).scale
            for i in piece.owners:
                ratio = 1.0
                if piece.adapted:
                    ratio = _trust(weights[i], scale * lengths[i], piece.group)
                factors[i] = float(piece.group["lr"]) * ratio * scale
        return factors


class _Terms(NamedTuple):
    """u = scale (m / (sqrt(v) + eps) + decay w), so that debiasing passes over no tensor."""

    scale: float
    eps: float
    decay: float

    @classmethod
    def of(cls, piece: Piece) -> _Terms:
        group = piece.group
        scale, root = 1.0, 1.0
        if group["bias_correction"]:
            beta1, beta2 = group["betas"]
            root = math.sqrt(1.0 - beta2**piece.step)
            scale = root / (1.0 - beta1**piece.step)
        decay = group["weight_decay"] / scale if group["decay_in_trust_ratio"] else 0.0
        return cls(scale, group["eps"] * root, decay)


def _directions(piece: Piece, room: Tensor | None) -> list[Tensor]:
    """The u / scale of each tensor, of a stretch in memory that is given."""
    terms, (m, v) = _Terms.of(piece), piece.state
    if room is None:
        roots = torch._foreach_sqrt(v)
        torch._foreach_add_(roots, terms.eps)
        directions = list(torch._foreach_div(m, roots))
        if terms.decay:
            torch._foreach_add_(directions, piece.parameters, alpha=terms.decay)
        return directions
    (w,), (m1,), (v1,) = piece.parameters, m, v
    u = room.as_strided(w.shape, w.stride())
    torch.sqrt(v1, out=u).add_(terms.eps)
    torch.div(m1, u, out=u)
    return [u.add_(w, alpha=terms.decay) if terms.decay else u]


def _move(piece: Piece, directions: list[Tensor], factors: Sequence[float]) -> None:
    group = piece.group
    if group["weight_decay"] and not group["decay_in_trust_ratio"]:
        torch._foreach_mul_(piece.parameters, 1.0 - group["lr"] * group["weight_decay"])
    if piece.is_stretch:
        piece.parameters[0].sub_(directions[0], alpha=factors[0])
        return
    torch._foreach_mul_(directions, factors)
    torch._foreach_sub_(piece.parameters, directions)


def _trust(weight: float, length: float, group: dict[str, Any]) -> float:
    low, high = group["weight_norm_range"]
    weight = min(max(weight, low), high)
    return weight / length if weight and length else 1.0
