"""A run that is killed, stopped and starved of disk space again and again, and must end as if nothing had happened.

    python tests/torture.py                                       50 kills, 20 SIGTERMs, 5 full disks
    python tests/torture.py --kills 3 --terms 2 --full 1          the short form, as the test suite has it

Two ranks train a small network on pictures that are made here. A second run of the same command is disturbed: SIGKILL
of one rank or of all at random moments and while a checkpoint is being written, SIGTERM of the launcher or of a rank,
a full disk for some seconds; after each the same command is started again. In the end its weights, momentum, running
statistics and losses must equal the undisturbed run's to the last bit, no restart may have gone back further than to
the checkpoint before, and nothing may be left over. OUT is a small tmpfs, for which root is needed; otherwise the disk
is not filled, which is said.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import write_jpeg
from safetensors.torch import load_file

IMAGES, CLASSES, BATCH = 480, 3, 48
STEPS_PER_EPOCH = IMAGES // BATCH
START_S, STEP_S, END_S, RUN_S = 240, 120, 120, 3600
DISK_MB = 96
COMPLAINT = re.compile(r"training goes on|metrics cannot be written")


class SurvivalError(Exception):
    """What must not happen has happened."""


class Job:
    """One start of the command.

    Args:
        out: the run's folder.
        data: what it trains on.
        epochs: its length.
        log: file for what it says.
    """

    def __init__(self, out, data, epochs, log):
        self.out, self._log = out, log
        self._from = log.stat().st_size if log.exists() else 0
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
            "knltrain", "train", "--recipe", "cifar-256", "--data", data, "--out", out, "--global-batch", BATCH,
            "--epochs", epochs, "--precision", "fp32", "--optim.lr", 0.05, "--workers", 1, "--checkpoint.keep", 2,
        ]  # fmt: skip
        with log.open("a") as file:
            self.launcher = subprocess.Popen(
                list(map(str, command)), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def said(self):
        """What this start has said."""
        with self._log.open("rb") as file:
            file.seek(self._from)
            return file.read().decode(errors="replace")

    def ranks(self):
        """Process ids of its ranks, in their order."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                environ = (path / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            rank = [int(entry[5:]) for entry in environ if entry.startswith(b"RANK=")]
            if str(self.out).encode() in words and rank:
                found[rank[0]] = int(path.name)
        return [pid for _, pid in sorted(found.items())]

    def wait(self):
        """Waits for the launcher and all ranks, and returns the launcher's code."""
        code = until(self.launcher.poll, END_S, lambda: f"the launcher ends: {self.said()[-2000:]}", ended=True)
        until(lambda: not self.ranks(), END_S, "all ranks end")
        return code

    def kill(self):
        """Ends everything."""
        self.launcher.kill()
        for pid in self.ranks():
            send(pid, signal.SIGKILL)
        self.launcher.wait()
        until(lambda: not self.ranks(), END_S, "killed ranks are gone")


