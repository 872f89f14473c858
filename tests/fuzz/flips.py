"""A fuzzer that flips bytes: whole files go in damaged, and pixels, numbers or one line must come out.

Each input is a function of (target, seed, number), so that a failure is found again by its number:

    python tests/fuzz/flips.py --minutes 20                    # all targets in turns, for as long as you like
    python tests/fuzz/flips.py --target jpeg --seed 3 --minutes 5
    python tests/fuzz/flips.py --target jpeg --seed 3 --only 1234 --keep failing.jpg

Inputs are tried in processes of their own, with little memory and an alarm: what crashes, hangs or fills the memory
there is reported like an exception that is not one of those for people.
"""

import argparse
import faulthandler
import itertools
import json
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.faulty import FAULTY
from fuzz.targets import TARGETS

_MEMORY = 6 << 30
_SLOWEST_S = 20.0
# Values at which programs go wrong: ends of ranges, signs, and markers of formats.
_BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF, 0x0A, 0x22, 0x2D, 0x2E, 0x2F, 0x5B, 0x5C, 0x7B, 0xD8, 0xDA)
_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFDC, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF,
            0xFFFFFFFFFFFFFFFF)  # fmt: skip


def damaged(data, others, rng):
    """A file with up to eight faults in it, most of them near its beginning, where headers are."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        if not out:
            break
        at = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(len(out), 700))
        match rng.randrange(9):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2:
                out[at] = rng.choice(_BYTES)
            case 3:
                kind = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
                number = rng.choice(_NUMBERS) & ((1 << 8 * struct.calcsize(kind)) - 1)
                out[at : at + struct.calcsize(kind)] = struct.pack(kind, number)
            case 4:  # cut short
                del out[at:]
            case 5:  # a hole
                del out[at : at + rng.choice((1, 2, 16, 512))]
            case 6:  # twice
                out[at:at] = out[at : at + rng.choice((1, 4, 64, 512, 4096))]
            case 7:  # the end of another
                other = rng.choice(others)
                out[at:] = other[min(len(other), rng.randrange(len(other) + 1)) :]
            case 8:  # a digit, for what is written in words
                digits = [place for place, byte in enumerate(out) if 0x30 <= byte <= 0x39]
                if digits:
                    place = rng.choice(digits)
                    out[place : place + 1] = rng.choice((b"-1", b"0", b"9" * 30, b"9" * 5000, b"1e999", b"NaN", b"7"))
    return bytes(out)


def make(target, corpus, seed, number):
    """The input of that number."""
    rng = random.Random(f"{target}-{seed}-{number}")
    return damaged(rng.choice(corpus), corpus, rng)


def _attempt(target, data, folder):
    """Tries an input; raises what must not be raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.attempt(data, folder)
        except target.allowed as error:
            assert "\n" not in str(error), f"an error of several lines: {error!r}"
            assert len(str(error)) < 5000, f"an error of {len(str(error))} characters"


def _child(name, seed, first, count, seconds, slowest_s, folder):
    """Tries inputs one after the other, and says in a file of which number it is at."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    until = time.monotonic() + seconds
    target, work = {**TARGETS, **FAULTY}[name](), Path(folder, "work")
    work.mkdir()
    with open(Path(folder, "at"), "w+b") as file:
        file.truncate(8)
        at = mmap.mmap(file.fileno(), 8)
        corpus = target.corpus(work)
        for number in range(first, first + count):
            at[:] = struct.pack("<q", number)
            faulthandler.dump_traceback_later(0.9 * slowest_s)
            signal.setitimer(signal.ITIMER_REAL, slowest_s)  # ends the process, wherever it is
            try:
                _attempt(target, make(name, corpus, seed, number), work)
            except Exception:
                traceback.print_exc()
                sys.exit(1)
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            if time.monotonic() > until:
                break


def run(name, *, seed=0, first=0, count=10**9, seconds=1e9, slowest_s=_SLOWEST_S):
    """Tries inputs in another process.

    Returns:
        How many were tried, and of the one that failed its number and what was said; None if none did.
    """
    fast = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="knltrain-fuzz-", dir=fast) as folder:
        settings = {"name": name, "seed": seed, "first": first, "count": count, "seconds": seconds,
                    "slowest_s": slowest_s, "folder": folder}  # fmt: skip
        result = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps(settings)],
            capture_output=True, text=True, errors="replace", env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        path = Path(folder, "at")
        (at,) = struct.unpack("<q", path.read_bytes()) if path.exists() else (first,)
    if result.returncode == 0:
        return at - first + 1, None
    by = signal.Signals(-result.returncode).name if result.returncode < 0 else f"exit code {result.returncode}"
    if result.returncode == -signal.SIGALRM:
        by = f"no end within {slowest_s:g} s"
    return at - first + 1, (at, f"{by}\n{result.stderr[-3000:]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="of all targets together")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="default all, in turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this number of one target, in this process")
    parser.add_argument("--keep", type=Path, help="with --only: write the input there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(**json.loads(options.child))
        return
    names = options.target or sorted(TARGETS)
    if options.only is not None:
        target = TARGETS[names[0]]()
        with tempfile.TemporaryDirectory() as folder:
            data = make(names[0], target.corpus(Path(folder)), options.seed, options.only)
            if options.keep:
                options.keep.write_bytes(data)
            _attempt(target, data, Path(folder))
        return
    failures, tried = 0, dict.fromkeys(names, 0)
    end = time.monotonic() + 60 * options.minutes
    turns = itertools.cycle(names)
    while (left := end - time.monotonic()) > 0:
        name = next(turns)
        seconds = min(left, 60 * options.minutes / len(names), 60.0)
        done, failure = run(name, seed=options.seed, seconds=seconds, first=tried[name])
        tried[name] += done
        if failure:
            failures += 1
            number, said = failure
            print(f"{name} --seed {options.seed} --only {number}: {said}", flush=True)
    print(", ".join(f"{name} {count:,}" for name, count in tried.items()), f"inputs; {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
