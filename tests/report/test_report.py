"""The report as a command: what it draws, what it leaves out, and what it makes of hostile folders."""

import errno
import json
import os
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from report.folders import RATIOS, run_folder

from knltrain.cli.main import main
from knltrain.errors import KnltrainError
from knltrain.report.draw import _loss, _loss_limit, _noise
from knltrain.report.runs import read_run

CURVES = {"accuracy", "loss", "learning-rate", "throughput", "time", "memory"}


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text of each kind."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_data(self, data):
        if data.strip() and self._open[-1] != "style":
            self.texts.append(data.strip())


def page_of(out):
    return Page((out / "report.html").read_text("utf-8"))


def drawn(out):
    return {path.stem for path in (out / "figures").iterdir()}


def test_it_draws_what_there_is(tmp_path):
    run_folder(tmp_path / "lars", ratios=RATIOS, noise_scale=500.0)
    run_folder(tmp_path / "sgd", optimizer="sgd", batch=128, finished=False)
    out = tmp_path / "out"
    result = json.loads(invoke(tmp_path / "lars", tmp_path / "sgd", "--out", out, "--json").stdout.splitlines()[-1])
    assert drawn(out) == {*CURVES, "noise-scale", "trust-ratios-1"}
    assert sorted(result["figures"]) == sorted(str(path) for path in (out / "figures").iterdir())
    for path in (out / "figures").glob("*.svg"):
        ElementTree.parse(path)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (out / "figures").glob("*.png"))
    lars, sgd = result["runs"]
    assert (lars["name"], lars["finished"], sgd["finished"]) == ("lars", True, False)
    # Twelve steps of half a second with 64 images each.
    assert (lars["steps"], lars["train_s"], lars["images_per_s"]) == (12, 6.0, 128.0)
    assert lars["data_fraction"] == pytest.approx(0.1)
    assert (lars["comm_fraction"], lars["exposed_comm_fraction"]) == pytest.approx((0.4, 0.2))
    assert (lars["top1"], lars["val_loss"]) == pytest.approx((90 - 80 / 12, 1 / 12))
    assert (lars["peak_rss_mb"], sgd["peak_rss_mb"]) == (1234.5, 812.0)
    assert (lars["noise_scale"], sgd["noise_scale"]) == (500.0, None)
    page = page_of(out)
    for text in ("lars", "not finished", "83.33", "6 s", "alexnet_bn_small on cifar10 · ", "global_batch", "128"):
        assert any(text in found for found in page.texts), text
    assert "plan.world_size" in page.texts
    assert len([tag for tag, _ in page.elements if tag == "svg"]) == 8
    classes = {attributes.get("class") for _, attributes in page.elements}
    assert {"run-0", "run-1"} <= classes


def test_a_batch_that_changes_is_counted_as_it_was(tmp_path):
    """Six steps of 64 images and six of 256, at 128 and 512 images a second."""
    path = run_folder(tmp_path / "run", noise_scale=500.0)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "loss" in row and row["step"] > 6:
            row["images_per_s"] = 512.0
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, _ = read_run(path)
    assert run.batches.tolist() == [64] * 6 + [256] * 6
    assert run.results()["images_per_s"] == 320
    figure = Figure()
    axes = figure.subplots()
    assert _noise(axes, run, "black", "run")
    batch = axes.lines[1]
    assert (batch.get_xdata().tolist(), batch.get_ydata().tolist()) == ([0, 2, 4], [64, 64, 256])
    assert batch.get_drawstyle() == "steps-pre"


