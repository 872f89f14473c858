"""OneCCL as the compiled part reaches it: names and layouts, refusals, and when it is loaded at all."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from knltrain.comm import oneccl
from knltrain.comm.backend import choose_backend
from knltrain.errors import ConfigError
from knltrain.launch.world import Ranks

RANKS = Ranks("torchrun", 0, 2, 0, 2, "env://")
SOURCE = Path(__file__).parents[2] / "kernels" / "ccl_library.cpp"

# Each function that kernels/ccl_library.cpp looks up by name, taken by its type from oneCCL's headers, and the layouts.
PROBE = """
#include <oneapi/ccl.hpp>
#include <cstddef>
using namespace ccl;
using Events = vector_class<event>;
using Sizes = vector_class<size_t>;
static_assert(sizeof(event) == sizeof(void *) && sizeof(communicator) == 2 * sizeof(void *));
static_assert(sizeof(library_version) == 56 && kvs::address_max_size == 256);
static_assert(int(datatype::int8) == 0 && int(datatype::uint8) == 1 && int(datatype::int32) == 4);
static_assert(int(datatype::int64) == 6 && int(datatype::float16) == 8 && int(datatype::float32) == 9);
static_assert(int(datatype::float64) == 10 && int(datatype::bfloat16) == 11);
static_assert(int(reduction::sum) == 0 && int(reduction::prod) == 1);
static_assert(int(reduction::min) == 2 && int(reduction::max) == 3);
void *volatile keep;
template <class T> void use(T entry) { keep = reinterpret_cast<void *>(entry); }
void all(event *e, communicator *c, kvs *k) {
    use<shared_ptr_class<kvs> (*)(const kvs_attr &)>(create_main_kvs);
    use<shared_ptr_class<kvs> (*)(const kvs::address_type &, const kvs_attr &)>(create_kvs);
    keep = new kvs::address_type(k->get_address());
    use<communicator (*)(int, int, shared_ptr_class<kvs_interface>, const comm_attr &)>(create_communicator);
    c->~communicator();
    e->~event();
    e->test();
    use<event (*)(const void *, size_t, const vector_class<void *> &, const Sizes &, datatype, const communicator &,
                  const allgatherv_attr &, const Events &)>(allgatherv);
    use<event (*)(const void *, void *, size_t, datatype, reduction, const communicator &, const allreduce_attr &,
                  const Events &)>(allreduce);
    use<event (*)(const void *, const Sizes &, void *, const Sizes &, datatype, const communicator &,
                  const alltoallv_attr &, const Events &)>(alltoallv);
    use<event (*)(void *, size_t, datatype, int, const communicator &, const broadcast_attr &,
                  const Events &)>(broadcast);
    use<event (*)(void *, size_t, datatype, int, const communicator &, const pt2pt_attr &, const Events &)>(recv);
    use<event (*)(const void *, void *, size_t, datatype, reduction, int, const communicator &, const reduce_attr &,
                  const Events &)>(reduce);
    use<event (*)(const void *, void *, size_t, datatype, reduction, const communicator &, const reduce_scatter_attr &,
                  const Events &)>(reduce_scatter);
    use<event (*)(void *, size_t, datatype, int, const communicator &, const pt2pt_attr &, const Events &)>(send);
    use<library_version (*)()>(get_library_version);
    use(&default_allgatherv_attr), use(&default_allreduce_attr), use(&default_alltoallv_attr);
    use(&default_broadcast_attr), use(&default_comm_attr);
    use(&default_kvs_attr), use(&default_pt2pt_attr);
    use(&default_reduce_attr), use(&default_reduce_scatter_attr);
}
"""


def need_library():
    try:
        oneccl.find_library()
    except oneccl.UnavailableError as error:
        pytest.skip(str(error))


def looked_up():
    """The names in kernels/ccl_library.cpp, put together as its compiler does."""
    text = SOURCE.read_text().replace("CCL_EVENTS", '"RKSt6vectorINS0_5eventESaI"')
    calls = re.findall(r"find\(api\.\w+,((?:\s*\"[^\"]*\")+)\);", text)
    return {"".join(re.findall(r'"([^"]*)"', call)) for call in calls}


def test_names_and_layouts_are_those_of_oneccls_headers(tmp_path):
    need_library()
    compiler = shutil.which("g++") or pytest.skip("no g++")
    files = importlib.metadata.files("oneccl-devel") or []
    header = next((Path(os.path.normpath(f.locate())) for f in files if str(f).endswith("oneapi/ccl.hpp")), None)
    if header is None:
        pytest.skip("oneCCL's headers are not installed")
    (tmp_path / "probe.cpp").write_text(PROBE)
    command = [compiler, "-std=c++17", "-w", "-c", "probe.cpp", f"-I{header.parents[1]}", "-o", "probe.o"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    names = subprocess.run(["nm", "-u", "probe.o"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert len(looked_up()) == 25
    missing = looked_up() - {line.split()[-1] for line in names.splitlines()}
    assert not missing


def test_wrong_calls_are_refused_before_an_address_is_used():
    need_library()
    code = """
