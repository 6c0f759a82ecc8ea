"""Scripts, manifests and images that start jobs elsewhere: what can be known of them here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from scaledtrain.command_line import compose

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SERVICE, JOB = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
HOSTS = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]


def torchrun(command: list[str]) -> tuple[dict[str, str], list[str]]:
    """Its options, and the arguments of `scaledtrain.train`."""
    at = command.index("-m")
    assert (command[0], command[at + 1]) == ("torchrun", "scaledtrain.train")
    options = dict(word.removeprefix("--").split("=") for word in command[1:at])
    return options, command[at + 2 :]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    command = [Path(sys.executable).parent / "shellcheck", script]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout


class TestKubernetes:
    @pytest.mark.parametrize("manifest", [SERVICE, JOB], ids=lambda manifest: manifest["kind"])
    def test_a_manifest_has_the_schema_of_its_kind(self, manifest: dict[str, Any]) -> None:
        kubernetes_validate.validate(manifest, "1.37", strict=True)

    def test_as_many_pods_meet_as_there_are(self) -> None:
        spec = JOB["spec"]
        options, arguments = torchrun(spec["template"]["spec"]["containers"][0]["command"])
        assert int(options["nnodes"]) == spec["completions"] == spec["parallelism"]
        # Pod i of an indexed job has the name <job>-i, which its service makes an address.
        first, service = f"{JOB['metadata']['name']}-0", SERVICE["metadata"]["name"]
        assert spec["template"]["spec"]["subdomain"] == service
        assert options["rdzv-endpoint"] == f"{first}.{service}:29500"
        assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}
        assert compose(arguments).resume == "auto"

    def test_every_mount_has_its_volume(self) -> None:
        pod = JOB["spec"]["template"]["spec"]
        mounts = [mount["name"] for mount in pod["containers"][0]["volumeMounts"]]
        assert mounts == [volume["name"] for volume in pod["volumes"]]


class TestDocker:
    def test_the_hosts_of_compose_meet_and_train(self) -> None:
        for name, host in HOSTS.items():
            assert host["hostname"] == name
            command = host["command"].replace("${ARGUMENTS:-strategy=async}", "strategy=async")
            options, arguments = torchrun(shlex.split(command))
            assert int(options["nnodes"]) == len(HOSTS)
            assert options["rdzv-endpoint"].split(":")[0] in HOSTS
            assert compose(arguments).run_dir == "/runs/run"

    def test_what_an_image_copies_is_there_and_not_ignored(self) -> None:
        file = (ROOT / "docker/Dockerfile").read_text()
        copied = {
            source
            for sources in re.findall(r"^COPY ([^-].*) \S+$", file, re.MULTILINE)
            for source in sources.split()
        }
        kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
        assert copied == set(kept)
        assert all((ROOT / source).exists() for source in copied)
