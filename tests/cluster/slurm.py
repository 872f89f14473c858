"""A Slurm cluster of one node, in namespaces of its own: its ports, its sockets and its state are nobody else's."""

import os

from cluster.hosts import Host, until

_START_S = 30.0
_ADDRESS = "10.88.0.1"
_CONF = """
ClusterName=test
SlurmctldHost=head({address})
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/spool
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
MpiDefault=pmi2
ReturnToService=2
# A requeued job starts again when its old credential has expired, and not after two minutes.
AuthInfo=cred_expire=5
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
KillWait=20
NodeName=head NodeAddr={address} CPUs={cpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=head Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=head PriorityTier=2
"""
_SETUP = """
# Slurm resolves no address, not even a written one, where loopback is the only interface.
ip link add eth0 type bridge
ip address add {address}/24 dev eth0
ip link set eth0 up
mkdir -m 755 /run/munge {run} {run}/state {run}/spool
dd if=/dev/urandom of=/run/munge/key bs=128 count=1 status=none
chmod 400 /run/munge/key
munged --force --key-file=/run/munge/key --log-file=/run/munge/log --pid-file=/run/munge/pid --seed-file=/run/munge/seed
export SLURM_CONF={folder}/slurm.conf
slurmctld
slurmd
"""


class Slurm:
    """munged, slurmctld and slurmd, running as root.

    Args:
        folder: for their files.
    """

    def __init__(self, folder):
        folder.mkdir(parents=True)
        run, self._conf = "/run/slurm", folder / "slurm.conf"
        places = {"run": run, "folder": folder, "address": _ADDRESS}
        self._conf.write_text(_CONF.format(cpus=len(os.sched_getaffinity(0)), **places))
        self.host = Host("head", folder / "head", _SETUP.format(**places))
        self._logs = [folder / "head" / "log", folder / "slurmctld.log", folder / "slurmd.log"]
        with (folder / "head" / "hosts").open("a") as hosts:
            hosts.write(f"{_ADDRESS} head\n")
        try:
            until(lambda: self.run("sinfo", "-h", "-o", "%T", check=False).stdout.strip() == "idle", _START_S, self.log)
        except BaseException:
            self.stop()
            raise
        self.host.settle()

    def run(self, *command, timeout=60, check=True, **environment):
        """Runs a command on the node and returns it, finished."""
        return self.host.run(*command, timeout=timeout, check=check, SLURM_CONF=str(self._conf), **environment)

    def submit(self, *arguments, **environment):
        """Submits a batch script and returns the job's number."""
        return self.run("sbatch", "--parsable", *arguments, **environment).stdout.strip()

    def job(self, number):
        """What scontrol says of a job, by key."""
        said = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(field.partition("=")[::2] for field in said.split() if "=" in field)

    def log(self):
        """What the daemons said."""
        return "\n".join(path.read_text() for path in self._logs if path.exists())

    def clear(self):
        """Cancels every job and waits until none is left."""
        self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        self.run("scancel", "--user=root", check=False)
        until(lambda: not self.run("squeue", "-h").stdout.strip(), _START_S, self.log)

    def stop(self):
        """Ends the node and what runs on it."""
        self.host.stop()
