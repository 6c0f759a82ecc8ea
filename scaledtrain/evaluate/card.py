"""A model card: what a model is, what it was trained on, and what it is worth."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf

import scaledtrain
from scaledtrain.baselines.results import Baselines, read_baselines, verdict
from scaledtrain.checkpoint.folder import Manifest
from scaledtrain.disk import replace_file
from scaledtrain.errors import ConfigError
from scaledtrain.evaluate.results import Calibration, Evaluated, read_evaluated
from scaledtrain.run_dir import CONFIG, RESULT

__all__ = ["CARD", "write_card"]

CARD = "MODEL_CARD.md"

_TASKS = {
    "classification": "Classification",
    "regression": "Regression",
    "language_model": "Language modeling",
}
_SECRET = re.compile(r"storage_options|secret|token$|password|credential|api_?key", re.IGNORECASE)
_PASSWORD = re.compile(r"//[^/@\s]+@")  # in a URL
_QUERY = re.compile(r"(//[^\s?]+)\?\S+")  # which is where a signed URL has its signature
_HIDDEN = "(left out)"


def write_card(checkpoint: str | Path, to: str | Path, run_dir: str | Path | None = None) -> Path:
    """Write the card of an exported checkpoint, as Hugging Face's hub reads it.

    It holds what the run left in its folder: config, data, environment, and what
    ``scaledtrain.evaluate`` and ``scaledtrain.baselines`` found. Settings that may be secret, as
    options of a storage, are left out.

    Args:
        checkpoint: the folder of one step.
        to: the folder that the weights are exported to.
        run_dir: the folder of the run; None: where such a checkpoint lies.

    Returns:
        The file, ``MODEL_CARD.md``: as ``README.md`` the hub shows it.

    Raises:
        ConfigError: there is one already, or a file of the run is damaged.
    """
    checkpoint, path = Path(checkpoint).absolute(), Path(to) / CARD
    run = checkpoint.parent.parent if run_dir is None else Path(run_dir)
    if path.exists():
        raise ConfigError(f"{path} is there already; remove it, or export to another folder")
    manifest = Manifest.read(checkpoint)
    evaluated = read_evaluated(run)
    if evaluated is not None and evaluated.checkpoint != checkpoint.name:
        evaluated = None  # of other weights
    values = evaluated.values if evaluated is not None else manifest.evaluation
    config = _config(run)
    result = _result(run)
    baselines = read_baselines(run)
    kind = evaluated.kind if evaluated is not None else baselines.kind if baselines else None
    data = str(_get(config, "data", "_target_") or "not recorded").rpartition(".")[2]
    name = config.get("name") or run.resolve().name
    header = _header(str(name), kind, data, values)
    title = f"# {name}\n\n{_about(manifest, config)}"
    parts = [
        title,
        _use(Path(to)),
        _data(data, result),
        _metrics(values, evaluated),
        _against(baselines, values),
        "" if evaluated is None else _calibration(evaluated.calibration),
        _made(result, config),
    ]
    text = "\n\n".join(part for part in parts if part)
    replace_file(path, f"---\n{header}---\n\n{text}\n".encode())
    return path


def _config(run: Path) -> dict[str, Any]:
    path = run / CONFIG
    if not path.is_file():
        return {}
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; restore it, or remove it") from error
    written = found if isinstance(found, dict) else {}
    return {str(k): _without_secrets(str(k), v) for k, v in written.items()}


def _without_secrets(key: str, value: Any) -> Any:
    if _SECRET.search(key) and value not in (None, {}, ""):
        return _HIDDEN
    if isinstance(value, Mapping):
        return {_public(str(k)): _without_secrets(str(k), v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_secrets(key, each) for each in value]
    return _public(value) if isinstance(value, str) else value


def _public(text: str) -> str:
    return _QUERY.sub(rf"\1?{_HIDDEN}", _PASSWORD.sub("//", text))


def _result(run: Path) -> dict[str, Any]:
    path = run / RESULT
    if not path.is_file():  # it has not ended, or was a script of one's own
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; restore it, or remove it") from error
    return found if isinstance(found, dict) else {}


def _get(values: Mapping[str, Any], *keys: str) -> Any:
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _header(name: str, kind: str | None, data: str, values: Mapping[str, float]) -> str:
    """The YAML that the hub reads: an entry for each metric in its model index."""
    header: dict[str, Any] = {"library_name": "pytorch", "tags": ["scaledtrain"]}
    if values:
        header["metrics"] = list(values)
        task = {
            "type": (kind or "other").replace("_", "-"),
            "name": _TASKS.get(kind or "", "Other"),
        }
        results = {
            "task": task,
            "dataset": {"type": data, "name": data, "split": "test"},
            "metrics": [{"type": m, "name": m, "value": value} for m, value in values.items()],
        }
        header["model-index"] = [{"name": name, "results": [results]}]
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True)  # type: ignore[no-any-return, unused-ignore]


def _about(manifest: Manifest, config: Mapping[str, Any]) -> str:
    model = manifest.facts.get("model", "A model")
    path = _get(config, "model", "_target_")
    made = f" (`{path}`)" if path else ""
    how = f", strategy {manifest.facts['strategy']}" if "strategy" in manifest.facts else ""
    return (
        f"{model}{made} after {manifest.step:,} updates{how}. Trained and exported by "
        f"scaledtrain {scaledtrain.__version__}."
    )


def _use(to: Path) -> str:
    lines = ["## Use", ""]
    if (to / "model.pt2").exists():
        lines += [
            "`model.pt2` is the whole model in eval mode, which needs torch alone, for batches of "
            "any number of samples:",
            "",
            "```python",
            "import torch",
            "",
            'model = torch.export.load("model.pt2").module()',
            "outputs = model(inputs)",
            "```",
            "",
        ]
    lines.append(
        "`model.safetensors` has the weights by the names of the model's own `state_dict`."
    )
    return "\n".join(lines)


def _data(name: str, result: Mapping[str, Any]) -> str:
    facts = result.get("data") or {}
    rows = [[key.replace("_", " "), f"`{value}`"] for key, value in facts.items()]
    return f"## Data\n\n`{name}`" + (f"\n\n{_table(['', ''], rows)}" if rows else "")


def _metrics(values: Mapping[str, float], evaluated: Evaluated | None) -> str:
    if not values:
        return "## Metrics\n\nIt was not evaluated."
    of = "The run's last evaluation before it was saved."
    if evaluated is not None:
        samples = "" if evaluated.samples is None else f", {evaluated.samples:,} samples"
        of = f"Of these weights on the test data{samples}."
    rows = [[name, f"{value:.4f}"] for name, value in values.items()]
    return f"## Metrics\n\n{of}\n\n{_table(['metric', 'value'], rows)}"


def _against(baselines: Baselines | None, values: Mapping[str, float]) -> str:
    if baselines is None:
        return ""
    metrics = baselines.metrics
    rows = [["this model", *(f"{values[m]:.4f}" if m in values else "–" for m in metrics)]]
    for row in baselines.rows:
        shown = [f"{row.values[m]:.4f}" if m in row.values else "–" for m in metrics]
        rows.append([row.name.replace("_", " "), *shown])
    said = verdict(baselines, values)
    return f"## Baselines\n\n{said}\n\n{_table(['', *metrics], rows)}"


def _calibration(found: Calibration | None) -> str:
    if found is None:
        return ""
    lines = [
        f"It says {found.mean_confidence:.1%} on average and is right in {found.accuracy:.1%}; "
        f"expected calibration error {found.expected_error:.4f} ({found.n_bins} bins, "
        f"{found.answers:,} answers).",
        "",
        *(f"* {threshold}" for threshold in found.thresholds),
    ]
    return "\n".join(["## Calibration", "", *lines]).rstrip()


def _made(result: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    told = _get(result, "environment") or {}
    rows = [
        ["commit", f"`{told.get('commit') or 'not recorded'}`"],
        *([key, str(told[key])] for key in ("scaledtrain", "torch", "python") if key in told),
        *([key, str(told[key])] for key in ("device", "cpu", "world_size") if key in told),
        ["exported with", f"scaledtrain {scaledtrain.__version__}, torch {torch.__version__}"],
    ]
    text = f"## How it was made\n\n{_table(['', ''], rows)}"
    if config:
        written = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        text += f"\n\n```yaml\n{written}```"
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
