"""Which variant of the native kernels runs, on which threads of which runtime, and what happens without them."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.checks import threads

from knltrain.errors import ConfigError
from knltrain.ops import native

VARIANTS = ("avx2", "avx512f", "avx512", "avx512_bf16")


@pytest.fixture
def module():
    """The built module."""
    if native.load_error() is not None:
        pytest.skip(f"no native kernels: {native.load_error()}")
    return native.kernels()


@pytest.fixture
def as_in_a_new_process(module):
    """The kernels are chosen again, for this test and after it."""
    with pytest.MonkeyPatch.context() as patch:
        native.kernels.cache_clear()
        yield patch
    native.kernels.cache_clear()
    native.kernels()


def run_python(script, *arguments, **environment):
    """Runs a script in a process of its own."""
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    environment = {**os.environ, **environment}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("name", VARIANTS)
def test_the_environment_forces_a_variant(module, name):
    if name not in module.supported_isas():
        pytest.skip(f"this processor does not run {name}")
    script = """
from knltrain import _kernels
use_isa, used = _kernels.use_isa, []
_kernels.use_isa = lambda name: (used.append(name), use_isa(name))
import torch
from knltrain.ops import native
from knltrain.ops.batchnorm import batch_norm_act
x = torch.arange(24.0).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
y = batch_norm_act(x, torch.ones(3), torch.zeros(3), None, None, training=True, relu=False)
print(native.isa(), *used, y.var((0, 2, 3), correction=0).round().tolist())
"""
    assert run_python(script, KNLTRAIN_ISA=name).stdout.split(maxsplit=2) == [name, name, "[1.0, 1.0, 1.0]\n"]


def test_by_default_the_best_variant_runs(module, monkeypatch):
    monkeypatch.setenv("KNLTRAIN_ISA", "")
    assert native.isa() == module.supported_isas()[-1]
    monkeypatch.delenv("KNLTRAIN_ISA")
    assert native.isa() == module.supported_isas()[-1]


def test_supported_are_those_that_the_kernel_names(module):
    """Linux's own reading of CPUID, beside ours."""
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    needed = {"avx2": {"avx2", "fma"}, "avx512f": {"avx512f"}, "avx512": {"avx512bw", "avx512dq", "avx512vl"}}
    needed["avx512"] |= {"avx512f", "avx512cd"}
    needed["avx512_bf16"] = needed["avx512"] | {"avx512_bf16"}
    script = "from knltrain import _kernels; print(*_kernels.supported_isas())"
    assert run_python(script).stdout.split() == [name for name in VARIANTS if needed[name] <= flags]


@pytest.mark.parametrize("asked, supported", [("sse4", VARIANTS), ("avx512", ["avx2"]), ("AVX2", ["avx2", "avx512f"])])
def test_a_variant_that_does_not_run_is_an_error(as_in_a_new_process, module, asked, supported):
    as_in_a_new_process.setattr(module, "supported_isas", lambda: list(supported))
    as_in_a_new_process.setenv("KNLTRAIN_ISA", asked)
    for choose in (native.isa, native.kernels):
        with pytest.raises(ConfigError, match=f"KNLTRAIN_ISA={asked}: .*{', '.join(supported)}"):
            choose()


def test_the_module_itself_refuses_an_unknown_variant(module):
    with pytest.raises(ValueError, match="sse4"):
        module.use_isa("sse4")


def test_arguments_are_named(module):
    """Addresses are integers: by position, two that are exchanged would be read and written as each other."""
    functions = [value for name, value in vars(module).items() if name.endswith(("_forward", "_backward", "_step"))]
    functions += [module.conv_weight_grad, module.crop_flip_normalize, module.pointwise, module.winograd,
                  module.winograd_weight_grad]  # fmt: skip
    assert len(functions) == 15
    for function in functions:
        assert re.match(r"def \w+\(\*, ", function.__nb_signature__[0][0]), function.__nb_signature__
    arguments = {"x": 0, "y": 0, "rows": 0, "channels": 0, "size": 5, "alpha": 1.0, "is_bf16": False, "tasks": 1}
    module.local_response_norm_forward(**arguments)
    for wrong in ({"z": 0}, {"x": None}):
        with pytest.raises(TypeError):
            module.local_response_norm_forward(**{**arguments, **wrong})
    with pytest.raises(TypeError):
        module.local_response_norm_forward(*arguments.values())


