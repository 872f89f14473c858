"""Hosts made of namespaces, each with a network, a name, processes, /run and /etc/hosts of its own.

A host is a tree of processes that ends with its first one, and that ends with this process, however it ends. Its
interfaces go with it. So nothing has to be found and removed that an earlier run has left.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

_NAMESPACES = ("net", "uts", "mount", "ipc", "pid")
_UNSHARE = ["unshare", *(f"--{kind}" for kind in _NAMESPACES), "--fork", "--kill-child", "--mount-proc",
            "--propagation", "private"]  # fmt: skip
_START_S = 20.0
# The first process reaps what its children leave behind, so that a process that has ended is not seen any more.
_INIT = "trap : CHLD; sleep infinity & keeper=$!; touch {ready}; while kill -0 $keeper; do wait $keeper; done"


def need(*programs):
    """Skips the test that asks, aloud, where it cannot be run: it takes root, and programs."""
    if os.geteuid() != 0:
        without("only root can make hosts of namespaces")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if missing := [program for program in programs if shutil.which(program, path=path) is None]:
        without(f"not installed: {', '.join(missing)}; .ci/run names the packages")
    tried = subprocess.run(
        [*_UNSHARE, "mount", "-t", "tmpfs", "none", "/run"], capture_output=True, text=True, timeout=20
    )
    if tried.returncode:
        without(f"no namespaces can be made here: {tried.stderr.strip()}")


def without(reason):
    """Skips a test aloud; where everything has to be there, fails it."""
    (pytest.fail if os.environ.get("KNLTRAIN_TEST_ALL") else pytest.skip)(reason)


def until(condition, seconds, what):
    """Waits for a condition and returns what it returns."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {what() if callable(what) else what}")
        time.sleep(0.05)
    return value


class Host:
    """One host.

    Args:
        name: what `hostname` says there.
        folder: for its files; made.
        setup: shell commands for its first process, in its namespaces.
    """

    def __init__(self, name, folder, setup=""):
        self.name, self.folder = name, folder
        folder.mkdir(parents=True)
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        (folder / "resolv.conf").touch()  # no name server: an unknown name is unknown at once
        script = "\n".join(
            (
                "set -e",
                f"hostname {name}",
                "mount -t tmpfs none /run",
                "mount -t tmpfs none /dev/shm",
                f"mount --bind {folder}/hosts /etc/hosts",
                f"mount --bind {folder}/resolv.conf /etc/resolv.conf",
                "ip link set lo up",
                setup,
                _INIT.format(ready=folder / "ready"),
            )
        )
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._holder = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *_UNSHARE, "bash", "-c", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
                env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
            )  # fmt: skip
        try:
            until(self._is_up, _START_S, lambda: f"{name} is up: {self._log.read_text()}")
            self.pid = int(Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text())
        except BaseException:
            self.stop()
            raise
        self._own = self.processes()

    def _is_up(self):
        if self._holder.poll() is not None:
            pytest.fail(f"{self.name} did not start: {self._log.read_text()}")
        return (self.folder / "ready").exists()

    def inside(self, *command, namespaces=_NAMESPACES):
        """The command line that runs a command there."""
        kinds = [f"--{kind}" for kind in namespaces]
        return ["nsenter", "--target", str(self.pid), *kinds, f"--wd={os.getcwd()}", *map(str, command)]

    def run(self, *command, timeout=60, check=True, **environment):
        """Runs a command there and returns it, finished."""
        result = subprocess.run(
            self.inside(*command), capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}
        )
        if check and result.returncode:
            pytest.fail(f"{self.name}: {' '.join(map(str, command))}: {result.stdout}{result.stderr}")
        return result

    def ip(self, arguments):
        """Changes its network; `ip` sees the process ids of this machine, so that it can name another host's."""
        subprocess.run(self.inside("ip", *arguments.split(), namespaces=("net",)), check=True, timeout=20)

    def processes(self):
        """Ids, as this machine counts them, and command lines of what runs there."""
        namespace, found = os.readlink(f"/proc/{self.pid}/ns/pid"), {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "ns" / "pid") == namespace:
                    found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        return found

    def guests(self, containing=""):
        """What runs there beside what the host itself consists of."""
        return {pid: line for pid, line in self.processes().items() if pid not in self._own and containing in line}

    def settle(self):
        """Counts what runs there now as the host's own."""
        self._own = self.processes()

    def clear(self):
        """Ends every guest."""
        for pid in self.guests():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self):
        """Ends the host and everything that runs there."""
        self._holder.kill()
        self._holder.wait(timeout=20)


