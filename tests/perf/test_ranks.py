"""The script that lets settings of several ranks take turns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cluster.hosts import need

PERF = Path(__file__).parents[2] / "perf"


@pytest.fixture
def measured(tmp_path):
    """Runs the script small and returns what it wrote, and what it said."""

    def run(*arguments, code=0):
        result = subprocess.run(
            [sys.executable, PERF / "ranks.py", *arguments, "--quick", "--json", "--out", tmp_path / "out"],
            capture_output=True, text=True, timeout=240, cwd=tmp_path,
        )  # fmt: skip
        assert result.returncode == code, result.stderr
        if code:
            return None, result.stderr
        printed = json.loads(result.stdout.splitlines()[-1])
        assert json.loads((tmp_path / "out" / "ranks.json").read_text()) == printed
        assert (tmp_path / "out" / "ranks.png").read_bytes().startswith(b"\x89PNG")
        return printed, result.stderr

    return run


def test_layouts_of_this_node_take_turns(measured):
    result, said = measured("--layouts", "1x1,2x1", "--engines", "eager", "--precision", "fp32")
    alone, two = result["settings"]
    assert (alone["ranks"], alone["engine"], alone["backend"], alone["comm_s"]) == (1, "eager", "none", 0)
    assert (two["ranks"], two["local_batch"], two["precision"]) == (2, 8, "fp32")
    assert two["backend"] in ("ccl", "gloo"), "what auto became"
    assert 0 < two["exposed_comm_s"] <= two["comm_s"] < two["step_s"]
    assert 0 < two["exposed_fraction"] < 1
    assert "alexnet_bn_small" in said
    assert "2 x 1" in said


@pytest.mark.hand
def test_hosts_with_links_of_a_speed(measured):
    need("unshare", "nsenter", "setpriv", "taskset", "ip", "tc")
    result, _ = measured("--links", "0.5", "--dtypes", "bf16")
    (row,) = result["settings"]
    assert (row["ranks"], row["link_gbit"], row["dtype"]) == (2, 0.5, "bf16")
    assert row["comm_s"] > 0
    # The link does not carry more than it was told to, and something.
    assert 0.05 < result["links_measured_gbit"]["0.5"] < 0.55
    commands = [read(path) for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [line for line in commands if b"knltrain\0train\0" in line and b"--comm.dtype\0bf16" in line]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give --layouts, ranks on this node, or --links"),
        (["--layouts", "2"], "'--layouts': 2: values separated by commas, as in 1x2,2x1"),
        (["--layouts", "0x1"], "'--layouts': 0x1"),
        (["--links", "-1"], "'--links': -1"),
        (["--layouts", "3x1"], "--batch 16 is not a multiple of 3 ranks"),
        (["--layouts", "2x1", "--dtypes", "fp8"], "comm.dtype: 'fp8' will not do"),
    ],
)
def test_refusals(arguments, words, refusal, tmp_path):
    assert words in refusal("ranks", *arguments, "--quick", "--out", tmp_path / "out")


def test_ranks_that_fail_are_no_measurement(measured, monkeypatch):
    monkeypatch.setenv("CCL_ATL_TRANSPORT", "carrier-pigeon")
    _, said = measured("--layouts", "2x1", "--backends", "ccl", code=1)
    assert "training ended with" in said
    assert "Traceback" not in said


def read(path):
    """A file of a process that may end meanwhile."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
