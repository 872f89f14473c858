"""The script that compares measured steps with predicted ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cluster.hosts import need

from knltrain.predict.systems import load

PERF = Path(__file__).parents[2] / "perf"


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, PERF / "predicted.py", "--quick", "--json", "--out", "out", *arguments],
        capture_output=True, text=True, timeout=400, cwd=cwd,
    )  # fmt: skip


@pytest.mark.hand
def test_a_step_is_predicted_from_layers_and_links_and_then_measured(tmp_path):
    need("unshare", "nsenter", "setpriv", "taskset", "ip", "tc")
    done = run("--links", "0.5", "--bucket-mb", "1", "--precision", "fp32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "out/predicted.json").read_text()) == result
    assert (tmp_path / "out/predicted.png").read_bytes().startswith(b"\x89PNG")
    (row,) = result["settings"]
    assert (row["model"], row["ranks"], row["link_gbit"]) == ("alexnet_bn_small", 2, 0.5)
    assert row["deviation"] == pytest.approx(row["predicted_s"] / row["step_s"] - 1)
    assert result["within_10_percent"] == (abs(row["deviation"]) <= 0.1)
    (system,) = map(load, map(str, (tmp_path / "out").glob("*.toml")))
    assert (system.node.cores.value, system.node.ranks.value) == (1, 1), "a host of one core and one rank"
    # What the link carries is what the gradients have: they are not faster than that.
    assert 0.2 < 8 * system.network.link_gb_per_s.value < 0.55
    assert row["predicted_s"] > 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--hosts", "1"], "--hosts 1: nothing is communicated"),
        (["--links", "0"], "'--links': 0"),
        (["--dtypes", "fp8"], "comm.dtype: 'fp8' will not do"),
    ],
)
def test_refusals(arguments, words, refusal, tmp_path):
    assert words in refusal("predicted", *arguments, "--quick", "--out", tmp_path / "out")
