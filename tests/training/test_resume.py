"""A run that is stopped goes on as if it had not been, in its own folder, and nothing else does."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prepared import prepare
from runs import assert_same_run, computed, newest, state
from small_networks import (
    PRECISIONS,
    STEPS,
    add_small_networks,
    marked,
    network_of,
    small_run,
    whole_and_in_parts,
    why_no_engine,
)

from knltrain import checkpoint
from knltrain.checkpoint.files import seal
from knltrain.config import override
from knltrain.errors import ConfigError, KnltrainError
from knltrain.runlog.console import Console
from knltrain.training import run_dir, trainer
from knltrain.training import step as stepping


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


@pytest.fixture
def config(image_folder, tmp_path):
    return small_run(image_folder, tmp_path / "run")


class Said(Console):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__(silent=True)
        self.lines = []

    def line(self, text):
        self.lines.append(text)

    warn = line


def run(config, *, allow=(), console=None, **changes):
    return trainer.train(override(config, changes), console or Console(silent=True), allow_change=frozenset(allow))


@pytest.mark.parametrize(
    "engine, precision", [marked(engine, kind) for engine in PRECISIONS for kind in PRECISIONS[engine]]
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(image_folder, tmp_path, monkeypatch, engine, precision):
    """In the middle of an epoch, with accumulation; test_changing_runs.py has dropout and AlexNet's layers."""
    if reason := why_no_engine(engine, precision):
        pytest.skip(reason)
    add_small_networks(monkeypatch.setitem)
    options = {"engine": engine, "precision": precision, **network_of(engine)}
    whole_and_in_parts(run, image_folder, tmp_path, options)
    assert newest(tmp_path / "parts").name == f"step-{STEPS:08}"
    assert_same_run(tmp_path / "parts", tmp_path / "whole", evaluations=False)


@pytest.fixture
def killed(config, monkeypatch):
    """A run whose process was killed in step 5, as far as its folder shows: after the checkpoint of the first epoch."""

    def kill(seed, step, micro):
        if step == 4:
            raise SystemError("killed")
        original(seed, step, micro)

    original = stepping.seed_dropout
    monkeypatch.setattr(stepping, "seed_dropout", kill)
    with pytest.raises(SystemError):
        run(config)
    monkeypatch.setattr(stepping, "seed_dropout", original)
    out = Path(config.out)
    assert newest(out).name == "step-00000003"
    return out


