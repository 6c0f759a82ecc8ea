"""Which rank of its job a process is: by torchrun, Slurm, or by hand."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from scaledtrain.errors import ConfigError

__all__ = ["RankInfo"]


@dataclass(frozen=True)
class RankInfo:
    """Which process of the job this one is, and where all meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    master_address: str = "127.0.0.1"
    master_port: int = 29500
    single: bool = False
    """Each rank was launched by itself, so one that died may come back while the others go on."""

    @property
    def is_elastic(self) -> bool:
        """Whether a launcher may start all ranks again, other ones too, who then meet anew."""
        return self.has_agent and not self.single

    @property
    def has_agent(self) -> bool:
        """Whether the launcher keeps the job's store, so that no rank does."""
        name = "SCALEDTRAIN" if self.single else "TORCHELASTIC"
        return os.environ.get(f"{name}_USE_AGENT_STORE") == "True"

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> RankInfo:
        """Read our own variables, else torchrun's, else those of a Slurm step: who takes part.

        Without any of them the job is this process. Our own are SCALEDTRAIN_RANK, _WORLD_SIZE,
        _MASTER_ADDR and _MASTER_PORT: for ranks that are launched one by one.

        Raises:
            ConfigError: the variables contradict each other.
        """
        try:
            info = cls._read(env)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"the environment of this rank is incomplete or wrong ({error!r}); torchrun sets "
                "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, srun sets SLURM_*: "
                "start the job with one of them, or set all by hand; or, for ranks launched one by "
                "one, SCALEDTRAIN_RANK, _WORLD_SIZE, _MASTER_ADDR and _MASTER_PORT"
            ) from error
        if not 0 <= info.rank < info.size:
            raise ConfigError(
                f"rank {info.rank} of {info.size} cannot be: ranks go from 0 to {info.size - 1}; "
                "check RANK and WORLD_SIZE"
            )
        return info

    @classmethod
    def _read(cls, env: Mapping[str, str]) -> RankInfo:
        if "SCALEDTRAIN_RANK" in env:
            return cls(
                int(env["SCALEDTRAIN_RANK"]),
                int(env["SCALEDTRAIN_WORLD_SIZE"]),
                int(env.get("SCALEDTRAIN_LOCAL_RANK", env.get("LOCAL_RANK", "0"))),
                env["SCALEDTRAIN_MASTER_ADDR"],
                int(env["SCALEDTRAIN_MASTER_PORT"]),
                single=True,
            )
        if "RANK" in env and "WORLD_SIZE" in env:
            return cls(
                int(env["RANK"]),
                int(env["WORLD_SIZE"]),
                int(env.get("LOCAL_RANK", "0")),
                env.get("MASTER_ADDR", "127.0.0.1"),
                int(env.get("MASTER_PORT", "29500")),
            )
        if "SLURM_STEP_NUM_TASKS" in env:
            return cls(
                int(env["SLURM_PROCID"]),
                int(env["SLURM_STEP_NUM_TASKS"]),
                int(env["SLURM_LOCALID"]),
                env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
                # Jobs that share a node differ in their id, so they get different ports.
                int(env.get("MASTER_PORT", str(15000 + int(env["SLURM_JOB_ID"]) % 10000))),
            )
        return cls()


def _first_host(nodes: str) -> str:
    """First name of a Slurm node list: ``gpu[03-07,12],login1`` -> ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise ConfigError(f"cannot read the Slurm node list {nodes!r}; set MASTER_ADDR")
    return "".join(part or "" for part in match.groups())
