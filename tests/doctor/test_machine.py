"""Each check that needs no torch, on trees and environments that provoke it."""

import dataclasses
import os
import subprocess
import sys

import pytest
from node import trees
from node.trees import write

from knltrain.doctor import machine
from knltrain.doctor.machine import CHECKS, read_machine

MEMINFO = "MemTotal: {0} kB\nMemAvailable: {1} kB\nSwapTotal: {2} kB\nSwapFree: {3} kB"


def found(name, root, environ=None, allowed=None):
    """What a check says of a machine, with what every finding has to have."""
    finding = CHECKS[name](read_machine(root, environ or {}, allowed))
    assert finding.name == name
    assert finding.cause
    assert bool(finding.symptom) == bool(finding.remedy) == (finding.severity != "ok")
    return finding


def kind(name, root, environ=None, allowed=None):
    return found(name, root, environ, allowed).severity


@pytest.fixture
def small(tmp_path):
    """Two cores with bf16, 24 GiB, all well."""
    root = trees.small(tmp_path)
    write(root, "proc/meminfo", MEMINFO.format(24 << 20, 20 << 20, 0, 0))
    (root / "dev/shm").mkdir(parents=True)
    return root


def test_nothing_is_wrong_with_a_good_machine(small, monkeypatch):
    monkeypatch.setattr(
        os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 1 << 22, 1 << 22, 1 << 22, *5 * (0,)))
    )
    assert {name: kind(name, small) for name in CHECKS} == dict.fromkeys(CHECKS, "ok")


def test_nothing_is_known_of_an_empty_folder(tmp_path):
    """No check stumbles over files that are not there."""
    worst = {name: kind(name, tmp_path) for name in CHECKS}
    assert {name for name, severity in worst.items() if severity == "error"} == set()
    assert (worst["isa"], worst["shared-memory"], worst["memory"]) == ("warning", "warning", "note")


