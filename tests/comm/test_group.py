"""What ranks agree on before the first collective, which oneCCL would wait for without an end."""

import json
import socket

import pytest
from comm.ranks import outputs, results, start_ranks, wait_for

from knltrain.comm import oneccl
from knltrain.comm.group import Group
from knltrain.launch.world import Ranks

GROUP = """
import json, os, sys
from knltrain.comm.group import Group
from knltrain.errors import KnltrainError
from knltrain.launch.world import discover
folder, backend, kept, exported = sys.argv[1:]
ranks = discover()
os.environ.update(json.loads(exported) if ranks.rank else {})
said = {}
try:
    with Group(ranks, backend, range(ranks.rank + int(kept))) as group:
        group.set_timeout(60)
        said = {"sum": group.sum(ranks.rank + 1.0), "count": group.count(ranks.rank < 1),
                "any": [group.any(ranks.rank == 1), group.any(False)], "backend": group.backend.name,
                "note": group.backend.note, "workers": group.backend.settings.get("set", {}).get("CCL_WORKER_COUNT")}
except KnltrainError as error:
    said = {"error": str(error)}
open(f"{folder}/rank{ranks.rank}.json", "w").write(json.dumps(said))
"""

OPEN_FILES = """
import json, sys
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from knltrain.comm.group import Group
from knltrain.launch.world import discover
ranks = discover()
setrlimit(RLIMIT_NOFILE, (256, getrlimit(RLIMIT_NOFILE)[1]))
with Group(ranks, "gloo"):
    soft, hard = getrlimit(RLIMIT_NOFILE)
open(f"{sys.argv[1]}/rank{ranks.rank}.json", "w").write(json.dumps({"soft": soft, "hard": hard}))
"""

CHOOSE = """
import json, sys
from knltrain.training import setup, trainer
from knltrain.config import RunConfig, override
from knltrain.runlog.console import Console
from knltrain.errors import ConfigError
from knltrain.launch.world import discover
folder, differs = sys.argv[1:]
rank = discover().rank
chosen = {"precision": ("fp32", "bf16"), "engine": ("fused", "eager")}
setup.choose_precision = lambda *_, **__: chosen["precision"][rank if differs == "precision" else 0]
setup.choose_engine = lambda *_, **__: chosen["engine"][rank if differs == "engine" else 0]
try:
    trainer.train(override(RunConfig(), {"out": f"{folder}/run", "comm.backend": "gloo"}), Console(silent=True))
except ConfigError as error:
    open(f"{folder}/rank{rank}.json", "w").write(json.dumps({"error": str(error)}))
"""

CONNECT = """
import json, sys
from datetime import timedelta
import torch.distributed as dist
from knltrain.comm import ccl, oneccl
from knltrain.launch.world import discover
folder = sys.argv[1]
ranks = discover()
oneccl.configure(ranks, range(ranks.rank + 1))
ccl.register()
try:
    dist.init_process_group("ccl", init_method=f"file://{folder}/store", rank=ranks.rank, world_size=2,
                            timeout=timedelta(seconds=5))
    dist.barrier()
    said = "connected"
except RuntimeError as error:
    said = str(error)
open(f"{folder}/rank{ranks.rank}.json", "w").write(json.dumps(said))
"""


@pytest.fixture
def needs_oneccl():
    try:
        oneccl.find_library()
    except oneccl.UnavailableError as error:
        pytest.skip(str(error))


def start(script, folder, *arguments):
    path = folder / "script.py"
    path.write_text(script)
    return start_ranks(path, 2, folder, *arguments)


def run(script, folder, *arguments):
    """What two ranks said."""
    assert wait_for(start(script, folder, *arguments), 120) == [0, 0], outputs(folder)
    return results(folder, 2)


