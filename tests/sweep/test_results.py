"""Which learning rate is the best, and what is said of it: from folders that look like runs."""

import csv
import dataclasses
import errno
import json
import math
import os

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sweeps import sweep_of

from knltrain.errors import ConfigError, KnltrainError
from knltrain.sweep import results as results_module
from knltrain.sweep.draw import draw_accuracy
from knltrain.sweep.results import COLUMNS, Results
from knltrain.sweep.runner import collect, guard, task_of

NEW = {"cpu": "New CPU", "cores": 4, "revision": None, "versions": {"torch": "2.13.0", "knltrain": "0.1.0"}}
IMAGES = 2560  # with 15 epochs, 150 steps of 256 and 38 of 1,024


@pytest.fixture
def results(tmp_path):
    return Results(sweep_of(), tmp_path, IMAGES)


def end(results, *key, top1=None, status="diverged"):
    """Puts a run's folder there, as if it had been trained."""
    point = results.sweep.point(*key)
    folder = point.folder(results.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "epoch": step / 2, "loss": 2.0 / step} for step in (1, 2)]
    rows.append({"step": 2, "epoch": 1.0, "top1": top1 or 10.0, "top5": 50.0, "val_loss": 1.5})
    record = {"cpu": "Old CPU", "cores": 2, "revision": "abc", "versions": {"torch": "2.8.0", "knltrain": "0.1.0"}}
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if top1 is None:
        (folder / "ended.json").write_text(json.dumps({"status": status, "reason": f"a {status} run", "seconds": 1.0}))
    else:
        steps = results.steps(point)
        summary = {
            "finished": True,
            "steps": steps,
            "top1": top1,
            "best_top1": top1,
            "wall_s": 2.0,
            "images_per_s": 9.0,
        }
        (folder / "summary.json").write_text(json.dumps(summary))


def searched(results):
    """Every learning rate of SGD and LARS at 256 with seed 0."""
    end(results, "sgd", 256, 0.5, 0, top1=79.0)
    end(results, "sgd", 256, 1.0, 0, top1=80.0)
    end(results, "lars", 256, 0.5, 0, top1=78.0)
    end(results, "lars", 256, 1.0, 0)


def test_a_run_that_diverged_is_tried_again_as_its_message_says(results):
    """``--health.divergence-steps 0 goes on``: the field may change in a run, and is no other sweep."""
    searched(results)
    point = results.sweep.point("lars", 256, 1.0, 0)
    ended = point.folder(results.out) / "ended.json"
    health = dataclasses.asdict(point.config.health)
    ended.write_text(json.dumps({"status": "diverged", "reason": "a diverged run", "health": health}))
    assert results.outcome(point).ended
    other = Results(sweep_of(fields={"data": "shapes", "health.divergence_steps": "0"}), results.out, IMAGES)
    assert other.outcome(other.sweep.point("lars", 256, 1.0, 0)).status == "stopped"


