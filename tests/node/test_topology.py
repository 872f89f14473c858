from knltrain.node.topology import parse_cpu_list, read_node


def make_tree(root, *, flags, siblings, online):
    """A sysfs and procfs of one's own: siblings maps a CPU to the text of its thread_siblings_list."""
    (root / "proc").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text(
        f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\nmodel name\t: Some CPU\n"
    )
    base = root / "sys/devices/system/cpu"
    base.mkdir(parents=True)
    (base / "online").write_text(online + "\n")
    for cpu, text in siblings.items():
        (base / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (base / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(text + "\n")
    return root


def test_cpu_lists():
    assert parse_cpu_list("0-3,8,10-11\n") == (0, 1, 2, 3, 8, 10, 11)
    assert parse_cpu_list("") == ()


def test_siblings_next_to_each_other(tmp_path):
    """As cloud machines number them: CPUs 0 and 1 are one core."""
    root = make_tree(tmp_path, flags="avx2 avx512f avx512bw", online="0-7",
                     siblings={cpu: f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}" for cpu in range(8)})  # fmt: skip
    node = read_node(root, allowed=set(range(4)))
    assert node.cores == ((0, 1), (2, 3))
    assert (node.cpus, node.online, node.isa) == ((0, 1, 2, 3), 8, "avx512")
    assert not node.computes_bf16


def test_siblings_half_the_machine_apart(tmp_path):
    root = make_tree(tmp_path, flags="avx2 amx_bf16", online="0-7",
                     siblings={cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)})  # fmt: skip
    node = read_node(root, allowed={0, 1, 4, 5})
    assert node.cores == ((0, 4), (1, 5))
    assert node.computes_bf16
    assert node.isa == "amx_bf16"


def test_a_container_without_topology_files(tmp_path):
    root = make_tree(tmp_path, flags="sse2", online="0-3", siblings={})
    node = read_node(root, allowed={1, 3})
    assert node.cores == ((1,), (3,))
    assert node.isa == "baseline"


def test_this_machine():
    node = read_node()
    assert node.cpus
    assert len(node.cores) <= len(node.cpus) <= node.online
