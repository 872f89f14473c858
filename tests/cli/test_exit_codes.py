"""What a command ends with, from its first second on."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from knltrain.cli.main import main

# A library that gets a signal while it is imported, and goes on for long.
SIGNALLED = """
import os, signal, time
os.kill(os.getpid(), signal.{})
for _ in range(600):
    time.sleep(0.1)
"""
IMPORTING = {
    "train": (["train", "--recipe", "cifar-256", "--data", "synthetic"], "torch"),
    "eval": (["eval", ".", "--data", "synthetic"], "torch"),
    "export": (["export", ".", "net.pth"], "torch"),
    "bench": (["bench"], "torch"),
    "prepare": (["prepare", ".", "out"], "PIL"),
    "report": (["report", "."], "matplotlib"),
    "the command": (["recipes"], "click"),
}


def run(arguments, folder, **environment):
    return subprocess.run([sys.executable, "-m", "knltrain", *arguments], cwd=folder, capture_output=True, text=True,
                          timeout=200, env={**os.environ, **environment})  # fmt: skip


@pytest.mark.parametrize("name, code, words", [("SIGINT", 130, "knltrain: interrupted\n"), ("SIGTERM", -15, "")])
@pytest.mark.parametrize("command", IMPORTING)
def test_a_signal_while_modules_are_imported(tmp_path, command, name, code, words):
    arguments, module = IMPORTING[command]
    (tmp_path / "library" / module).mkdir(parents=True)
    (tmp_path / "library" / module / "__init__.py").write_text(SIGNALLED.format(name))
    (tmp_path / "empty").mkdir()
    result = run(arguments, tmp_path / "empty", PYTHONPATH=str(tmp_path / "library"))
    assert (result.returncode, result.stdout, result.stderr) == (code, "", words)
    assert list((tmp_path / "empty").iterdir()) == []


def test_ctrl_c_elsewhere_is_one_line_too(monkeypatch):
    """In the parser, or in a command that catches no errors by itself."""
    from click.testing import CliRunner

    def interrupt(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(main.commands["recipes"], "make_context", interrupt)
    result = CliRunner().invoke(main, ["recipes"])
    assert (result.exit_code, result.stderr) == (130, "knltrain: interrupted\n")


def test_an_ignored_ctrl_c_stays_ignored(tmp_path):
    """As nohup and shells that start jobs in the background leave it."""
    code = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
import knltrain.cli.main
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def weights(path):
    save_file({"a": torch.ones(1)}, path)


def checkpoint_of_torch(path):
    torch.save({"a": torch.ones(1)}, path)


@pytest.mark.parametrize(
    "write, code, words",
    [
        (
            lambda path: path.write_text("epochs = 3\n"),
            2,
            "is not weights: neither safetensors nor a file by torch.save",
        ),
        (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + b"\0" * 100), 2, "is not weights"),
        (lambda path: path.write_bytes(b""), 2, "is empty; give a run's folder, a checkpoint, or a file of weights"),
        (lambda path: path.mkdir(), 1, "no checkpoint, and no run that has one"),
        (weights, 2, "--model must name the network of these weights"),
        (checkpoint_of_torch, 2, "--model must name the network of these weights"),
        (lambda path: os.mkfifo(path), 1, "no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(tmp_path, write, code, words):
    path = tmp_path / "file"
    write(path)
    result = run(["eval", str(path), "--data", "synthetic"], tmp_path)
    assert result.returncode == code
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"knltrain: {path}")
    assert words in line


def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-m", "knltrain", "recipes", "--json"], stdout=full,
                                stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert result.returncode == 1
    assert "standard output, or another file being written: No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
