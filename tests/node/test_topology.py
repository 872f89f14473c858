import shutil

import pytest
from node import trees

from knltrain.node import topology
from knltrain.node.affinity import plan_node
from knltrain.node.cpulist import format_cpu_list, parse_cpu_list, parse_cpu_mask
from knltrain.node.topology import MemoryNode, Node, read_node


def test_cpu_masks():
    assert parse_cpu_mask("5") == (0, 2)
    assert parse_cpu_mask("0000,00000001,8000000A\n") == (1, 3, 31, 32)
    for wrong in ("", "0x5", "1,2", "123456789", "g", "1,00000000,", "f" * 20):
        with pytest.raises(ValueError, match="not a mask"):
            parse_cpu_mask(wrong)
    with pytest.raises(ValueError, match="more CPUs"):
        parse_cpu_mask("1" + ",00000000" * 2048 + "," + "0" * 8)


def test_cpu_lists():
    assert parse_cpu_list("0-3,8,10-11\n") == (0, 1, 2, 3, 8, 10, 11)
    assert parse_cpu_list("") == ()
    for wrong in ("3-1", "-4", "0-99999999999", "one"):
        with pytest.raises(ValueError):
            parse_cpu_list(wrong)
    assert format_cpu_list([11, 0, 1, 2, 8, 10, 2]) == "0-2,8,10-11"
    assert format_cpu_list([]) == ""


def sizes(node):
    return [len(domain.cores) for domain in node.domains]


def test_xeon_phi_with_its_fast_memory_as_cache(tmp_path):
    node = read_node(trees.xeon_phi(tmp_path, "quadrant/cache"))
    assert (len(node.cpus), len(node.cores), sizes(node), node.isa) == (272, 68, [68], "avx512f")
    assert node.cores[0] == (0, 68, 136, 204)
    assert node.memory_nodes == ()
    assert node.domains[0].memory_mb == 98304
    tiles = [cpus for level, cpus in node.caches if level == 2]
    assert len(tiles) == 34
    assert tiles[0] == (0, 1, 68, 69, 136, 137, 204, 205)


def test_xeon_phi_flat(tmp_path):
    node = read_node(trees.xeon_phi(tmp_path, "quadrant/flat"))
    assert sizes(node) == [68]
    assert node.memory_nodes == (MemoryNode(1, 16384, "MCDRAM", (0,)),)


def test_xeon_phi_in_clusters_that_are_not_equal(tmp_path):
    node = read_node(trees.xeon_phi(tmp_path, "SNC-4/flat"))
    assert sizes(node) == [18, 18, 16, 16]
    assert [(one.number, one.kind, one.domains) for one in node.memory_nodes] == [
        (4, "MCDRAM", (0,)), (5, "MCDRAM", (1,)), (6, "MCDRAM", (2,)), (7, "MCDRAM", (3,))]  # fmt: skip


def test_two_packages_with_siblings_half_the_machine_apart(tmp_path):
    node = read_node(trees.xeon(tmp_path))
    assert (node.packages, sizes(node), node.cores[3]) == (2, [28, 28], (3, 59))
    assert [domain.package for domain in node.domains] == [0, 1]
    part = read_node(tmp_path, allowed={30, 31, 86})
    assert part.cores == ((30, 86), (31,))
    assert [(domain.number, domain.package) for domain in part.domains] == [(1, 1)]
    assert part.online == 112


def test_clusters_of_43_43_and_42(tmp_path):
    node = read_node(trees.xeon_snc3(tmp_path))
    assert sizes(node) == [43, 43, 42]
    assert (node.isa, node.amx_refused) == ("amx_bf16", False)


def test_hbm_beside_each_package(tmp_path):
    node = read_node(trees.xeon_max(tmp_path))
    assert node.memory_nodes == (MemoryNode(2, 65536, "HBM", (0,)), MemoryNode(3, 65536, "HBM", (1,)))
    # The other package's is not ours.
    assert [one.number for one in read_node(tmp_path, allowed=set(range(56))).memory_nodes] == [2]


