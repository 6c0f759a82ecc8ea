"""The wheel holds what an installation needs: the package, its types, the configs, the extras."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import scaledtrain

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}

TEMPLATES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "scaledtrain").rglob("*.html")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``python -m build`` makes: the source distribution, and the wheel out of that."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    assert len(list(folder.glob("scaledtrain-*.tar.gz"))) == 1
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh one with the wheel; the packages that it needs are those of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    install = ["install", "--no-index", "--no-deps", "--quiet", wheel]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder / "bin/python", *install],
        check=True,
        timeout=100,
    )
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder in a .pth file is searched, but .pth files therein are not read: a checkout that is
    # installed for development is not found.
    paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "needed.pth").write_text("\n".join(paths))
    return folder


@pytest.fixture(scope="module")
def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_is_pure_python_and_named_after_the_package(wheel: Path) -> None:
    assert wheel.name.startswith("scaledtrain-")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_holds_every_config_inside_the_package(files: set[str]) -> None:
    assert {f"scaledtrain/{config}" for config in CONFIGS} <= files


def test_the_wheel_holds_every_module_and_the_marker_of_typed_packages(files: set[str]) -> None:
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "scaledtrain").rglob("*.py")}
    assert modules | {*TEMPLATES, "scaledtrain/py.typed"} <= files


def test_the_wheel_holds_nothing_but_the_package_and_its_metadata(files: set[str]) -> None:
    assert {file.split("/")[0].partition("-")[0] for file in files} == {"scaledtrain"}
    assert not [file for file in files if "__pycache__" in file]


def test_the_metadata_names_the_extras_the_licence_and_the_oldest_python(
    metadata: Message, files: set[str]
) -> None:
    engines = {"accelerate", "deepspeed"}
    others = {"bench", "data", "examples", "huggingface", "remote", "report", "test", "zstd"}
    judging = {"baselines", "evaluate", "tune"}
    assert set(metadata.get_all("Provides-Extra", [])) == engines | others | judging
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert any(file.endswith(".dist-info/licenses/LICENSE") for file in files)


def test_the_core_needs_few_other_packages(metadata: Message) -> None:
    core = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert {need.partition(">=")[0] for need in core} == {
        "greenlet",
        "hydra-core",
        "numpy",
        "omegaconf",
        "safetensors",
        "tensorboard",
        "torch",
        "tqdm",
        "xxhash",
    }


def test_the_citation_names_what_the_package_is(metadata: Message) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["title"] == metadata["Name"]
    assert citation["version"] == metadata["Version"] == scaledtrain.__version__
    assert citation["license"] == metadata["License-Expression"]
    assert citation["authors"] == [{"name": metadata["Author"]}]
    assert f"## [{metadata['Version']}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_main_job_runs_where_it_is_installed_outside_of_the_checkout(
    environment: Path, tmp_path: Path
) -> None:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        ran = subprocess.run(
            [environment / "bin" / command[0], *command[1:]],
            cwd=tmp_path,
            env=own,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    said = run("python", "-c", "import scaledtrain; print(scaledtrain.__file__)")
    assert Path(said.strip()).is_relative_to(environment)
    options = ["workers=2", "max_steps=20", "strategy=async", "trace=true", "run_dir=run"]
    assert "ended at step 20" in run("scaledtrain", "train", *options)
    told = json.loads((tmp_path / "run" / "result.json").read_text())
    assert told["environment"]["world_size"] == 2
    assert told["environment"]["commit"] is None
    run("scaledtrain", "report", "run")
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000  # with Bokeh's script
