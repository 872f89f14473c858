"""Whether the tests notice faults: applies one fault of mutants.toml at a time and runs the tests beside it.

    nice python tests/mutants/run.py --out /tmp/mutants.jsonl     # all; again: what is missing
    python tests/mutants/run.py --only lars-batches slurm-port    # these
    python tests/mutants/run.py --tree ../older                   # the same in another checkout

Each mutant is killed (a test failed, crashed or took longer than five minutes), SURVIVED (all passed), skipped (this
processor does not run the code) or error (the old text is not in the file exactly once, it does not compile, or no test
ran). The exit code is 1 where one survived, else 2 where there was an error.

The tree is left alone: its files are copied to a temporary folder, where the kernels are built and the tests run. First
all tests that are named run once without a mutant; those that fail then are left out afterwards, and are printed.
It takes a C++ compiler, cmake, ninja, and nanobind or pip with a package index; CMAKE_BUILD_PARALLEL_LEVEL is how many
compilers run at once. The first build takes a minute, a mutant five to ten seconds, one in C++ half a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
TIME_LIMIT = 300  # seconds for a mutant's tests
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not hand")  # what CI runs has to notice
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)  # of pytest's summary: a test, and why

# The environment has knltrain installed editable: this finder would import it from there.
SITECUSTOMIZE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
"""


@dataclass(frozen=True)
class Mutant:
    """One fault: `old`, which is in `file` exactly once, becomes `new`; `tests` are the ones to notice."""

    id: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    processor: str = ""  # an instruction set of /proc/cpuinfo without which the code does not run