@pytest.mark.parametrize("bandwidths, kind", [
    ((300000, 300000, 30000, 30000), "far"), ((300000, 300000, 300000, 300000), "far"),
    # Persistent memory, memory behind CXL and HBM look alike where firmware says nothing.
    (None, "unknown"), ((300000, 300000, 0, 0), "unknown"), ((0, 0, 900000, 900000), "unknown"),
])  # fmt: skip
def test_bandwidth_that_firmware_tells_decides_what_is_fast(bandwidths, kind, tmp_path):
    node = read_node(trees.xeon_max(tmp_path, bandwidths))
    assert {one.kind for one in node.memory_nodes} == {kind}
    assert {rank.memory.mode for rank in plan_node(node, environ={}).ranks} == {"local"}


def test_memory_is_compared_with_that_of_the_domains_that_firmware_says_are_nearest(tmp_path):
    """A domain with HBM alone beside one without, and a class of access that is of a device's processor."""
    trees.xeon_max(tmp_path, (300000, 900000, 600000, 600000))
    nodes = "sys/devices/system/node"
    trees.write(tmp_path, f"{nodes}/node2/access1/initiators/node0/cpulist", "0-55")
    trees.write(tmp_path, f"{nodes}/node3/access1/initiators/node0/cpulist", "0-55")
    trees.write(tmp_path, f"{nodes}/node3/access1/initiators/read_bandwidth", 100000)
    assert [(one.kind, one.domains) for one in read_node(tmp_path).memory_nodes] == [("HBM", (0,)), ("far", (0,))]


def test_fast_memory_of_a_xeon_phi_whose_flags_are_hidden(tmp_path):
    trees.xeon_phi(tmp_path, "quadrant/flat")
    trees.write(tmp_path, "proc/cpuinfo", "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 87\nflags\t\t: avx2\n")
    assert [one.kind for one in read_node(tmp_path).memory_nodes] == ["MCDRAM"]


@pytest.mark.parametrize("mode", ["quadrant/cache", "quadrant/flat", "SNC-4/flat"])
def test_masks_say_what_lists_do(mode, tmp_path):
    """In words of 32 bits; a Xeon Phi's 272 CPUs take nine."""
    assert read_node(trees.xeon_phi(tmp_path / "masks", mode, masks=True)) == read_node(
        trees.xeon_phi(tmp_path / "lists", mode)
    )


