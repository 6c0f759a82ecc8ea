"""A part of a model's tree of modules, with the names that the model has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from scaledtrain.errors import ConfigError

__all__ = ["all_tensors", "fill"]


def fill(
    root: nn.Module, model: nn.Module, parts: Sequence[nn.Module], extra: Iterable[Tensor]
) -> None:
    """Give an empty module what some parts have of a model, where the model has it.

    Submodules of the model that a part has whole are there as they are. Other tensors hang on
    modules that stand where the model has them; modules that a part has made for itself share the
    dictionaries of these, and so find whatever will stand there (a shard, what functional_call
    puts there).

    Args:
        root: stands for the model.
        model: the whole.
        parts: submodules of it, or modules made of submodules and tensors of it.
        extra: further tensors of the model.

    Raises:
        ConfigError: a part has a parameter that the model has not, or not by this name.
    """
    _Tree(model, parts, extra).fill(root)


def all_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers; what is tied comes several times."""
    for inner in module.modules():
        for _, tensor in _own_tensors(inner):
            yield tensor


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None:
                yield name, tensor


class _Tree:
    """The work of `fill`."""

    def __init__(
        self, model: nn.Module, parts: Sequence[nn.Module], extra: Iterable[Tensor]
    ) -> None:
        self._model = model
        self._originals = set(model.modules())
        self._whole: dict[nn.Module, None] = {}
        self._made: dict[nn.Module, None] = {}
        for part in parts:
            self._sort(part)
        self._held = {id(t) for module in self._whole for t in all_tensors(module)}
        self._held |= {id(t) for module in self._made for _, t in _own_tensors(module)}
        self._held |= {id(t) for t in extra}
        self._stand_in: dict[nn.Module, nn.Module] = {}
        self._owners: dict[tuple[int, str], list[nn.Module]] = {}

    def _sort(self, module: nn.Module) -> None:
        if module in self._originals:
            self._whole[module] = None
            return
        self._made[module] = None
        for child in module.children():
            self._sort(child)

    def fill(self, root: nn.Module) -> None:
        """Do it."""
        self._fill(root, self._model)
        for module in self._made:
            module.training = self._model.training
            self._share(module, "_parameters")
            self._share(module, "_buffers")

    def _fill(self, own: nn.Module, original: nn.Module) -> nn.Module:
        self._stand_in[original] = own
        for name, tensor in _own_tensors(original):
            if id(tensor) not in self._held:
                continue
            self._owners.setdefault((id(tensor), name), []).append(own)
            if isinstance(tensor, nn.Parameter):
                own.register_parameter(name, tensor)
            else:
                own.register_buffer(name, tensor, name not in original._non_persistent_buffers_set)
        for name, child in original._modules.items():
            if child is None:
                continue
            if child in self._whole:
                own.add_module(name, child)
                continue
            inner = self._stand_in.get(child) or self._fill(nn.Module(), child)
            if inner._parameters or inner._buffers or inner._modules:
                own.add_module(name, inner)
        return self._as_list(own, original)

    def _as_list(self, own: nn.Module, original: nn.Module) -> nn.Module:
        """Lists of blocks stay lists, by which others find the blocks."""
        if type(original) not in (nn.ModuleList, nn.Sequential) or original is self._model:
            return own
        if not all(child in self._whole for child in own.children()):
            return own
        as_list = type(original)()
        as_list._modules.update(own._modules)
        return as_list

    def _share(self, module: nn.Module, kind: str) -> None:
        """Let a made module have the tensors that the model has by having its dictionary."""
        tensors = {name: t for name, t in getattr(module, kind).items() if t is not None}
        owners = [self._owners.get((id(tensor), name), []) for name, tensor in tensors.items()]
        if not any(owners) and (kind == "_buffers" or not tensors):
            return  # it has made them for itself
        owner = next((one for one in owners[0] if all(one in others for others in owners)), None)
        if owner is None:
            raise ConfigError(
                f"the part {type(module).__name__} has {', '.join(tensors)}, which "
                f"{type(self._model).__name__} has not, or not in one module by these names; let "
                "it hold submodules of the model, or tensors by the names that the model has"
            )
        setattr(module, kind, getattr(owner, kind))
