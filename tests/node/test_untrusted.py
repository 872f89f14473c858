"""Files of a node that are damaged, or made to do harm: taken as not there, without a wait."""

import functools
import json
import os

import pytest
from click.testing import CliRunner
from node import trees

from knltrain.cli.main import main
from knltrain.errors import ConfigError
from knltrain.launch.hosts import expand_counts, expand_hosts
from knltrain.node.cgroup import read_limits
from knltrain.node.cpulist import parse_cpu_list, read_number, read_text
from knltrain.node.topology import read_node

DIGITS = "9" * 5000
hosts = functools.partial(expand_hosts, given_as="SLURM_STEP_NODELIST")


@pytest.fixture
def machine(tmp_path):
    """Two cores in a control group."""
    trees.small(tmp_path)
    trees.write(tmp_path, "proc/self/cgroup", "0::/a")
    return tmp_path


# What fills the memory, what no int and no float holds, what is no path.
@pytest.mark.parametrize(
    "file, text",
    [
        ("sys/fs/cgroup/a/cpu.max", f"{DIGITS} 100000"),
        ("sys/fs/cgroup/a/cpu.max", f"{'9' * 4000} 1"),
        ("sys/fs/cgroup/a/memory.max", DIGITS),
        ("sys/fs/cgroup/a/cpuset.cpus", "0-65535," * 10_000),
        ("sys/devices/system/node/node0/meminfo", f"Node 0 MemTotal: {DIGITS} kB"),
        ("sys/devices/system/node/node0/distance", DIGITS),
        ("sys/devices/system/cpu/online", f"0-{DIGITS}"),
        ("proc/self/cgroup", "0::/a\0b"),
        ("proc/self/cgroup", "0::" + "/a" * 30_000),
        ("proc/sys/kernel/osrelease", f"6.{DIGITS}"),
        ("proc/cpuinfo", "x" * (1 << 22)),
        ("proc/cpuinfo", "".join(f"{number}: x\n" for number in range(100_000))),
    ],
    ids=range(12),
)
@pytest.mark.timeout(60)
def test_a_damaged_file_says_nothing(machine, file, text):
    trees.write(machine, file, text)
    node = read_node(machine)
    assert node.cores
    assert len(node.cpus) <= 1 << 16
    result = CliRunner().invoke(main, ["plan", "--topology", str(machine), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])


@pytest.mark.timeout(60)
def test_what_is_no_file_says_nothing(machine):
    for name in ("proc/cpuinfo", "sys/devices/system/cpu/online", "proc/self/cgroup"):
        (machine / name).unlink()
        os.mkfifo(machine / name)
    assert read_node(machine).cpu_model == "unknown"
    (machine / "endless").symlink_to("/dev/zero")
    assert read_text(machine / "endless") == ""


def test_a_name_that_drives_a_terminal_is_escaped(machine):
    trees.write(machine, "proc/cpuinfo", "model name : \x1b[2Jevil\nflags : avx2")
    assert read_node(machine).cpu_model == r"\x1b[2Jevil"


@pytest.mark.parametrize("text", ["0-" + DIGITS, "0-65535,0-65535", "-1", "1-0", "a", "65536"])
def test_lists_of_cpus_that_are_none(text):
    with pytest.raises(ValueError):
        parse_cpu_list(text)


@pytest.mark.parametrize(
    "text, number", [("-1", -1), ("+7", 7), (DIGITS, None), ("1_0", None), ("", None), ("1.5", None)]
)
def test_numbers(tmp_path, text, number):
    (tmp_path / "file").write_text(text)
    assert read_number(tmp_path / "file") == number


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "expand, text",
    [(hosts, "n[0-999999][0-999999]"), (hosts, "n[0-999998]," * 50), (expand_counts, "1(x999999)," * 50),
     (expand_counts, DIGITS)],
    ids=range(4),
)  # fmt: skip
def test_lists_of_a_launcher_that_would_fill_the_memory(expand, text):
    with pytest.raises(ConfigError, match=r"too many nodes|Slurm's variables are damaged") as raised:
        expand(text)
    assert len(str(raised.value)) < 400


def test_a_quota_is_read_still(machine):
    trees.write(machine, "sys/fs/cgroup/a/cpu.max", "150000 100000")
    assert read_limits(machine).cpu_quota == 1.5