def rising(path, loss):
    """A run whose loss from its seventh step on is another."""
    folder = run_folder(path)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "loss" in row and row["step"] > 6:
            row["loss"] = loss
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("loss, clipped", [(3.0, False), (50.0, True), (1e14, True)])
def test_a_run_that_diverged_leaves_the_others_their_scale(tmp_path, loss, clipped):
    folders = run_folder(tmp_path / "good"), rising(tmp_path / "bad", loss)
    runs = [read_run(folder)[0] for folder in folders]
    limit = _loss_limit(runs)
    first = runs[0].steps["loss"][0]
    assert limit == (pytest.approx(1.15 * first) if clipped else None)
    axes = Figure().subplots()
    for run in runs:
        assert _loss(axes, run, "black", "run", limit=limit)
    marked = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "^" and len(line.get_xdata())]
    assert marked == ([[7 * 4 / 12]] if clipped else [])
    if clipped:
        assert axes.get_ylim() == (0, limit)
    invoke(*folders, "--out", tmp_path / "out")
    assert ("first loss beyond the axis" in " ".join(page_of(tmp_path / "out").texts)) == clipped


def test_the_time_to_a_target(tmp_path):
    # An evaluation every three steps, of half a second each.
    run_folder(tmp_path / "fast")
    run_folder(tmp_path / "short", steps=6, epochs=2)
    result = invoke(tmp_path / "fast", tmp_path / "short", "--out", tmp_path / "out", "--target-top1", "80", "--json")
    fast, short = json.loads(result.stdout.splitlines()[-1])["runs"]
    assert (short["epochs_to_target"], short["train_s_to_target"]) == (None, None)
    assert fast["top1"] >= 80 > short["top1"]
    texts = page_of(tmp_path / "out").texts
    assert "epochs to 80 %" in texts
    assert "training to 80 %" in texts
    assert (fast["epochs_to_target"], fast["train_s_to_target"]) == (3.0, 4.5)
    plain = json.loads(invoke(tmp_path / "fast", "--out", tmp_path / "out", "--json").stdout.splitlines()[-1])
    assert "epochs_to_target" not in plain["runs"][0]
    assert "epochs to" not in " ".join(page_of(tmp_path / "out").texts)


@pytest.mark.parametrize("target, epochs", [(69.9, 2), (70, 2), (70.1, 3), (80, 4), (80.1, None)])
def test_a_target_is_reached_by_what_equals_it(tmp_path, target, epochs):
    run, _ = read_run(run_folder(tmp_path / "run", steps=8))
    assert run.evaluations["top1"].tolist()[1::2] == [70, 80]
    found = run.results(target)
    assert (found["epochs_to_target"], found["train_s_to_target"]) == (epochs, epochs)


def test_what_nobody_logged_is_said_and_old_figures_go(tmp_path):
    out = tmp_path / "out"
    invoke(run_folder(tmp_path / "full", ratios=RATIOS, noise_scale=500.0), "--out", out)
    assert drawn(out) == {*CURVES, "noise-scale", "trust-ratios"}
    (out / "figures" / "mine.png").write_bytes(b"")
    invoke(run_folder(tmp_path / "plain"), "--out", out)
    assert drawn(out) == {*CURVES, "mine"}
    text = " ".join(page_of(out).texts)
    assert "No run has logged trust ratios: knltrain train --log-trust-ratios" in text
    assert "No run has a noise scale" in text


@pytest.mark.parametrize("steps", [0, 1, 2000])
def test_runs_of_any_length(tmp_path, steps):
    invoke(run_folder(tmp_path / "run", steps=steps, epochs=1, ratios=RATIOS, noise_scale=5.0), "--out", tmp_path / "o")
    assert drawn(tmp_path / "o") == ({*CURVES, "noise-scale", "trust-ratios"} if steps else set())
    assert (tmp_path / "o" / "report.html").stat().st_size < 1 << 20


def test_many_runs_have_colours_of_their_own(tmp_path):
    folders = [run_folder(tmp_path / f"run{index}", steps=4) for index in range(14)]
    invoke(*folders, "--out", tmp_path / "out")
    swatches = [attributes["style"] for tag, attributes in page_of(tmp_path / "out").elements if tag == "i"]
    assert len(set(swatches)) == 14