def test_masks_of_two_domains_of_a_core_of_two_threads(tmp_path):
    for cpu, siblings in enumerate(("5", "a", "5", "a")):
        trees.write(tmp_path, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings", siblings)
    trees.write(tmp_path, "sys/devices/system/cpu/online", "0-3")
    for node, cpus in enumerate(("5", "a")):
        trees.write(tmp_path, f"sys/devices/system/node/node{node}/cpumap", cpus)
    assert [domain.cores for domain in read_node(tmp_path).domains] == [((0, 2),), ((1, 3),)]
    # A list is believed before a mask, and the names that are newer than both are read.
    trees.write(tmp_path, "sys/devices/system/cpu/cpu0/topology/core_cpus_list", "0-1")
    assert read_node(tmp_path).cores[0] == (0, 1)


def test_cpus_that_are_offline_where_nothing_lists_them(tmp_path):
    trees.write_tree(tmp_path, cores=trees.apart(4, 2), domains=[range(8)], memory=[1000], flags="avx2", masks=True)
    trees.write(tmp_path, "sys/devices/system/cpu/cpu7/online", 0)
    shutil.rmtree(tmp_path / "sys/devices/system/cpu/cpu3/topology")
    assert read_node(tmp_path).cpus == (0, 1, 2, 4, 5, 6)


def test_packages_that_share_a_domain_are_counted(tmp_path):
    trees.write_tree(tmp_path, cores=trees.apart(4, 1), domains=[range(4)], packages=[[0, 1], [2, 3]], memory=[1000],
                     flags="avx2")  # fmt: skip
    assert (read_node(tmp_path).packages, sizes(read_node(tmp_path))) == (2, [4])


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("missing, named", [
    ("cpu/cpu1/topology", "neither thread_siblings_list nor thread_siblings of CPU 1"),
    ("node/node1/cpu*", "neither cpulist nor cpumap of NUMA domain 1"),
])  # fmt: skip
def test_a_copy_without_what_would_be_guessed_is_refused(missing, named, masks, tmp_path, knltrain):
    trees.write_tree(tmp_path, cores=trees.apart(4, 2), domains=[[0, 1, 4, 5], [2, 3, 6, 7], []], masks=masks,
                     memory=[1000, 1000, 1000], flags="avx2")  # fmt: skip
    result = knltrain("plan", "--topology", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "NUMA domains 2, cores 4 x 2 threads" in result.stdout
    trees.write(tmp_path, "sys/devices/system/cpu/online", "0-7")
    for path in (tmp_path / "sys/devices/system").glob(missing):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = knltrain("plan", "--topology", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert named in result.stderr


def test_epyc_in_four_domains(tmp_path):
    node = read_node(trees.epyc_nps4(tmp_path))
    assert sizes(node) == [16, 16, 16, 16]
    assert sum(level == 3 for level, _ in node.caches) == 8
    assert node.computes_bf16 is False


def test_cores_that_share_a_cache_are_neighbours(tmp_path):
    """Where the firmware numbers cores across caches in turn."""
    cores = [(cpu,) for cpu in range(8)]
    caches = [(3, 3, [0, 2, 4, 6]), (3, 3, [1, 3, 5, 7])]
    trees.write_tree(tmp_path, cores=cores, domains=[range(8)], memory=[1000], flags="avx2", caches=caches)
    assert read_node(tmp_path).domains[0].cores == ((0,), (2,), (4,), (6,), (1,), (3,), (5,), (7,))


@pytest.mark.parametrize("index, level", [(2, 2), (3, 3), (4, 4), (4, 3)])
def test_caches_of_every_index_are_read(tmp_path, index, level):
    """From level 2 on; the fourth index is a cache of level 3 where the first level has two, or one of level 4."""
    caches = [(0, 1, [0]), (1, 1, [0]), (index, level, [0, 1])]
    trees.write_tree(tmp_path, cores=[(0,), (1,)], domains=[[0, 1]], memory=[1000], flags="avx2", caches=caches)
    assert read_node(tmp_path).caches == ((level, (0, 1)),)


@pytest.mark.parametrize(
    "asked, isa, computes_bf16",
    [
        ("AVX2", "avx2", False),
        ("avx2_vnni_2", "avx2", False),
        ("AVX512_CORE", "avx512", False),
        ("AVX512_CORE_BF16", "avx512_bf16", True),
        ("AVX10_1_512", "avx512_bf16", True),
        ("AVX512_CORE_AMX", "amx_bf16", True),
        ("ALL", "amx_bf16", True),
        ("no such thing", "amx_bf16", True),
    ],
)
def test_what_onednn_is_kept_from_this_machine_does_not_have(monkeypatch, asked, isa, computes_bf16):
    monkeypatch.setattr(topology, "_cpuinfo", lambda root: {"flags": f"avx2 {trees.SAPPHIRE_RAPIDS}"})
    monkeypatch.setattr(topology, "kernel_grants_amx", lambda: True)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
        with monkeypatch.context() as patch:
            patch.setenv(name, asked)
            node = read_node()
        assert (node.isa, node.computes_bf16) == (isa, computes_bf16)
        assert node.gains_from_bf16 == (isa == "amx_bf16"), "such cores are slow in bf16 without AMX"
    assert read_node().isa == "amx_bf16"


def test_a_cloud_machine_with_siblings_beside_each_other_and_a_kernel_without_amx(tmp_path):
    node = read_node(trees.cloud(tmp_path), allowed=set(range(4)))
    assert node.cores == ((0, 1), (2, 3))
    assert (node.cpus, node.online) == ((0, 1, 2, 3), 32)
    assert (node.isa, node.amx_refused) == ("avx512_bf16", True)


@pytest.mark.parametrize(
    "flags, gains",
    [
        ("avx512f", False),
        ("avx512f avx512_bf16", True),  # Cooper Lake, Zen 4
        ("avx512f avx512_bf16 avx512_fp16 amx_tile amx_bf16", True),
        ("avx512f avx512_bf16 avx512_fp16", False),  # the same, where a hypervisor hides AMX
        ("avx512f avx512_bf16 avx512_fp16 sse4a", True),
    ],
)
def test_cores_made_for_amx_gain_from_bf16_with_amx_alone(tmp_path, flags, gains):
    trees.write_tree(tmp_path, cores=[(0,)], domains=[[0]], memory=[1000], flags=flags)
    assert read_node(tmp_path).gains_from_bf16 is gains


def test_a_container(tmp_path):
    node = read_node(trees.container(tmp_path))
    assert node.cpus == node.group_cpus == (5, 6, 7, 8, 9, 20)
    assert (len(node.cores), node.online) == (6, 64)
    assert node.memory_limit_mb == 8192, "the parent's is tighter"
    assert node.cpu_quota == 3.5
    # What the launcher left of it is told apart from what the group leaves.
    pinned = read_node(tmp_path, allowed={5})
    assert (pinned.cpus, pinned.group_cpus) == ((5,), (5, 6, 7, 8, 9, 20))


def test_cgroup_version_1(tmp_path):
    trees.xeon(tmp_path)
    trees.write(
        tmp_path, "proc/self/cgroup", "4:memory:/slurm/job\n3:cpuset:/slurm/job\n2:cpu,cpuacct:/slurm/job\n0::/"
    )
    top = "sys/fs/cgroup"
    trees.write(tmp_path, f"{top}/memory/memory.limit_in_bytes", 0x7FFFFFFFFFFFF000)
    trees.write(tmp_path, f"{top}/memory/slurm/memory.limit_in_bytes", 3 << 30)
    trees.write(tmp_path, f"{top}/memory/slurm/job/memory.limit_in_bytes", 0x7FFFFFFFFFFFF000)
    trees.write(tmp_path, f"{top}/cpuset/cpuset.cpus", "0-111")
    trees.write(tmp_path, f"{top}/cpuset/slurm/job/cpuset.cpus", "0-3,56-59")
    trees.write(tmp_path, f"{top}/cpu,cpuacct/slurm/job/cpu.cfs_quota_us", "-1")
    trees.write(tmp_path, f"{top}/cpu,cpuacct/slurm/job/cpu.cfs_period_us", "100000")
    node = read_node(tmp_path)
    assert (node.cores, node.memory_limit_mb, node.cpu_quota) == (((0, 56), (1, 57), (2, 58), (3, 59)), 3072, None)


@pytest.mark.parametrize("outer, inner", [(1, 2), (2, 1)])
def test_the_tightest_of_nested_groups_counts(tmp_path, outer, inner):
    """Whether it is the process's own or the one around it; cgroup v2 and v1."""
    trees.xeon(tmp_path)
    trees.write(tmp_path, "proc/self/cgroup", "3:memory:/a/b\n2:cpu:/a/b\n1:cpuset:/a/b\n0::/a/b")
    v2, v1 = "sys/fs/cgroup", "sys/fs/cgroup/{}"
    for folder, size in (("a", outer), ("a/b", inner)):
        trees.write(tmp_path, f"{v2}/{folder}/memory.max", size << 31)
        trees.write(tmp_path, f"{v2}/{folder}/cpu.max", f"{200000 * size} 100000")
        trees.write(tmp_path, f"{v2}/{folder}/cpuset.cpus.effective", f"0-{2 * size - 1}")
    node = read_node(tmp_path)
    assert (node.memory_limit_mb, node.cpu_quota, node.cpus) == (2048, 2, (0, 1))
    for folder, size in (("a", outer), ("a/b", inner)):
        trees.write(tmp_path, f"{v1.format('memory')}/{folder}/memory.limit_in_bytes", size << 30)
        trees.write(tmp_path, f"{v1.format('cpu')}/{folder}/cpu.cfs_quota_us", 100000 * size)
        trees.write(tmp_path, f"{v1.format('cpu')}/{folder}/cpu.cfs_period_us", 100000)
        trees.write(tmp_path, f"{v1.format('cpuset')}/{folder}/cpuset.cpus", f"0-{size - 1}")
    node = read_node(tmp_path)
    assert (node.memory_limit_mb, node.cpu_quota, node.cpus) == (1024, 1, (0,))


def test_a_group_that_is_named_as_the_host_names_it(tmp_path):
    """Without a cgroup namespace the container's own group is the root of what it sees."""
    trees.xeon(tmp_path)
    trees.write(tmp_path, "proc/self/cgroup", "3:cpuset:/docker/4711\n0::/../../elsewhere")
    trees.write(tmp_path, "sys/fs/cgroup/cpuset/cpuset.cpus", "8-9")
    assert read_node(tmp_path).cpus == (8, 9)


def test_memory_that_the_cpuset_does_not_leave_is_not_there(tmp_path):
    trees.xeon_phi(tmp_path, "quadrant/flat")
    trees.write(tmp_path, "sys/fs/cgroup/cpuset.mems.effective", "0")
    assert read_node(tmp_path).memory_nodes == ()


def test_a_small_virtual_machine(tmp_path):
    node = read_node(trees.small(tmp_path))
    assert (node.cores, sizes(node), node.isa) == (((0,), (1,)), [2], "avx512_bf16")


def test_nothing_at_all(tmp_path):
    node = read_node(tmp_path, allowed={1, 3})
    assert (node.cores, node.isa, sizes(node), node.online) == (((1,), (3,)), "baseline", [2], 2)
    assert read_node(tmp_path).cpus == (0,)


def two_packages(root):
    packages = [[0, 1, 4, 5], [2, 3, 6, 7]]
    return trees.write_tree(root, cores=trees.apart(4, 2), domains=packages, packages=packages, memory=[9000] * 2,
                            flags="avx2", distances=[[10, 21], [21, 10]],
                            caches=[(3, 3, cpus) for cpus in packages])  # fmt: skip


FILES = ["cpu/online", "cpu/cpu0/topology/thread_siblings_list", "cpu/cpu0/topology/physical_package_id",
         "cpu/cpu0/cache/index3/level", "cpu/cpu0/cache/index3/shared_cpu_list", "node/node0/cpulist",
         "node/node0/meminfo", "node/node0/distance"]  # fmt: skip


@pytest.mark.parametrize("damage", ["", "garbage", "0-", "-1", "0-99999999", "3-1", "\x00\xff", "missing", "folder"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_taken_as_not_there(file, damage, tmp_path):
    path = two_packages(tmp_path) / "sys/devices/system" / file
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_text(damage, encoding="latin-1")
    node = read_node(tmp_path, allowed=set(range(8)))
    assert sorted(cpu for core in node.cores for cpu in core) == list(range(8))
    assert sorted(cpu for domain in node.domains for core in domain.cores for cpu in core) == list(range(8))
    assert len(node.cores) in (4, 5)


@pytest.mark.parametrize("folder", ["sys/devices/system/node", "sys/devices/system/cpu", "proc"])
def test_a_missing_folder(folder, tmp_path):
    shutil.rmtree(two_packages(tmp_path) / folder)
    node = read_node(tmp_path, allowed={0, 1, 4, 5})
    assert node.cpus == (0, 1, 4, 5)
    assert sum(sizes(node)) == len(node.cores)


def test_the_value_cannot_be_changed_and_always_has_a_domain():
    node = Node("CPU", frozenset(), (0, 1), ((0,), (1,)), 2)
    assert node.domains[0].cores == ((0,), (1,))
    assert hash(node)
    with pytest.raises(AttributeError):
        node.online = 3


def test_this_machine():
    node = read_node()
    assert node.cpus
    assert len(node.cores) <= len(node.cpus) <= node.online
    assert sum(sizes(node)) == len(node.cores)
