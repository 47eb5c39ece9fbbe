"""The report's page: one HTML file, with its style and its figures inside.

A log is untrusted. The template ``page.html.jinja`` escapes whatever comes from it, nothing in it
is evaluated, and the page's content security policy forbids scripts and the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from safestep.measure.estimator_registry import Estimator
from safestep.plots.measured_how import how_measured
from safestep.plots.rates import say_lowered
from safestep.plots.style import SERIES_COLORS
from safestep.plots.wording import count, number
from safestep.report.evidence import gather
from safestep.report.regimes import REGIMES, name_regimes
from safestep.report.verdict import Verdict
from safestep.runlog.folder import list_runs
from safestep.runlog.reader import Run
from safestep.runlog.series import StepSeries, step_series

MAX_EVENTS = 200
_MAX_RUNS = 20  # of one folder
_MAX_TEXT = 500
_HERE = Path(__file__).parent
_REGIME_COLORS = {
    "inside": "#009673", "scaled": "#0077bb", "not taken": "#7a68c8", "controlled": "#b87a00",
    "unsettled": "#aa4499", "harmful": "#d9480f", "unknown": "#8a949e",
}  # fmt: skip
_DARK_LIFT = 0.35  # share of white that keeps the figures' colours legible on the dark page
_WAYS = {
    **{each.way: each.meaning for each in Estimator},
    "unmeasured": "neither measured nor predicted; such a step passes unguarded, unless it was not "
    "taken at all",
}


@dataclass(frozen=True, slots=True)
class ShownFigure:
    """A figure on the page: its SVG, what it says, and the name of its run."""

    svg: Markup
    says: str
    label: str


@dataclass(frozen=True, slots=True)
class Section:
    """One kind of figure, of every run that has it."""

    caption: str
    figures: list[ShownFigure]
    is_first: bool = False


def build_page(
    runs: Sequence[Run],
    labels: Sequence[str],
    verdicts: Sequence[Verdict],
    sections: Sequence[Section],
    refresh_seconds: int | None = None,
) -> str:
    """Return the page.

    Args:
        runs: The runs.
        labels: Their names.
        verdicts: What happened in each.
        sections: The figures.
        refresh_seconds: How often a browser reads the page again; None for a finished report.

    Returns:
        HTML.
    """
    return _template().render(
        title=", ".join(labels),
        refresh_seconds=refresh_seconds,
        palette=_palette(),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        cards=list(map(_card, runs, labels, verdicts)),
        first=[section for section in sections if section.is_first],
        more=[section for section in sections if not section.is_first],
        regimes=REGIMES,
        ways=_WAYS,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["short"] = _short
    return environment.get_template("page.html.jinja")


def _short(value: Any) -> str:
    text = str(value).replace(" <= ", "\u00a0<=\u00a0").replace(" %", "\u00a0%")
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."


def _palette() -> Markup:
    """Return the figures' colours as CSS variables, lifted on a dark page."""
    light = "".join(f"--c{color[1:]}: {color};" for color in SERIES_COLORS)
    dark = "".join(f"--c{color[1:]}: {_lifted(color)};" for color in SERIES_COLORS)
    return Markup(f":root {{{light}}} @media (prefers-color-scheme: dark) {{:root {{{dark}}}}}")


def _lifted(color: str) -> str:
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 * _DARK_LIFT + p * (1 - _DARK_LIFT)):02x}" for p in parts)


def _card(run: Run, label: str, verdict: Verdict) -> dict[str, Any]:
    """Return what the template says about one run."""
    return {
        "label": label,
        "verdict": verdict,
        "bar": _bar(run),
        "measured": _measured(run),
        "others": _other_runs(run),
        "numbers": _numbers(run),
        "settings": {str(name): value for name, value in run.settings.items()},
        "events": [
            {name: str(event.get(name, "")) for name in ("step", "name", "message")}
            for event in run.events[-MAX_EVENTS:]
        ],
        "hidden_events": len(run.events) - MAX_EVENTS,
    }


def _bar(run: Run) -> list[dict[str, Any]]:
    """Return the regimes, with how many steps are in each."""
    series = step_series(run)
    if not len(series.step):
        return []
    counts = {name: int(mask.sum()) for name, mask in name_regimes(run, gather(run)).items()}
    return [
        {"name": name, "steps": steps, "color": _REGIME_COLORS[name]}
        for name, steps in counts.items() if steps
    ]  # fmt: skip


def _measured(run: Run) -> str:
    """Return at how many steps r was measured, in each way, predicted, or not known."""
    counts = {way: int(mask.sum()) for way, mask in how_measured(run).items() if mask.any()}
    others = {name: counts.pop(name, 0) for name in ("predicted", "unmeasured", "unknown")}
    skipped = int(step_series(run).skipped.sum())
    ways = ", ".join(f"{way} {steps:,}" for way, steps in counts.items())
    told = {
        f"measured at {count(sum(counts.values()), 'step')} ({ways})": sum(counts.values()),
        f"predicted from earlier ones at {others['predicted']:,}": others["predicted"],
        f"{count(skipped, 'step')} not taken": skipped,
        f"not measured at {others['unmeasured'] - skipped:,}": others["unmeasured"] - skipped,
        f"not told by the log at {others['unknown']:,}": others["unknown"],
    }
    return ", ".join(text for text, steps in told.items() if steps > 0)


def _other_runs(run: Run) -> list[dict[str, str]]:
    """Return the other runs of the folder, which this card does not count, the newest first."""
    others = [other for other in list_runs(run.path.parent) if other.path != run.path]
    return [
        {"file": other.path.name, "started": other.started.replace("T", " ") or "an unknown time"}
        for other in others[:_MAX_RUNS]
    ]


def _numbers(run: Run) -> dict[str, Any]:
    series, header = step_series(run), run.header
    return {
        "file": run.path,
        "folder": run.path.parent,
        "safestep": header.get("safestep", "unknown"),
        "torch": header.get("torch", "unknown"),
        "workers": header.get("world_size", "unknown"),
        "logits": str(header.get("logits", "unknown")).removeprefix("logits: "),
        "steps": f"{len(series.step):,}",
        "steps scaled": f"{int(series.clipped.sum()):,}",
        "steps not taken": f"{int(series.skipped.sum()):,}",
        "steps not measured": f"{int(series.unmeasured.sum()):,}",
        "largest r": _largest(run, series),
        "learning rate": f"the guard {say_lowered(series)}",
    }


def _largest(run: Run, series: StepSeries) -> str:
    """Return the largest r, its step, and where the model has several heads, which one set it."""
    known = np.where(np.isfinite(series.proposed), series.proposed, -np.inf)
    if not len(known) or np.isneginf(known).all():
        return "unknown"
    at = int(known.argmax())
    step, heads = series.step[at], run.steps.get("head")
    names = [] if heads is None else filter(None, heads[run.steps["step"] == step])
    which = ", ".join(dict.fromkeys(map(str, names)))
    return f"{number(float(known[at]))} at step {step}" + (f", set by {which}" if which else "")