def test_numbers_that_are_none_are_gaps(tmp_path):
    """A skipped step has null for its loss and the norm."""
    folder = run_folder(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "epoch": 4.3, "loss": null, "lr": 1, "step_s": 0.5}\n{"step": 14, "ep')
    result = invoke(folder, "--out", tmp_path / "out", "--json")
    (run,) = json.loads(result.stdout.splitlines()[-1])["runs"]
    assert (run["steps"], run["train_s"]) == (13, 6.5)
    assert "warning" not in result.stderr, "a last line that was cut short is no damage"


def spoil(folder, name, content):
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path, "no such folder; give the folders of runs"),
        (lambda path: (path.write_text("") and None) or path, "no folder; give the folders of runs"),
        (lambda path: path.mkdir() or path, "no config.json in it"),
        (lambda path: spoil(run_folder(path), "config.json", b"[]"), "its config.json is not that of a run"),
        (lambda path: spoil(run_folder(path), "config.json", b'{"config": 3}'), "its config.json is not that of a run"),
        (lambda path: spoil(run_folder(path), "config.json", b"[" * 100000), "its config.json is not that of a run"),
        (lambda path: spoil(run_folder(path), "config.json", b"\xff{}"), "its config.json is not that of a run"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, make, words):
    folder = make(tmp_path / "foreign")
    alone = invoke(folder, "--out", tmp_path / "none", code=1)
    (line,) = alone.stderr.splitlines()
    assert str(folder) in line
    assert words in line
    assert not (tmp_path / "none").exists()


def test_what_is_no_run_is_left_out(tmp_path):
    foreign, good = tmp_path / "foreign", run_folder(tmp_path / "good")
    result = invoke(foreign, good, "--out", tmp_path / "out", "--json")
    (line,) = result.stderr.splitlines()[:-1]
    assert line == f"warning: {foreign}: no such folder; give the folders of runs; it is left out"
    told = json.loads(result.stdout.splitlines()[-1])
    assert ([one["name"] for one in told["runs"]], [one["path"] for one in told["left_out"]]) == (
        ["good"], [str(foreign)])  # fmt: skip
    assert "none of 2 folders is a run's" in invoke(foreign, tmp_path, "--out", tmp_path / "none", code=1).stderr


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "summary.json", "trust_ratios.jsonl"])
def test_nothing_is_waited_for(tmp_path, name):
    folder = run_folder(tmp_path / "run", ratios=RATIOS)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    if name == "config.json":
        with pytest.raises(KnltrainError, match="not the folder of a run"):
            read_run(folder)
    else:
        _, problems = read_run(folder)
        assert [problem for problem in problems if f"{folder}/{name}" in problem]


@pytest.mark.parametrize(
    "line",
    [b'{"step": "3", "epoch": 1}', b'{"step": 3, "epoch": 1e400}', b'{"step": 3}', b"[]", b"\xff", b"[" * 100000,
     b'{"step": 3, "epoch": NaN}', b'{"step": 3, "epoch": 1, "loss": [1], "weight": 3}', b"x" * (3 << 20)],
)  # fmt: skip
def test_damage_in_the_middle_is_said(tmp_path, line):
    folder = run_folder(tmp_path / "run", ratios=RATIOS)
    for name in ("metrics.jsonl", "trust_ratios.jsonl"):
        lines = (folder / name).read_bytes().splitlines()
        (folder / name).write_bytes(b"\n".join([*lines[:5], line, *lines[5:], b""]))
    run, problems = read_run(folder)
    for name, problem in zip(("metrics.jsonl", "trust_ratios.jsonl"), problems, strict=True):
        assert problem.startswith(f"{folder}/{name}: ")
        assert problem.endswith(
            "line 6 is no row; it is left out" if len(line) < 1 << 20 else "line 6 first; they are left out"
        )
    whole, _ = read_run(run_folder(tmp_path / "whole", ratios=RATIOS))
    assert run.results() == whole.results()
    assert len(run.trust_ratios.epochs) == len(whole.trust_ratios.epochs)


