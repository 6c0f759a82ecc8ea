"""Learning rates for batches of another size, and what goes with them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from scaledtrain.errors import ConfigError

__all__ = [
    "LearningRateScaling",
    "Rule",
    "decay_groups",
    "follow_batch",
    "norms_and_biases",
    "zero_gamma",
]

Rule = Literal["none", "linear", "sqrt", "adascale"]

# What schedules keep in a group is multiplied, too.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


@dataclass(frozen=True)
class LearningRateScaling:
    r"""Brings an optimizer tuned for one batch size to another, kappa times as large.

    ``"linear"``: lr <- kappa lr, for SGD. ``"sqrt"``: lr <- sqrt(kappa) lr, and where there are
    betas (Adam, LAMB)::

        1 - beta <- kappa (1 - beta) for both,   eps <- eps / sqrt(kappa)

    so that averages are over as many samples as before. To go from one batch to a second and from
    that to a third is to go there at once. ``"none"``: all stays. ``"adascale"``: it stays, too,
    since `scaledtrain.optim.AdaScale` multiplies learning rates by what gradients show.

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

    rule: Rule = "none"
    reference_batch: int = 256

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ConfigError(
                f"lr_scaling.rule is {self.rule!r}; it is one of {', '.join(get_args(Rule))}"
            )
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
        return {"linear": kappa, "sqrt": math.sqrt(kappa)}.get(self.rule, 1.0)

    def scaled(self, settings: Mapping[str, Any], batch: float) -> dict[str, Any]:
        """The settings of a parameter group that change, as they are for a batch.

        Args:
            settings: of a group, for the reference batch.
            batch: samples in one update.

        Raises:
            ConfigError: the batch is so large that an average would be over less than one update.
        """
        factor = self.factor(batch)
        changed = {name: settings[name] * factor for name in _RATES if name in settings}
        if self.rule != "sqrt" or "betas" not in settings:
            return changed
        kappa = batch / self.reference_batch
        before = tuple(settings["betas"])
        betas = tuple(1.0 - kappa * (1.0 - beta) for beta in before)
        if not all(0.0 <= beta < 1.0 for beta in betas):
            largest = self.reference_batch / (1.0 - min(before))
            raise ConfigError(
                f"learning rates scaled by sqrt: betas {before} for batches of "
                f"{self.reference_batch} become {tuple(round(b, 4) for b in betas)} for batches of "
                f"{batch:g}, and they are in [0, 1): the rule holds up to {largest:g} samples "
                "here; take a smaller batch, larger betas, or another rule (lr_scaling)"
            )
        return {**changed, "betas": betas, "eps": settings["eps"] / math.sqrt(kappa)}

    def apply(self, optimizer: Optimizer, batch: float) -> None:
        """Change the settings of all groups of an optimizer that was made for the reference batch.

        Groups keep the rule and the batch in mind, so that settings follow where a run goes on with
        batches of another size (`follow_batch`).

        Args:
            optimizer: new: a schedule is made after this.
            batch: samples in one update.

        Raises:
            ConfigError: as `scaled`.
        """
        for group in optimizer.param_groups:
            group.update(self.scaled(group, batch), scaled_by=self.rule, scaled_to=batch)


def follow_batch(state: dict[str, Any], optimizer: Optimizer) -> float:
    """Bring the state of an optimizer to the batch that another one's settings are scaled to.

    Both were scaled by the same rule of `LearningRateScaling`; else nothing changes, nor in the
    state of an engine (DeepSpeed's), which has another form.

    Args:
        state: an optimizer's ``state_dict()``; changed.
        optimizer: that is to load it.

    Returns:
        What learning rates were multiplied by.

    Example:
        >>> def adam(batch):
        ...     made = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.1, betas=(0.9, 0.99))
        ...     LearningRateScaling("sqrt", reference_batch=16).apply(made, batch)
        ...     return made
        >>> state = adam(16).state_dict()
        >>> follow_batch(state, adam(64))
        2.0
        >>> [round(beta, 6) for beta in state["param_groups"][0]["betas"]]
        [0.6, 0.96]
    """
    factor = 1.0
    for then, now in zip(state.get("param_groups", ()), optimizer.param_groups, strict=False):
        if "scaled_by" in now and then.get("scaled_by") == now["scaled_by"]:
            batch = now["scaled_to"]
            scaling = LearningRateScaling(now["scaled_by"], then["scaled_to"])
            then.update(scaling.scaled(then, batch), scaled_to=batch)
            factor = scaling.factor(batch)
    return factor


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