@pytest.mark.parametrize("rows, status", [
    ([{"step": 9, "loss": 0.2}, {"step": 9, "val_loss": 0.3}], "done"),
    ([{"step": 9, "loss": 0.2}, {"step": 9, "val_loss": 1e24}], "diverged"),
    ([{"step": 9, "loss": 0.2}, {"step": 9, "val_loss": None}], "diverged"),
    ([{"step": 9, "loss": 0.2}, {"step": 9, "val_loss": math.inf}], "diverged"),
    ([{"step": 9, "loss": 1e24}], "diverged"),
    ([{"step": 9, "loss": math.nan}], "diverged"),
    ([{"step": 9, "loss": None}, {"step": 9, "val_loss": 0.3}], "done"),  # a step that was skipped
    ([{"step": 1, "loss": 1e24}, {"step": 9, "loss": 0.2}], "done"),
    ([], "done"),
])  # fmt: skip
def test_a_run_that_ends_with_a_loss_beyond_any_sense_has_diverged(results, rows, status):
    """Too few steps for the run itself to say so: it finishes, and its weights are worth nothing."""
    end(results, "sgd", 256, 1.0, 0, top1=10.0)
    point = results.sweep.point("sgd", 256, 1.0, 0)
    (point.folder(results.out) / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    outcome = results.outcome(point)
    assert (outcome.status, outcome.ended) == (status, True)
    assert (outcome.top1 is None) == (status == "diverged")
    if status == "diverged":
        assert outcome.reason.endswith("at its end, step 9")
        assert results.num_diverged("sgd", 256) == 1


def test_numbers_come_back_as_they_were_typed(tmp_path):
    fields = {"data": "shapes", "epochs": "2.3333333"}
    results = Results(sweep_of(lr_factors=(0.3333333, 1.0, 8.0), fields=fields), tmp_path, IMAGES)
    end(results, "sgd", 256, 0.3333333, 0, top1=79.0)
    collect(results)
    text = (tmp_path / "report.md").read_text()
    assert "| x 0.3333333 | x 1 | x 8 |" in text
    assert "| 0.0333333 | 0.3333333 | 79.00 |" in text
    assert "2.3333333 epochs" in text
    assert "--lr-factors 0.3333333,1,8 " in results.sweep.command(tmp_path)


def test_the_best_is_chosen_by_the_seeds_that_all_learning_rates_have(results):
    searched(results)
    end(results, "sgd", 256, 1.0, 1, top1=70.0)  # a later seed that is worse says nothing of the other rate
    best = results.best("sgd", 256)
    assert (best.factor, best.lr, best.mean, best.top1) == (1.0, 0.1, 75.0, {0: 80.0, 1: 70.0})
    assert best.deviation == pytest.approx(50**0.5)
    assert best.searched == {0.5: (1, 79.0), 1.0: (1, 80.0)}
    assert (best.complete, best.at_edge) == (True, True)


@pytest.mark.parametrize("best, at_edge", [(0.25, True), (0.5, False), (1.0, True)])
def test_the_smallest_rate_is_an_edge_as_the_largest_is(tmp_path, best, at_edge):
    results = Results(sweep_of(lr_factors=(0.25, 0.5, 1.0)), tmp_path, IMAGES)
    for factor in (0.25, 0.5, 1.0):
        end(results, "sgd", 256, factor, 0, top1=80.0 if factor == best else 70.0)
    found = results.best("sgd", 256)
    assert (found.factor, found.at_edge) == (best, at_edge)


def test_the_best_is_chosen_by_the_mean_of_all_seeds(tmp_path):
    results = Results(sweep_of(search_seeds=(0, 1, 2)), tmp_path, IMAGES)
    for seed, (low, high) in enumerate([(70.0, 60.0), (70.0, 80.0), (70.0, 80.0)]):
        end(results, "sgd", 256, 0.5, seed, top1=low)
        end(results, "sgd", 256, 1.0, seed, top1=high)
    assert results.best("sgd", 256).factor == 1.0
    end(results, "sgd", 256, 1.0, 0, top1=40.0)
    assert results.best("sgd", 256).factor == 0.5


def test_a_rate_with_which_a_seed_diverges_is_not_the_best(tmp_path):
    results = Results(sweep_of(search_seeds=(0, 1, 2)), tmp_path, IMAGES)
    for seed in range(3):
        end(results, "sgd", 256, 0.5, seed, top1=70.0)
        end(results, "sgd", 256, 1.0, seed, top1=90.0)
    assert results.best("sgd", 256).factor == 1.0
    (results.sweep.point("sgd", 256, 1.0, 2).folder(tmp_path) / "summary.json").unlink()
    end(results, "sgd", 256, 1.0, 2)
    assert results.best("sgd", 256).factor == 0.5


def test_later_seeds_wait_for_the_search(results):
    assert results.best("sgd", 256) is None
    end(results, "sgd", 256, 0.5, 0, top1=79.0)
    assert results.best("sgd", 256).complete is False
    end(results, "sgd", 256, 1.0, 0, status="failed")  # it will be tried again
    assert results.later() == [None] * 8
    searched(results)
    later = results.later()
    assert [point and point.name for point in later] == [
        "sgd-b256-lr0.1-seed1", "sgd-b256-lr0.1-seed2", "lars-b256-lr0.565685-seed1", "lars-b256-lr0.565685-seed2",
        *[None] * 4]  # fmt: skip
    assert task_of(results, 3).name == "lars-b256-lr1.13137-seed0"
    assert task_of(results, 9) is later[1]
    with pytest.raises(KnltrainError, match="not known before tasks 0 to 7 have ended"):
        task_of(results, 12)
    with pytest.raises(ConfigError, match="--task 16: this sweep has the tasks 0 to 15"):
        task_of(results, 16)


def test_a_run_whose_batch_changes_has_the_steps_that_it_is_trained_for(tmp_path):
    fields = {"data": "shapes", "schedule.batches": "512", "schedule.batch_epochs": "5"}
    results = Results(sweep_of(fields=fields), tmp_path, IMAGES)
    point = results.sweep.point("sgd", 256, 1.0, 0)
    assert results.steps(point) == 5 * 5 + 10 * 10
    point.folder(tmp_path).mkdir(parents=True)
    (point.folder(tmp_path) / "summary.json").write_text(json.dumps({"finished": True, "steps": 125, "top1": 80.0}))
    assert results.outcome(point).status == "done"


def test_a_run_whose_files_cannot_be_read_now_is_not_trained_again(results, monkeypatch):
    def refuse(path):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)

    searched(results)
    point = results.sweep.point("sgd", 256, 0.5, 0)
    assert results.outcome(point).status == "done"
    monkeypatch.setattr(results_module, "open_regular", refuse)
    with pytest.raises(OSError, match=r"Permission denied: .*summary\.json"):
        results.outcome(point)


