"""Machines as the kernel shows them: each function writes the files of one under a folder and returns it."""

from knltrain.node.cpulist import format_cpu_list

XEON_PHI = "avx2 avx512f avx512cd avx512er avx512pf"
SKYLAKE = "avx2 avx512f avx512bw avx512vl avx512dq"
SAPPHIRE_RAPIDS = SKYLAKE + " avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8"
MILAN = "avx2"


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def mask(cpus):
    """CPUs as the kernel's words of 32 bits in hex, the lowest last."""
    words = f"{sum(1 << cpu for cpu in cpus):x}"
    words = words.zfill(-(-len(words) // 8) * 8)
    return ",".join(words[first : first + 8] for first in range(0, len(words), 8))


def write_cpus(root, folder, names, cpus, *, masks):
    """Writes a set of CPUs under the name of its list, or of its mask alone."""
    of_list, of_mask = names
    write(root, f"{folder}/{of_mask if masks else of_list}", mask(cpus) if masks else format_cpu_list(cpus))


def write_tree(root, *, cores, domains, memory, flags, model="Some CPU", packages=None, caches=(), distances=None,
               kernel="6.1.0-amd64", bandwidths=None, masks=False):  # fmt: skip
    """Writes a machine.

    Args:
        root: where.
        cores: CPUs of each core.
        domains: CPUs of each NUMA node; of memory alone, none.
        memory: MiB of each node.
        flags: as /proc/cpuinfo has them.
        model: the processor's name.
        packages: CPUs of each package.
        caches: (index, level, CPUs that share it).
        distances: a row for each node.
        kernel: release.
        bandwidths: MB/s of each node's memory, from ACPI's HMAT.
        masks: whether sets of CPUs are masks alone, as before Linux 2.6.25, and nothing lists the CPUs online.
    """
    cpus = sorted(cpu for core in cores for cpu in core)
    blocks = [f"processor\t: {cpu}\nmodel name\t: {model}\nflags\t\t: {flags}\n" for cpu in cpus]
    write(root, "proc/cpuinfo", "\n".join(blocks))
    write(root, "proc/sys/kernel/osrelease", kernel)
    base = "sys/devices/system/cpu"
    if not masks:
        write(root, f"{base}/online", format_cpu_list(cpus))
    siblings, sharing, of_node = (
        ("thread_siblings_list", "thread_siblings"), ("shared_cpu_list", "shared_cpu_map"), ("cpulist", "cpumap")
    )  # fmt: skip
    for core in cores:
        for cpu in core:
            write_cpus(root, f"{base}/cpu{cpu}/topology", siblings, core, masks=masks)
    for package, members in enumerate(packages or [cpus]):
        for cpu in members:
            write(root, f"{base}/cpu{cpu}/topology/physical_package_id", package)
    for index, level, sharers in caches:
        for cpu in sharers:
            write(root, f"{base}/cpu{cpu}/cache/index{index}/level", level)
            write_cpus(root, f"{base}/cpu{cpu}/cache/index{index}", sharing, sharers, masks=masks)
    for number, members in enumerate(domains):
        node = f"sys/devices/system/node/node{number}"
        write_cpus(root, node, of_node, members, masks=masks)
        write(root, f"{node}/meminfo", f"Node {number} MemTotal:       {1024 * memory[number]} kB")
        if distances:
            write(root, f"{node}/distance", " ".join(map(str, distances[number])))
        if bandwidths:
            write(root, f"{node}/access0/initiators/read_bandwidth", bandwidths[number])
    return root


def apart(cores, threads):
    """CPUs of each core where its threads are the whole machine apart."""
    return [tuple(core + cores * thread for thread in range(threads)) for core in range(cores)]


def cpus_of(cores):
    return sorted(cpu for core in cores for cpu in core)


def split(cores, sizes):
    """CPUs of consecutive cores, so many at a time."""
    parts, first = [], 0
    for size in sizes:
        parts.append(cpus_of(cores[first : first + size]))
        first += size
    return parts


def xeon_phi(root, mode, *, masks=False):
    """Xeon Phi 7250: 68 cores of 4 threads, two cores to a tile with its cache; 96 GiB and 16 GiB of MCDRAM."""
    cores = apart(68, 4)
    tiles = [(2, 2, cpus_of(cores[tile : tile + 2])) for tile in range(0, 68, 2)]
    if mode == "quadrant/cache":
        domains, memory, distances = [cpus_of(cores)], [98304], [[10]]
    elif mode == "quadrant/flat":
        domains, memory, distances = [cpus_of(cores), []], [98304, 16384], [[10, 31], [31, 10]]
    else:  # SNC-4/flat: 34 tiles do not divide by 4
        domains = [*split(cores, (18, 18, 16, 16)), [], [], [], []]
        memory = [24576] * 4 + [4096] * 4
        distances = [
            [10 if a == b else 31 if abs(a - b) == 4 else 21 if max(a, b) < 4 else 41 for b in range(8)]
            for a in range(8)
        ]
    return write_tree(root, cores=cores, domains=domains, memory=memory, distances=distances, caches=tiles, masks=masks,
                      flags=XEON_PHI, model="Intel(R) Xeon Phi(TM) CPU 7250 @ 1.40GHz")  # fmt: skip


def xeon(root):
    """Two packages of 28 cores, siblings half the machine apart."""
    cores = apart(56, 2)
    packages = split(cores, (28, 28))
    return write_tree(root, cores=cores, domains=packages, packages=packages, memory=[96000, 96000], flags=SKYLAKE,
                      distances=[[10, 21], [21, 10]], caches=[(3, 3, cpus) for cpus in packages])  # fmt: skip


def xeon_snc3(root):
    """One package of 128 cores in three sub-NUMA clusters of 43, 43 and 42."""
    cores = apart(128, 2)
    return write_tree(root, cores=cores, domains=split(cores, (43, 43, 42)), memory=[128000] * 3,
                      flags=SAPPHIRE_RAPIDS, distances=[[10, 12, 12], [12, 10, 12], [12, 12, 10]])  # fmt: skip


def xeon_max(root, bandwidths=(300000, 300000, 900000, 900000)):
    """Two packages of 56 cores with 128 GiB each, and 64 GiB of HBM each as nodes of their own."""
    cores = apart(112, 2)
    packages = split(cores, (56, 56))
    return write_tree(root, cores=cores, domains=[*packages, [], []], packages=packages, flags=SAPPHIRE_RAPIDS,
                      memory=[131072, 131072, 65536, 65536], bandwidths=bandwidths,
                      distances=[[10, 21, 13, 23], [21, 10, 23, 13], [13, 23, 10, 23], [23, 13, 23, 10]])  # fmt: skip


def epyc_nps4(root):
    """One package of 64 cores in four domains, eight cores to a cache."""
    cores = apart(64, 2)
    caches = [(3, 3, cpus) for cpus in split(cores, [8] * 8)]
    return write_tree(root, cores=cores, domains=split(cores, [16] * 4), memory=[64000] * 4, caches=caches,
                      flags=MILAN, distances=[[10 if a == b else 12 for b in range(4)] for a in range(4)])  # fmt: skip


def cloud(root):
    """32 CPUs of 16 cores, siblings beside each other; a kernel too old for AMX."""
    cores = [(cpu, cpu + 1) for cpu in range(0, 32, 2)]
    return write_tree(root, cores=cores, domains=[cpus_of(cores)], memory=[64000], flags=SAPPHIRE_RAPIDS,
                      kernel="5.10.0-28-cloud-amd64")  # fmt: skip


def container(root):
    """CPUs 5-9 and 20 of 64 and 8 GiB, by cgroup v2, in a group whose parent is tighter in memory."""
    cores = [(cpu,) for cpu in range(64)]
    write_tree(root, cores=cores, domains=split(cores, (32, 32)), memory=[64000] * 2, flags=SKYLAKE)
    write(root, "proc/self/cgroup", "0::/pods/one")
    write(root, "sys/fs/cgroup/cpuset.cpus.effective", "0-63")
    write(root, "sys/fs/cgroup/pods/cpuset.cpus.effective", "0-31")
    write(root, "sys/fs/cgroup/pods/memory.max", 8 << 30)
    write(root, "sys/fs/cgroup/pods/one/cpuset.cpus.effective", "5-9,20")
    write(root, "sys/fs/cgroup/pods/one/cpuset.mems.effective", "0")
    write(root, "sys/fs/cgroup/pods/one/memory.max", 16 << 30)
    write(root, "sys/fs/cgroup/pods/one/cpu.max", "350000 100000")
    return root


def small(root):
    """A virtual machine of two cores."""
    return write_tree(root, cores=[(0,), (1,)], domains=[[0, 1]], memory=[24000], flags=SKYLAKE + " avx512_bf16",
                      caches=[(3, 3, [0, 1])])  # fmt: skip