# The whole of what uses kernels, and how often it warned.
WORK = """
import logging
import torch
records = []
handler = logging.Handler()
handler.emit = records.append
logging.getLogger().addHandler(handler)
from knltrain.ops import native
from knltrain.ops.batchnorm import batch_norm_act
from knltrain.ops.convgrad import conv2d
for _ in range(2):
    x = torch.randn(3, 32, 6, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 32, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    gain, bias = torch.ones(16, requires_grad=True), torch.zeros(16, requires_grad=True)
    y = batch_norm_act(conv2d(x, weight), gain, bias, torch.zeros(16), torch.ones(16), training=True)
    y.float().square().sum().backward()
    assert weight.grad.isfinite().all() and gain.grad.norm() > 1 and bias.grad.norm() > 1
assert native.kernels() is None and native.isa() is None
warnings = [record for record in records if record.levelno >= logging.WARNING]
print(len(warnings), warnings[0].getMessage())
"""
ABSENT = """
import sys
class Absent:
    def find_spec(name, path=None, target=None):
        if name == "knltrain._kernels":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent)
"""
BROKEN = """
import sys
class Broken:
    def find_spec(name, path=None, target=None):
        if name == "knltrain._kernels":
            raise ImportError("libstdc++.so.6: version not found", name=name)
sys.meta_path.insert(0, Broken)
"""
OLD_PROCESSOR = """
import sys, types
import knltrain
knltrain._kernels = sys.modules["knltrain._kernels"] = types.ModuleType("knltrain._kernels")
knltrain._kernels.supported_isas = list
"""


@pytest.mark.parametrize(
    "situation, why",
    [
        pytest.param(ABSENT, "not built", id="not built"),
        pytest.param(BROKEN, r"libstdc\+\+.so.6: version not found", id="does not load"),
        pytest.param(OLD_PROCESSOR, "no AVX2", id="old processor"),
    ],
)
def test_without_kernels_everything_works_and_one_warning_says_why(situation, why):
    run = run_python(situation + WORK)
    count, _, message = run.stdout.partition(" ")
    assert count == "1"
    assert message.startswith("knltrain runs without its native kernels: ")
    assert re.search(why, message), message


# Threads there are after a large batch norm, and after an operation of torch's own. Filling memory with torch would
# start threads too early, so NumPy does.
THREADS = """
import os
import sys
import numpy as np
import torch
from knltrain.ops.batchnorm import batch_norm_act
def normalize(rows):
    x = torch.from_numpy(np.ones((rows, 1, 1, 64), np.float32)).permute(0, 3, 1, 2)
    batch_norm_act(x, torch.ones(64), torch.zeros(64), None, None, training=True)
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(int(sys.argv[1]))
one = normalize(2)
print(normalize(4096) - one)
torch.from_numpy(np.ones(1 << 20)).exp()
print(len(os.listdir("/proc/self/task")) - one)
"""
RUNTIMES = r"""
import re
maps = open("/proc/self/maps").read()
print(*sorted({os.path.realpath(path) for path in re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[.-]\S*", maps)}))
"""


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_are_torchs(module, count):
    """As many as torch is told to use; torch then works on the same ones and starts none."""
    run = run_python(THREADS, str(count))
    assert run.stdout.split() == [str(count - 1)] * 2


def test_there_is_one_openmp_runtime(module):
    *_, runtimes = run_python(THREADS + RUNTIMES, "2").stdout.splitlines()
    assert len(runtimes.split()) == 1, runtimes


def test_threads_come_from_a_preloaded_runtime(module):
    """Where Intel's stands before torch's, both torch and the kernels use that one."""
    library = Path(sys.prefix, "lib", "libiomp5.so")
    if not library.exists():
        pytest.skip(f"no {library}")
    first, second, runtimes = run_python(THREADS + RUNTIMES, "3", LD_PRELOAD=str(library)).stdout.splitlines()
    assert first == second == "2"
    assert str(library.resolve()) in runtimes


def test_without_openmp_there_is_one_thread_and_a_warning(as_in_a_new_process, caplog):
    as_in_a_new_process.setattr(native, "_openmp_of_torch", lambda: None)
    with caplog.at_level(logging.WARNING):
        native.kernels()
        native.kernels()
    assert [record.getMessage() for record in caplog.records] == [
        "torch's OpenMP runtime was not found: the native kernels run on one thread"
    ]


def test_little_work_is_not_divided():
    with threads(3):
        tasks = [native.tasks_for(numbers) for numbers in (0, 1, 16383, 16384, 24575, 24576, 10**9)]
    assert tasks == [1, 1, 1, 2, 2, 3, 3]
    with threads(1):
        assert native.tasks_for(10**9) == 1


def test_addresses():
    tensor = torch.zeros(2)
    assert native.address(tensor) == tensor.data_ptr() != 0
    assert native.address(None) == 0


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.zeros(2, 3, device="meta"), "on meta"),
        (torch.zeros(2, 3).to_sparse(), "sparse"),
        (torch.zeros(2, 3).double(), "float64; it must be torch.bfloat16 or torch.float32"),
        (torch.zeros(3, 2), r"shape \(3, 2\); it must have \(2, 3\)"),
        (torch.zeros(2, 3, 1), "shape"),
    ],
)
def test_check_says_what_is_wrong_with_which_tensor(tensor, message):
    native.check("x", torch.zeros(2, 3), (torch.bfloat16, torch.float32), (2, 3))
    with pytest.raises(ValueError, match=f"^x .*{message}"):
        native.check("x", tensor, (torch.bfloat16, torch.float32), (2, 3))
