"""The checks that need torch: what each makes of what it finds."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from knltrain.comm.backend import Backend
from knltrain.comm.probe import AllReduceResult
from knltrain.doctor import torch_checks
from knltrain.errors import ConfigError
from knltrain.launch.placement import RankPlacement
from knltrain.launch.world import Ranks
from knltrain.node.affinity import plan_node, threads_per_rank
from knltrain.node.topology import read_node
from knltrain.node.tuning_cache import check_writable, settings_of, store
from knltrain.ops import native

LIBC = "7f00-7f01 r-xp 00000000 fe:00 1 /usr/lib/libc.so.6\n"
GOMP = (
    "7f02-7f03 r-xp 00000000 fe:00 2 /site/torch/lib/libgomp.so.1\n"
    "7f04-7f05 rw-p 00000000 fe:00 2 /site/torch/lib/libgomp.so.1\n"
)
IOMP = "7f06-7f07 r-xp 00000000 fe:00 3 /conda/lib/libiomp5.so\n"
BUNDLED = "7f08-7f09 r-xp 00000000 fe:00 4 /site/scikit_learn.libs/libgomp-d22c30c5.so.1.0.0\n"


def test_one_openmp_runtime_is_right():
    assert torch_checks.openmp(LIBC + GOMP, "").cause == "/site/torch/lib/libgomp.so.1"
    assert torch_checks.openmp(LIBC, "").cause == "none"


@pytest.mark.parametrize("second", [IOMP, BUNDLED])
def test_two_openmp_runtimes_are_not(second):
    finding = torch_checks.openmp(GOMP + LIBC + second, "/usr/lib/libtcmalloc.so.4")
    assert finding.severity == "warning"
    assert "2 OpenMP runtimes" in finding.cause
    assert second.split()[-1] in finding.cause
    assert finding.remedy.startswith("LD_PRELOAD=/site/torch/lib/libgomp.so.1")


def test_a_preloaded_openmp_runtime_serves_all():
    finding = torch_checks.openmp(IOMP + GOMP, "/usr/lib/libtcmalloc.so.4:/conda/lib/libiomp5.so")
    assert finding.severity == "ok"


@pytest.fixture
def place():
    node = read_node()
    return RankPlacement(node, Ranks("none", 0, 1, 0, 1), plan_node(node, 1, environ={}).ranks[0])


def test_torch_that_has_moved_its_threads(place, monkeypatch):
    threads = dataclasses.replace(place.plan, threads=torch.get_num_threads())
    assert torch_checks.torch_itself(dataclasses.replace(place, plan=threads)).severity == "ok"
    assert torch_checks.torch_itself(None).severity == "ok"
    more = dataclasses.replace(place.plan, threads=torch.get_num_threads() + 1)
    finding = torch_checks.torch_itself(dataclasses.replace(place, plan=more))
    assert finding.severity == "warning"
    assert f"the plan has {torch.get_num_threads() + 1}" in finding.cause
    for name in ("OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY", "GOMP_CPU_AFFINITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {4097})
    finding = torch_checks.torch_itself(place)
    assert (finding.severity, "is on 4097 now" in finding.cause) == ("warning", True)


def test_kernels(monkeypatch):
    for reason, severity in ((None, "ok"), ("they were not built; install g++", "warning")):
        monkeypatch.setattr(native, "load_error", lambda reason=reason: reason)
        monkeypatch.setattr(native, "isa", lambda: "avx512")
        monkeypatch.setattr(native, "best_isa", lambda: "avx512")
        monkeypatch.setattr(native, "has_openmp", lambda: True)
        finding = torch_checks.kernels()
        assert finding.severity == severity
        assert finding.remedy.startswith("install g++") or not reason
    monkeypatch.setattr(native, "load_error", lambda: None)
    monkeypatch.setattr(native, "has_openmp", lambda: False)
    assert "one thread" in torch_checks.kernels().symptom
    monkeypatch.setattr(native, "best_isa", lambda: "avx512_bf16")
    finding = torch_checks.kernels()
    assert (finding.severity, finding.cause) == ("note", "KNLTRAIN_ISA=avx512; this processor runs avx512_bf16")

    def refuse():
        raise ConfigError("KNLTRAIN_ISA=sse: this processor runs avx2; unset it or name one")

    monkeypatch.setattr(native, "isa", refuse)
    assert torch_checks.kernels().severity == "error"


@pytest.mark.skipif(native.load_error() is not None, reason="no native kernels here")
def test_kernels_of_this_machine():
    assert native.best_isa() in ("avx2", "avx512f", "avx512", "avx512_bf16")
    assert native.has_openmp()


def refusing(monkeypatch, reasons, *, ipex_is_there):
    def refuse(name, precision):
        assert precision == "fp32", "in which all of them run on any processor"
        if name in reasons:
            raise ConfigError(f"engine {name}: {reasons[name]}")

    monkeypatch.setattr(torch_checks, "refuse_missing_parts", refuse)
    monkeypatch.setattr(torch_checks.importlib.util, "find_spec", lambda name: object() if ipex_is_there else None)
    return torch_checks.engines()


def test_engines(monkeypatch):
    assert refusing(monkeypatch, {}, ipex_is_there=True).cause.startswith("fused, eager, compile, ipex run")
    reasons = {"compile": "torch.compile needs g++ or clang++ on the PATH; install one or use eager",
               "ipex": "intel-extension-for-pytorch is not installed; pip install 'knltrain[intel]'"}  # fmt: skip
    finding = refusing(monkeypatch, reasons, ipex_is_there=False)
    assert (finding.severity, finding.symptom) == ("note", "--engine compile and ipex will be refused")
    assert finding.cause.startswith("fused, eager run; compile: torch.compile needs g++")
    assert "install one or use eager; pip install 'knltrain[intel]'" in finding.remedy


def test_an_ipex_beside_another_torch_is_a_warning(monkeypatch):
    reasons = {"ipex": "intel-extension-for-pytorch 2.8.0 does not load with torch 2.13.0; use --engine eager"}
    finding = refusing(monkeypatch, reasons, ipex_is_there=True)
    assert finding.severity == "warning"
    assert "2.8.0 does not load with torch 2.13.0" in finding.cause


@pytest.mark.parametrize(
    "reasons, severity, words",
    [
        (("", ""), "ok", "fp32 4.0 ms, bf16 4.0 ms"),
        (("", "bf16 is not supported"), "warning", "bf16: bf16 is not supported"),
        (("no such interface", "no such interface"), "error", "fp32: no such interface"),
    ],
)
def test_all_reduce(monkeypatch, reasons, severity, words):
    results = [
        AllReduceResult(dtype, 0.0 if reason else 0.004, reason)
        for dtype, reason in zip(("fp32", "bf16"), reasons, strict=True)
    ]
    monkeypatch.setattr(torch_checks, "run_two_rank_all_reduce", lambda limit_s: results)
    finding = torch_checks.all_reduce()
    assert finding.severity == severity
    assert words in finding.cause
    assert finding.remedy == "--comm.dtype fp32" or severity != "warning"


def test_oneccl(monkeypatch):
    monkeypatch.setattr(
        torch_checks, "choose_backend", lambda *_: Backend("gloo", "torch", "tcp", note="not installed")
    )
    assert (torch_checks.oneccl().severity, torch_checks.oneccl().cause) == ("note", "not installed")
    monkeypatch.setattr(
        torch_checks, "choose_backend", lambda *_: Backend("ccl", "oneCCL 2021.13", "ofi", note="kept X")
    )
    asked = []
    answers = [AllReduceResult("fp32", 0.004), AllReduceResult("bf16", 0.003)]
    monkeypatch.setattr(
        torch_checks, "run_two_rank_all_reduce", lambda limit_s, backend: asked.append(backend) or answers
    )
    finding = torch_checks.oneccl()
    assert finding.severity == "ok"
    assert finding.cause.startswith("oneCCL 2021.13 over ofi; kept X, 2 ranks")
    assert "fp32 4.0 ms, bf16 3.0 ms" in finding.cause
    answers[1] = AllReduceResult("bf16", 0.0, "no provider")
    finding = torch_checks.oneccl()
    assert (finding.severity, asked[-1]) == ("error", "ccl")
    assert "bf16: no provider" in finding.cause
    assert "--comm.backend gloo" in finding.remedy


def test_a_data_folder(image_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("KNLTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch_checks, "file_system", lambda path: "ext4")
    monkeypatch.setattr(torch_checks, "rate_per_core", lambda dataset, config, timed: 100.0)
    finding = torch_checks.data_folder(image_folder)
    assert finding.severity == "ok"
    assert f"{image_folder}, ext4: opened in" in finding.cause
    assert "100 img/s decoded on one core; no model was measured here" in finding.cause
    monkeypatch.setattr(torch_checks, "file_system", lambda path: "lustre")
    finding = torch_checks.data_folder(image_folder)
    assert finding.severity == "warning"
    assert f"knltrain prepare {image_folder} DST --format tar" in finding.remedy


@pytest.mark.parametrize("share, severity", [(0.05, "ok"), (0.3, "note"), (0.9, "warning")])
def test_decoding_against_what_a_model_was_measured_to_take(image_folder, monkeypatch, tmp_path, share, severity):
    monkeypatch.setenv("KNLTRAIN_CACHE", str(tmp_path / "cache"))
    node = read_node()
    settings = settings_of("resnet50", "bf16" if node.gains_from_bf16 else "fp32", node,
                           threads_per_rank(node, local_size=1, environ={}))  # fmt: skip
    check_writable()
    store(settings, {"fastest": "eager", "engines": [{"engine": "eager", "images_per_s": 50.0},
                                                     {"engine": "ipex", "images_per_s": 40.0}]})  # fmt: skip
    monkeypatch.setattr(torch_checks, "file_system", lambda path: "ext4")
    rate = 50.0 / share / len(node.cores)
    monkeypatch.setattr(torch_checks, "rate_per_core", lambda dataset, config, timed: rate)
    finding = torch_checks.data_folder(image_folder)
    assert finding.severity == severity
    assert f"resnet50 trains on 50 img/s here, {share:.0%} of what {len(node.cores)} cores decode" in finding.cause


def test_a_data_folder_that_cannot_be_used(tmp_path):
    finding = torch_checks.data_folder(tmp_path / "nowhere")
    assert finding.severity == "error"
    assert "no such folder" in finding.cause
    (tmp_path / "train/one").mkdir(parents=True)
    (tmp_path / "train/one/1.jpg").write_text("no image")
    assert "1.jpg" in torch_checks.data_folder(Path(tmp_path)).cause