def test_a_run_of_fewer_steps_is_not_done(results):
    searched(results)
    path = results.sweep.point("sgd", 256, 1.0, 0).folder(results.out) / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "steps": 149}))
    assert results.outcome(results.sweep.point("sgd", 256, 1.0, 0)).status == "stopped"
    path.write_text("{")
    assert results.outcome(results.sweep.point("sgd", 256, 1.0, 0)).status == "stopped"


def test_what_is_written(results):
    searched(results)
    end(results, "sgd", 256, 1.0, 1, top1=82.0)
    end(results, "sgd", 1024, 0.5, 0, top1=75.5)
    guard(results.sweep, results.out)
    found = collect(results)
    with (results.out / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert set(COLUMNS) >= {"model", "optimizer", "batch", "lr", "seed", "epochs", "top1", "seconds", "status", "run"}
    assert [(row["optimizer"], row["batch"], row["lr"], row["seed"], row["top1"], row["status"]) for row in rows] == [
        ("sgd", "256", "0.05", "0", "79.0", "done"), ("sgd", "256", "0.1", "0", "80.0", "done"),
        ("lars", "256", "0.5656854249492381", "0", "78.0", "done"),
        ("lars", "256", "1.1313708498984762", "0", "", "diverged"), ("sgd", "1024", "0.2", "0", "75.5", "done"),
        ("sgd", "256", "0.1", "1", "82.0", "done"),
    ]  # fmt: skip
    assert rows[0]["run"] == "runs/sgd-b256-lr0.05-seed0"
    for name in ("accuracy.png", "losses.png"):
        assert (results.out / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(found))["reference"]["mean"] == 81.0

    report = (results.out / "report.md").read_text()
    for line in (
        "3 seed(s). Of 16 runs, 5 done, 1 diverged.",
        "Old CPU, 2 core(s); torch 2.8.0, knltrain 0.1.0 (abc).",
        "| 256 | sgd | 0.1 | 1 | 81.00 ± 1.41 | 2 | 0 | reference |",
        "| 256 | lars | 0.565685 | 0.5 | 78.00 | 1 | 0 | -3.00 |",
        "| 1,024 | sgd | 0.2 | 0.5 | 75.50 | 1 | 0 | -5.50 |",
        "at each batch 2 learning rate(s) with 1 seed(s) each",
        "| sgd | 256 | 0.1 | 79.00 | **80.00** |",
        "| lars | 256 | 1.13137 | **78.00** | 1 diverged |",
        "| lars | 1,024 | 2.26274 | - | - |",
        "- sgd at 256: 0.1 is at the edge of what was tried",
        "- sgd at 1,024: not every learning rate has been tried yet.",
        "- `lars-b256-lr1.13137-seed0` diverged: a diverged run",
    ):
        assert line in report, report


@pytest.mark.parametrize("text", [None, "", '{"step": 1, "epoch": 0.5, "loss": nu'])
def test_a_sweep_is_drawn_without_the_metrics_of_its_best(results, monkeypatch, text):
    searched(results)
    metrics = results.sweep.point("sgd", 256, 1.0, 0).folder(results.out) / "metrics.jsonl"
    metrics.unlink() if text is None else metrics.write_text(text)
    labels = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *args, **kw: labels.append(kw.get("label")) or plot(*args, **kw))
    collect(results)
    assert (results.out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert ("SGD, lr 0.1: no metrics.jsonl" in labels) == (text is None)


@pytest.fixture
def accuracy_axes(monkeypatch):
    """Draws accuracy.png of a sweep, and returns the axes."""

    def draw(results):
        figures = []
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
            draw_accuracy(results, results.chosen(), results.reference(), results.out / "accuracy.png")
        (figure,) = figures
        figure.canvas.draw()
        (axes,) = figure.axes
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())
        return axes

    return draw


def texts(axes):
    return [text.get_text() for text in axes.texts]


def line(axes, label):
    (found,) = [one for one in axes.lines if one.get_label() == label]
    return found.get_xdata().tolist(), found.get_ydata().tolist()


def test_a_line_has_a_gap_and_a_cross_where_all_runs_diverged(tmp_path, accuracy_axes):
    results = Results(sweep_of(batches=(256, 512, 1024)), tmp_path, IMAGES)
    for batch in (256, 1024):
        end(results, "sgd", batch, 0.5, 0, top1=80.0)
    assert texts(accuracy_axes(results)) == []
    for factor in (0.5, 1.0):
        end(results, "sgd", 512, factor, 0)
    axes = accuracy_axes(results)
    batches, means = line(axes, "SGD")
    assert (batches, means[0], math.isnan(means[1]), means[2]) == ([256, 512, 1024], 80.0, True, 80.0)
    assert texts(axes) == ["2 of 2 runs"]
    crosses = [one.get_xdata()[0] for one in axes.lines if one.get_marker() == "x" and len(one.get_xdata())]
    assert crosses == [512]
    assert "a single seed each" in axes.figure.get_suptitle()