import os
from knltrain.comm import oneccl
from knltrain.launch.world import Ranks
os.environ["CCL_LOG_LEVEL"] = "error"
oneccl.configure(Ranks("none", 0, 1, 0, 1))
ccl = __import__("knltrain._kernels")._kernels.ccl
def refused(call, words):
    try:
        call()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
refused(ccl.version, "not loaded")
oneccl.load()
refused(lambda: ccl.join_meeting_point(b"short"), "256 bytes")
with oneccl.quiet():
    point = ccl.open_meeting_point()
refused(lambda: ccl.connect(2, 2, point), "rank 2 of 2")
comm = ccl.connect(1, 0, point)
refused(lambda: comm.all_reduce(0, 0, 4, 12, 0, False), "no data type 12")
refused(lambda: comm.all_reduce(0, 0, 4, 9, 4, False), "no reduction 4")
refused(lambda: comm.broadcast(0, 4, 9, 1, False), "no rank 1")
refused(lambda: comm.all_to_all(0, [1, 2], 0, [1], 9, False), "2 given for 1 ranks")
refused(lambda: comm.all_gather(0, 1, [0], [1, 1], 9, False), "2 given for 1 ranks")
comm.close()
comm.close()
refused(lambda: comm.broadcast(0, 4, 9, 0, False), "closed")
print("all refused")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "all refused", result.stderr


def test_what_is_no_oneccl_is_refused_with_the_reason(tmp_path):
    code = """
import ctypes.util, sys
from knltrain.comm import oneccl
try:
    oneccl.load()
except oneccl.UnavailableError as error:
    print(error)
"""
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / "libccl.so.1"
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "CCL_ROOT": str(tmp_path)}
    result = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60)
    assert f"CCL_ROOT={tmp_path} holds no libccl.so.1" in result.stdout
    library.write_bytes(b"no library")
    result = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60)
    assert f"{library} does not load" in result.stdout
    if compiler := shutil.which("g++"):
        subprocess.run([compiler, "-shared", "-fPIC", "-x", "c++", "/dev/null", "-o", str(library)], check=True)
        result = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=60)
        assert "another interface than oneCCL 2021's" in result.stdout


