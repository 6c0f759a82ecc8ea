"""Learning rates for batches of another size, and what goes with them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from scaledtrain.errors import ConfigError

__all__ = ["LearningRateScaling", "decay_groups", "norms_and_biases", "zero_gamma"]


@dataclass(frozen=True)
class LearningRateScaling:
    r"""Brings an optimizer tuned for one batch size to another, kappa times as large.

    ``"linear"``: lr <- kappa lr, for SGD. ``"sqrt"``: lr <- sqrt(kappa) lr, and where there are
    betas (Adam, LAMB)::

        1 - beta <- kappa (1 - beta) for both,   eps <- eps / sqrt(kappa)

    so that averages are over as many samples as before. ``"none"``: all stays.

    A batch is all samples whose gradients make one update: of all replicas and all accumulated
    batches where replicas step together, of one worker where a server updates with each gradient.

    Args:
        rule: which.
        reference_batch: the batch that the optimizer's settings are for, in samples.

    Raises:
        ConfigError: no such rule, or a batch below 1.

    Example:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, 0.95))
        >>> LearningRateScaling("sqrt", reference_batch=256).apply(optimizer, batch=1024)
        >>> group = optimizer.param_groups[0]      # kappa = 4
        >>> group["lr"], [round(beta, 6) for beta in group["betas"]], group["eps"]
        (0.002, [0.6, 0.8], 5e-09)

    References:
        Goyal et al. 2017, arXiv 1706.02677 (linear); Malladi et al. 2022, On the SDEs and Scaling
        Rules for Adaptive Gradient Algorithms, arXiv 2205.10287 (square root).
    """

    rule: Literal["none", "linear", "sqrt"] = "none"
    reference_batch: int = 256

    def __post_init__(self) -> None:
        if self.rule not in ("none", "linear", "sqrt"):
            raise ConfigError(f"lr_scaling.rule is {self.rule!r}; it is none, linear or sqrt")
        if self.reference_batch < 1:
            raise ConfigError(
                f"lr_scaling.reference_batch is {self.reference_batch}; it counts samples, >= 1"
            )

    def factor(self, batch: float) -> float:
        """What the learning rate is multiplied by.

        Args:
            batch: samples in one update.
        """
        kappa = batch / self.reference_batch
        return {"none": 1.0, "linear": kappa, "sqrt": math.sqrt(kappa)}[self.rule]

    def apply(self, optimizer: Optimizer, batch: float) -> None:
        """Change the settings of all groups of an optimizer that was made for the reference batch.

        Args:
            optimizer: new: a schedule is made after this.
            batch: samples in one update.

        Raises:
            ConfigError: the batch is so large that an average would be over less than one update.
        """
        kappa = batch / self.reference_batch
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor(batch)
            if self.rule != "sqrt" or "betas" not in group:
                continue
            betas = tuple(1.0 - kappa * (1.0 - beta) for beta in group["betas"])
            if not all(0.0 <= beta < 1.0 for beta in betas):
                largest = self.reference_batch / (1.0 - min(group["betas"]))
                raise ConfigError(
                    f"lr_scaling.rule sqrt makes of betas {tuple(group['betas'])} for batches of "
                    f"{self.reference_batch} {tuple(round(b, 4) for b in betas)} for batches of "
                    f"{batch:g}, and they are in [0, 1): the rule holds up to {largest:g} samples "
                    "here; take a smaller batch, larger betas, or another rule"
                )
            group["betas"] = betas
            group["eps"] = group["eps"] / math.sqrt(kappa)


def norms_and_biases(model: nn.Module) -> set[str]:
    """Names of parameters that are no matrices: biases, and weights of normalisation layers.

    Large-batch recipes do not decay them, and LARS and LAMB do not adapt to their norms.

    Args:
        model: whose parameters have their whole shapes.

    Example:
        >>> sorted(norms_and_biases(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))))
        ['0.bias', '1.bias', '1.weight']
    """
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() < 2 or name.rpartition(".")[2] == "bias"
    }


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], exempt: Collection[str]
) -> list[dict[str, Any]]:
    """Parameter groups of which the last has no weight decay.

    Args:
        named_parameters: all.
        exempt: names of those that are not decayed: `norms_and_biases`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        >>> groups = decay_groups(model.named_parameters(), norms_and_biases(model))
        >>> optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.1), (3, 0.0)]
    """
    named = list(named_parameters)
    decayed = [(name, p) for name, p in named if name not in exempt]
    others = [(name, p) for name, p in named if name in exempt]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@runtime_checkable
class _NamesLastNorms(Protocol):
    def last_norms(self) -> Sequence[nn.Module]: ...


@torch.no_grad()
def zero_gamma(model: nn.Module, norms: Iterable[nn.Module] | None = None) -> None:
    """Let residual blocks begin as the identity: the weight of each one's last norm becomes 0.

    Args:
        model: initialised.
        norms: the last normalisation layer of each residual branch; None: what the model's own
            method ``last_norms()`` returns.

    Raises:
        ConfigError: the model has no such method, or a layer no weight.

    Example:
        >>> from scaledtrain.models import ConvNet
        >>> model = ConvNet(channels=1, n_classes=10, width=8)
        >>> zero_gamma(model)
        >>> sum(int((p == 0).all()) for name, p in model.named_parameters() if "weight" in name)
        2

    References:
        Goyal et al. 2017, arXiv 1706.02677, section 5.1.
    """
    if norms is None:
        if not isinstance(model, _NamesLastNorms):
            raise ConfigError(
                f"zero_gamma: {type(model).__name__} does not name the last norms of its residual "
                "blocks; give it a method last_norms() that returns them, or leave zero_gamma out"
            )
        norms = model.last_norms()
    for norm in norms:
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise ConfigError(f"zero_gamma: {norm} has no weight that could be 0")
        weight.zero_()
