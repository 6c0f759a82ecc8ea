"""LARS: momentum whose learning rate follows the norms of each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from scaledtrain.errors import ConfigError
from scaledtrain.optim.layerwise import Adapt, LayerwiseOptimizer, Piece

__all__ = ["LARS"]

_SMALL = 2.0**-26  # 1 - (1 - factor) is a larger one to a relative 2^-27, less than float32 rounds


class LARS(LayerwiseOptimizer):
    r"""Layer-wise adaptive rate scaling: SGD for batches of many thousand samples.

    For each tensor w with gradient g, trust coefficient eta, weight decay beta, momentum m and
    learning rate gamma::

        lambda = eta |w| / (|g| + beta |w| + eps)      (1 where |w| or |g| is 0)
        v <- m v + gamma lambda (g + beta w),   w <- w - v

    so that no tensor moves by more than about a fraction gamma eta of its norm, however large its
    gradient is. A tensor that is not adapted has lambda = 1: it wants a gamma that is eta times as
    large, and is best given a group of its own (`decay_groups`).

    Public versions disagree on what the paper leaves open; here each choice is an argument. Memory:
    one buffer of the parameters' size. With momentum, but without nesterov and maximize, a float32
    tensor on a CPU is updated in one pass by the fused kernel of torch's SGD. Not capturable in a
    CUDA graph, since the norms come to the host.

    Args:
        params: parameters, or (name, parameter) pairs, or groups.
        lr: gamma, >= 0.
        momentum: m, in [0, 1).
        weight_decay: beta, >= 0.
        trust_coefficient: eta, > 0.
        eps: in the denominator of lambda, >= 0; the paper has none.
        nesterov: move by m v + gamma lambda (g + beta w) instead of v.
        adapt: which tensors have a lambda: ``"matrices"``, those of two dims or more, so not norms
            and biases; ``"decayed"``, those with weight decay; ``"all"``, as in the paper.
        clip: lambda is at most gamma, and takes its place: gamma lambda becomes
            min(gamma, lambda). This is LARC; its lr is an upper bound.
        momentum_correction: keep the learning rate out of the velocity, v <- m v + lambda (g +
            beta w), w <- w - gamma v, as `torch.optim.SGD` does. While gamma is constant it is the
            same; when it changes this is what multiplying the paper's velocity by
            gamma_new / gamma_old is, which Goyal et al. call momentum correction. Not with
            ``clip``, whose rate is not gamma.
        maximize: go uphill.
        foreach: True: all tensors together, which costs temporaries of the parameters' size;
            False: a stretch of a tensor after another; None: what is faster on the device.

    Raises:
        ConfigError: an argument is outside its range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = LARS([w], lr=1.0, momentum=0.0, trust_coefficient=0.1)
        >>> w.grad = torch.tensor([[0.0, 50.0]])
        >>> optimizer.step()      # |w| = 5, |g| = 50, lambda = 0.1 * 5 / 50 = 0.01: 4 - 0.01 * 50
        >>> w.tolist()
        [[3.0, 3.5]]

    References:
        You et al. 2017, Large Batch Training of Convolutional Networks, arXiv 1708.03888; Goyal et
        al. 2017, arXiv 1706.02677 (momentum correction: remark 3).
    """

    state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        nesterov: bool = False,
        adapt: Adapt = "matrices",
        clip: bool = False,
        momentum_correction: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
            if not value >= 0.0:
                raise ConfigError(f"LARS: {name} is {value}; it is >= 0")
        if not 0.0 <= momentum < 1.0:
            raise ConfigError(f"LARS: momentum is {momentum}; it is in [0, 1)")
        if not trust_coefficient > 0.0:
            raise ConfigError(f"LARS: trust_coefficient is {trust_coefficient}; it is > 0")
        if nesterov and momentum == 0.0:
            raise ConfigError("LARS: nesterov looks ahead along a momentum, but momentum is 0")
        if clip and momentum_correction:
            raise ConfigError(
                "LARS: with clip a tensor's rate is min(lr, lambda), so there is no lr to keep out "
                "of the velocity; leave clip or momentum_correction out"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
            "adapt": adapt,
            "clip": clip,
            "momentum_correction": momentum_correction,
            "maximize": maximize,
        }
        super().__init__(params, defaults, foreach)

    def _factors(self, pieces: Sequence[Piece]) -> dict[int, float]:
        """By parameter: what multiplies g + beta w on its way into the velocity."""
        weights, gradients = self._norms(
            pieces,
            lambda i: [pieces[i].parameters, pieces[i].gradients] if pieces[i].adapted else [],
        )
        factors = {}
        for piece in pieces:
            for i in piece.owners:
                trust = _trust(weights[i], gradients[i], piece.group) if piece.adapted else 1.0
                factors[i] = _factor(trust, piece)
        return factors

    def _cut(self, piece: Piece) -> list[list[Piece]]:
        if self._takes_kernel(piece):
            return [[piece]]  # it goes once through memory, so there is nothing to be kept
        return super()._cut(piece)

    def _update(self, pieces: Sequence[Piece]) -> None:
        factors = self._factors(pieces)
        for piece in pieces:
            own = [factors[owner] for owner in piece.owners]
            if not (piece.is_stretch or self._takes_kernel(piece)):
                _update_together(piece, own)
                continue
            tensors = zip(piece.parameters, piece.gradients, *piece.state, own, strict=True)
            for w, g, v, factor in tensors:
                _update_one(w, g, v, factor, piece.group)

    def _takes_kernel(self, piece: Piece) -> bool:
        return self._foreach is None and _has_kernel(piece.parameters[0], piece.group)


def _update_one(w: Tensor, g: Tensor, v: Tensor, factor: float, group: dict[str, Any]) -> None:
    in_order = w.is_contiguous() and g.is_contiguous() and v.is_contiguous()
    if _has_kernel(w, group) and in_order and factor > _SMALL:
        _update_in_one_pass(w, g, v, factor, group)
        return
    v.mul_(group["momentum"]).add_(g, alpha=factor)
    decay = factor * _sign(group) * group["weight_decay"]
    if decay:
        v.add_(w, alpha=decay)
    rate = group["lr"] if group["momentum_correction"] else 1.0
    if not group["nesterov"]:
        w.sub_(v, alpha=rate)
        return
    # w -= rate (m v + factor (g + beta w)), beginning with the term that has w.
    w.mul_(1.0 - rate * decay).sub_(g, alpha=rate * factor)
    w.sub_(v, alpha=rate * group["momentum"])


def _has_kernel(w: Tensor, group: dict[str, Any]) -> bool:
    """Whether SGD's fused kernel can make the update."""
    is_plain = group["momentum"] > 0.0 and not group["nesterov"] and not group["maximize"]
    return w.is_cpu and w.dtype == torch.float32 and is_plain


