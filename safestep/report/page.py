"""The report's page: one HTML file, styles and figures inside, everything escaped.

A log is untrusted. Whatever comes from it goes through ``html.escape``, nothing in it is evaluated,
and the page's content security policy forbids scripts and the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from safestep.plots.style import SERIES_COLORS
from safestep.plots.wording import number
from safestep.report.regimes import REGIMES, name_regimes
from safestep.report.verdict import Verdict
from safestep.runlog.reader import Run
from safestep.runlog.series import StepSeries, removed_area, step_series

MAX_EVENTS = 200
_MAX_TEXT = 500
_REGIME_COLORS = {
    "safe": "#009673", "controlled": "#b87a00", "unsettled": "#aa4499", "harmful": "#d9480f",
    "unknown": "#8a949e",
}  # fmt: skip
_DARK_LIFT = 0.35  # share of white that keeps the figures' colours legible on the dark page
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2320; --soft: #5b6570;
  --line: #d9dee3; --card: #f5f7f8; --good: #007a5e; --warn: #8f5f00; --bad: #c03a06; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e6e9ec; --soft: #a4adb6;
  --line: #363c42; --card: #1c2024; --good: #3fc79f; --warn: #e0a63a; --bad: #ff8350; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 80rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
.runs { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-left: .35rem solid;
  border-radius: .4rem; padding: .9rem 1rem; min-width: 0; }
.card.good { border-left-color: var(--good); } .card.warn { border-left-color: var(--warn); }
.card.bad { border-left-color: var(--bad); }
.headline { font-size: 1.15rem; font-weight: 600; margin: .2rem 0 .5rem; overflow-wrap: anywhere; }
.good .headline { color: var(--good); } .warn .headline { color: var(--warn); }
.bad .headline { color: var(--bad); }
.story { margin: 0; padding-left: 1.1rem; overflow-wrap: anywhere; }
.bar { display: flex; height: .8rem; margin: .8rem 0 .4rem; border-radius: .2rem;
  overflow: hidden; }
.bar i { min-width: 2px; }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: .15rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-top: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures { display: grid; gap: 1.4rem 1.8rem; }
.figures.one { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figcaption, .soft { color: var(--soft); font-size: .88rem; }
details { margin: .6rem 0; } summary { cursor: pointer; }
"""


def _palette() -> str:
    """Return the figures' colours as CSS variables, lifted on a dark page."""
    light = "".join(f"--c{color[1:]}: {color};" for color in SERIES_COLORS)
    dark = "".join(
        f"--c{color[1:]}: #"
        + "".join(
            f"{round(255 * _DARK_LIFT + int(color[i : i + 2], 16) * (1 - _DARK_LIFT)):02x}"
            for i in (1, 3, 5)
        )
        + ";"
        for color in SERIES_COLORS
    )
    return f":root {{{light}}} @media (prefers-color-scheme: dark) {{:root {{{dark}}}}}"


@dataclass(frozen=True, slots=True)
class ShownFigure:
    """A figure on the page: its SVG, its facts in words, and the run it shows."""

    svg: str
    facts: str
    label: str


@dataclass(frozen=True, slots=True)
class Section:
    """One kind of figure, of every run that has it."""

    caption: str
    figures: list[ShownFigure]


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
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    cards = "".join(map(_card, runs, labels, verdicts))
    figures = _figures_side_by_side(sections) if len(runs) > 1 else _figures(sections)
    details = "".join(map(_details, runs, labels))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">{refresh}
