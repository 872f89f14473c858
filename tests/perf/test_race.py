"""perf/vs_peers.py: that it races, lists who cannot, and computes its ratios from rounds; no figure is asserted."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PERF = Path(__file__).parents[2] / "perf"


def race(out, *arguments, **environment):
    return subprocess.run(
        [sys.executable, str(PERF / "vs_peers.py"), "--quick", "--json", "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
    )


def test_quick_race_gives_every_contestant_the_same_work(tmp_path):
    # In fp32 every implementation computes the same losses, up to rounding, if it trains on the same batch from the
    # same weights with the same optimizer.
    done = race(tmp_path, "--precisions", "fp32", "--engine", "eager")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (raced,) = result["races"]
    stock, ours = raced["contestants"]
    assert [stock["name"], ours["name"]] == ["stock", "knltrain"]
    for one in (stock, ours):
        assert len(one["rounds"]) == result["rounds"] == 2
        assert all(math.isfinite(rate) and rate > 0 for rate in one["rounds"])
        assert one["quartile1"] <= one["images_per_s"] <= one["quartile3"]
        assert one["last_loss"] < one["first_loss"]
        assert 50 < one["peak_mib"] < 10_000
    assert raced["best_peer"] == "stock"
    assert stock["ratio_to_stock"] == 1.0
    assert ours["first_loss"] == pytest.approx(stock["first_loss"], rel=1e-4)
    assert ours["last_loss"] == pytest.approx(stock["last_loss"], rel=2e-2)
    assert result["versions"]["torch"]
    assert json.loads((tmp_path / "vs_peers.json").read_text()) == result
    assert "| knltrain (eager) |" in (tmp_path / "vs_peers.md").read_text()
    assert (tmp_path / "vs_peers.png").read_bytes().startswith(b"\x89PNG")


def test_who_cannot_run_is_listed_with_the_reason(tmp_path):
    # torch.compile needs a compiler or what one left in a cache: this PATH and this folder have neither.
    done = race(tmp_path, "--contestants", "compile+launcher,knltrain", "--precisions", "fp32", "--engine", "eager",
                PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    (raced,) = json.loads(done.stdout.splitlines()[-1])["races"]
    compiled, ours = raced["contestants"]
    assert "images_per_s" not in compiled
    # Where tcmalloc or Intel's OpenMP is missing too, that is found first.
    assert "g++" in compiled["reason"] or "no lib" in compiled["reason"]
    assert ours["images_per_s"] > 0
    assert raced["best_peer"] is None
    assert "does not run: " + compiled["reason"] in (tmp_path / "vs_peers.md").read_text()


def test_another_interpreters_pytorch_races_too(tmp_path):
    done = race(tmp_path, "--contestants", "stock,knltrain", "--precisions", "fp32", "--engine", "eager",
                "--python", sys.executable)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (raced,) = json.loads(done.stdout.splitlines()[-1])["races"]
    stock, ours, other = raced["contestants"]
    release = stock["torch"].partition("+")[0]
    assert [stock["name"], ours["name"], other["name"]] == ["stock", "knltrain", f"stock, torch {release}"]
    assert (stock["python"], other["python"]) == ("", sys.executable)
    assert other["images_per_s"] > 0
    assert f"torch {stock['torch']} has oneDNN {stock['onednn']}" in (tmp_path / "vs_peers.md").read_text()
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?", stock["onednn"])


@pytest.mark.parametrize("python, wrong", [("no/python", "No such file"), ("false", "--python false")])
def test_an_interpreter_that_cannot_is_refused_with_one_line(tmp_path, python, wrong):
    done = race(tmp_path, "--python", python)
    assert done.returncode == 2
    assert wrong in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_contestant_is_refused_with_one_line(tmp_path):
    done = race(tmp_path, "--contestants", "knltrain,horovod")
    assert done.returncode == 2
    assert "horovod" in done.stderr
    assert "ipex+launcher" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def vs_peers(monkeypatch):
    monkeypatch.syspath_prepend(str(PERF))
    spec = importlib.util.spec_from_file_location("vs_peers", PERF / "vs_peers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "vs_peers", module)
    spec.loader.exec_module(module)
    return module


def contestant(name, rounds, first_loss=7.0, last_loss=6.5, other_cores=0.0, recipe=None):
    return {
        "name": name,
        "recipe": recipe or name,
        "rounds": rounds,
        "first_loss": first_loss,
        "last_loss": last_loss,
        "other_cores": [other_cores] * len(rounds),
        "peak_mib": 1000.0,
    }


def test_ratios_are_of_the_same_round(vs_peers):
    # The machine is half as fast in the second round: rates differ, ratios do not.
    raced = vs_peers.compare(
        {
            "contestants": [
                contestant("stock", [10.0, 5.0, 10.0]),
                contestant("timm", [12.0, 6.0, 12.0]),
                contestant("knltrain", [18.0, 9.0, 18.0]),
                {"name": "ipex", "recipe": "ipex", "reason": "not installed"},
            ]
        }
    )
    _, timm, ours, ipex = raced["contestants"]
    assert raced["best_peer"] == "timm"
    assert ours["ratio_to_stock"] == pytest.approx(1.8)
    assert ours["ratio_to_best_peer"] == pytest.approx(1.5)
    assert timm["ratio_to_best_peer"] == pytest.approx(1.0)
    assert (ours["quartile1"], ours["images_per_s"], ours["quartile3"]) == (13.5, 18.0, 18.0)
    assert ours["odd"] == []
    assert "images_per_s" not in ipex


def test_what_is_odd_is_said(vs_peers):
    raced = vs_peers.compare(
        {
            "contestants": [
                contestant("stock", [1.0, 1.0]),
                contestant("timm", [1.0, 1.0], last_loss=7.1),
                contestant("ipex", [1.0, 1.0], first_loss=9.0),
                contestant("knltrain", [1.0, 1.0], other_cores=0.5),
            ]
        }
    )
    odd = {one["name"]: " ".join(one["odd"]) for one in raced["contestants"]}
    assert odd["stock"] == ""
    assert "7.000 to 7.100" in odd["timm"]
    assert "first loss is 9.000" in odd["ipex"]
    assert "0.50 cores" in odd["knltrain"]


@pytest.mark.parametrize("memory_mib, odd", [(2000.0, 0), (1999.0, 2)])
def test_contestants_that_do_not_fit_in_memory_are_said(vs_peers, memory_mib, odd):
    raced = vs_peers.compare({"contestants": [contestant("stock", [1.0]), contestant("knltrain", [1.0])]}, memory_mib)
    assert sum("2,000 MiB of 1,999" in " ".join(one["odd"]) for one in raced["contestants"]) == odd
