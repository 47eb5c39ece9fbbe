"""The report of any run is one page that stands alone, and trusts nothing in the log."""

import json
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from safestep.cli import main
from safestep.plots.figure_registry import FIGURES
from safestep.report.figures import draw
from safestep.report.write import write_report
from safestep.runlog.reader import list_runs, read_run
from safestep.runlog.writer import RunLog

VOID = {"meta", "br", "img", "path", "use", "rect", "image"}


def page_of(*run_dirs, output=None):
    """Return the page without the files beside it, which take most of a report's time."""
    return Page(write_report(run_dirs, output, refresh_seconds=5))


class Page(HTMLParser):
    """Checks that elements nest, and collects attributes and text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join("".join(self.text).split())

    def values(self, name):
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.mark.slow
def test_report_of_a_spiked_run_opens_with_what_happened(spiked_run, tmp_path):
    path = write_report([spiked_run], tmp_path)

    page = Page(path)
    assert "Protected: the guard scaled down" in page.words
    assert "learning rate x10,000" in page.words
    assert sum(label.startswith("The loss went") for label in page.values("aria-label")) == 1
    assert len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.glob("*.pdf"))) == 7
    assert all(file.stat().st_size > 2000 for file in tmp_path.iterdir())


def test_report_of_workers_shows_them(worker_run, tmp_path):
    page = page_of(worker_run, output=tmp_path)

    assert "Worker 3 is off from step 80 on" in page.words
    labels = page.values("aria-label")
    assert sum(label.startswith("Over the last tenth of the run") for label in labels) == 3
    assert not any(label.startswith("The loss went") for label in labels)  # no step was logged


def test_bar_counts_steps_as_they_were_taken(tmp_path):
    """Three inside, two scaled down, one not taken, of which none is harmful."""
    with RunLog(tmp_path, {"max_normalized_step": 1.0}) as log:
        for step, status in enumerate(["ok", "clipped", "ok", "skipped", "clipped", "ok"]):
            r, scale = (4.0, 0.25) if status == "clipped" else (0.5, 1.0)
            log.write("step", {"step": step, "normalized_step": r, "scale": scale,
                               "status": status, "estimator": "jvp", "loss": 1.0})  # fmt: skip

    page = page_of(tmp_path).words

    assert "inside 3 scaled 2 not taken 1 How r was found: measured at 5 steps (exact 5)" in page
    assert ", 1 step not taken." in page
    assert "harmful 0" not in page


def test_page_needs_nothing_from_outside(spiked_run, tmp_path):
    page = page_of(spiked_run, output=tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")

    assert "default-src 'none'" in text
    links = page.values("src") + page.values("href") + page.values("xlink:href")
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\((?!#)|@import|<script", text)


@pytest.mark.slow
def test_two_runs_lie_side_by_side(spiked_run, lost_run, tmp_path):
    page = page_of(spiked_run, lost_run, output=tmp_path)

    assert "Protected" in page.words
    assert "Harmed" in page.words
    labels = page.values("aria-label")
    assert sum(label.startswith("The loss went") for label in labels) == 2


def test_figures_of_two_runs_have_the_same_axes(spiked_run, lost_run):
    for kind in FIGURES[:1]:
        first, second = draw(kind, [read_run(spiked_run), read_run(lost_run)])
        assert first is not None
        assert second is not None
        assert first.axes[0].get_xlim() == second.axes[0].get_xlim()
        assert first.axes[0].get_ylim() == second.axes[0].get_ylim()


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{}%s\x00\u202e"


def test_everything_from_the_log_is_escaped(tmp_path):
    with RunLog(tmp_path / "run", {EVIL: EVIL}) as log:
        for step in range(3):
            log.write("step", {
                "step": step, "status": "skipped", "reason": EVIL, "estimator": EVIL,
                "normalized_step": "nan", "scale": 0.0, EVIL: EVIL,
            })  # fmt: skip
        log.write("event", {"step": EVIL, "name": EVIL, "message": EVIL})
        log.write("event", {"step": [EVIL], "name": "worker", "message": {EVIL: 1}, "rank": 0})

    page = page_of(tmp_path / "run", output=tmp_path / "out")

    assert not {"script", "img"} & {tag for tag, _, _ in page.attributes}
    assert "<script" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)</script>" in page.words  # shown as text
    assert "onerror" not in [name for _, name, _ in page.attributes]


@pytest.mark.parametrize("records", [
    [],
    [{"step": 0}],
    [{"step": 0, "normalized_step": 0.5, "status": "ok", "scale": 1.0, "loss": 1.0}],
    [{"step": s, "normalized_step": "nan", "loss": "nan", "scale": 0.0, "status": "skipped"}
     for s in range(20)],
    [{"step": s, "normalized_step": "inf", "loss": "inf", "scale": "nan", "radius": 0.0}
     for s in range(20)],
    [{"step": s, "normalized_step": 0.1, "loss": -1.0, "scale": 1.0} for s in range(20)],
    [{"step": 7 * s, "normalized_step": 1e-300, "step_norm": 1e300, "scale": 1.0, "loss": 1e300,
      "radius": 1e300, "seconds": 0.0} for s in range(20)],
], ids=["empty", "bare", "one step", "NaN", "infinite", "negative loss", "huge"])  # fmt: skip
def test_strange_run_has_a_page(tmp_path, records):
    with RunLog(tmp_path / "run", {}) as log:
        for record in records:
            log.write("step", record)

    page = page_of(tmp_path / "run", output=tmp_path / "out")

    assert "safestep report" in page.words


def test_torn_last_line_is_said_on_the_page(tmp_path):
    with RunLog(tmp_path, {}) as log:
        log.write("step", {"step": 0, "normalized_step": 0.5})
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"kind": "st')

    assert "last line of the log is cut short" in page_of(tmp_path).words


def test_runs_of_one_folder_are_listed_and_never_added_up(tmp_path):
    for loss in (1.0, 2.0, 3.0):
        with RunLog(tmp_path, {}) as log:
            for step in range(3):
                log.write("step", {"step": step, "normalized_step": 0.5, "loss": loss})
    names = {path.name for path in tmp_path.glob("run-*.jsonl")}

    page = page_of(tmp_path).words

    assert len(names) == 2
    assert "Healthy: 3 steps" in page
    assert "Other runs in this folder (2), not counted here" in page
    assert all(f"{name}, begun " in page for name in names)


@pytest.mark.parametrize(
    ("later", "effect"),
    [("1.0", "loss unaffected (1 before, 1 after)"),
     ("0.5", "loss went on falling (1 before, 0.5 after)")],
    ids=["level", "falling"],
)  # fmt: skip
def test_csv_is_enough_for_a_report(tmp_path, later, effect):
    rows = ["step,safestep/normalized_step,safestep/scale,train_loss"]
    rows += [f"{step},{9.0 if step == 30 else 0.5},{0.11 if step == 30 else 1.0},"
             f"{later if step > 30 else 1.0}" for step in range(60)]  # fmt: skip
    (tmp_path / "metrics.csv").write_text("\n".join(rows))

    page = page_of(tmp_path)

    assert f"1 intervention at step 30: r = 9, scaled by 0.11; {effect}." in page.words


def test_report_command_prints_where_the_page_is(tmp_path, capsys):
    with RunLog(tmp_path, {}) as log:
        log.write("step", {"step": 0, "learning_rate": 0.1})

    assert main(["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0

    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "out" / "report.html"
    assert path.is_file()


def test_report_of_nothing_is_a_clear_error(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2

    error = capsys.readouterr().err
    assert "expected run.jsonl or metrics.csv" in error
    assert "Traceback" not in error


def test_followed_page_is_written_anew_until_interrupted(tmp_path, monkeypatch, capsys):
    """Sleeping is where the run goes on: two more records, then Ctrl-C."""
    log = RunLog(tmp_path, {})
    log.write("step", {"step": 0, "normalized_step": 0.25})
    pages = []

    def sleep(_):
        pages.append((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
        if len(pages) == 2:
            log.close()
            raise KeyboardInterrupt
        log.write("step", {"step": 1, "normalized_step": 0.75})

    monkeypatch.setattr("safestep.report.write.time.sleep", sleep)

    assert main(["report", str(tmp_path), "--follow"]) == 0
    assert "1 step, r\u00a0&lt;=\u00a00.25, none touched." in pages[0]
    assert "2 steps, r\u00a0&lt;=\u00a00.75, none touched." in pages[1]
    assert 'http-equiv="refresh"' in pages[1]
    final = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in final
    assert str(tmp_path) in capsys.readouterr().out


@pytest.mark.slow
def test_million_steps_are_reported_in_a_minute(tmp_path):
    rng = np.random.default_rng(0)
    r = rng.lognormal(-1.5, 0.5, size=1_000_000)
    r[777_700:777_800] = 0.25
    r[777_777] = 500.0
    with (tmp_path / "run.jsonl").open("w") as file:
        file.write('{"kind": "header", "schema_version": 1, "settings": {}}\n')
        for step, value in enumerate(r.tolist()):
            record = {
                "kind": "step", "step": step, "normalized_step": value, "radius": 1 / value,
                "step_norm": 1.0, "scale": min(1.0, 1 / value), "loss": 1 + 1 / (1 + step),
                "status": "clipped" if value > 1 else "ok",
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")

    start = time.perf_counter()
    page = Page(write_report([tmp_path]))
    elapsed = time.perf_counter() - start

    assert "1 intervention at step 777777: r = 500, scaled by 0.002; loss unaffected" in page.words
    assert (tmp_path / "report" / "report.html").stat().st_size < 10_000_000
    sys.stdout.write(f"{elapsed:.1f} s\n")
    assert elapsed < 120  # about 25 s on one core


def test_links_in_a_strangers_folder_are_replaced_and_not_followed(healthy_run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    folder = tmp_path / "run"
    (folder / "report").mkdir(parents=True)
    (folder / "run.jsonl").write_bytes((healthy_run / "run.jsonl").read_bytes())
    write_report([folder])
    names = sorted(path.name for path in (folder / "report").iterdir())
    for name in [*names, "report.part"]:
        (mine / name).write_text("mine")
        (folder / "report" / name).unlink(missing_ok=True)
        (folder / "report" / name).symlink_to(mine / name)

    write_report([folder])

    assert {path.read_text() for path in mine.iterdir()} == {"mine"}
    assert not any((folder / "report" / name).is_symlink() for name in names)


def test_report_folder_that_is_a_link_is_replaced(healthy_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.jsonl").write_bytes((healthy_run / "run.jsonl").read_bytes())
    (tmp_path / "run" / "report").symlink_to(tmp_path / "mine")

    page_of(tmp_path / "run")

    assert list((tmp_path / "mine").iterdir()) == []
    assert not (tmp_path / "run" / "report").is_symlink()


def test_report_of_an_earlier_run_has_a_folder_of_its_own(tmp_path):
    for r in (0.25, 0.5):
        with RunLog(tmp_path, {}) as log:
            log.write("step", {"step": 0, "normalized_step": r, "scale": 1.0})
    _, earlier = list_runs(tmp_path)

    path = write_report([earlier.path], refresh_seconds=5)

    assert path.parent.name == f"report-{earlier.run}"
    assert "r <= 0.25" in Page(path).words


@pytest.mark.parametrize("value", [1e300, 1.7e308, 5e-324])
def test_values_at_the_ends_of_float64_have_a_page(tmp_path, value):
    names = ("normalized_step", "step_norm", "radius", "loss", "learning_rate", "seconds")
    with RunLog(tmp_path, {}) as log:
        for step in range(30):
            for optimizer in range(2):
                record = {"step": step, "optimizer": optimizer, "scale": 1.0, "time": value}
                log.write("step", {**record, **dict.fromkeys(names, value)})
            log.write("workers", {"step": step, "loss": [value, -value], "grad_norm": [value] * 2})

    assert "30 steps" in page_of(tmp_path).words
