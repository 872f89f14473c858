import json

import pytest

from knltrain.metrics import MetricsLog, draw_curves, read_metrics, write_json

ROWS = [
    {"step": 1, "epoch": 0.5, "loss": 2.0},
    {"step": 2, "epoch": 1.0, "loss": 1.5},
    {"step": 2, "epoch": 1.0, "top1": 40.0, "top5": 80.0, "val_loss": 1.6},
]


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": 1.0})
    with MetricsLog(tmp_path, after_step=3) as log:
        log.write({"step": 4, "loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 0.5)]  # fmt: skip


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_tensorboard_has_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path) as log:
        for row in ROWS:
            log.write(row)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("top1")] == [(2, 40.0)]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], []])
def test_curves_are_drawn_of_any_number_of_rows(tmp_path, rows):
    draw_curves(rows, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_whole_or_absent(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
