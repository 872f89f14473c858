"""Hosts with links of a given speed between them: network namespaces of this machine, for root.

A host has a network and a name of its own, and shares all else, its cores included. Its link is shaped in both
directions by the token bucket filter of Linux (tc-tbf). A host ends with the script that made it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from knltrain.bench.tune import last_message
from knltrain.errors import ConfigError, KnltrainError

_PROGRAMS = ("unshare", "nsenter", "setpriv", "taskset", "ip", "tc", "hostname")
_LINK = "link0"
_PORT = 29400
_START_S = 20.0
_COMMAND_TIMEOUT_S = 600.0
# What may pass at once at any speed: several packets of the largest size that the kernel hands over undivided, 64 KiB.
_BURST = 1 << 20
_BLAST_S = 1.0
_SINK = """
import socket, sys, time
server = socket.create_server(("", 29401))
print("ready", flush=True)
link, _ = server.accept()
total = len(link.recv(1 << 20))  # what the bucket lets pass at once is not counted
while total < 1 << 22: total += len(link.recv(1 << 20))
start, total = time.perf_counter(), 0
while got := len(link.recv(1 << 20)): total += got
print(8e-9 * total / (time.perf_counter() - start))
"""
_SOURCE = """
import socket, sys, time
link = socket.create_connection((sys.argv[1], 29401))
block, end = bytes(1 << 20), time.perf_counter() + float(sys.argv[2])
while time.perf_counter() < end: link.sendall(block)
"""


class Hosts:
    """So many hosts on one switch.

    Args:
        count: how many.
        gbit: speed of each host's link, Gbit/s in each direction.

    Raises:
        ConfigError: this is not root's process, a program is missing, or the kernel has no such filter.
    """

    def __init__(self, count: int, gbit: float) -> None:
        path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        if os.geteuid() != 0:
            raise ConfigError("--links: only root can make hosts of namespaces")
        if missing := [name for name in _PROGRAMS if shutil.which(name, path=path) is None]:
            raise ConfigError(f"--links: not installed: {', '.join(missing)} (iproute2, util-linux)")
        self._environ = {**os.environ, "PATH": path}
        self._open = contextlib.ExitStack()
        try:
            switch = self._start("switch")
            self._inside(switch, "ip link add ports type bridge", "ip link set ports up")
            self.pids = [self._start(f"node{number}") for number in range(1, count + 1)]
            rate = f"root tbf rate {round(1000 * gbit)}mbit burst {_BURST} latency 50ms"
            for number, pid in enumerate(self.pids, start=1):
                port = f"port{number}"
                self._inside(switch, f"ip link add {port} type veth peer name {_LINK} netns {pid}",
                             f"ip link set {port} master ports up", f"tc qdisc add dev {port} {rate}")  # fmt: skip
                self._inside(pid, f"ip address add {_address(number)}/24 dev {_LINK}", f"ip link set {_LINK} up",
                             f"tc qdisc add dev {_LINK} {rate}")  # fmt: skip
        except BaseException:
            self.close()
            raise

    def _start(self, name: str) -> int:
        """Makes a host; it lasts as long as its process, and that no longer than this one."""
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "sh", "-c",
             f"hostname {name} && ip link set lo up && echo up && exec sleep infinity"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self._environ,
        )  # fmt: skip
        self._open.callback(lambda: (process.kill(), process.communicate()))
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != "up\n":
            raise ConfigError(f"--links: no host can be made here: {process.stderr.read().strip()}")
        return process.pid

    def _inside(self, pid: int, *commands: str) -> None:
        for command in commands:
            result = subprocess.run(
                [*_enter(pid, "--net"), *command.split()], capture_output=True, text=True, timeout=_START_S,
                env=self._environ,
            )  # fmt: skip
            if result.returncode:
                raise ConfigError(f"--links: {command}: {result.stderr.strip()}")

    def ranks(self, words: Sequence[str]) -> list[str]:
        """The command that starts one rank on each host, each on its share of this machine's cores; it ends with them.

        Args:
            words: what follows the interpreter.
        """
        lines = [" ".join(f"'{word}'" for word in self._rank(number, words)) + " &" for number in range(len(self.pids))]
        # Told to end, it tells them and waits; the code of one that fails is its own.
        waits = f"for rank in $(seq {len(lines)}); do wait -n || code=$?; done; exit ${{code:-0}}"
        return ["bash", "-c", "\n".join(["trap \"trap '' TERM; kill 0; wait\" TERM", *lines, waits])]

    def answers(self, words: Sequence[str]) -> list[str]:
        """Runs a command on all hosts at once, each on its share of the cores, and returns what each printed.

        Args:
            words: what follows the interpreter.

        Raises:
            KnltrainError: it failed on one, or never ended.
        """
        with contextlib.ExitStack() as stack:
            processes = []
            for number in range(len(self.pids)):
                process = subprocess.Popen(self._rank(number, words), stdin=subprocess.DEVNULL, text=True,
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
                stack.callback(lambda process=process: (process.kill(), process.communicate()))
                processes.append(process)
            said = []
            for process in processes:
                try:
                    out, errors = process.communicate(timeout=_COMMAND_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    raise KnltrainError(f"{' '.join(words)}: no end after {_COMMAND_TIMEOUT_S:g} s") from None
                if process.returncode:
                    raise KnltrainError(f"{' '.join(words)}: {last_message(errors)}")
                said.append(out)
            return said

    def _rank(self, number: int, words: Sequence[str]) -> list[str]:
        """What runs one of the ranks on its host."""
        cpus, count = sorted(os.sched_getaffinity(0)), len(self.pids)
        mine = cpus[number * len(cpus) // count : (number + 1) * len(cpus) // count]
        told = {"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
                "MASTER_ADDR": _address(1), "MASTER_PORT": _PORT}  # fmt: skip
        return [*_enter(self.pids[number], "--net", "--uts"), "taskset", "--cpu-list",
                ",".join(map(str, mine or [cpus[number % len(cpus)]])), "env",
                *(f"{name}={value}" for name, value in told.items()), sys.executable, *words]  # fmt: skip

    def measured_gbit(self) -> float:
        """What one connection really carries from the second host to the first, Gbit/s."""
        first, second = ([*_enter(pid, "--net"), sys.executable, "-c"] for pid in self.pids[:2])
        with subprocess.Popen([*first, _SINK], stdout=subprocess.PIPE, text=True) as sink:
            try:
                assert sink.stdout is not None
                sink.stdout.readline()
                subprocess.run([*second, _SOURCE, _address(1), str(_BLAST_S)], check=True, timeout=_START_S)
                return float(sink.stdout.readline())
            finally:
                sink.kill()

    def close(self) -> None:
        """Ends the hosts."""
        self._open.close()


def _address(number: int) -> str:
    return f"10.78.0.{number}"


def _enter(pid: int, *namespaces: str) -> list[str]:
    return ["nsenter", "--target", str(pid), *namespaces]
