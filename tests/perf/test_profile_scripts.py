"""The scripts for people who profile: each is run small and must write what makes sense; parsers on recorded text."""

import gzip
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from knltrain.comm.backend import choose_backend
from knltrain.launch.world import Ranks

PERF = Path(__file__).parents[2] / "perf"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(str(PERF))
    return importlib.import_module(name)


@pytest.fixture
def onednn(monkeypatch):
    return module("onednn_layers", monkeypatch)


@pytest.fixture
def perf_stat(monkeypatch):
    return module("_perf_stat", monkeypatch)


@pytest.fixture
def script(tmp_path):
    """Runs a script; returns the object on the last line of its stdout, which must be what it wrote."""

    def run(name, *arguments, launcher=(), code=0, **environment):
        # One thread: on a busy machine, OpenMP threads that wait for each other wait long.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment}
        start = ["bash"] if name.endswith(".sh") else [sys.executable, *launcher]
        result = subprocess.run(
            [*start, PERF / name, *map(str, arguments), "--out", tmp_path / "out", "--json"],
            capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path)  # fmt: skip
        assert result.returncode == code, result.stderr
        if code:
            return result.stderr
        printed = json.loads(result.stdout.splitlines()[-1])
        stem = tmp_path / "out" / Path(name).stem
        assert json.loads(stem.with_suffix(".json").read_text()) == printed
        assert result.stderr, "people are told too"
        return printed

    return run


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


# profile_step.py


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_profile_step_adds_up(engine, script, tmp_path):
    result = script("profile_step.py", "--quick", "--engine", engine)
    assert result["step_s"] > 0
    assert sum(kind["share"] for kind in result["kinds"].values()) == pytest.approx(1)
    for total in (
        sum(kind["self_s"] for kind in result["kinds"].values()),
        sum(op["self_s"] for op in result["ops"]),
    ):
        assert total == pytest.approx(result["profiled_step_s"])
    busy = {kind for kind, row in result["kinds"].items() if row["self_s"] > 0}
    assert busy == {"convolution", "linear", "norm", "activation_pooling", "loss", "optimizer", "copies", "other"}
    other = [op for op in result["ops"] if op["kind"] == "other"]
    assert not [op["op"] for op in other if "knltrain" in op["op"]], "every op of ours has a kind"
    assert result["versions"]["torch"]
    assert result["command"][:2] == ["profile_step.py", "--quick"]
    assert is_png(tmp_path / "out" / "profile_step.png")
    if engine == "eager":
        calls = {(op["op"], op["kind"]): op["calls"] for op in result["ops"]}
        assert calls["aten::convolution_backward", "convolution"] == 5, "alexnet_bn_small has five convolutions"
        assert calls["Optimizer.step#LARS.step", "optimizer"] == 1
        trace = json.loads(gzip.decompress((tmp_path / "out" / "trace.json.gz").read_bytes()))
        assert sum(event.get("name") == "aten::convolution_backward" for event in trace["traceEvents"]) == 2 * 5


def test_profile_step_sees_the_wait_for_images(script, image_folder):
    result = script("profile_step.py", "--quick", "--data", image_folder)
    assert result["kinds"]["data"]["self_s"] > 0
    assert sum(kind["self_s"] for kind in result["kinds"].values()) == pytest.approx(result["profiled_step_s"])


def test_profile_step_sees_communication(script):
    result = script("profile_step.py", "--quick", launcher=TORCHRUN)
    assert result["world_size"] == 2
    assert result["kinds"]["communication"]["self_s"] > 0
    assert result["gradients_on_wire_s"] > 0
    waits = [op for op in result["ops"] if op["op"] == "waiting for gradients"]
    assert [(op["kind"], op["calls"]) for op in waits] == [("communication", 1)]


