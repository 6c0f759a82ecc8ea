"""README and guides: blocks run, commands are understood, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scaledtrain.command_line import compose
from scaledtrain.config import check
from scaledtrain.errors import ConfigError
from scaledtrain.sweeps import split_sweeps

ROOT = Path(__file__).resolve().parents[2]
GUIDES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = ("train", "compare", "simulate", "memory", "trace", "replay", "tune", "ablate")
DOCUMENTS = [ROOT / "README.md", *GUIDES]
LINKED = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


PYTHON = [
    pytest.param(block, id=f"{name(path)}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(blocks(path, "python"), 1)
]


@pytest.mark.parametrize("block", PYTHON)
def test_block_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    exec(compile(block, "block.py", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_the_readme_names_every_guide() -> None:
    assert GUIDES
    linked = set(re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", DOCUMENTS[0].read_text(), re.MULTILINE))
    assert linked == {name(guide) for guide in GUIDES}


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, hyphens for spaces, no punctuation."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("path", LINKED, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        reached = (path.parent / file).resolve() if file else path
        assert reached.exists(), f"{name(path)} links to {target}"
        if anchor:
            assert anchor in anchors(reached), f"{name(path)} links to {target}"


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Document, command, and settings of each line in a shell block that is composed by Hydra."""
    for path in DOCUMENTS:
        for block in (*blocks(path, "bash"), *blocks(path, "sh")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for command in COMMANDS:
                    if f"scaledtrain.{command}" in words:
                        given = words[words.index(f"scaledtrain.{command}") + 1 :]
                        settings, _ = split_sweeps([word for word in given if "=" in word])
                        yield name(path), command, settings


def test_commands_are_understood() -> None:
    found = list(commands())
    assert len(found) > 30
    for path, command, settings in found:
        try:
            config = compose(settings, config_name=command)
            if command == "train" and "data=sharded" not in settings:  # whose folder is made up
                check(config)
        except ConfigError as error:
            raise AssertionError(f"{path}: {command} {' '.join(settings)}") from error