def test_isa(small, tmp_path):
    cloud = trees.cloud(tmp_path / "cloud")
    finding = found("isa", cloud)
    assert finding.severity == "warning"
    assert "5.10.0-28-cloud-amd64 does not grant" in finding.cause
    assert "5.16" in finding.remedy
    narrowed = found("isa", small, {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert (narrowed.severity, narrowed.remedy) == ("warning", "unset ONEDNN_MAX_CPU_ISA")
    for onednn in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        restricting = {onednn: "sse41", "ATEN_CPU_CAPABILITY": "avx2"}
        every = found("isa", small, restricting)
        assert all(f"{name}={value}" in every.cause and name in every.remedy for name, value in restricting.items())
    for nothing in ({"ONEDNN_MAX_CPU_ISA": ""}, {"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"},
                    {"DNNL_MAX_CPU_ISA": "no such thing"}, {"ATEN_CPU_CAPABILITY": "AVX2"}):  # fmt: skip
        assert kind("isa", small, nothing) == "ok"
    phi = found("isa", trees.xeon_phi(tmp_path / "phi", "quadrant/flat"))
    assert (phi.severity, phi.remedy) == ("note", "--engine fused")
    old = trees.write_tree(tmp_path / "old", cores=[(0,)], domains=[[0]], memory=[1000], flags="sse4_2")
    assert kind("isa", old) == "warning"
    restricted = found("isa", old, {"ONEDNN_MAX_CPU_ISA": "SSE41"})
    assert restricted.remedy == "unset ONEDNN_MAX_CPU_ISA", "what it hides is not the processor's lack"
    assert "ONEDNN_MAX_CPU_ISA=SSE41" in found("bf16", old, {"ONEDNN_MAX_CPU_ISA": "SSE41"}).cause


def test_amx_refused_by_a_kernel_that_could_grant_it(small):
    granted = read_machine(small, {})
    refused = dataclasses.replace(granted, node=dataclasses.replace(granted.node, amx_refused=True))
    assert "arch_prctl" in machine.isa(refused).remedy


def test_bf16(small, tmp_path):
    assert found("bf16", small).cause == "in hardware: avx512_bf16"
    emulated = found("bf16", trees.xeon(tmp_path / "xeon"))
    assert emulated.severity == "note"
    assert "--comm.dtype bf16" in emulated.remedy
    hidden = found("bf16", trees.cloud(tmp_path / "cloud"))
    assert hidden.severity == "warning"
    assert "AMX is hidden" in hidden.cause


def status(root, pid, name, parent, cpus):
    write(root, f"proc/{pid}/status", f"Name:\t{name}\nPPid:\t{parent}\nCpus_allowed_list:\t{cpus}")


def test_cpus_that_were_taken_and_who_took_them(tmp_path):
    root = trees.xeon(tmp_path)
    for pid, name, parent, cpus in (("self", "knltrain", 30, "0-3"), (30, "bash", 20, "0-3"),
                                    (20, "slurmstepd", 1, "0-111"), (1, "systemd", 0, "0-111")):  # fmt: skip
        status(root, pid, name, parent, cpus)
    finding = found("affinity", root, allowed={0, 1, 2, 3})
    assert finding.severity == "warning"
    assert "restricted since bash (process 30), which slurmstepd (process 20) started" in finding.cause
    assert finding.symptom == "training uses 4 of 56 cores"
    status(root, 20, "slurmstepd", 30, "0-3")  # a circle, and damage
    assert "since" not in found("affinity", root, allowed={0, 1, 2, 3}).cause
    status(root, 30, "bash", 20, "many")
    assert "since" not in found("affinity", root, allowed={0, 1, 2, 3}).cause


def hydra(rank, size, local_size):
    return {"PMI_RANK": str(rank), "PMI_SIZE": str(size), "MPI_LOCALRANKID": str(rank),
            "MPI_LOCALNRANKS": str(local_size)}  # fmt: skip


def test_ranks_pinned_by_their_launcher(tmp_path):
    root = trees.xeon_snc3(tmp_path)
    assert kind("affinity", root, hydra(0, 3, 3)) == "ok"
    few = found("affinity", root, hydra(0, 3, 3), allowed={0})
    assert few.severity == "error"
    assert "hydra pinned rank 0 to 1 core (CPUs 0)" in few.cause
    assert "I_MPI_PIN=0" in few.remedy
    # The last domain's 42 cores are enough for a rank that should have had 43.
    fewer = found("affinity", root, hydra(0, 3, 3), allowed=set(range(42)))
    assert fewer.severity == "warning"
    assert "its share of this node is 43 cores" in fewer.cause


def test_a_part_of_a_node_that_slurm_does_not_confine_a_job_to(small):
    finding = found("affinity", small, {"SLURM_JOB_CPUS_PER_NODE": "1(x2)"})
    assert (finding.severity, finding.symptom) == ("warning", "jobs on this node take each other's cores")
    assert "gave this job 1 CPUs" in finding.cause
    assert "--exclusive" in finding.remedy


def test_a_job_without_a_launcher_and_a_launcher_that_says_too_little(small):
    finding = found("affinity", small, {"SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS": "8"})
    assert finding.severity == "warning"
    assert finding.cause.startswith("this Slurm job has 4 nodes and 8 tasks, and no launcher started this process")
    assert finding.remedy.startswith("start the ranks of one run with srun")
    finding = found("affinity", small, {"PMIX_RANK": "1"})
    assert (finding.severity, "(PMIX_RANK=1)" in finding.cause) == ("error", True)
    assert "(slurm)" in found("affinity", small, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2",
                                                  "SLURM_STEP_TASKS_PER_NODE": "2"}).cause  # fmt: skip


def test_launchers_that_contradict_each_other(small):
    contradiction = {"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    finding = found("affinity", small, contradiction)
    assert finding.severity == "error"
    assert "a model of its own" in finding.cause


def test_threads(small):
    idle = found("threads", small, {"OMP_NUM_THREADS": "1"})
    assert (idle.severity, idle.symptom) == ("warning", "1 of 2 cores of a rank are idle")
    assert found("threads", small, {"OMP_NUM_THREADS": "8"}).symptom == "threads wait for each other"
    assert kind("threads", small, {"OMP_NUM_THREADS": "2"}) == "ok"
    assert kind("threads", small, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}) == "ok"
    assert kind("threads", small, {"OMP_NUM_THREADS": "many"}) == "error"
    bound = found("threads", small, {"KMP_AFFINITY": "granularity=fine,compact"})
    assert bound.severity == "note"
    assert "unset KMP_AFFINITY" in bound.remedy


def test_cpu_limit(tmp_path):
    finding = found("cpu-limit", trees.container(tmp_path))
    assert finding.severity == "warning"
    assert "3.5 CPUs' time on 6 cores" in finding.cause
    assert "3 threads, which the kernel moves about on 6 cores" in finding.symptom
    write(tmp_path, "sys/fs/cgroup/pods/one/cpu.max", "600000 100000")
    assert kind("cpu-limit", tmp_path) == "ok"


@pytest.mark.parametrize("free_mb, severity", [(20000, "ok"), (2923, "ok"), (2922, "error"), (100, "error")])
def test_memory_that_is_free(small, free_mb, severity):
    write(small, "proc/meminfo", f"MemAvailable: {free_mb * 1024} kB")
    assert kind("memory", small) == severity


def test_memory_that_is_allowed(tmp_path):
    root = trees.container(tmp_path)
    write(root, "proc/meminfo", MEMINFO.format(1 << 30, 1 << 29, 0, 0))
    finding = found("memory", root)
    assert (finding.severity, "limit 8,192" in finding.cause) == ("ok", True), "one domain, fp32"
    write(root, "sys/fs/cgroup/pods/one/cpuset.cpus.effective", "5-9,40")
    write(root, "sys/fs/cgroup/pods/cpuset.cpus.effective", "0-63")
    two = found("memory", root)
    assert two.severity == "warning"
    assert "fewer ranks than 2 a node" in two.remedy


def test_swap(small):
    assert found("swap", small).cause == "none"
    write(small, "proc/meminfo", MEMINFO.format(1, 1, 4 << 20, (4 << 20) - (100 << 10)))
    assert found("swap", small).cause == "100 of 4,096 MiB in use"
    write(small, "proc/meminfo", MEMINFO.format(1, 1, 4 << 20, 1 << 20))
    assert kind("swap", small) == "warning"


def test_numa_balancing(small, tmp_path):
    write(small, "proc/sys/kernel/numa_balancing", 1)
    assert kind("numa-balancing", small) == "ok"
    root = trees.xeon(tmp_path / "xeon")
    assert kind("numa-balancing", root) == "ok"
    write(root, "proc/sys/kernel/numa_balancing", 1)
    assert found("numa-balancing", root).remedy == "sysctl kernel.numa_balancing=0"


def test_huge_pages(small):
    folder = "sys/kernel/mm/transparent_hugepage"
    write(small, f"{folder}/enabled", "[always] madvise never")
    write(small, f"{folder}/defrag", "always defer [madvise] never")
    assert found("huge-pages", small).cause == "transparent huge pages: always"
    write(small, f"{folder}/defrag", "[always] defer madvise never")
    finding = found("huge-pages", small)
    assert (finding.severity, finding.remedy) == ("note", f"echo madvise > /{folder}/defrag")


def test_malloc(small):
    tcmalloc = {"LD_PRELOAD": "/usr/lib/libtcmalloc.so.4"}
    assert "does not exist" in found("malloc", small, tcmalloc).cause
    write(small, "usr/lib/libtcmalloc.so.4", "")
    assert found("malloc", small, tcmalloc).cause == "tcmalloc, preloaded"
    write(small, "proc/self/maps", "7f00-7f01 r-xp 00000000 00:00 0 /usr/lib/libc.so.6")
    assert "not in this process" in found("malloc", small, tcmalloc).cause
    write(small, "proc/self/maps", "7f00-7f01 r-xp 00000000 00:00 0 /usr/lib/libtcmalloc.so.4")
    assert kind("malloc", small, tcmalloc) == "ok"
    assert kind("malloc", small, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=131072"}) == "note"
    assert kind("malloc", small, {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX"}) == "ok"


def test_malloc_of_another_c_library(small, monkeypatch):
    monkeypatch.setattr(machine, "keep_freed_memory", lambda environ: {"allocator": "not glibc", "set_by": "nobody"})
    assert kind("malloc", small) == "warning"


@pytest.mark.parametrize("total, free, severity", [(64, 64, "warning"), (2000, 1000, "ok"), (2000, 500, "warning")])
def test_shared_memory(small, monkeypatch, total, free, severity):
    page = 4096
    disk = os.statvfs_result((page, page, total * 256, free * 256, free * 256, *5 * (0,)))
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    assert kind("shared-memory", small) == severity
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert found("shared-memory", small).remedy == "chmod 1777 /dev/shm"


@pytest.mark.parametrize("hard, severity", [(4096, "ok"), (4095, "warning"), ("unlimited", "ok")])
def test_open_files(small, hard, severity):
    """The soft limit is raised by every rank."""
    write(small, "proc/self/limits", f"Max processes             9                    9                    processes\n"
          f"Max open files            1024                 {hard:<20} files")  # fmt: skip
    assert kind("open-files", small) == severity


def frequency(root, cpu, **files):
    for name, value in files.items():
        write(root, f"sys/devices/system/cpu/cpu{cpu}/cpufreq/{name}", value)


def test_clock(small):
    for cpu in (0, 1):
        frequency(small, cpu, scaling_governor="powersave", scaling_driver="acpi-cpufreq")
    assert found("clock", small).cause == "governor powersave on 2 CPUs, driver acpi-cpufreq"
    frequency(small, 0, scaling_driver="intel_pstate")
    assert kind("clock", small) == "ok"
    frequency(small, 0, cpuinfo_max_freq=3_500_000, scaling_max_freq=2_100_000)
    capped = found("clock", small)
    assert capped.severity == "warning"
    assert "2.1 GHz allowed of 3.5" in capped.cause
    assert capped.remedy == "cpupower frequency-set --max 3500000"


def test_it_reads_this_machine_without_torch():
    code = (
        "import sys; from knltrain.doctor.machine import CHECKS, read_machine; machine = read_machine();"
        "found = [check(machine) for check in CHECKS.values()]; sys.exit('torch' in sys.modules or len(found) < 12)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