@pytest.mark.parametrize(
    "names, kind",
    [
        (["aten::mkldnn_convolution", "aten::convolution", "aten::conv2d", "forward", "step"], "convolution"),
        (["autograd::engine::evaluate_function: ConvolutionBackward0", "backward", "step"], "convolution"),
        (["torch_ipex::convolution_backward", "step"], "convolution"),
        (["aten::copy_", "aten::_to_copy", "aten::to", "aten::conv2d", "forward", "step"], "copies"),
        (["aten::empty", "aten::native_batch_norm", "step"], "norm"),
        (["aten::addmm", "aten::linear", "step"], "linear"),
        (["aten::add_", "forward", "step"], "activation_pooling"),
        (["aten::add_", "Optimizer.step#LARS.step", "optimizer", "step"], "optimizer"),
        (["aten::mul", "_LocalResponseNormBackward", "backward", "step"], "norm"),
        (["aten::nll_loss_backward", "autograd::engine::evaluate_function: NllLossBackward0", "backward"], "loss"),
        (["aten::view", "step"], "other"),
        (["backward", "step"], "other"),
        (["c10d::allreduce_", "backward", "step"], "communication"),
        # Those of the fused engine, the plain torch operations within them included.
        (["knltrain::batch_norm_act", "forward", "step"], "norm"),
        (["aten::relu", "knltrain::batch_norm_act_backward", "backward", "step"], "norm"),
        (["GeneratedBackwardFor_knltrain_batch_norm_act_default", "forward", "step"], "norm"),
        (["aten::lerp_", "forward", "step"], "norm"),
        (["_Conv2dBackward", "backward", "step"], "convolution"),
        (["aten::copy_", "knltrain::lars_step", "optimizer", "step"], "optimizer"),
        (["knltrain::sgd_step"], "optimizer"),
        (["knltrain::crop_flip_normalize"], "data"),
        (["knltrain::conv_weight_grad"], "convolution"),
        (["knltrain::max_pool2d_backward"], "activation_pooling"),
        (["knltrain::dropout_backward"], "activation_pooling"),
        (["knltrain::local_response_norm_backward"], "norm"),
    ],
)
def test_kind_of(names, kind, monkeypatch):
    assert module("profile_step", monkeypatch).kind_of(names) == kind


def test_a_model_that_does_not_exist_is_one_line(refusal, tmp_path):
    message = refusal("profile_step", "--model", "vgg", "--out", tmp_path / "out")
    assert message.startswith("profile_step.py: model: no 'vgg'")
    assert len(message.splitlines()) == 1


# onednn_layers.py


def test_onednn_layers_of_resnet50(script, tmp_path):
    # Below a batch of 16, torch computes some fp32 convolutions without oneDNN.
    arguments = ["--model", "resnet50", "--image-size", 64, "--batch", 16, "--steps", 1, "--engine", "eager"]
    result = script("onednn_layers.py", *arguments)
    stem = [row for row in result["layers"] if row["shape"].startswith("mb16_ic3oc64_ih64oh32kh7sh2dh0ph3")]
    assert {row["direction"] for row in stem} == {"forward", "weight gradient"}, "images need no gradient"
    for row in stem:
        assert row["calls"] == 1
        assert row["gflop"] == pytest.approx(1e-9 * 2 * (16 * 32 * 32) * 64 * (3 * 7 * 7))
        assert row["gflop_per_s"] == pytest.approx(1e3 * row["gflop"] / row["ms"])
    calls = {row["direction"]: row["calls"] for row in result["totals"] if row["primitive"] == "convolution"}
    assert calls == {"forward": 53, "data gradient": 52, "weight gradient": 53}
    for name in ("calls", "ms", "gflop", "mb"):
        total = sum(row[name] for row in result["totals"])
        assert total == pytest.approx(sum(row[name] or 0 for row in result["layers"]))
    assert 0 < result["onednn_s"] < result["step_s"]
    assert any(line.startswith("oneDNN v") for line in result["onednn"])
    assert is_png(tmp_path / "out" / "onednn_layers.png")