class Network:
    """Hosts with three interfaces each, on one of which they reach each other, and sshd.

    ``mgmt0``, which the default route takes, leads nowhere. ``docker0`` has the same address on every host. ``fab0`` is
    the one. The first host's own name resolves to loopback there, as many installers leave it.

    Args:
        names: of the hosts.
        folder: for their files.
    """

    def __init__(self, names, folder):
        self._open = contextlib.ExitStack()
        try:
            self._make(names, folder)
        except BaseException:
            self.close()
            raise

    def _make(self, names, folder):
        self.switch = self._host("switch", folder)
        self.switch.ip("link add fabric type bridge")
        self.switch.ip("link set fabric up")
        key, self.ssh_config = folder / "key", folder / "ssh_config"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, timeout=20)
        self.ssh_config.write_text(
            f"IdentityFile {key}\nIdentitiesOnly yes\nUser root\nBatchMode yes\nStrictHostKeyChecking no\n"
            "UserKnownHostsFile /dev/null\nGlobalKnownHostsFile /dev/null\nLogLevel ERROR\nConnectTimeout 10\n"
            "ServerAliveInterval 1\nServerAliveCountMax 5\n"
        )
        self.ssh = folder / "ssh"
        self.ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.ssh_config} "$@"\n')
        self.ssh.chmod(0o755)
        sshd_config = folder / "sshd_config"
        sshd_config.write_text(
            f"HostKey {key}\nAuthorizedKeysFile {key}.pub\nPidFile none\nUsePAM no\nStrictModes no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nClientAliveInterval 1\n"
            "ClientAliveCountMax 5\n"
        )
        sshd = shutil.which("sshd", path="/usr/sbin:/sbin:/usr/local/sbin")  # which insists on its full path
        start = f"mkdir -p /run/sshd; {sshd} -f {sshd_config} -E {{log}}"
        self.hosts = [self._host(name, folder, start.format(log=folder / f"sshd-{name}")) for name in names]
        addresses = [f"10.77.0.{number}" for number in range(1, len(names) + 1)]
        for number, host in enumerate(self.hosts, start=1):
            host.address = addresses[number - 1]
            for name, address in (("mgmt0", f"10.66.{number}.1/24"), ("fab0", f"{host.address}/24")):
                self.switch.ip(f"link add {name}-{number} type veth peer name {name} netns {host.pid}")
                self.switch.ip(f"link set {name}-{number} up")
                host.ip(f"address add {address} dev {name}")
                host.ip(f"link set {name} up")
            self.switch.ip(f"link set fab0-{number} master fabric")
            host.ip(f"route add default via 10.66.{number}.254")
            host.ip("link add docker0 type bridge")
            host.ip("address add 172.17.0.1/16 dev docker0")
            host.ip("link set docker0 up")
            others = zip(addresses, names, strict=True)
            known = [f"{'127.0.1.1' if number == 1 == of else address} {name}"
                     for of, (address, name) in enumerate(others, start=1)]  # fmt: skip
            (host.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known, ""]))
        for host in self.hosts:
            until(
                lambda host=host: self.hosts[0].run(self.ssh, host.address, "true", check=False).returncode == 0,
                _START_S,
                lambda host=host: f"ssh to {host.name}: {(folder / f'sshd-{host.name}').read_text()}",
            )
            until(lambda host=host: not host.guests(), _START_S, lambda host=host: f"only {host.guests()} left")

    def _host(self, name, folder, setup=""):
        host = Host(name, folder / name, setup)
        self._open.callback(host.stop)
        return host

    def cut(self, host):
        """Pulls a host's cable at the switch."""
        self.switch.ip(f"link set fab0-{self.hosts.index(host) + 1} down")

    def mend(self):
        """Puts every cable back."""
        for number in range(1, len(self.hosts) + 1):
            self.switch.ip(f"link set fab0-{number} up")

    def clear(self):
        """Ends what runs on the hosts, and mends their links."""
        self.mend()
        for host in self.hosts:
            host.clear()

    def close(self):
        """Ends the hosts."""
        self._open.close()
