import dataclasses
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from node import trees

from knltrain.cli.main import main
from knltrain.errors import ConfigError
from knltrain.node import plan_formats
from knltrain.node.affinity import comm_cores, plan_node, threads_per_rank
from knltrain.node.topology import Node, read_node

MACHINES = {
    "phi-cache": lambda root: trees.xeon_phi(root, "quadrant/cache"),
    "phi-flat": lambda root: trees.xeon_phi(root, "quadrant/flat"),
    "phi-snc4": lambda root: trees.xeon_phi(root, "SNC-4/flat"),
    "xeon": trees.xeon,
    "xeon-snc3": trees.xeon_snc3,
    "xeon-max": trees.xeon_max,
    "epyc-nps4": trees.epyc_nps4,
    "cloud": trees.cloud,
    "small": trees.small,
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Reads each machine once."""
    read = {}

    def get(name):
        if name not in read:
            read[name] = read_node(MACHINES[name](tmp_path_factory.mktemp(name)))
        return read[name]

    return get


def node(cores, threads=1, online=None):
    siblings = tuple(tuple(core + cores * t for t in range(threads)) for core in range(cores))
    cpus = tuple(sorted(cpu for core in siblings for cpu in core))
    return Node("CPU", frozenset(), cpus, siblings, online or len(cpus))


def test_one_thread_a_physical_core():
    assert threads_per_rank(node(68, threads=4), 1, {}) == 68


def test_ranks_that_nobody_pinned_share_the_cores():
    assert threads_per_rank(node(8), 2, {}) == 4
    assert threads_per_rank(node(2), 4, {}) == 1


def test_a_pinned_rank_uses_all_it_was_given():
    assert threads_per_rank(node(4, online=8), 2, {}) == 4
    # A container's ranks are not pinned because the machine around it is larger.
    container = dataclasses.replace(node(4, online=64), group_cpus=(0, 1, 2, 3))
    assert threads_per_rank(container, 2, {}) == 2


def test_torchruns_default_of_one_is_not_obeyed_and_a_users_number_is():
    assert threads_per_rank(node(8), 2, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}) == 4
    assert threads_per_rank(node(8), 2, {"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}) == 3
    assert threads_per_rank(node(8), 1, {"OMP_NUM_THREADS": "1"}) == 1
    assert threads_per_rank(node(8), 1, {"OMP_NUM_THREADS": "6,1"}) == 6


@pytest.mark.parametrize("value", ["0", "many", "-2"])
def test_nonsense_is_refused(value):
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS"):
        threads_per_rank(node(8), 1, {"OMP_NUM_THREADS": value})
    with pytest.raises(ConfigError, match="OMP_NUM_THREADS"):
        plan_node(node(8), environ={"OMP_NUM_THREADS": value})
    with pytest.raises(ConfigError, match="1 or more"):
        plan_node(node(8), 0, environ={})


@pytest.mark.parametrize("count", [None, 1, 2, 3, 4, 5, 7, 8, 16, 42])
@pytest.mark.parametrize("name", MACHINES)
def test_whatever_is_asked_nobody_is_cornered_and_no_core_forgotten(name, count, machine):
    node = machine(name)
    plan = plan_node(node, count, environ={})
    core_of = {cpu: core for core in node.cores for cpu in core}
    crowded = len(plan.ranks) > len(node.cores)
    seen = set()
    for rank in plan.ranks:
        mine = {core_of[cpu] for cpu in (*rank.compute, *rank.comm)}
        assert len(mine) == len(rank.compute) + len(rank.comm) == rank.cores, "one thread a core"
        assert {core_of[cpu] for cpu in rank.decode} <= mine
        assert len(rank.decode) >= len(rank.compute) == rank.threads >= 1
        assert len(rank.comm) == len(plan.ranks[0].comm), "the library is told one number"
        assert crowded or not mine & seen
        seen |= mine
    assert not plan.idle
    assert crowded or seen == set(node.cores)
    most, fewest = max(rank.cores for rank in plan.ranks), min(rank.cores for rank in plan.ranks)
    if name not in ("phi-snc4", "xeon-snc3"):
        assert most - fewest <= 1
    assert crowded == any("share cores" in note for note in plan.notes)
    assert all(len(line) <= 80 for line in plan_formats.as_text(node, plan).splitlines())


def test_one_rank_per_domain_with_all_that_is_in_it(machine):
    plan = plan_node(machine("phi-snc4"), environ={})
    assert [rank.domains for rank in plan.ranks] == [(0,), (1,), (2,), (3,)]
    assert [rank.threads for rank in plan.ranks] == [17, 17, 15, 15]
    assert plan.ranks[1].compute == tuple(range(18, 35))
    assert plan.ranks[1].comm == (35,)
    assert plan.ranks[1].decode == tuple(range(86, 103)), "the second thread of each compute core"
    assert "ranks have 16 to 18 cores" in plan.notes[0]
    assert [rank.threads for rank in plan_node(machine("xeon-snc3"), environ={}).ranks] == [40, 40, 39]


def test_fewer_ranks_than_domains_get_whole_ones(machine):
    plan = plan_node(machine("phi-snc4"), 2, environ={})
    assert [rank.domains for rank in plan.ranks] == [(0, 1), (2, 3)]
    assert plan_node(machine("xeon-snc3"), 2, environ={}).ranks[0].domains == (0, 1)
    assert "2 ranks do not fit 3 domains" in plan_node(machine("xeon-snc3"), 2, environ={}).notes[0]


def test_parts_of_a_domain_end_where_its_caches_do(machine):
    node = machine("epyc-nps4")
    groups = [set(cpus) for level, cpus in node.caches if level == 3]
    for rank in plan_node(node, 8, environ={}).ranks:
        assert any({*rank.compute, *rank.comm} <= group for group in groups)


@pytest.mark.parametrize("cores, world_size, kept",
                         [(68, 1, 0), (68, 2, 4), (28, 2, 2), (16, 8, 1), (8, 2, 1), (7, 2, 0), (1, 64, 0),
                          (128, 2, 4)])  # fmt: skip
def test_cores_that_are_kept_for_communication(cores, world_size, kept):
    assert comm_cores(cores, world_size) == kept
    plan = plan_node(node(cores), 1, world_size=world_size, environ={})
    assert (len(plan.ranks[0].comm), plan.ranks[0].threads) == (kept, cores - kept)


def test_every_rank_keeps_as_many_cores_as_the_smallest_can():
    """oneCCL has one number of workers in a job."""
    first, second = plan_node(node(15), 2, environ={}).ranks
    assert [len(rank.comm) for rank in (first, second)] == [0, 0]
    assert (first.threads, second.threads) == (8, 7)


def test_a_single_thread_a_core_leaves_the_decoders_the_whole_rank(machine):
    (rank,) = plan_node(machine("small"), environ={}).ranks
    assert rank.decode == rank.compute == (0, 1)
    # A single sibling, left over by a mask, is no place for all of them.
    lopsided = Node("CPU", frozenset(), (0, 1, 2, 4), ((0, 4), (1,), (2,)), 8)
    assert plan_node(lopsided, environ={}).ranks[0].decode == (0, 1, 2, 4)


def test_a_users_number_of_threads():
    (rank,) = plan_node(node(8), 1, environ={"OMP_NUM_THREADS": "3"}).ranks
    assert (rank.threads, rank.compute, rank.decode) == (3, tuple(range(8)), tuple(range(8)))
    assert rank.num_spare_cpus == 5
    (rank,) = plan_node(node(8, threads=2), 1, environ={"OMP_NUM_THREADS": "12"}).ranks
    assert rank.compute == (*range(8), *range(8, 12))
    assert set(range(12, 16)) <= set(rank.decode)
    plan = plan_node(node(2), 1, environ={"OMP_NUM_THREADS": "6"})
    assert (plan.ranks[0].threads, plan.ranks[0].compute) == (6, (0, 1))
    assert "more than the 2 CPUs" in plan.notes[0]
    # What communicates gives way.
    (rank,) = plan_node(node(16), 1, world_size=2, environ={"OMP_NUM_THREADS": "16"}).ranks
    assert (rank.threads, rank.comm, rank.num_spare_cpus) == (16, (), 0)
    ranks = plan_node(node(8), 2, environ={"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}).ranks
    assert [rank.threads for rank in ranks] == [4, 4]


def test_fewer_threads_than_cores_are_pinned_to_none_of_them():
    """A second run, or container, would be pinned to the same first cores."""
    limited = dataclasses.replace(node(16, threads=2), cpu_quota=8.0)
    asked = plan_node(node(16, threads=2), 1, environ={"OMP_NUM_THREADS": "8"})
    for plan in (asked, plan_node(limited, 1, environ={})):
        (rank,) = plan.ranks
        assert (rank.threads, rank.cores, rank.compute) == (8, 16, tuple(range(16)))
        assert rank.decode == tuple(range(16, 32)), "the second thread of each core"
        assert (rank.num_spare_cpus, plan.idle) == (16, ())
        text = " ".join(plan_formats.as_text(limited, plan).split())
        assert "8 threads on any of 0-15" in text
        assert "cores left idle: 8 (whichever the kernel leaves)" in text
    # Ranks keep to their part of the node, and what the workers of the library take is not there for threads.
    two = plan_node(limited, 2, environ={"OMP_NUM_THREADS": "3"}).ranks
    assert [(rank.threads, rank.compute) for rank in two] == [(3, tuple(range(8))), (3, tuple(range(8, 16)))]
    (rank,) = plan_node(limited, 1, world_size=2, environ={}).ranks
    assert (rank.threads, rank.comm) == (7, (15,))
    assert threads_per_rank(limited, 1, {}) == 8


def test_fast_memory_is_preferred_where_a_rank_gets_enough_of_it(machine):
    memory = [rank.memory for rank in plan_node(machine("phi-snc4"), environ={}).ranks]
    assert [(one.mode, one.nodes) for one in memory] == [("prefer", (4,)), ("prefer", (5,)), ("prefer", (6,)),
                                                        ("prefer", (7,))]  # fmt: skip
    assert plan_node(machine("phi-flat"), 8, environ={}).ranks[0].memory.mode == "prefer"
    few = plan_node(machine("phi-flat"), 16, environ={}).ranks[0].memory
    assert (few.mode, few.nodes) == ("local", ())
    assert "1,024 MiB of MCDRAM a rank are too little" in few.reason
    assert plan_node(machine("xeon-max"), environ={}).ranks[1].memory.nodes == (3,)
    assert plan_node(machine("xeon"), environ={}).ranks[1].memory.mode == "local"


def test_no_more_threads_than_the_control_groups_quota(tmp_path):
    plan = plan_node(read_node(trees.container(tmp_path)), 1, environ={})
    assert (plan.ranks[0].threads, len(plan.ranks[0].compute)) == (3, 6)
    assert any("3.5 CPUs' time" in note for note in plan.notes)
    assert any("leaves 6 of this node's 64 CPUs" in note for note in plan.notes)


def test_the_picture_of_a_xeon_phi(machine):
    node = machine("phi-snc4")
    lines = plan_formats.as_text(node, plan_node(node, environ={})).splitlines()
    at = lines.index("domain 3, package 0: 16 cores, 24,576 MiB + 4,096 MiB of MCDRAM (node 7)")
    assert lines[at + 1 : at + 6] == [
        "   rank 3---------------",
        "cpu  52 ###############=",
        "cpu 120 ddddddddddddddd.",
        "cpu 188 ................",
        "cpu 256 ................",
    ]
    assert "cores left idle: 0" in lines


def test_the_picture_folds(machine):
    big = Node("CPU", frozenset(), tuple(range(100)), tuple((cpu,) for cpu in range(100)), 100)
    text = plan_formats.as_text(big, plan_node(big, 12, environ={}))
    lines = text.splitlines()
    assert "  rank 0--------1--------2--------3--------4-------5-----" in lines, "the first of two lines of 50 columns"
    assert "  rank 5-6-------7-------8-------9-------10------11------" in lines
    assert [line[:7] for line in lines if line.startswith("cpu")] == ["cpu  0 ", "cpu 50 "]


def test_formats(machine):
    node = machine("xeon")
    plan = plan_node(node, environ={})
    assert plan_formats.as_env(plan).splitlines() == [
        "export OMP_NUM_THREADS=26", "export CCL_WORKER_COUNT=2", "export CCL_WORKER_AFFINITY=26,27,54,55"]  # fmt: skip
    arguments = plan_formats.as_mpiexec(plan).split()
    assert arguments[:4] == ["-ppn", "2", "-genv", "I_MPI_PIN_DOMAIN"]
    masks = [int(mask, 16) for mask in arguments[4].strip("[]").split(",")]
    assert masks[0] & masks[1] == 0
    for mask, rank in zip(masks, plan.ranks, strict=True):
        assert {cpu for cpu in range(112) if mask >> cpu & 1} == {*rank.compute, *rank.comm, *rank.decode}
    assert "--cpus-per-task=56" in plan_formats.as_slurm(node, plan)
    assert "#SBATCH --ntasks-per-node=2" in plan_formats.as_slurm(node, plan)
    ragged = plan_formats.as_env(plan_node(machine("phi-snc4"), environ={}))
    assert "export OMP_NUM_THREADS" not in ragged
    record = json.loads(json.dumps(plan_formats.as_dict(node, plan)))
    assert record["ranks"][0]["threads"] == 26


@pytest.mark.parametrize("format", ["text", "json", "env", "mpiexec", "slurm"])
def test_the_command(format, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    trees.xeon_phi(tmp_path, "SNC-4/flat")
    arguments = ["plan", "--topology", str(tmp_path), "--ranks-per-node", "2", "--format", format]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert {"text": "rank 1: 30 threads", "json": '"local_rank": 1', "env": "export CCL_WORKER_COUNT=2",
            "mpiexec": "-ppn 2", "slurm": "--cpus-per-task=136"}[format] in result.stdout  # fmt: skip
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert len(json.loads(result.stdout)["ranks"]) == 2


def test_the_command_answers_without_torch():
    code = (
        "import sys; from knltrain.cli.main import main; main(['plan'], standalone_mode=False); "
        "sys.exit(sorted({'torch', 'numpy', 'rich'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "rank 0" in result.stdout