RECORDED = [
    (  # MKL-DNN 0.x: no engine, no types of a convolution
        "mkldnn_verbose,exec,convolution,jit:avx512_common,forward_training,fsrc:nChw16c fwei:OIhw16i16o fbia:undef "
        "fdst:nChw16c,alg:convolution_direct,mb100_ic128oc32_ih7oh7kh3sh1dh0ph1_iw7ow7kw3sw1dw0pw1,0.201904",
        ("convolution", "forward", "jit:avx512_common", (), 0.201904),
        2e-9 * 100 * 7 * 7 * 32 * 128 * 9,
    ),
    (
        "mkldnn_verbose,exec,reorder,jit:uni,undef,in:f32_oihw out:f32_Ohwi16o,num:1,64x3x11x11,0.432129",
        ("reorder", "undef", "jit:uni", ("f32", "f32"), 0.432129),
        None,
    ),
    (  # 1.x
        "dnnl_verbose,exec,cpu,convolution,jit:avx2,forward_training,src_f32::blocked:aBcd8b:f0 "
        "wei_f32::blocked:ABcd8b8a:f0 bia_f32::blocked:a:f0 dst_f32::blocked:aBcd8b:f0,,alg:convolution_direct,"
        "mb2_ic16oc16_ih7oh7kh5sh1dh0ph2_iw7ow7kw5sw1dw0pw2,0.0390625",
        ("convolution", "forward", "jit:avx2", ("f32", "f32", "f32"), 0.0390625),
        2e-9 * 2 * 7 * 7 * 16 * 16 * 25,
    ),
    (  # 2.x: a matrix product says its destination too
        "onednn_verbose,exec,cpu,matmul,brg:avx512_core_amx_bf16,undef,src_bf16::blocked:ba:f0 "
        "wei_bf16::blocked:ab:f0 dst_bf16::blocked:ab:f0,attr-scratchpad:user ,,1600x128:128x10:1600x10,0.5",
        ("matmul", "undef", "brg:avx512_core_amx_bf16", ("bf16", "bf16", "bf16"), 0.5),
        2e-9 * 1600 * 128 * 10,
    ),
    (  # 3.2: the second factor is the same for all of the batch
        "onednn_verbose,exec,cpu,matmul,gemm:jit:f32,undef,src_f32::blocked:abc::f0 wei_f32::blocked:abc::f0 "
        "bia_f32::blocked:abc::f0_mask4 dst_f32::blocked:abc::f0,,,7x12800x128:1x128x64,39.0911",
        ("matmul", "undef", "gemm:jit:f32", ("f32", "f32", "f32"), 39.0911),
        2e-9 * 7 * 12800 * 128 * 64,
    ),
    (  # 3.3
        "onednn_verbose,primitive,exec,cpu,convolution,brgconv:avx512_core,forward_training,src_f32::blocked:acdb::f0 "
        "wei_f32:ap:blocked:Acdb16a::f0 bia_f32:a:blocked:a::f0 dst_f32::blocked:acdb::f0,attr-scratchpad:user ,"
        "alg:convolution_direct,mb50_ic3oc6_ih112oh110kh3sh1dh0ph0_iw112ow110kw3sw1dw0pw0,1.5",
        ("convolution", "forward", "brgconv:avx512_core", ("f32", "f32", "f32"), 1.5),
        2e-9 * 50 * 110 * 110 * 6 * 3 * 9,
    ),
    (  # 3.7.1, groups, of a training step of alexnet_bn
        "onednn_verbose,v1,primitive,exec,cpu,convolution,jit_bf16:avx512_core_bf16,backward_weights,"
        "src:bf16::blocked:acdb::f0 wei:bf16:a:blocked:aBCde16c16b::f0 bia:bf16:a:blocked:a::f0 "
        "dst:bf16::blocked:acdb::f0,attr-scratchpad:user,alg:convolution_direct,"
        "g2mb128_ic96oc256_ih27oh27kh5sh1dh0ph2_iw27ow27kw5sw1dw0pw2,130.282",
        ("convolution", "weight gradient", "jit_bf16:avx512_core_bf16", ("bf16", "bf16", "bf16"), 130.282),
        2e-9 * 128 * 27 * 27 * 256 * (96 / 2) * 25,
    ),
    (  # 3.7.1 with ONEDNN_VERBOSE_TIMESTAMP, rectangular
        "onednn_verbose,v1,1795342325872.242920,primitive,exec,cpu,convolution,jit:avx512_core,backward_data,"
        "src:f32::blocked:acdb::f0 wei:f32:a:blocked:aBCde4b4c::f0 bia:undef::undef::: dst:f32::blocked:acdb::f0,"
        "attr-scratchpad:user,alg:convolution_direct,g2mb4_ic8oc16_ih16oh8kh3sh2dh0ph1_iw16ow16kw5sw1dw0pw2,0.0297852",
        ("convolution", "data gradient", "jit:avx512_core", ("f32", "f32", "f32"), 0.0297852),
        2e-9 * 4 * 8 * 16 * 16 * (8 / 2) * 15,
    ),
    (  # 3.12, three-dimensional
        "onednn_verbose,v1,primitive,exec,cpu,convolution,jit:avx512_core,forward_training,src:f32:a:blocked:abcde::f0 "
        "wei:f32:ap:blocked:Acdeb16a::f0 bia:f32:a:blocked:a::f0 dst:f32:ap:blocked:aBcde16b::f0,attr-scratchpad:user,"
        "alg:convolution_direct,mb2_ic4oc8_id8od6kd3sd1dd0pd0_ih9oh7kh3sh1dh0ph0_iw10ow8kw3sw1dw0pw0,0.0300293",
        ("convolution", "forward", "jit:avx512_core", ("f32", "f32", "f32"), 0.0300293),
        2e-9 * 2 * 6 * 7 * 8 * 8 * 4 * 27,
    ),
    (  # 3.12, transposed
        "onednn_verbose,v1,primitive,exec,cpu,deconvolution,conv:any+brgconv_strided:avx512_core,forward_training,"
        "src:f32:a:blocked:acdb::f0 wei:f32:ap:blocked:Acdb16a::f0 bia:f32:a:blocked:a::f0 dst:f32:a:blocked:acdb::f0,"
        "attr-scratchpad:user,alg:deconvolution_direct,mb2_ic4oc8_ih9oh19kh3sh2dh0ph0_iw9ow19kw3sw2dw0pw0,0.065918",
        ("deconvolution", "forward", "conv:any+brgconv_strided:avx512_core", ("f32", "f32", "f32"), 0.065918),
        2e-9 * 2 * 9 * 9 * 4 * 8 * 9,
    ),
    (  # behind what a launcher puts before every line
        "[1] onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core_bf16,undef,src:bf16::blocked:ab::f0 "
        "wei:bf16::blocked:ba::f0 dst:bf16::blocked:ab::f0,attr-scratchpad:user attr-post-ops:sum,,"
        "128x9216:9216x4096,23.728",
        ("matmul", "undef", "brg_matmul:avx512_core_bf16", ("bf16", "bf16", "bf16"), 23.728),
        2e-9 * 128 * 9216 * 4096,
    ),
]