def test_a_killed_run_has_every_step_once(config, killed, tmp_path):
    """With the line that it was writing cut short, and what it was about to write still there."""
    with (killed / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "loss": 1')
    shutil.copytree(newest(killed), killed / "checkpoints" / ".step-00000006.tmp")
    (killed / "metrics.jsonl.tmp").write_text("{")
    (killed / ".lock").write_text("elsewhere, process 1")
    run(config)
    run(config, out=str(tmp_path / "whole"))
    assert_same_run(killed, tmp_path / "whole")
    assert [row["step"] for row in computed(killed)] == [1, 2, 3, 3, 4, 5, 6, 6]
    left = [path.name for path in killed.rglob(".*")] + [path.name for path in killed.rglob("*.tmp")]
    assert left == []


def test_an_evaluation_that_was_made_up_for_and_lost_is_there_once(config, monkeypatch):
    """Stopped before the evaluation of step 3; evaluated when it went on, and killed before the next checkpoint."""
    original = stepping.seed_dropout

    def act(seed, step, micro):
        if step == 2 and micro == 0:
            signal.raise_signal(signal.SIGTERM)
        if step == 4:
            raise SystemError("killed")
        original(seed, step, micro)

    monkeypatch.setattr(stepping, "seed_dropout", act)
    run(config)
    with pytest.raises(SystemError):
        run(config)
    monkeypatch.setattr(stepping, "seed_dropout", original)
    run(config)
    assert [row["step"] for row in computed(config.out) if "top1" in row] == [3, 6]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_the_newest_whole_checkpoint_is_taken(config, tmp_path, file):
    run(config)
    shutil.copytree(config.out, tmp_path / "damaged")
    folder = newest(tmp_path / "damaged")
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    console = Said()
    run(config, out=str(tmp_path / "damaged"), console=console)
    (line,) = [line for line in console.lines if "passed over" in line]
    assert str(folder) in line
    assert file in line
    assert any("resumed from" in line and "step-00000003" in line for line in console.lines)
    assert_same_run(tmp_path / "damaged", config.out)
    with pytest.raises(KnltrainError, match=r"does not match its checksum|is not JSON|of [\d,]+ bytes"):
        (folder / file).write_bytes(b"x" * 100)
        run(config, out=str(tmp_path / "branch"), resume=str(folder))
    assert not (tmp_path / "branch").exists()


def test_another_way_of_computing_goes_on_with_the_same_data_and_a_line(config, monkeypatch):
    run(config, max_steps=4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    other = "ipex" if why_no_engine("fused") else "fused"
    console = Said()
    run(config, engine=other, console=console)
    (line,) = [line for line in console.lines if "bits may differ" in line]
    assert f"threads 2 -> 1, engine eager -> {other}" in line
    assert newest(config.out).name == "step-00000006"


def test_another_configuration_in_the_same_folder_is_refused(config):
    run(config, max_steps=1)
    with pytest.raises(ConfigError, match=r"another configuration \(optim.lr: 2.0 -> 6.0\).*--allow-change optim.lr"):
        run(config, **{"optim.lr": 6.0})
    with pytest.raises(ConfigError, match=r"\(seed: 0 -> 1\)"):
        run(config, allow=["optim.lr"], seed=1, **{"optim.lr": 6.0})
    with pytest.raises(ConfigError, match="holds a run already"):
        run(config, resume="never")
    assert run(config, max_steps=2)[0]["steps"] == 2


def test_a_change_that_is_allowed_is_recorded(config):
    run(config, max_steps=1)
    console = Said()
    run(config, allow=["optim.lr", "seed"], max_steps=2, console=console, **{"optim.lr": 6.0})
    assert "from step 1 on, optim.lr is 6.0 and no longer 2.0" in console.lines
    assert any("--allow-change seed has no effect" in line for line in console.lines)
    run(config, allow=["label_smoothing", "seed"], max_steps=3, label_smoothing=0.1, **{"optim.lr": 6.0})
    run(config, max_steps=4, label_smoothing=0.1, **{"optim.lr": 6.0})  # what was allowed once needs no leave again
    record = json.loads(Path(config.out, "config.json").read_text())
    assert record["config"]["optim"]["lr"] == 6.0
    assert record["changes"] == [
        {"step": 1, "field": "optim.lr", "before": 2.0, "after": 6.0},
        {"step": 2, "field": "label_smoothing", "before": 0.0, "after": 0.1},
    ]


def test_another_batch_goes_on_with_the_image_after_the_last(config):
    """A step counts images: half the batch would take a run back to where it has been, twice the batch to its end."""
    run(config, max_steps=2)
    for batch, now in ((32, "1.333"), (8, "0.3333")):
        with pytest.raises(ConfigError, match=f"at epoch 0.6667, and step 2 with these batches at {now}") as caught:
            run(config, allow=["global_batch"], global_batch=batch)
    message = str(caught.value)
    words = message[message.index("--schedule") :].split()
    given = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    run(config, allow=given.pop("allow_change").split(","), global_batch=8, **given)
    rows = [row for row in computed(config.out) if "loss" in row]
    assert [row["epoch"] for row in rows] == pytest.approx(
        [(16 * min(n, 2) + 8 * max(0, n - 2)) / 48 for n in range(1, 11)]
    )


def test_images_in_another_order_are_said(config, image_folder, tmp_path):
    run(config, max_steps=1)
    shutil.copytree(image_folder, tmp_path / "copy")
    prepare(image_folder, tmp_path / "raw")
    for data, said in ((tmp_path / "copy", 0), (tmp_path / "raw", 1)):
        console = Said()
        run(config, max_steps=2, data=str(data), console=console)
        assert sum("images in another order than they have now" in line for line in console.lines) == said


def test_a_named_checkpoint(config, tmp_path):
    run(config)
    run(config, max_steps=3, out=str(tmp_path / "start"))
    folder = newest(tmp_path / "start")
    run(config, out=str(tmp_path / "branch"), resume=str(folder))
    got, wanted = state(tmp_path / "branch"), state(config.out)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert [row["step"] for row in computed(tmp_path / "branch") if "loss" in row] == [4, 5, 6]
    assert checkpoint.read_state(newest(tmp_path / "branch"))["config_sha256"] == run_dir.digest(config)
    with pytest.raises(ConfigError, match=r"is a checkpoint of another configuration \(optim.lr: 2.0 -> 3.0\)"):
        run(config, out=str(tmp_path / "other"), resume=str(folder), **{"optim.lr": 3.0})
    assert not (tmp_path / "other").exists()
    run(config, out=str(tmp_path / "other"), resume=str(folder), allow=["optim.lr"], **{"optim.lr": 3.0})
    record = json.loads((tmp_path / "other" / "config.json").read_text())
    assert record["changes"] == [{"step": 3, "field": "optim.lr", "before": 2.0, "after": 3.0}]


def test_a_run_that_has_ended_leaves_another_folder_nothing_to_train(config, tmp_path):
    run(config)
    with pytest.raises(ConfigError, match=r"is at the end of this run, and leaves .*other nothing to train"):
        run(config, out=str(tmp_path / "other"), resume=config.out)
    assert not (tmp_path / "other").exists()


def test_a_run_that_began_with_a_named_checkpoint_goes_on_from_its_own(config, tmp_path):
    """The same command after a stop; and one that names an older checkpoint of the same folder goes back there once."""
    run(config, max_steps=2, out=str(tmp_path / "start"))
    named = {"resume": str(newest(tmp_path / "start")), "optim.lr": 3.0}
    for out, stops in (("whole", [6]), ("parts", [3, 5, 6])):
        for stop in stops:
            run(
                config, allow=["optim.lr"] if stop == stops[0] else [], max_steps=stop, out=str(tmp_path / out), **named
            )
    assert_same_run(tmp_path / "parts", tmp_path / "whole", evaluations=False)
    assert [row["step"] for row in computed(tmp_path / "parts") if "loss" in row] == [3, 4, 5, 6]
    assert len(json.loads((tmp_path / "parts" / "config.json").read_text())["changes"]) == 1
    before = contents(tmp_path / "parts")
    run(config, out=str(tmp_path / "parts"), **named)
    assert contents(tmp_path / "parts") == before

    run(config, max_steps=3)
    older = str(newest(config.out))
    run(config)
    run(config, resume=older, max_steps=5)
    assert newest(config.out).name == "step-00000005"
    run(config, resume=older)
    assert [row["step"] for row in computed(config.out) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_other_data_under_a_checkpoint_is_refused(config, image_folder, tmp_path):
    run(config, max_steps=1)
    smaller = tmp_path / "smaller"
    shutil.copytree(image_folder, smaller)
    next((smaller / "train" / "class0").iterdir()).unlink()
    with pytest.raises(ConfigError, match=r"other data \(train: 48 -> 47 images\); .*--allow-change data"):
        run(config, data=str(smaller))
    console = Said()
    run(config, data=str(smaller), allow=["data"], max_steps=2, console=console)
    assert "from step 1 on, the data are others: train: 48 -> 47 images" in console.lines
    (change,) = json.loads(Path(config.out, "config.json").read_text())["changes"]
    assert (change["step"], change["field"], change["before"]) == (1, "data", ["train: 48 -> 47 images"])
    console = Said()
    run(config, data=str(smaller), allow=["data"], max_steps=3, console=console)  # now it is as it was
    assert any("--allow-change data has no effect" in line for line in console.lines)


def test_lists_of_classes_may_be_elsewhere_and_must_say_the_same(config, tmp_path):
    names, order, other = tmp_path / "names", tmp_path / "order", tmp_path / "other"
    names.write_text("class0\nclass2\n")
    order.write_text("class2\nclass1\nclass0\n")
    other.write_text("class0\nclass1\n")
    run(config, max_steps=1, classes=str(names), class_order=str(order))
    state = json.loads((newest(config.out) / "state.json").read_text())
    assert state["classes"] == ["class2", "class0"]
    moved = tmp_path / "moved"
    names.rename(moved)
    run(config, max_steps=2, classes=str(moved), class_order=str(order))
    for given in ({"classes": str(other), "class_order": str(order)}, {"classes": str(moved)}, {}):
        with pytest.raises(ConfigError, match="other data"):
            run(config, max_steps=3, **given)


def _rename_a_class(root):
    for part in ("train", "val"):
        (root / part / "class1").rename(root / part / "class9")


def _relabel(root):
    image = next((root / "train" / "class0").iterdir())
    image.rename(root / "train" / "class1" / image.name.replace(".", "-other."))


def _remove_from_val(root):
    next((root / "val" / "class2").iterdir()).unlink()


def _add_a_class(root):
    for part in ("train", "val"):
        shutil.copytree(root / part / "class1", root / part / "class9")


@pytest.mark.parametrize(
    "change, words",
    [
        (_rename_a_class, r"class 1 'class1' -> 'class2'; class 2 'class2' -> 'class9'"),
        (_relabel, r"train: class 'class0' 16 -> 15 images; train: class 'class1' 16 -> 17 images"),
        (_remove_from_val, r"val: \d+ -> \d+ images"),
        (_add_a_class, r"3 -> 4 classes"),
    ],
)
def test_other_classes_and_labels_are_refused_with_what_differs(config, image_folder, tmp_path, change, words):
    run(config, max_steps=1)
    before = contents(Path(config.out))
    shutil.copytree(image_folder, tmp_path / "other")
    change(tmp_path / "other")
    with pytest.raises(ConfigError, match=rf"step-00000001 was trained on other data \(.*{words}"):
        run(config, data=str(tmp_path / "other"))
    assert contents(Path(config.out)) == before


def test_images_under_other_names_are_said(config, image_folder, tmp_path):
    run(config, max_steps=1)
    shutil.copytree(image_folder, tmp_path / "other")
    image = next((tmp_path / "other" / "train" / "class0").iterdir())
    image.rename(image.with_name("0.jpg"))
    console = Said()
    run(config, data=str(tmp_path / "other"), max_steps=2, console=console)
    assert sum("was trained on other files" in line for line in console.lines) == 1


def rewrite_state(folder, change):
    """Changes what a checkpoint says of itself, as another version would have written it."""
    described = checkpoint.read_state(folder)
    change(described)
    (folder / "state.json").write_text(seal(described))


def test_a_checkpoint_of_a_version_that_said_less_of_its_data_goes_on(config, image_folder, tmp_path):
    def older(described):
        described["labels_sha256"] = described.pop("data")["train"]["labels_sha256"]
        del described["started_from"]

    run(config, max_steps=1)
    rewrite_state(newest(config.out), older)
    shutil.copytree(config.out, tmp_path / "again")
    run(config, max_steps=2)
    smaller = tmp_path / "smaller"
    shutil.copytree(image_folder, smaller)
    next((smaller / "train" / "class0").iterdir()).unlink()
    with pytest.raises(ConfigError, match="48 -> 47 images"):
        run(config, out=str(tmp_path / "again"), data=str(smaller))


# Spellings of a path -------------------------------------------------------------------------------------------------


def spellings(path, tmp_path, monkeypatch):
    """Other names of a path."""
    (tmp_path / "link").symlink_to(path.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    below = path.relative_to(tmp_path)
    return [f"{path}/", str(below), f"./{below}", str(path.parent / "." / ".." / path.parent.name / path.name),
            str(tmp_path / "link" / path.name), f"~/{below}"]  # fmt: skip


def test_a_checkpoint_is_the_same_under_every_spelling(config, tmp_path, monkeypatch):
    """Otherwise a run would start over from it, and what it has written since would be removed."""
    run(config, max_steps=2, out=str(tmp_path / "start"))
    folder = newest(tmp_path / "start")
    run(config, resume=str(folder), max_steps=4)
    for spelling in [*spellings(folder, tmp_path, monkeypatch), str(tmp_path / "start"), "start/"]:
        console = Said()
        run(config, resume=spelling, max_steps=4, console=console)
        assert any("nothing left to train" in line for line in console.lines), spelling
        assert newest(config.out).name == "step-00000004"


def test_the_steps_that_auto_has_added_are_of_the_run_that_a_checkpoint_began(config, tmp_path):
    run(config, max_steps=2, out=str(tmp_path / "start"))
    named = {"resume": str(newest(tmp_path / "start"))}
    run(config, max_steps=3, **named)
    run(config, max_steps=5, **{"checkpoint.keep": 1})
    run(config, max_steps=6, **named)
    assert [row["step"] for row in computed(config.out) if "loss" in row] == [3, 4, 5, 6]
    assert checkpoint.read_state(newest(config.out))["started_from"] == [named["resume"]]


def test_a_version_that_wrote_only_resume_is_understood(config, tmp_path):
    def older(described):
        del described["started_from"]
        described["config"]["resume"] += "/"

    run(config, max_steps=2, out=str(tmp_path / "start"))
    named = {"resume": str(newest(tmp_path / "start"))}
    run(config, max_steps=4, **named)
    rewrite_state(newest(config.out), older)
    console = Said()
    run(config, max_steps=4, console=console, **named)
    assert any("nothing left to train" in line for line in console.lines)


def test_a_run_is_not_continued_with_another_runs_checkpoint(config, tmp_path):
    run(config, max_steps=2, out=str(tmp_path / "start"))
    run(config, max_steps=4)
    before = contents(Path(config.out))
    with pytest.raises(ConfigError, match=r"run holds a run that did not start from .*start; give another --out"):
        run(config, resume=str(tmp_path / "start"))
    assert contents(Path(config.out)) == before


def test_going_back_in_a_folder_says_what_will_be_removed(config):
    run(config, max_steps=2, **{"checkpoint.keep": 5})
    first = newest(config.out)
    run(config, max_steps=3, **{"checkpoint.keep": 5})
    console = Said()
    run(config, max_steps=4, resume=f"{first}/", console=console, **{"checkpoint.keep": 5})
    (line,) = [line for line in console.lines if "goes back to" in line]
    assert "goes back to step-00000002: later checkpoints (step-00000003) are removed when" in line
    assert [row["step"] for row in computed(config.out) if "loss" in row] == [1, 2, 3, 4]


def test_initial_weights_are_the_same_under_every_spelling(config, tmp_path, monkeypatch):
    run(config, max_steps=1, out=str(tmp_path / "first"))
    weights = newest(tmp_path / "first") / "model.safetensors"
    run(config, max_steps=1, init_from=str(weights))
    for spelling in spellings(weights, tmp_path, monkeypatch):
        if not spelling.endswith("/"):
            run(config, max_steps=2, init_from=spelling)


def test_a_moved_runs_summary_names_its_folder(config, tmp_path):
    run(config)
    Path(config.out).rename(tmp_path / "moved")
    summary, finished = run(config, out=str(tmp_path / "moved"))
    assert (summary["out"], finished) == (str(tmp_path / "moved"), True)


@pytest.mark.parametrize("mask, file, folder", [(0o002, 0o664, 0o775), (0o077, 0o600, 0o700)])
def test_the_umask_says_who_may_read_a_run(config, mask, file, folder):
    before = os.umask(mask)
    try:
        run(config, max_steps=1, log_trust_ratios=config.optim.name == "lars")
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in Path(config.out).rglob("*")}
    assert {path.name: oct(mode) for path, mode in modes.items() if mode != (folder if path.is_dir() else file)} == {}


# What is damaged, and what cannot be read ----------------------------------------------------------------------------


def test_without_config_json_the_checkpoint_says_what_the_run_is(config):
    run(config, max_steps=2)
    Path(config.out, "config.json").unlink()
    with pytest.raises(ConfigError, match=r"step-00000002 is a checkpoint of another configuration \(optim.lr: 2.0"):
        run(config, max_steps=4, **{"optim.lr": 3.0})
    with pytest.raises(ConfigError, match="holds a run already"):
        run(config, max_steps=4, resume="never")
    run(config, max_steps=4)
    assert [row["step"] for row in computed(config.out) if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 100, b"{}", b'{"config": 3}', b"[" * 100_000])
def test_a_damaged_config_json_can_be_deleted(config, content):
    run(config, max_steps=2)
    path = Path(config.out, "config.json")
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.json is damaged; delete this file, and the run goes on"):
        run(config, max_steps=3)
    path.unlink()
    run(config, max_steps=3)
    assert newest(config.out).name == "step-00000003"


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("name", ["config.json", "state.json", "model.safetensors", "checkpoints"])
def test_what_cannot_be_read_now_is_not_damaged(config, monkeypatch, name, number):
    """Nothing is passed over, and nothing is advised to be deleted: it may be whole."""
    run(config, max_steps=2)
    before = contents(Path(config.out))
    originals = {"open": os.open, "scandir": os.scandir}

    def failing(function):
        def call(path=".", *arguments, **options):
            if str(path).endswith(name):
                raise OSError(number, os.strerror(number), path)
            return originals[function](path, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for function in originals:
            patch.setattr(os, function, failing(function))
        with pytest.raises(OSError, match=os.strerror(number)) as raised:
            run(config, max_steps=4)
    assert str(raised.value.filename).endswith(name)
    assert contents(Path(config.out)) == before


def contents(out):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(out.rglob("*")) if path.is_file()}


def test_a_finished_run_is_left_as_it_is(config):
    summary, _ = run(config)
    before = contents(Path(config.out))
    assert run(config) == (summary, True)
    assert contents(Path(config.out)) == before


def test_a_run_that_was_killed_before_its_summary_gets_one(config):
    summary, _ = run(config)
    Path(config.out, "summary.json").unlink()
    again, _ = run(config)
    assert (again["top1"], again["steps"]) == (summary["top1"], STEPS)
    assert Path(config.out, "summary.json").exists()


HOLD = """
import sys
from pathlib import Path
from knltrain.runlog.console import Console
from knltrain.training.run_dir import lock_run_dir
with lock_run_dir(Path(sys.argv[1]), Console(silent=True)):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(config):
    """A process that has the run's folder."""
    command = [sys.executable, "-c", HOLD, config.out]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_two_runs_do_not_share_a_folder(config, holder, monkeypatch):
    monkeypatch.setattr(run_dir, "_LOCK_TIMEOUT_S", 0.2)
    with pytest.raises(KnltrainError, match=rf"in use by a run on {os.uname().nodename}, process {holder.pid};"):
        run(config)
    assert [path.name for path in Path(config.out).iterdir()] == [".lock"]
    holder.kill()
    holder.wait()
    assert run(config, max_steps=1)[1]
    assert not Path(config.out, ".lock").exists()


def test_a_run_waits_for_one_that_is_ending(config, holder):
    class Ends(Said):
        def line(self, text):
            super().line(text)
            if "in use by" in text:
                holder.stdin.close()

        warn = line

    console = Ends()
    assert run(config, max_steps=1, console=console)[1]
    assert sum("in use by" in line for line in console.lines) == 1


@pytest.mark.parametrize("other", [False, True])
def test_a_lock_of_a_file_that_has_lost_its_name_is_none(tmp_path, monkeypatch, other):
    """Between opening and locking, the run before has removed its file, and a third may have made another."""
    path, lock, locked = tmp_path / "run" / ".lock", run_dir.fcntl.lockf, []

    def lockf(descriptor, operation):
        if not locked:
            path.unlink()
            if other:
                path.touch()
        locked.append(descriptor)
        lock(descriptor, operation)

    monkeypatch.setattr(run_dir.fcntl, "lockf", lockf)
    console = Said()
    with run_dir.lock_run_dir(path.parent, console):
        assert path.read_text().endswith(f", process {os.getpid()}")
    assert (len(locked), console.lines) == (2, [])


def test_a_file_system_without_locks_is_said(config, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_dir.fcntl, "lockf", refuse)
    console = Said()
    assert run(config, max_steps=1, console=console)[1]
    assert any("No locks available: a second run" in line for line in console.lines)