def read_list(path: Path) -> list[Mutant]:
    """The mutants of a list. Raises TypeError for a field that there is not."""
    entries = tomllib.loads(path.read_text())["mutant"]
    return [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


class Copy:
    """A copy of a tree with its own kernels, in which tests run."""

    def __init__(self, tree: Path, room: Path):
        self.root, self.room, self.build = room / "tree", room, room / "build"
        listed = ["git", "-C", str(tree), "ls-files", "-co", "--exclude-standard", "-z"]
        for name in filter(None, subprocess.check_output(listed, text=True).split("\0")):
            if (tree / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(tree / name, self.root / name)
        (room / "site").mkdir()
        (room / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
        paths = f"{self.root}{os.pathsep}{room / 'site'}"
        # Bytecode is kept by the source's size and time in whole seconds, which two mutants may share.
        self.environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
        self.first_build()
        ask = "import knltrain, knltrain._kernels as kernels; print(knltrain.__file__, kernels.__file__, sep='\\n')"
        code, where = self.python("-c", ask)
        if code != 0 or not all(Path(line).is_relative_to(self.root) for line in where.splitlines()):
            raise SystemExit(f"the tests would not import the copy: {where}")

    def python(self, *arguments: str, limit: float | None = None) -> tuple[int | None, str]:
        """Python in the copy: its exit code, None for one ended at the limit, and what it printed."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return None, ""
        return process.returncode, output

    def first_build(self) -> None:
        """Builds the kernels, and keeps the build to start from."""
        tools = self.room / "tools"
        build_system = tomllib.loads((self.root / "pyproject.toml").read_text())["build-system"]
        nanobind = [name for name in build_system["requires"] if name.startswith("nanobind")]
        if importlib.util.find_spec("nanobind") is None:
            install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tools), *nanobind]
            subprocess.run(install, check=True)
        path = os.pathsep.join([str(tools), os.environ.get("PYTHONPATH", "")])
        found = [sys.executable, "-m", "nanobind", "--cmake_dir"]
        cmake_dir = subprocess.check_output(found, text=True, env={**os.environ, "PYTHONPATH": path}).strip()
        given = {"nanobind_DIR": cmake_dir, "Python_EXECUTABLE": sys.executable, "CMAKE_BUILD_TYPE": "Release"}
        options = [f"-D{name}={value}" for name, value in given.items()]
        command = ["cmake", "-S", str(self.root / "kernels"), "-B", str(self.build), "-G", "Ninja", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        if not self.compile():
            raise SystemExit("the kernels do not compile without a mutant")
        shutil.copytree(self.build, self.room / "first")
        self.first = next((self.root / "knltrain").glob("_kernels*.so")).read_bytes()

    def compile(self) -> bool:
        """Builds what has changed and puts the module into the package; false where it does not compile."""
        done = subprocess.run(["cmake", "--build", str(self.build)], capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stdout[-2000:], file=sys.stderr)
            return False
        for module in self.build.glob("_kernels*.so"):
            shutil.copy2(module, self.root / "knltrain")
        return True

    def undo_compile(self) -> None:
        """The build and the module as they were first, with their times, so that nothing else is built again."""
        shutil.rmtree(self.build)
        shutil.copytree(self.room / "first", self.build)
        next((self.root / "knltrain").glob("_kernels*.so")).write_bytes(self.first)

    def failing(self, tests: list[str]) -> list[str]:
        """The tests that fail without a mutant."""
        code, output = self.python(*PYTEST, *tests)
        print(output.strip().rpartition("\n")[2], flush=True)
        if code not in (0, 1):
            raise SystemExit(f"without a mutant, pytest ended with {code}")
        return FAILED.findall(output)

    def judge(self, mutant: Mutant, left_out: list[str]) -> tuple[str, str]:
        """What the tests say of a mutant: the verdict and what it rests on."""
        file = self.root / mutant.file
        text = file.read_text() if file.is_file() else ""
        if text.count(mutant.old) != 1:
            return "error", f"the old text is {text.count(mutant.old)} times in {mutant.file}"
        if mutant.processor and not re.search(rf"\b{mutant.processor}\b", Path("/proc/cpuinfo").read_text()):
            return "skipped", f"this processor has no {mutant.processor}"
        native, before = mutant.file.startswith("kernels/"), file.stat()
        try:
            file.write_text(text.replace(mutant.old, mutant.new))
            if native and not self.compile():
                return "error", "it does not compile"
            leave = [f"--deselect={test}" for test in left_out]
            code, output = self.python(*PYTEST, "-x", *leave, *mutant.tests, limit=TIME_LIMIT)
        finally:
            file.write_text(text)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
            if native:
                self.undo_compile()
        if code is None:
            return "killed", "time-out"
        last = output.strip().rpartition("\n")[2]
        if code in (1, 2) or code < 0:  # a failure, a module that cannot be imported, a crash
            failed = FAILED.search(output)
            return "killed", failed[1] if failed else f"exit code {code}"
        if code == 0 and " passed" in last:
            return "SURVIVED", last
        return "error", f"no test ran: {last}"


def main() -> int:
    """Runs the mutants that are asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tree", type=Path, default=HERE.parents[1], help="checkout to test; this one if not given")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these mutants instead of all")
    parser.add_argument("--list", type=Path, default=HERE / "mutants.toml", help="the mutants")
    parser.add_argument("--out", type=Path, help="one JSON line a mutant; those already in it are not run again")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what runs is ended and the temporary folder removed

    mutants = read_list(options.list)
    if unknown := set(options.only or ()) - {mutant.id for mutant in mutants}:
        parser.error(f"no mutant {', '.join(sorted(unknown))}")
    results: dict[str, dict[str, object]] = {}
    if options.out and options.out.is_file():
        results = {entry["id"]: entry for entry in map(json.loads, options.out.read_text().splitlines())}
    asked = [mutant for mutant in mutants if options.only is None or mutant.id in options.only]
    missing = [mutant for mutant in asked if mutant.id not in results]

    with tempfile.TemporaryDirectory(prefix="mutants-") as room:
        begin = time.monotonic()
        if missing:
            copy = Copy(options.tree.resolve(), Path(room).resolve())
            left_out = copy.failing(sorted({test for mutant in missing for test in mutant.tests}))
            for test in left_out:
                print(f"fails without a mutant, left out: {test}")
            print(f"{time.monotonic() - begin:.0f} s until the first mutant", flush=True)
        for mutant in missing:
            start = time.monotonic()
            verdict, why = copy.judge(mutant, left_out)
            seconds = round(time.monotonic() - start, 1)
            results[mutant.id] = {"id": mutant.id, "verdict": verdict, "seconds": seconds, "why": why}
            print(f"{verdict:8} {seconds:6.1f} s  {mutant.id}: {why}", flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(results[mutant.id]) + "\n")

    verdicts = [str(results[mutant.id]["verdict"]) for mutant in asked]
    kinds = ("killed", "SURVIVED", "skipped", "error")
    counted = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in kinds)
    print(f"{len(asked)} mutants: {counted}; {time.monotonic() - begin:.0f} s")
    return 1 if "SURVIVED" in verdicts else 2 if "error" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
