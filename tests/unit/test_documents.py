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
COMMANDS = ("train", "check", "compare", "simulate", "memory", "trace", "replay", "tune", "ablate")
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
    linked = set(
        re.findall(r"^\| \[[^]]+\]\((docs/[^)]+)\)", DOCUMENTS[0].read_text(), re.MULTILINE)
    )
    assert linked == {name(guide) for guide in GUIDES}


CHOOSING = ROOT / "docs/choosing.md"
QUOTED = {  # what is said of strategies -> the stored row that it is taken from
    "95 % and 99 % of the sum": "| auto | 514 | 95.3 % (95.0 to 96.6) |",
    "and 99 % of the sum of their rates": "| async | 538 | 99.5 % (99.2 to 99.6) |",
    "an even split 37 %": "| even | 197 | 36.6 % (36.4 to 36.6) |",
    "share 0.92, 1.6 s": "| sync | 0.92 / 0.31 / 0.65 | 1.6 / 4.5 / 1.8 |",
    "0.97, 1.5 s": "| async | 0.97 / 0.97 / 0.98 | 1.5 / 2.1 / 1.7 |",
    "0.96, 1.5 s": "| ssp | 0.95 / 0.31 / 0.96 | 1.5 / 4.7 / 1.5 |",
    "`local_sgd` and `diloco` 0.73": "| local_sgd | 0.93 / 0.31 / 0.73 | 5.8 / never / 4.5 |",
    "but 4.5 and 2.9 s": "| diloco | 0.94 / 0.31 / 0.73 | 2.4 / never / 2.9 |",
    "share 0.98, 2.2 s": "| hogwild | – / 0.98 / – | – / 2.2 / – |",
    "`async` 0.70, 2.7 s": "| async | – / 0.70 / – | – / 2.7 / – |",
    "`sync` 0.29, 4.5 s": "| sync | – / 0.29 / – | – / 4.5 / – |",
    "over gloo 0.13": "| ddp | – / 0.13 / – | – / never / – |",
    "0.84, with 4,096 0.77": "| sync | 1.01 | 0.92 | 0.84 | 0.80 | 0.77 |",
    "share 0.59 with 8 workers, 0.45 with 64": "| diloco | 1.01 | 0.59 | 0.45 | 0.38 |",
    "`sync` 0.15, 0.09, 0.07": "| sync | 1.01 | 0.15 | 0.09 | 0.07 |",
    "`easgd` 0.87, 0.41, 0.10": "| easgd | 1.01 | 0.87 | 0.41 | 0.10 |",
    "share 0.93 and 0.71": "| easgd | 0.97 | 0.95 | 0.93 | 0.95 |",
    "and 0.71; `gossip` 0.52": "| async_local_sgd | 0.97 | 0.73 | 0.71 | 0.71 |",
    "`gossip` 0.52": "| gossip | 0.97 | 0.76 | 0.52 | 0.35 |",
    "`async` 0.26, `diloco` 0.24": "| async | 0.97 | 0.29 | 0.26 | 0.24 |",
    "`diloco` 0.24, `sync` 0.07": "| diloco | 0.97 | 0.26 | 0.24 | 0.09 |",
    "one server gives 0.26": "| async | 1.01 | 1.00 | 0.98 | 0.26 | 0.03 |",
    "16 shards give 0.98": "| async_shards | 1.01 | 1.00 | 0.98 | 0.98 | 0.48 |",
    "0.05 instead of 0.25": "| async_shards | 1.01 | 0.28 | 0.05 | 0.01 |",
    "(209 virtual seconds": "| fastest worker alone | 209 |",
    "after 270 virtual s": "| delay_adaptive | 270 |",
    "`ringmaster` 339": "| ringmaster | 339 |",
    "plain `async` 354": "| async | 354 |",
    "`push_sum` 368": "| push_sum | 368 |",
    "`gossip` 408": "| gossip | 408 |",
    "`local_sgd` 661": "| local_sgd | 661 |",
    "`sync` 710": "| sync | 710 |",
    "`easgd` 718": "| easgd | 718 |",
    "98 % and 100 %; `sync` alone 28 %": "4x slower | 28 % | 98 % | 68 % | 97 % | 100 % | 29 % |",
    "51 % instead of 54 %": "gamma of shape 4 | 54 % | 51 % | 70 % | 60 % | 100 % | 72 % |",
    "101 % and 96 %; `sync` alone 43 %": "of 80 steps | 43 % | 48 % | 96 % | 58 % | 101 % | 44 % |",
    "`diloco` and `async_local_sgd` did not": "| async_local_sgd | never |",
}


@pytest.mark.parametrize(("said", "row"), QUOTED.items())
def test_what_is_said_of_strategies_was_measured(said: str, row: str) -> None:
    """Where measurements were repeated, change the guide, and the rows here."""
    assert said in CHOOSING.read_text(encoding="utf-8")
    assert row in (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")


def test_the_readme_has_no_other_figures_of_strategies() -> None:
    readme = without_code(DOCUMENTS[0].read_text(encoding="utf-8"))
    guide = readme.partition("### Which strategy should I use?")[2].partition("\n## ")[0]
    figures = re.compile(r"\d+(?:\.\d+)?(?: %| s\b)?")
    found = figures.findall(guide)
    assert len(found) > 30
    assert set(found) <= set(figures.findall(without_code(CHOOSING.read_text(encoding="utf-8"))))


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
                        if settings:
                            yield name(path), command, settings


def test_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(blocks(ROOT / "docs/own-parts.md", "python")[0])
    monkeypatch.syspath_prepend(tmp_path)  # the guide's first block is a file of that name
    found = list(commands())
    assert len(found) > 30
    for path, command, settings in found:
        try:
            config = compose(settings, config_name=command)
            if command == "train" and "data=sharded" not in settings:  # whose folder is made up
                check(config)
        except ConfigError as error:
            raise AssertionError(f"{path}: {command} {' '.join(settings)}") from error