@pytest.mark.parametrize("line, expected, gflop", RECORDED)
def test_parser_on_recorded_lines(line, expected, gflop, onednn):
    (primitive,) = onednn.parse([line])
    assert (primitive.kind, primitive.direction, primitive.implementation, primitive.types, primitive.ms) == expected
    assert primitive.gflop == (None if gflop is None else pytest.approx(gflop))


def test_parser_leaves_out_what_is_no_execution(onednn):
    lines = """
onednn_verbose,v1,info,oneDNN v3.7.1 (commit 8d263e693366ef8db40acc569cc7d8edf644556d)
onednn_verbose,v1,primitive,info,template:operation,engine,primitive,implementation,prop_kind,exec_time
dnnl_verbose,create:cache_miss,cpu,reorder,jit:blk,undef,src_f32::blocked:abcd:f0 dst_f32::blocked:aB:f0,,,8x8,0.05
onednn_verbose,v1,graph,exec,cpu,100002,matmul_post_ops,fc,,in0_bf16:0:strided:undef,fpm:strict,dnnl,3.5
onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,src:bf16::blocked:acdb::f0 dst:bf1
onednn_verbose,v1,primitive,exec,cpu,convolution
step 1 took 3.5 s
"""
    assert list(onednn.parse(lines.splitlines())) == []