<title>safestep: {_text(", ".join(labels))}</title><style>{_palette()}{STYLE}</style></head><body>
<h1>safestep report</h1>
<main><section class="runs" aria-label="What happened">{cards}</section>
{figures}
<h2>Behind the figures</h2>{details}{_definitions()}</main></body></html>
"""


def _text(value: Any) -> str:
    text = str(value)
    return escape(text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}...")


def _card(run: Run, label: str, verdict: Verdict) -> str:
    story = "".join(f"<li>{_text(sentence)}</li>" for sentence in verdict.sentences)
    return (
        f'<article class="card {verdict.tone}"><h3>{_text(label)}</h3>'
        f'<p class="headline">{_text(verdict.headline)}</p><ul class="story">{story}</ul>'
        f"{_regimes(run)}</article>"
    )


def _regimes(run: Run) -> str:
    """Return a bar of the regimes' shares, and their counts."""
    series = step_series(run)
    if not len(series.step):
        return ""
    counts = {name: int(mask.sum()) for name, mask in name_regimes(run, series).items()}
    counts = {name: n for name, n in counts.items() if n or name in ("safe", "harmful")}
    bar = "".join(
        f'<i style="flex:{n} 0 0;background:{_REGIME_COLORS[name]}"></i>'
        for name, n in counts.items() if n
    )  # fmt: skip
    key = " &nbsp; ".join(
        f'<span class="key" style="background:{_REGIME_COLORS[name]}"></span> {name} {n:,}'
        for name, n in counts.items()
    )
    return f'<div class="bar" aria-hidden="true">{bar}</div><div class="soft">{key}</div>'


def _figure(shown: ShownFigure, caption: str) -> str:
    return (
        f'<figure><div role="img" aria-label="{_text(shown.facts)}">{shown.svg}</div>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _figures(sections: Sequence[Section]) -> str:
    figures = "".join(
        _figure(shown, section.caption) for section in sections for shown in section.figures
    )
    return f'<h2>Figures</h2><section class="figures one">{figures}</section>'


def _figures_side_by_side(sections: Sequence[Section]) -> str:
    """Return a row a kind of figure, one run beside the other."""
    rows = []
    for section in sections:
        figures = "".join(_figure(shown, shown.label) for shown in section.figures)
        rows.append(
            f'<p class="soft">{_text(section.caption)}</p><div class="runs">{figures}</div>'
        )
    return f"<h2>Figures, aligned by step</h2>{''.join(rows)}"


def _details(run: Run, label: str) -> str:
    facts = _table(_numbers(run)) + _table({str(k): v for k, v in run.settings.items()})
    summary = f"<summary>{_text(label)}: numbers, settings, events</summary>"
    return f"<details>{summary}{facts}{_events(run)}</details>"


def _numbers(run: Run) -> dict[str, Any]:
    series, header = step_series(run), run.header
    return {
        "file": run.path,
        "safestep": header.get("safestep", "unknown"),
        "torch": header.get("torch", "unknown"),
        "workers": header.get("world_size", "unknown"),
        "logits": str(header.get("logits", "unknown")).removeprefix("logits: "),
        "steps": f"{len(series.step):,}",
        "steps scaled": f"{int(series.clipped.sum()):,}",
        "steps not taken": f"{int(series.skipped.sum()):,}",
        "steps not measured": f"{int(series.unmeasured.sum()):,}",
        "largest r": _largest(run, series),
        "learning-rate area removed": f"{removed_area(series):.2%}",
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


def _events(run: Run) -> str:
    if not run.events:
        return "<p>No events.</p>"
    rows = "".join(
        f"<tr><td>{_text(event.get('step', ''))}</td><td>{_text(event.get('name', ''))}</td>"
        f"<td>{_text(event.get('message', ''))}</td></tr>"
        for event in run.events[-MAX_EVENTS:]
    )
    hidden = len(run.events) - MAX_EVENTS
    note = f"<p>{hidden:,} earlier events are not shown.</p>" if hidden > 0 else ""
    return f"{note}<table><tr><th>step</th><th>event</th><th>message</th></tr>{rows}</table>"


def _table(rows: dict[str, Any]) -> str:
    cells = "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{cells}</table>" if rows else ""


def _definitions() -> str:
    return f"<details><summary>What the regimes mean</summary>{_table(REGIMES)}</details>"