def until(condition, seconds, what, *, ended=False, pause=0.02):
    """Waits for a condition and returns its value; with ``ended``, 0 counts."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value or (ended and value is not None):
            return value
        if time.monotonic() > deadline:
            raise SurvivalError(f"not within {seconds} s: {what() if callable(what) else what}")
        time.sleep(pause)


def send(pid, number):
    """Sends a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def steps_of(out):
    """The steps in metrics.jsonl, each with its loss, in the order in which they stand there."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # is being written
        if "loss" in row:
            rows.append((row["step"], row["loss"]))
    return rows


def reached(out):
    """The last step."""
    rows = steps_of(out)
    return rows[-1][0] if rows else 0


def resumed_at(job):
    """The step that a start went on from; None as long as it has not said."""
    said = job.said()
    if found := re.search(r"resumed from \S*step-(\d+)", said):
        return int(found[1])
    if "gradients are all-reduced" not in said or any(
        path.suffix != ".tmp" for path in job.out.glob("checkpoints/step-*")
    ):
        return None  # is about to say
    return 0


def wait_for_steps(job, least):
    """Waits until training is under way."""

    def ready():
        if job.launcher.poll() is not None:
            raise SurvivalError(f"ended with {job.launcher.returncode}: {job.said()[-3000:]}")
        return resumed_at(job) is not None and reached(job.out) >= least

    until(ready, START_S, lambda: f"a step: {job.said()[-3000:]}")


def disturb(kind, job, rng):
    """Does to a run what it must survive; returns whether it has ended by that."""
    time.sleep(rng.uniform(0, 2.0))
    if kind == "full":
        fill = job.out.parent / "filler"
        before, told = reached(job.out), len(COMPLAINT.findall(job.said()))
        with fill.open("wb", buffering=0) as file:  # what does not fit is not written again when it is closed
            try:
                while True:
                    file.write(bytes(2**16))
            except OSError:
                pass
        time.sleep(rng.uniform(1, 3))
        until(lambda: len(COMPLAINT.findall(job.said())) > told or job.launcher.poll() is not None, STEP_S,
              lambda: f"the full disk is said: {job.said()[-2000:]}")  # fmt: skip
        alive = job.launcher.poll() is None
        fill.unlink(missing_ok=True)
        if not alive:
            raise SurvivalError(f"a full disk has ended the run: {job.said()[-3000:]}")
        until(lambda: reached(job.out) > before, STEP_S, "training goes on")
        return False
    if kind == "write":
        folder = job.out / "checkpoints"
        until(lambda: list(folder.glob(".step-*.tmp")) or job.launcher.poll() is not None, STEP_S,
              "a checkpoint is being written", pause=0.0005)  # fmt: skip
    victims = job.ranks()
    if not victims:
        return True  # it has ended by itself
    one = rng.choice(victims)
    if kind == "term":
        send(rng.choice([job.launcher.pid, one]), signal.SIGTERM)
    elif rng.random() < 0.5:
        send(one, signal.SIGKILL)
    else:
        job.kill()
    return True


def check(reference, out):
    """Compares two finished runs.

    Raises:
        SurvivalError: they are not the same.
    """
    expected, got = (max((folder / "checkpoints").iterdir()) for folder in (reference, out))
    if expected.name != got.name:
        raise SurvivalError(f"{got.name} and not {expected.name}")
    names = sorted(path.name for path in expected.iterdir())
    if names != sorted(path.name for path in got.iterdir()):
        raise SurvivalError("the checkpoints have other files")
    for name in names:
        if name.endswith(".safetensors"):
            one, two = load_file(expected / name), load_file(got / name)
            wrong = [key for key in one.keys() | two.keys() if key not in one or key not in two
                     or not torch.equal(one[key], two[key])]  # fmt: skip
            if wrong:
                raise SurvivalError(f"{name}: {len(wrong)} tensors are not the same, among them {sorted(wrong)[0]}")
    if steps_of(reference) != steps_of(out):
        raise SurvivalError("metrics.jsonl has other steps or losses")
    left = {path.name for path in out.rglob("*")} - {path.name for path in reference.rglob("*")}
    left -= {name for name in left if name.startswith(("events.out", "step-"))}  # a file a start; the best checkpoint
    if left:
        raise SurvivalError(f"left over: {', '.join(sorted(left))}")


def torture(kills, terms, full, seed, folder, say=print):
    """Runs both runs and returns a summary.

    Raises:
        SurvivalError: something did not survive.
    """
    rng = random.Random(seed)
    kinds = ["kill"] * (kills - kills // 2) + ["write"] * (kills // 2) + ["term"] * terms + ["full"] * full
    rng.shuffle(kinds)
    # Every restart goes back by an epoch at most, and is left alone for about as long.
    epochs = 3 + 2 * len(kinds)
    data = folder / "data"
    for index in range(IMAGES):
        write_jpeg(data / "train" / f"class{index % CLASSES}" / f"{index:04}.jpg", 36, 36, index)
    for index in range(2 * CLASSES):
        write_jpeg(data / "val" / f"class{index % CLASSES}" / f"{index}.jpg", 36, 36, 10_000 + index)
    reference, out = folder / "undisturbed" / "run", folder / "disturbed" / "run"
    out.parent.mkdir()
    mounted = False
    if full:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "none", out.parent], check=True, timeout=20)
        mounted = True
    job = None
    try:
        started = time.monotonic()
        job = Job(reference, data, epochs, folder / "undisturbed.log")
        if until(job.launcher.poll, RUN_S, "the undisturbed run ends", ended=True):
            raise SurvivalError(f"the undisturbed run: {job.said()[-3000:]}")
        say(f"undisturbed: {reached(reference)} steps in {time.monotonic() - started:.0f} s")
        started, starts, lost, most_lost = time.monotonic(), 0, 0, 0
        log, before, exact, unwritten = folder / "disturbed.log", 0, False, 0
        while kinds:
            job = Job(out, data, epochs, log)
            starts += 1
            wait_for_steps(job, before)
            at = resumed_at(job)
            gone = before - at
            # A checkpoint is due every epoch; one that is killed while it is written leaves the one before, and so does
            # one for which the disk was full.
            if gone > (0 if exact else (2 + unwritten) * STEPS_PER_EPOCH) or gone < 0:
                raise SurvivalError(f"start {starts} went on from step {at}; step {before} had been done")
            lost, most_lost = lost + gone, max(most_lost, gone)
            ended = False
            while kinds and not ended:
                kind = kinds.pop()
                until(lambda at=at: reached(out) > at, STEP_S, "a new step")
                ended = disturb(kind, job, rng)
            if not ended:
                say(f"start {starts}: {kind} at step {reached(out)}, and it goes on")
                break
            code = job.wait()
            before, exact = reached(out), kind == "term" and "stopped by a signal" in job.said()
            unwritten = len(re.findall(r"warning: checkpoint \S+: No space left", job.said()))
            say(f"start {starts}: {kind} at step {before}, launcher ended with {code}; {len(kinds)} to come")
        else:
            job = Job(out, data, epochs, log)
            starts += 1
        if code := until(job.launcher.poll, RUN_S, "the last start ends", ended=True):
            raise SurvivalError(f"the last start ended with {code}: {job.said()[-3000:]}")
        check(reference, out)
        return {"kills": kills, "terms": terms, "full_disks": full, "seed": seed, "starts": starts,
                "steps": reached(out), "steps_done_again": lost, "most_done_again_at_once": most_lost,
                "checkpoint_every_steps": STEPS_PER_EPOCH,
                "wall_s": round(time.monotonic() - started)}  # fmt: skip
    finally:
        if job is not None:
            job.kill()
        if mounted:
            subprocess.run(["umount", "--lazy", out.parent], timeout=20)  # a process that was killed may still hold it


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--full", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the result")
    asked = parser.parse_args()
    full = asked.full
    if full and os.geteuid() != 0:
        print("the disk is not filled: only root can mount a small one", file=sys.stderr)
        full = 0
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        result = torture(asked.kills, asked.terms, full, asked.seed, folder, lambda line: print(line, flush=True))
    except SurvivalError as failure:
        sys.exit(f"FAILED: {failure}\nlogs in {folder}")
    shutil.rmtree(folder)
    print(json.dumps(result))
    if asked.json:
        Path(asked.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