def test_of_the_cores_that_are_kept_every_rank_uses_as_many(needs_oneccl, tmp_path):
    """A node of 64 cores keeps four for communication, one of 16 keeps one."""
    for said in run(GROUP, tmp_path, "ccl", 1, "{}"):
        assert (said["sum"], said["backend"], said["workers"]) == ([3.0], "ccl", "1")


def test_where_one_rank_keeps_no_core_none_has_workers(needs_oneccl, tmp_path):
    for said in run(GROUP, tmp_path, "ccl", 0, "{}"):
        assert (said["sum"], said["workers"]) == ([3.0], None)


def test_flags_of_one_rank_reach_all(tmp_path):
    for said in run(GROUP, tmp_path, "gloo", 0, "{}"):
        assert (said["count"], said["any"]) == (1, [True, False])


def test_flags_of_a_single_rank_are_its_own():
    group = Group(Ranks("none", 0, 1, 0, 1))
    assert [group.count(True), group.count(False), group.any(True), group.any(False)] == [1, 0, True, False]


@pytest.mark.parametrize("exported", [{"CCL_WORKER_COUNT": "2"}, {"CCL_WORKER_AFFINITY": "0"}])
def test_different_numbers_of_workers_are_refused_by_all(exported, tmp_path):
    for said in run(GROUP, tmp_path, "auto", 0, json.dumps(exported)):
        assert "CCL_WORKER_COUNT differs (unset on" in said["error"]
    for said in run(GROUP, tmp_path, "gloo", 0, json.dumps(exported)):
        assert said["sum"] == [3.0]


def test_every_rank_may_open_as_many_files_as_the_system_lets_it(tmp_path):
    """Each has two connections to every other, and a few hundred of these are more than the usual limit."""
    for said in run(OPEN_FILES, tmp_path):
        assert said["soft"] == said["hard"]


@pytest.mark.parametrize("choice, words", [("precision", "bf16, not fp32"), ("engine", "eager, not fused")])
def test_ranks_that_auto_gives_different_things_are_refused(choice, words, tmp_path):
    """As on nodes of two processors; what would come of it is a sum over gradients of two types."""
    host = socket.gethostname()
    for said in run(CHOOSE, tmp_path, choice):
        assert said["error"].startswith(f"rank 1 on {host} is not like rank 0 on {host}: {choice}: {words}; start all")


SAME = """
import json, sys
from knltrain.comm.group import Group
from knltrain.errors import ConfigError
from knltrain.launch.world import discover
folder = sys.argv[1]
ranks, said = discover(), []
values = [
    {"seed": 1, "classes": ["cat", "dog"]},
    {"seed": 2 if ranks.rank == 2 else 1, "classes": ["cat", "dog"]},
    {"seed": 1, "classes": ["cat", "dog" if ranks.rank else "cow"], "more": 1},
    {"classes": ["cat", "dog"][:1 + (ranks.rank < 2)]},
    {"only": 1} if ranks.rank == 1 else {},
]
with Group(ranks, "gloo", same=values[0]) as group:
    for one in values:
        try:
            group.require_same(one, "do so")
            said.append("")
        except ConfigError as error:
            said.append(str(error).replace(group.hosts[0], "HOST"))
    said.append(group.sum(1.0))
open(f"{folder}/rank{ranks.rank}.json", "w").write(json.dumps(said))
"""


def test_ranks_with_different_values_are_told_which(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SAME)
    assert wait_for(start_ranks(path, 3, tmp_path), 120) == [0, 0, 0], outputs(tmp_path)
    for said in results(tmp_path, 3):
        assert said == [
            "",
            "rank 2 on HOST is not like rank 0 on HOST: seed: 2, not 1; do so",
            "rank 1 on HOST is not like rank 0 on HOST: classes: number 1 is dog, not cow; do so",
            "rank 2 on HOST is not like rank 0 on HOST: classes: 1, not 2; do so",
            "rank 1 on HOST is not like rank 0 on HOST: only: 1, not None; do so",
            [3.0],
        ]