def test_reorders_are_counted_with_their_bytes(onednn):
    line = (
        "onednn_verbose,v1,primitive,exec,cpu,reorder,jit:uni,undef,"
        "src:f32::blocked:abcd::f0 dst:bf16::blocked:acdb::f0,,,{},0.5"
    )
    parsed = list(onednn.parse([line.format("64x3x7x7"), line.format("64x3x7x7"), line.format("10")]))
    rows = onednn.layers(parsed, steps=2)
    assert [(row["shape"], row["calls"], row["ms"]) for row in rows] == [("64x3x7x7", 1, 0.5), ("10", 0.5, 0.25)]
    (total,) = onednn.totals(rows)
    megabytes = 1e-6 * (64 * 3 * 7 * 7 + 10 / 2) * (4 + 2)
    assert (total["calls"], total["ms"], total["mb"]) == (1.5, 0.75, pytest.approx(megabytes))
    assert total["gb_per_s"] == pytest.approx(megabytes / 0.75)
    assert total["gflop_per_s"] is None


# allreduce.py


@pytest.mark.parametrize("ranks", [1, 2])
def test_allreduce(ranks, script, tmp_path):
    result = script("allreduce.py", "--quick", launcher=TORCHRUN if ranks == 2 else ())
    assert result["world_size"] == ranks
    backends = ["gloo"]
    if ranks == 2 and choose_backend("auto", Ranks("none", 0, 2, 0, 2)).name == "ccl":
        backends = ["ccl", "gloo", *(["oneCCL alone"] if shutil.which("g++") else [])]
    assert result["backends"] == backends
    assert [(row["dtype"], row["bytes"], row["backend"]) for row in result["rows"]] == [
        (dtype, size, backend) for dtype in ("fp32", "bf16") for size in (4096, 65536, 1048576) for backend in backends
    ]
    for row in result["rows"]:
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["algbw_gb_per_s"] == pytest.approx(1e-9 * row["bytes"] / row["median_s"])
        assert row["busbw_gb_per_s"] == pytest.approx({1: 0, 2: row["algbw_gb_per_s"]}[ranks])
    beside = result["beside_computing"]
    assert (beside["backend"], beside["bytes"]) == (backends[0], 2**20)
    assert beside["computing_lost_s"] >= 0
    assert beside["seconds"] > 0
    assert is_png(tmp_path / "out" / "allreduce.png")


def test_a_program_that_cannot_be_compiled_is_done_without(script):
    if choose_backend("auto", Ranks("none", 0, 2, 0, 2)).name != "ccl":
        pytest.skip("oneCCL is not installed")
    path = os.path.dirname(sys.executable)
    result = script("allreduce.py", "--quick", "--sizes", "8", launcher=TORCHRUN, PATH=path)
    assert result["backends"] == ["ccl", "gloo"]
    assert {row["bytes"] for row in result["rows"]} == {8}


def test_bandwidths_are_those_of_nccl_tests(monkeypatch):
    # 8 ranks: each sends and receives 7/8 of the message twice.
    assert module("allreduce", monkeypatch).bandwidth(10**9, 2.0, 8) == (0.5, 0.875)


@pytest.mark.parametrize("option", [("--dtypes", "int8"), ("--sizes", "6"), ("--sizes", "1M")])
def test_allreduce_refuses(option, script):
    message = script("allreduce.py", *option, code=2)
    assert message.startswith(f"allreduce.py: {option[0]}")


# perf_stat.sh


