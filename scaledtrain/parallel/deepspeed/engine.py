"""DeepSpeed's ZeRO as what divides a replica among ranks."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from scaledtrain.errors import ConfigError
from scaledtrain.parallel.deepspeed.settings import (
    BatchCheck,
    check_optimizer,
    ds_config,
    file_offloads,
)
from scaledtrain.parallel.deepspeed.swapping import prepare_swapping
from scaledtrain.parallel.deepspeed.zero import ZeroModel
from scaledtrain.parallel.whole_tensors import check_elementwise
from scaledtrain.replica import Updater

if TYPE_CHECKING:
    from scaledtrain.parallel.engine import Recipe

__all__ = ["DeepSpeed"]


@dataclass(frozen=True)
class DeepSpeed:
    """DeepSpeed's ZeRO: the ranks of ``mesh.shard`` divide what training keeps of a replica.

    | stage | divided among n ranks             |
    |-------|-----------------------------------|
    | 1     | float32 parameters, optimizer     |
    | 2     | ... and gradients                 |
    | 3     | ... and the parameters themselves |

    Sent, by each rank, for P bytes of parameters: about 2 P (n - 1) / n in a step, with stage 3
    half as much again; with stages 2 and 3 the gradients' half of it for each microbatch.

    Forward, backward and update are DeepSpeed's own; it is told which microbatch is a step's last,
    and how much each loss counts, so that the gradient is the mean over all samples of the ranks.
    Norms and clipping are over all ranks, as everywhere here.

    With ``mesh.replicate`` above 1 the strategy sees the float32 parameters and gradients that ZeRO
    keeps on this rank, and averages them with the same part of other replicas: `Sync`, `LocalSGD`,
    `DiLoCo` and all others whose replicas step together and keep their optimizer. Strategies with
    a server, and those whose replicas go their own way, need ``engine=fully_shard``.

    With stage 3 all ranks of a job run the same modules in every step, also those of other
    replicas: DeepSpeed compares them. There
    ``deepspeed.zero.GatheredParameters(model.parameters())`` is the context in which a model's
    parameters are whole, to look at or to save them; all ranks of a replica enter it. Of parameters
    in files enter it with those of one module after the other: all have no buffers.

    Offloaded to NVMe (ZeRO-Infinity, stage 3, one replica, `Sync`), what is in files is read for
    the update of one sub-group of parameters after the other, and written again. Each rank has a
    folder of its own, which it removes at the end; parameters in it are gone with it. Tensors, and
    sub-groups, of less than 1 MiB on a rank (or ``aio.block_size``, if that is more) stay in
    memory. Checkpoints have all of it, whole, and go on with the same bits, in memory as well.

    A parameter that a step does not use has a gradient of 0, not none: momentum and weight decay go
    on for it.

    A crash of a rank ends the run for all; of one that is killed the folder stays, and is of no
    use. A gradient whose norm is not finite makes no update, with any precision: DeepSpeed leaves
    it out. float16 (``precision=fp16-true``) needs a GPU; its loss scale is DeepSpeed's. Not to be
    had here: ``torch.compile``, activation checkpointing.

    Args:
        zero_stage: 1, 2 or 3; None: the file's, else 2.
        offload: ``"cpu"``: optimizer and float32 parameters are in the host's memory, and updates
            are made there. ``"nvme"``: they are in files, and updates are made on the host. Either
            also for one rank alone (``mesh.shard=1``), which has all there is.
        offload_parameters: with stage 3, True or ``"cpu"``: the parameters are in the host's
            memory, too; ``"nvme"``: in files.
        nvme_path: a folder on a fast disk of each host, in which ranks make theirs; None: the
            file's.
        config: a DeepSpeed config of your own, a JSON file. What it says and our words say as well
            (stage, offload, precision, accumulation, clipping, optimizer) must be the same or
            ``"auto"``.

    Raises:
        ConfigError: DeepSpeed is not installed, or cannot do what is asked for; with NVMe, its
            operator cannot be compiled, or the folder cannot be used, or the optimizer cannot.

    Example:
        >>> DeepSpeed(zero_stage=3, offload="cpu").zero_stage
        3

    References:
        Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054; Ren et al. 2021, ZeRO-Offload, arXiv
        2101.06840; Rajbhandari et al. 2021, ZeRO-Infinity, arXiv 2104.07857.
    """

    zero_stage: int | None = None
    offload: Literal["cpu", "nvme"] | None = None
    offload_parameters: bool | Literal["cpu", "nvme"] = False
    nvme_path: Path | str | None = None
    config: Path | str | None = None

    takes_stages: ClassVar[bool] = False
    makes_own_groups: ClassVar[bool] = True

    @property
    def offloads(self) -> bool:
        """Whether optimizer or parameters are in the host's memory or in files."""
        if self.offload is not None or self.offload_parameters:
            return True
        return self.config is not None and file_offloads(Path(self.config))

    def apply(self, roots: Sequence[nn.Module], group: ProcessGroup, recipe: Recipe) -> ZeroModel:
        """Give a model to DeepSpeed, over the ranks of a group. Collective.

        Args:
            roots: the model alone, on the device on which it computes, the same on every rank.
            group: the ranks.
            recipe: of the training, to compare with the file; its optimizer is DeepSpeed's.
        """
        (model,) = roots
        if recipe.compile is not None:
            raise ConfigError(
                f"compile is {recipe.compile!r}, but DeepSpeed's hooks run between the model's "
                "modules, and are not compiled; leave it out, or take engine=fully_shard"
            )
        source = None if self.config is None else Path(self.config)
        config = ds_config(
            source,
            recipe,
            n_elements=sum(p.numel() for p in model.parameters() if p.requires_grad),
            largest_part=max(-(-p.numel() // group.size()) for p in model.parameters()),
            zero_stage=self.zero_stage,
            offload=self.offload,
            offload_parameters=self.offload_parameters,
            nvme_path=self.nvme_path,
        )
        zero = config["zero_optimization"]
        devices = [zero.get(n, {}).get("device") for n in ("offload_optimizer", "offload_param")]
        if "nvme" in devices and dist.get_world_size() > group.size():
            raise ConfigError(
                "engine.offload or engine.offload_parameters is nvme, and mesh.replicate is above "
                "1, but what is in files is one replica's alone; take engine.offload=cpu and "
                "engine.offload_parameters=true, or one replica (mesh.shard: all ranks)"
            )
        is_swapped = devices[0] == "nvme"
        if is_swapped and not recipe.only_updates_write:
            raise ConfigError(
                "engine.offload is nvme, but this strategy works on the parameters between "
                "updates, when they are in files; take strategy=sync, or engine.offload=cpu"
            )
        device = next(model.parameters()).device
        deepspeed = _import(device.type)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        optimizer = Updater(named, recipe.optimizer).optimizer
        check_optimizer(source, optimizer)
        check_elementwise(optimizer)
        names = {p: name for name, p in model.named_parameters()}
        with ExitStack() as files:
            files.enter_context(_local_rank(device))
            with _quiet():
                prepare_swapping(config, model, recipe.optimizer, group, files)
            try:
                with _quiet():
                    if zero.get("offload_param", {}).get("device") == "nvme":
                        # Done by initialize() they would be bfloat16 in their files on a CPU.
                        deepspeed.zero.Init(model, group, config_dict_or_path=config)
                    engine, *_ = deepspeed.initialize(
                        model=model,
                        optimizer=optimizer,
                        config=config,
                        mpu=_Ranks(group),
                        dist_init_required=False,
                    )
            except (ValueError, AssertionError) as error:
                raise ConfigError(
                    f"DeepSpeed {deepspeed.__version__} refuses this run: {error}"
                ) from error
            check, rank = BatchCheck(source, recipe), dist.get_rank(group)
            return ZeroModel(engine, model, optimizer, names, check, rank, files.pop_all())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its warnings, as of torch's parts that are out of use, and its variables."""
    before = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for name in os.environ.keys() - before.keys():
                del os.environ[name]


@contextmanager
def _local_rank(device: torch.device) -> Iterator[None]:
    """From which it takes the device, in steps, too; torchrun says it, srun and python do not."""
    is_said = "LOCAL_RANK" in os.environ
    if not is_said:
        of_mpi = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK")
        os.environ["LOCAL_RANK"] = of_mpi or str(device.index or 0)
    try:
        yield
    finally:
        if not is_said:
            os.environ.pop("LOCAL_RANK", None)


def _import(device: str) -> Any:
    """DeepSpeed, quiet, for that kind of device."""
    try:
        with _quiet():
            # Else it looks for devices of every make, and complains on finding none.
            os.environ.setdefault("DS_ACCELERATOR", device)
            deepspeed = importlib.import_module("deepspeed")
            deepspeed.accelerator.get_accelerator()
    except ImportError as error:
        raise ConfigError(
            f"engine=deepspeed needs DeepSpeed, which cannot be imported ({error}); install it: "
            "pip install 'scaledtrain[deepspeed]', or take engine=fully_shard"
        ) from error
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # It calls collectives by names that torch has begun to replace.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # A kernel for inference on CPUs, which would be compiled for a minute now.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    comm: Any = sys.modules["deepspeed.comm.comm"]
    if comm.cdb is not None and not dist.is_initialized():  # of a job that has ended
        comm.cdb = None
    if comm.cdb is None:
        with _quiet():
            comm.init_distributed(verbose=False)
    return deepspeed


class _Ranks:
    """Which ranks divide a model, as DeepSpeed asks for it (Megatron's ``mpu``)."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._group

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._group)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._group)

    def get_model_parallel_group(self) -> None:
        """Nobody else has other parts of the same layers."""

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    get_tensor_model_parallel_group: Callable[[_Ranks], None] = get_model_parallel_group
    get_tensor_model_parallel_rank: Callable[[_Ranks], int] = get_model_parallel_rank
    get_tensor_model_parallel_world_size: Callable[[_Ranks], int] = get_model_parallel_world_size
