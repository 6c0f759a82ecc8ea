"""The ``scaledtrain`` command: one word, and what that command makes of the rest."""

from __future__ import annotations

import importlib
import sys

import scaledtrain
from scaledtrain.errors import ConfigError
from scaledtrain.launching import guarded
from scaledtrain.schema import did_you_mean

__all__ = ["main"]

COMMANDS = {
    "train": "train a model: synchronously or asynchronously, one process or many",
    "check": "find bugs in model, data and training before they are run at scale",
    "compare": "train with several strategies, and report them side by side",
    "tune": "search for settings: several trainings, of which bad ones are ended early",
    "ablate": "take away one component at a time, and tell what each is worth",
    "simulate": "train on a cluster that is not there: real gradients, virtual time",
    "baselines": "what is reached without learning much, for results to be read against",
    "evaluate": "metrics, calibration and coverage of a saved run, and a page about them",
    "memory": "how many bytes a training takes, activations included, before anything is allocated",
    "replay": "make an asynchronous run again from its event log, and step through it",
    "data": "write, look at and check data sets that do not fit into memory",
    "checkpoints": "list, verify, compare and export what a run has saved",
    "report": "one page about one run or several, with curves, ranks, timeline",
    "trace": "show what each rank did when, of runs that were made with trace=true",
}

_MODULES = {  # the others' have their names
    "ablate": "scaledtrain.ablate.command",
    "baselines": "scaledtrain.baselines.command",
    "check": "scaledtrain.check.command",
    "data": "scaledtrain.data.commands",
    "evaluate": "scaledtrain.evaluate.command",
    "memory": "scaledtrain.memory.command",
    "replay": "scaledtrain.replay.command",
    "report": "scaledtrain.report.command",
    "simulate": "scaledtrain.simulate.command",
    "tune": "scaledtrain.tune.command",
}


def main() -> None:
    """Run the command that ``sys.argv`` names."""
    word, *rest = sys.argv[1:] or ["--help"]
    if word in COMMANDS:
        sys.argv = [f"scaledtrain {word}", *rest]
        importlib.import_module(_MODULES.get(word, f"scaledtrain.{word}")).main()
    elif word in ("-h", "--help", "help"):
        print(_help())
    elif word == "--version":
        print(f"scaledtrain {scaledtrain.__version__}")
    else:
        guarded(lambda: _refuse(word))


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: scaledtrain COMMAND [ARGUMENT ...]",
            "",
            *lines,
            "",
            "scaledtrain COMMAND --help says more; scaledtrain --version, which one this is.",
        ]
    )


def _refuse(word: str) -> None:
    guess = did_you_mean(word, COMMANDS)
    raise ConfigError(f"there is no command {word!r}{guess}; commands: {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