def _update_in_one_pass(
    w: Tensor, g: Tensor, v: Tensor, factor: float, group: dict[str, Any]
) -> None:
    """SGD: v <- m v + (1 - dampening) (g + beta w), w <- w - lr v."""
    torch._fused_sgd_(
        [w],
        [g],
        [v],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=float(group["lr"]) if group["momentum_correction"] else 1.0,
        dampening=1.0 - factor,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def _update_together(piece: Piece, factors: list[float]) -> None:
    group, (velocity,) = piece.group, piece.state
    if group["weight_decay"]:
        decay = group["weight_decay"] * _sign(group)
        steps = torch._foreach_add(piece.gradients, piece.parameters, alpha=decay)
        torch._foreach_mul_(steps, factors)
    else:
        steps = torch._foreach_mul(piece.gradients, factors)
    torch._foreach_mul_(velocity, group["momentum"])
    torch._foreach_add_(velocity, steps)
    rate = group["lr"] if group["momentum_correction"] else 1.0
    if group["nesterov"]:
        torch._foreach_add_(steps, velocity, alpha=group["momentum"])
    moved = steps if group["nesterov"] else velocity
    torch._foreach_add_(piece.parameters, moved, alpha=-rate)


def _sign(group: dict[str, Any]) -> float:
    return -1.0 if group["maximize"] else 1.0


def _trust(weight: float, gradient: float, group: dict[str, Any]) -> float:
    if not (weight and gradient):
        return 1.0
    denominator: float = gradient + group["weight_decay"] * weight + group["eps"]
    return float(group["trust_coefficient"] * weight / denominator)


def _factor(trust: float, piece: Piece) -> float:
    group, sign, lr = piece.group, _sign(piece.group), float(piece.group["lr"])
    if group["momentum_correction"]:
        return sign * trust
    return sign * (min(lr, trust) if group["clip"] and piece.adapted else lr * trust)
