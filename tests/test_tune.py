"""What tune stores is found where it holds, and nowhere else."""

import dataclasses
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import warnings

import pytest

from knltrain import tune
from knltrain.bench.compare import compare
from knltrain.config import RunConfig
from knltrain.console import Console
from knltrain.errors import KnltrainError
from knltrain.node import measured
from knltrain.node.affinity import threads_per_rank
from knltrain.node.measured import measured_file, settings_of, store, stored_engine
from knltrain.node.topology import Node, read_node

NODE = Node("Some CPU", frozenset({"avx2"}), (0, 1), ((0,), (1,)), 2)
SMALL = RunConfig(model="alexnet_bn_small", image_size=32, global_batch=4, precision="fp32")
QUIET = Console(silent=True)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KNLTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def keep(fastest, **more):
    measured.check_writable()
    store({**settings_of("resnet50", "bf16", NODE, 2), **more}, {"fastest": fastest})


def asked(model="resnet50", precision="bf16", node=NODE, threads=2):
    return stored_engine(model, precision, node, threads)


def test_tune_measures_and_stores(monkeypatch, cache):
    monkeypatch.setattr(tune, "compare", functools.partial(compare, engines=("eager",)))
    result = tune.tune(SMALL, QUIET, steps=1)
    assert (result["fastest"], result["stored"]) == ("eager", str(cache / "measured.json"))
    (stored,) = json.loads(measured_file().read_text())
    assert stored["engines"] == result["engines"]
    assert stored["settings"].items() >= {"model": "alexnet_bn_small", "batch": 4, "optimizer": "lars/paper"}.items()
    node = read_node()
    threads = threads_per_rank(node, local_size=1)
    assert stored_engine("alexnet_bn_small", "fp32", node, threads) == "eager"
    assert stored_engine("alexnet_bn_small", "fp32", node, threads + 1) is None


def test_the_shortest_step_wins(monkeypatch):
    engines = [{"engine": "eager", "images_per_s": 3.0}, {"engine": "ipex", "images_per_s": 4.0},
               {"engine": "compile", "reason": "no compiler"}]  # fmt: skip
    settings = {"precision": "fp32", "threads": 2, "batch": 4, "image_size": 32, "optimizer": "lars/paper"}
    monkeypatch.setattr(tune, "compare", lambda *args, **options: {**settings, "engines": engines})
    assert tune.tune(SMALL, QUIET, steps=1)["fastest"] == "ipex"
    assert stored_engine("alexnet_bn_small", "fp32", read_node(), 2) == "ipex"


def test_a_measurement_holds_for_its_settings_only(monkeypatch):
    assert asked() is None
    keep("fused")
    assert asked() == "fused"
    assert asked(model="alexnet") is None
    assert asked(precision="fp32") is None
    assert asked(threads=1) is None
    assert asked(node=dataclasses.replace(NODE, cpu_model="Other CPU")) is None
    assert asked(node=dataclasses.replace(NODE, flags=frozenset({"avx512f"}))) is None
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda package: "1.0")
        assert asked() is None
    with monkeypatch.context() as patch:
        patch.setattr("knltrain.__version__", "99")
        assert asked() is None
    assert asked() == "fused"


def test_the_newest_measurement_counts_and_takes_the_place_of_its_like():
    keep("eager", batch=32)
    keep("fused", batch=64)
    assert asked() == "fused"
    keep("ipex", batch=32)
    assert asked() == "ipex"
    assert [one["fastest"] for one in json.loads(measured_file().read_text())] == ["fused", "ipex"]


FOREIGN = ["", "{", "{}", "3", "[3]", '["settings"]', '[{"settings": {}}]', '[{"settings": 3, "fastest": "eager"}]',
           '[{"settings": {}, "fastest": 3}]']  # fmt: skip


@pytest.mark.parametrize("text", FOREIGN)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning_and_replaced(cache, text):
    keep("eager")
    measured_file().write_text(text)
    with pytest.warns(UserWarning, match=r"measured\.json: .*ignored") as caught:
        assert asked() is None
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="ignored"):
        keep("fused")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked() == "fused"


def test_a_write_that_fails_leaves_what_was_there(monkeypatch):
    keep("eager")

    def fail(*args):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is full"):
        patch.setattr(os, "replace", fail)
        keep("fused")
    assert asked() == "eager"


def test_an_unwritable_cache_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KNLTRAIN_CACHE", str(tmp_path / "file" / "sub"))
    monkeypatch.setattr(tune, "compare", lambda *args, **options: pytest.fail("measured"))
    with pytest.raises(KnltrainError, match="KNLTRAIN_CACHE"):
        tune.tune(SMALL, QUIET, steps=1)


def test_reading_needs_no_torch():
    code = (
        "import sys; from knltrain.node.measured import stored_engine; from knltrain.node.topology import read_node;"
        "stored_engine('resnet50', 'bf16', read_node(), 2); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