LATE = """
import json, sys, time
from knltrain.comm.group import Group
from knltrain.errors import KnltrainError
from knltrain.launch.world import discover
folder, late, after = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
ranks, said = discover(), ""
try:
    with Group(ranks, "gloo") as group, group.report_lost_ranks():
        group.set_timeout(10)
        # Rank 1 comes a little later than rank 0, and so waits for less than the time-out when that ends.
        time.sleep(after if ranks.rank == late else 1.5 * ranks.rank)
        group.barrier()
except KnltrainError as error:
    said = str(error)
open(f"{folder}/rank{ranks.rank}.json", "w").write(json.dumps(said))
"""


@pytest.mark.slow
def test_the_rank_that_makes_the_others_wait_is_the_one_that_is_named(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(LATE)
    processes = start_ranks(path, 3, tmp_path, 2, 60)
    assert wait_for(processes[:2], 120) == [0, 0], outputs(tmp_path)
    wait_for(processes[2:], 0)
    for said in results(tmp_path, 2):
        assert said.startswith(f"rank 2 on {socket.gethostname()} has not come to what the others wait for"), said


REMADE = """
import json, os, sys
from knltrain.comm.group import Group
from knltrain.errors import KnltrainError
from knltrain.launch.world import discover
folder = sys.argv[1]
ranks = discover()
said = ""
try:
    with Group(ranks, "gloo", start_timeout_s=60) as group, group.report_lost_ranks():
        group.barrier()
        if ranks.rank == 1:
            os._exit(0)
        group.set_timeout(5)
        group.barrier()
except KnltrainError as error:
    said = str(error)
open(f"{folder}/rank{ranks.rank}.json", "w").write(json.dumps(said))
"""


@pytest.mark.slow
def test_a_rank_that_ends_while_the_group_gets_its_time_out_is_named(tmp_path):
    assert wait_for(start(REMADE, tmp_path), 120) == [0, 0], outputs(tmp_path)
    (said,) = results(tmp_path, 1)
    assert said.startswith(f"rank 1 on {socket.gethostname()} has ended or does not answer"), said


def test_what_one_rank_cannot_use_ends_all(needs_oneccl, tmp_path):
    """Which would wait for it otherwise."""
    for said in run(GROUP, tmp_path, "ccl", 0, json.dumps({"CCL_ROOT": "/gone"})):
        assert said["error"].endswith("comm.backend ccl: CCL_ROOT=/gone holds no libccl.so.1; unset it or correct it")


def test_an_interface_that_is_not_there_is_not_used(needs_oneccl, tmp_path):
    for said in run(GROUP, tmp_path, "auto", 0, json.dumps({"CCL_KVS_IFACE": "eth9"})):
        assert (said["backend"], said["sum"]) == ("gloo", [3.0])
        assert "CCL_KVS_IFACE=eth9: " in said["note"]


def test_what_oneccl_would_wait_for_without_an_end_ends_after_the_time_out(needs_oneccl, tmp_path):
    """Of ranks that have not connected oneCCL aborts the second where the first is quicker to leave."""
    assert None not in wait_for(start(CONNECT, tmp_path), 120)
    said = results(tmp_path, 2)
    assert said, outputs(tmp_path)
    assert all(one.startswith("oneCCL did not connect the ranks within 5 s") for one in said)


def test_ranks_with_different_bindings_take_gloo_or_are_refused(tmp_path):
    """Of Intel's binding on one node and knltrain's on the other."""
    binding = tmp_path / "binding"
    binding.mkdir()
    (binding / "oneccl_bindings_for_pytorch.py").touch()
    script = f"import os, sys\nif os.environ['RANK'] == '1': sys.path.insert(0, {str(binding)!r})\n{GROUP}"
    first, second = run(script, tmp_path, "auto", 0, "{}")
    assert (first["backend"], second["backend"], first["sum"]) == ("gloo", "gloo", [3.0])
    assert "oneccl_bindings_for_pytorch on " in first["note"] + second["note"]