def test_a_file_without_end_is_not_read_to_its_end(tmp_path):
    folder = run_folder(tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"x\n" * 1000)
        file.truncate(1 << 40)
    run, problems = read_run(folder)
    assert problems == [f"{folder}/metrics.jsonl: line {run.steps['step'].size + run.evaluations['step'].size + 1} and "
                        "many others are no rows; the rest is left out"]  # fmt: skip


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_what_cannot_be_read_now_is_said_with_its_reason(tmp_path, monkeypatch, name):
    folder, original = run_folder(tmp_path / "run"), os.open

    def open_(path, *arguments, **options):
        if str(path).endswith(name):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(KnltrainError, match=f"{name}: Permission denied"):
        read_run(folder)


def test_rows_of_numbers_that_cannot_be_drawn(tmp_path):
    """Steps back in time, negative losses, ratios of zero, numbers as large as there are."""
    folder = run_folder(tmp_path / "run", ratios={"weight": {"a": 0.0, "b": -1.0, "c": 1e300}}, noise_scale=-5.0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": -3, "epoch": -1e300, "loss": -1e308, "lr": 1e308, "rss_mb": 1e308, "step_s": -1}\n')
        file.write('{"step": 1, "epoch": 1e300, "top1": 1e308, "val_loss": 0}\n')
    invoke(folder, "--out", tmp_path / "out")


def test_the_same_folder_is_drawn_once_and_names_are_told_apart(tmp_path):
    one, two = run_folder(tmp_path / "a" / "run"), run_folder(tmp_path / "b" / "run")
    result = invoke(one, two, tmp_path / "b" / ".." / "a" / "run", "--out", tmp_path / "out", "--json")
    assert "is named twice; it is drawn once" in result.stderr
    assert [run["name"] for run in json.loads(result.stdout.splitlines()[-1])["runs"]] == ["a/run", "b/run"]


HOSTILE = [
    "<script>alert(1)<", "\"><img src=x onerror=alert(1)>", "</style><svg onload=alert(1)>", "$\\frac{$", "_hidden",
    "日本 😀", "line\nbreak \x1b[31m", "{{ 7 * 7 }}{% raw %}", "'; --", "x" * 200, "\udcff\udcfe",
    "\u202etxt", "]]>&amp;&#60;",
]  # fmt: skip


@pytest.mark.slow
def test_what_runs_say_is_text_and_nothing_else(tmp_path):
    """Names of folders, fields, values and layers; what a browser finds has none of it as an element or attribute."""
    folders = []
    for index, text in enumerate(HOSTILE):
        name = text.replace("/", "∕")
        shown = text.encode("utf-8", "replace").decode()
        ratios = {"weight": {shown: 0.1, "$x_{": 0.2}}
        config = {"recipe": shown, shown: [shown], "model": shown}
        folders.append(run_folder(tmp_path / str(index) / name, steps=4, config=config, ratios=ratios))
    out = tmp_path / "out"
    invoke(*folders, "--out", out)
    page = page_of(out)
    assert {tag for tag, _ in page.elements} & {
        "script",
        "img",
        "iframe",
        "object",
        "link",
        "base",
        "b",
        "form",
    } == set()
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
    text = "\n".join(page.texts)
    for shown in ("<script>alert(1)<", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}{% raw %}", "$\\frac{$", "日本 😀",
                  "\\udcff\\udcfe", "line\\nbreak \\x1b[31m", "_hidden"):  # fmt: skip
        assert shown in text, shown
    for path in (out / "figures").glob("*.svg"):
        ElementTree.parse(path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke(run_folder(tmp_path / "run"), "--out", tmp_path / "file", code=1)
    assert "File exists" in result.stderr or "Not a directory" in result.stderr