def test_one_rank_does_not_load_it():
    code = """
from knltrain.comm.group import Group
from knltrain.launch.world import discover
group = Group(discover())
assert group.sum(2.0) == [2.0]
assert "libccl" not in open("/proc/self/maps").read()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_what_the_user_exported_stays(tmp_path):
    exported = {"CCL_WORKER_COUNT": "2", "CCL_LOG_LEVEL": "info", "FI_PROVIDER": "verbs", "I_MPI_ROOT": str(tmp_path)}
    environ = dict(exported)
    settings = oneccl.configure(RANKS, environ=environ)
    assert environ.items() >= exported.items()
    assert settings.kept == {name: value for name, value in exported.items() if name != "I_MPI_ROOT"}
    assert settings.set["CCL_WORKER_OFFLOAD"] == "1", "cores are kept for workers"
    assert (environ["CCL_LOCAL_SIZE"], environ["CCL_PROCESS_LAUNCHER"]) == ("2", "none")
    assert oneccl.configure(RANKS, environ={"I_MPI_ROOT": str(tmp_path)}).set["CCL_WORKER_OFFLOAD"] == "0"
    # What knltrain itself has exported before is no wish of the user's.
    told = {"CCL_KVS_IFACE": "ib0", "GLOO_SOCKET_IFNAME": "ib0"}
    settings = oneccl.configure(
        RANKS, environ={"I_MPI_ROOT": str(tmp_path), "FI_PROVIDER": "tcp", **told}, already_set=told
    )
    assert (settings.kept, settings.set["CCL_KVS_IFACE"]) == ({"FI_PROVIDER": "tcp"}, "ib0")
    for environ, problem in (
        ({"I_MPI_ROOT": "/gone"}, "I_MPI_ROOT=/gone is not a folder"),
        ({"CCL_KVS_IFACE": "ib77"}, "CCL_KVS_IFACE=ib77: .* has no such interface"),
    ):
        with pytest.raises(oneccl.UnavailableError, match=problem):
            oneccl.configure(RANKS, environ=environ)


def test_what_the_user_exported_empty_is_not_set(tmp_path):
    empty = ("CCL_ATL_TRANSPORT", "CCL_WORKER_COUNT", "CCL_WORKER_AFFINITY", "CCL_LOG_LEVEL", "FI_PROVIDER")
    root = {"I_MPI_ROOT": str(tmp_path)}
    plain = oneccl.configure(RANKS, [54], root.copy())
    assert oneccl.configure(RANKS, [54], {**root, **dict.fromkeys(empty, "")}) == plain
    assert plain.set["CCL_WORKER_COUNT"] == "1"


def test_kept_cores_become_workers_unless_the_user_has_spoken(tmp_path):
    ranks = Ranks("hydra", 1, 4, 1, 2)
    told = oneccl.configure(ranks, [54, 55], {"I_MPI_ROOT": str(tmp_path)}).set
    assert (told["CCL_WORKER_OFFLOAD"], told["CCL_WORKER_COUNT"]) == ("1", "2")
    # The second rank of a node takes the third and the fourth.
    assert told["CCL_WORKER_AFFINITY"].split(",")[2:4] == ["54", "55"]
    mine = oneccl.configure(ranks, [54, 55], {"I_MPI_ROOT": str(tmp_path), "CCL_WORKER_COUNT": "1"})
    assert "CCL_WORKER_AFFINITY" not in mine.set
    assert mine.kept["CCL_WORKER_COUNT"] == "1"


def test_transports_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="CCL_ATL_TRANSPORT=tcp: oneCCL has ofi and mpi"):
        oneccl.configure(RANKS, environ={"CCL_ATL_TRANSPORT": "tcp"})
    with pytest.raises(ConfigError, match="needs ranks that Intel MPI's mpiexec has started, not torchrun"):
        oneccl.configure(RANKS, environ={"CCL_ATL_TRANSPORT": "mpi"})


def test_ccl_that_is_not_there_is_an_error_or_gloo_aloud(monkeypatch):
    def missing():
        raise oneccl.UnavailableError("oneCCL is not installed; pip install it")

    monkeypatch.setattr(oneccl, "load", missing)
    monkeypatch.setattr(oneccl, "configure", lambda ranks, cpus, *, already_set: None)
    with pytest.raises(ConfigError, match=r"comm\.backend ccl: oneCCL is not installed; pip install it"):
        choose_backend("ccl", RANKS)
    chosen = choose_backend("auto", RANKS)
    assert (chosen.name, chosen.transport) == ("gloo", "tcp")
    assert "oneCCL is not installed; pip install it" in chosen.note
    assert choose_backend("gloo", RANKS).note == ""


def test_intels_own_binding_is_used_where_it_is_installed(tmp_path):
    (tmp_path / "oneccl_bindings_for_pytorch.py").write_text("imported = True\n")
    code = """
import sys
from knltrain.comm.backend import choose_backend
from knltrain.launch.world import Ranks
chosen = choose_backend("auto", Ranks("torchrun", 0, 2, 0, 2, "env://"))
assert sys.modules["oneccl_bindings_for_pytorch"].imported
assert chosen.name == "ccl" and "is installed: its ccl is used" in chosen.note, chosen
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


def test_intels_own_binding_that_does_not_load_is_left_out_aloud(tmp_path, monkeypatch):
    (tmp_path / "oneccl_bindings_for_pytorch.py").write_text("raise OSError('undefined symbol: of another torch')\n")
    monkeypatch.syspath_prepend(tmp_path)
    chosen = choose_backend("auto", RANKS)
    assert "oneccl_bindings_for_pytorch does not load and is ignored: undefined symbol" in chosen.note
    assert not chosen.version.startswith("oneccl_bindings"), "knltrain's own, or gloo"
