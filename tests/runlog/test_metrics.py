import json
import os

import pytest
from disk import record

from knltrain.runlog.metrics import MetricsLog, read_metrics, write_json

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


@pytest.mark.parametrize(
    "tail", [b'{"step": 3', b'{"step": 3, "loss": 1}', b"[3]\n", b"\xff\n", b"3\n", b'{"step": null}\n']
)
def test_what_is_no_row_is_left_out_when_a_run_goes_on(tmp_path, tail):
    """A number that was cut short reads as another: a row without its end is none."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    said = []
    with MetricsLog(tmp_path, after_step=5, warn=said.append) as log:
        log.write({"step": 3})
    assert said == ([f"{path}: line 3 is no row; it is left out"] if tail.endswith(b"\n") else [])
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert not list(tmp_path.glob("*.tmp"))


BAD = [b"x", b"", b"[]", b"null", b"\xff", b'{"step": 3, "loss": 1', b'{"step": "3"}', b'{"step": true}', b"\0" * 9,
       b"[" * 100_000, b'{"step": 3, "loss": "low"}', b'{"loss": 3}']  # fmt: skip


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_rows_after_a_bad_line_are_kept_and_it_is_said_once(tmp_path, line):
    path, said = tmp_path / "metrics.jsonl", []
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 4}\n' + line + b'\n{"step": 5}\n{"st')
    assert [row["step"] for row in read_metrics(path, said.append)] == [1, 4, 5]
    assert said == [f"{path}: 2 lines are no rows, line 2 first; they are left out"]
    with MetricsLog(tmp_path, after_step=4, warn=said.append) as log:
        log.write({"step": 5})
    assert path.read_text() == '{"step": 1}\n{"step": 4}\n{"step": 5}\n'
    assert len(said) == 2
    assert len(read_metrics(path, pytest.fail)) == 3


def test_a_row_behind_the_nuls_of_a_crash_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"\0" * 4096 + b'{"step": 2}\n' + b"\0" * 512)
    assert [row["step"] for row in read_metrics(path, pytest.fail)] == [1, 2]


def test_an_evaluation_that_will_be_made_again_is_dropped(tmp_path):
    with MetricsLog(tmp_path) as log:
        for row in ROWS:
            log.write(row)
    with MetricsLog(tmp_path, after_step=2, evaluated_step=1):
        pass
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS[:2]


def test_rows_wait_for_room_on_a_full_disk(tmp_path, monkeypatch):
    """What is written is a whole line or the beginning of one, and the rest of it follows."""
    said, room, original = [], [], os.write

    def write(descriptor, data):
        if not room:
            raise OSError(28, "No space left on device")
        return original(descriptor, data[: room.pop()])

    with MetricsLog(tmp_path, warn=said.append) as log:
        monkeypatch.setattr(os, "write", write)
        log.write(ROWS[0])
        room += [7]
        log.write(ROWS[1])
        monkeypatch.undo()
        log.write(ROWS[2])
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS
    reason = f"{tmp_path}/metrics.jsonl: No space left on device"
    assert said == [f"metrics cannot be written ({reason}); they follow when they can"]
    assert scalars(tmp_path, "loss") == [(1, 2.0), (2, 1.5)]


def test_what_a_checkpoint_counts_on_is_on_disk(tmp_path, monkeypatch):
    with MetricsLog(tmp_path) as log:
        log.write(ROWS[0])
        log.write_trust_ratios(1, 0.5, {"weight": {"fc.weight": 0.1}})
        told = record(monkeypatch)
        log.sync()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) == 3
    assert {path: holds for kind, path, holds in told if kind == "sync"} == files


def scalars(out, name):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_each_step_of_a_killed_run_once(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write({"step": step, "loss": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.write_bytes(events.read_bytes()[:-3])
    with MetricsLog(tmp_path, after_step=3) as log:
        for step in range(4, 7):
            log.write({"step": step, "loss": 0.5})
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 0.5), (5, 0.5), (6, 0.5)]


def test_tensorboard_has_the_same_numbers(tmp_path):
    with MetricsLog(tmp_path) as log:
        for row in ROWS:
            log.write(row)
    assert scalars(tmp_path, "loss") == [(1, 2.0), (2, 1.5)]
    assert scalars(tmp_path, "top1") == [(2, 40.0)]


def test_json_is_whole_or_absent(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
