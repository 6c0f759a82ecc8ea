"""The wheel holds what an installation needs: the package, its types, the configs, the extras."""

import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=60,
    )
    (path,) = folder.glob("*.whl")
    return path


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
    assert modules | {"scaledtrain/py.typed", "scaledtrain/report/timeline.html"} <= files


def test_the_wheel_holds_nothing_but_the_package_and_its_metadata(files: set[str]) -> None:
    assert {file.split("/")[0].partition("-")[0] for file in files} == {"scaledtrain"}
    assert not [file for file in files if "__pycache__" in file]


def test_the_metadata_names_the_extras_the_licence_and_the_oldest_python(
    metadata: Message, files: set[str]
) -> None:
    engines = {"accelerate", "deepspeed"}
    others = {"bench", "data", "examples", "huggingface", "remote", "report", "test", "zstd"}
    assert set(metadata.get_all("Provides-Extra", [])) == engines | others | {"tune"}
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


def test_an_installed_package_finds_its_configs_beside_itself(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import importlib.resources, scaledtrain\n"
        "configs = importlib.resources.files(scaledtrain) / 'configs'\n"
        "print(scaledtrain.__file__, configs.is_dir())"
    )
    shown = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert shown.stdout.split() == [str(tmp_path / "scaledtrain/__init__.py"), str(bool(CONFIGS))]