def test_a_seed_that_diverged_is_marked_and_seeds_are_counted(results, accuracy_axes):
    searched(results)
    end(results, "sgd", 256, 1.0, 1, top1=82.0)
    end(results, "sgd", 256, 1.0, 2)
    axes = accuracy_axes(results)
    assert texts(axes) == ["1 of 3 seeds"]
    assert line(axes, "SGD")[1][0] == 81.0
    title = axes.figure.get_suptitle()
    assert "means over 2 seeds, whiskers from the worst seed to the best; hollow: a single seed" in title
    ((low, high),) = [bars.lines[2][0].get_segments()[0][:, 1] for bars in axes.containers if bars.has_yerr]
    assert (low, high) == (80.0, 82.0)


def test_runs_that_diverged_at_the_smallest_batch_are_counted_beside_the_axis(results, accuracy_axes):
    searched(results)
    end(results, "sgd", 256, 1.0, 1, top1=82.0)
    end(results, "sgd", 256, 1.0, 2)
    end(results, "sgd", 1024, 0.5, 0, top1=70.0)
    axes = accuracy_axes(results)
    (text,) = axes.texts
    assert axes.get_window_extent().x0 < text.get_window_extent().x0


def test_the_search_of_a_method_with_rates_of_its_own(tmp_path):
    own = {("sgd", 256): (0.125, 0.25, 0.5), ("lars", 256): (0.5, 1.0, 2.0)}
    results = Results(sweep_of(lr_factors_at=own), tmp_path, IMAGES)
    for factor, top1 in ((0.125, 70.0), (0.25, 75.0), (0.5, 71.0)):
        end(results, "sgd", 256, factor, 0, top1=top1)
    best = results.best("sgd", 256)
    assert (best.factor, best.complete, best.at_edge) == (0.25, True, False)
    guard(results.sweep, results.out)
    collect(results)
    report = (results.out / "report.md").read_text()
    for line in (
        "at each batch 2 to 3 learning rate(s) with 1 seed(s) each",
        "| optimizer | batch | the rule's rate | x 0.125 | x 0.25 | x 0.5 | x 1 | x 2 |",
        "| sgd | 256 | 0.1 | 70.00 | **75.00** | 71.00 |  |  |",
        "| lars | 256 | 1.13137 |  |  | - | - | - |",
        "| sgd | 1,024 | 0.4 |  |  | - | - |  |",
    ):
        assert line in report, report


def test_runs_of_several_machines_are_counted_by_machine(results):
    searched(results)
    for lr, text in ((0.5, '{"cpu": "New CPU"}'), (1.0, json.dumps(NEW))):
        (results.sweep.point("sgd", 256, lr, 0).folder(results.out) / "config.json").write_text(text)
    collect(results)
    lines = (results.out / "report.md").read_text().splitlines()
    first = lines.index("- 1 run(s): New CPU, 4 core(s); torch 2.13.0, knltrain 0.1.0 (no checkout)")
    assert lines[first - 1 : first + 3] == [
        "",
        lines[first],
        "- 2 run(s): Old CPU, 2 core(s); torch 2.8.0, knltrain 0.1.0 (abc)",
        "",
    ]


def test_a_sweep_of_which_nothing_came_has_a_report(results):
    end(results, "sgd", 256, 1.0, 0)
    guard(results.sweep, results.out)
    assert collect(results)["best"] == []
    assert "1 diverged" in (results.out / "report.md").read_text()
    assert not (results.out / "accuracy.png").exists()


def test_another_sweep_is_refused_with_what_differs(tmp_path):
    guard(sweep_of(), tmp_path)
    grown = {"batches": (128, 256, 1024), "optimizers": ("lars", "sgd")}
    guard(sweep_of(**grown), tmp_path)
    guard(sweep_of(**grown, fields={"data": "elsewhere", "workers": "3"}), tmp_path)
    for changes, words in (
        ({}, "--batches without 128"),
        ({**grown, "fields": {"epochs": "3"}}, "epochs: 15 -> 3"),
        ({**grown, "recipe": "cifar-2k"}, "recipe: cifar-256 -> cifar-2k"),
    ):
        with pytest.raises(ConfigError, match=f"holds another sweep.*{words}.*give another --out"):
            guard(sweep_of(**changes), tmp_path)
    (tmp_path / "sweep.json").write_text('{"config": 3}')
    with pytest.raises(ConfigError, match="damaged"):
        guard(sweep_of(), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a run"):
        guard(sweep_of(), tmp_path)
