"""Nothing is downloaded: no verb opens a connection to anywhere, in any of its processes."""

import json
import os
import subprocess
import sys

import pytest

# Python reads a module of this name as it starts, in the processes of the decoders as well.
SPY = """
import os, sys

def spy(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"):
        address = arguments[1]
        if not isinstance(address, tuple) or str(address[0]).startswith("127."):
            return  # of this machine
    elif event not in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "http.client.connect"):
        return
    with open(os.environ["SPY_LOG"], "a") as log:
        log.write(f"{event} {arguments!r}\\n")

sys.addaudithook(spy)
"""


@pytest.fixture
def watched(knltrain, tmp_path):
    """Runs the command and returns it, and what it was seen to do."""
    (tmp_path / "spy").mkdir()
    (tmp_path / "spy" / "sitecustomize.py").write_text(SPY)
    log = tmp_path / "log"

    def run(*arguments):
        log.write_text("")
        result = knltrain(*arguments, PYTHONPATH=str(tmp_path / "spy"), SPY_LOG=str(log))
        assert result.returncode == 0, result.stderr
        return result, log.read_text()

    return run


def test_the_spy_sees_what_there_is_to_see(tmp_path, watched):
    watched("recipes")
    code = "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.connect(('198.51.100.1', 9))"
    log = tmp_path / "log"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "spy"), "SPY_LOG": str(log)}
    subprocess.run([sys.executable, "-c", code], env=environ, timeout=60)
    assert "socket.connect" in log.read_text()


@pytest.mark.slow
def test_no_verb_connects_to_anywhere(watched, image_folder, tmp_path):
    small = ["--image-size", 32, "--precision", "fp32", "--engine", "eager"]
    train = ["train", "--recipe", "cifar-256", *small, "--augment.resize", 32, "--global-batch", 16, "--max-steps", 1]
    verbs = [
        ["recipes"],
        ["plan"],
        ["prepare", image_folder, tmp_path / "raw", "--size", 32, "--workers", 1],
        [*train, "--data", tmp_path / "raw", "--out", tmp_path / "run"],
        ["eval", tmp_path / "run", "--data", tmp_path / "raw", "--precision", "fp32"],
        ["data", image_folder, "--sheet", tmp_path / "sheet.png"],
        [
            "bench",
            "--model",
            "alexnet_bn_small",
            "--batch",
            4,
            "--steps",
            1,
            "--precision",
            "fp32",
            "--engine",
            "eager",
        ],
    ]
    for verb in verbs:
        result, seen = watched(*verb, "--json")
        assert json.loads(result.stdout.splitlines()[-1])
        assert not seen, verb


def test_torchvisions_models_come_without_weights(watched, image_folder, tmp_path, torchvision):
    _, seen = watched("train", "--config", "/dev/null", "--model", "torchvision:squeezenet1_1", "--data", image_folder,
                      "--out", tmp_path / "run", "--image-size", 64, "--precision", "fp32", "--engine", "eager",
                      "--global-batch", 4, "--max-steps", 1, "--workers", 0)  # fmt: skip
    assert not seen
