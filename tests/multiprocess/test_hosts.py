"""One job on two hosts: network namespaces, joined by cards of limited bandwidth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scaledtrain.command_line import read_command_line
from scaledtrain.config import check
from scaledtrain.connection import connect
from scaledtrain.train import run

SCRIPT = Path(__file__).parents[2] / "launch" / "hosts.sh"
COMMAND = ["max_steps=12", "model.hidden=[32]", "console=false", "eval_every=100"]


def namespaces_are_permitted() -> bool:
    name = f"st-probe-{os.getpid()}"  # several processes of pytest may ask at once
    probe = f"ip netns add {name} && ip netns delete {name} && unshare --mount --pid --fork true"
    try:
        return subprocess.run(["sh", "-c", probe], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not namespaces_are_permitted(), reason="may not make network namespaces here")
@pytest.mark.timeout(180)
def test_two_hosts_shard_one_replica_over_a_slow_network(tmp_path: Path) -> None:
    arguments = [*COMMAND, "mesh.shard=2", "data.local_batch_size=16", f"run_dir={tmp_path}/hosts"]
    subprocess.run(
        [SCRIPT, "-n", "2", "-b", "200mbit", "scaledtrain.train", *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=170,
    )
    told = json.loads((tmp_path / "hosts" / "result.json").read_text())
    assert told["environment"]["transport"] == "torch"
    composed = read_command_line([*COMMAND, "data.local_batch_size=32"], "train", "train")
    assert composed is not None
    with connect() as link:
        alone = run(check(composed), link)
    expected = alone.evaluation["loss"]
    assert told["result"]["evaluation"]["loss"] == pytest.approx(expected, rel=1e-4)