def test_perf_stat(script, tmp_path):
    result = script("perf_stat.sh", "--quick", "--steps", "2")
    assert result["bench"]["steps"] == 2
    out = tmp_path / "out"
    if shutil.which("perf") is None:
        pytest.skip("no perf here; the next test is of that")
    if not result["counters"]:
        pytest.skip(f"perf may not count here: {result['reasons']}")
    assert result["counters"]["task-clock"] > 0
    assert result["counters"]["page-faults"] > 0
    if result["counters"]["cycles"] is None:
        assert result["derived"] == {}
        assert "virtual" in result["reasons"][0]
    else:
        assert 0 < result["derived"]["instructions_per_cycle"] < 10
        assert result["reasons"] == []
    assert sum(row["share"] for row in result["hottest"]) <= 1 + 1e-9
    folded = (out / "stacks.folded").read_text().splitlines()
    assert sum(int(line.rpartition(" ")[2]) for line in folded) == result["samples"] > 0
    assert is_png(out / "perf_stat.png")


def test_perf_stat_without_perf_says_so_and_measures_the_rest(script, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "date", "dirname", "git", "grep", "mkdir", "nproc", "rm", "sleep", "uname"):
        if path := shutil.which(name):
            (tools / name).symlink_to(path)
    result = script("perf_stat.sh", "--quick", "--steps", "1", PATH=str(tools))
    assert "perf is not installed" in result["reasons"][0]
    assert result["bench"]["step_s"]["median"] > 0
    assert result["counters"] == {}


def test_perf_stat_hands_on_what_bench_says(script):
    assert "no 'vgg'" in script("perf_stat.sh", "--model", "vgg", code=2)


def test_perf_stat_is_clean():
    path = PERF / "perf_stat.sh"
    usage = subprocess.run(["bash", path, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--quick" in usage
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if checker is None:
        pytest.skip("no shellcheck here")
    subprocess.run([checker, path], check=True)


def test_counters_and_their_ratios(perf_stat):
    text = """# started on Sun Nov 22 10:36:50 2026

12000.00;msec;task-clock;12000000000;100.00;1.950;CPUs utilized
36000000000;;cycles:u;12000000000;80.00;3.000;GHz
54000000000;;instructions:u;12000000000;80.00;1.50;insn per cycle
1000;;cache-references:u;12000000000;80.00;;
250;;cache-misses:u;12000000000;80.00;25.00;of all cache refs
9000000000;;core_power.lvl1_turbo_license;12000000000;100.00;;
<not supported>;;branches;0;100.00;;
"""
    count = perf_stat.counters(text)
    assert count["cycles"] == 36e9
    assert count["branches"] is None
    assert count["cpus_busy"] == 1.95
    assert perf_stat.derived(count) == {
        "instructions_per_cycle": 1.5,
        "clock_ghz": pytest.approx(3.0),
        "cache_miss_share": 0.25,
        "avx512_licence1_share": 0.25,
    }


def test_stacks_are_folded(perf_stat):
    script = """python 4711
\t 105f448f at::native::batch_norm_cpu_kernel (/env/torch/lib/libtorch_cpu.so)
\t 23ea482 at::_ops::native_batch_norm::call (/env/torch/lib/libtorch_cpu.so)
\t 158383 _PyObject_Call (/env/bin/python3.11)
\t fe107 _PyEval_EvalFrameDefault (/usr/lib/libpython3.11.so.1.0)
\tffffffffffffffff [unknown] ([unknown])

python 4711
\t 7f70 jit_brgemm_kernel_t.29 (/tmp/perf-4711.map)

python 4711
\t 7f90 [unknown] (/tmp/perf-4711.map)

"""
    samples = perf_stat.stacks(script)
    assert samples == {
        ("python", "at::native::batch_norm_cpu_kernel"): 1,
        ("jit_brgemm_kernel_t",): 1,
        ("[generated code]",): 1,
    }
    widths = {name: width for *_, width, name in perf_stat._bars(samples)}
    assert all(math.isclose(width, 100 / 3) for width in widths.values())
    assert len(widths) == 4
