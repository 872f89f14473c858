"""Two ranks that are stopped go on as if they had not been, each with its own running statistics."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from cluster.runs import TORCHRUN, ccl_is_here
from runs import assert_same_run, newest, state
from small_networks import NETWORKS, PRECISIONS, why_no_engine

RANK = Path(__file__).with_name("resuming_ranks.py")


@pytest.mark.parametrize("engine, backend", [*((engine, "gloo") for engine in PRECISIONS), ("fused", "ccl")])
def test_two_ranks_go_on_as_if_they_had_not_been_stopped(engine, backend, image_folder, tmp_path):
    if reason := why_no_engine(engine) or ("" if backend == "gloo" or ccl_is_here() else "oneCCL does not load"):
        pytest.skip(reason)
    cases = {
        f"{network}-{precision}": {"model": network, "engine": engine, "precision": precision, **options}
        for network, options in NETWORKS.items()
        for precision in PRECISIONS[engine]
    }
    tests = str(Path(__file__).parents[1])
    result = subprocess.run(
        [*TORCHRUN[:-1], RANK, image_folder, tmp_path, backend, json.dumps(cases)],
        capture_output=True, text=True, timeout=280, env={**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for name in cases:
        for parts in ("once", "twice"):
            assert_same_run(tmp_path / name / parts, tmp_path / name / "whole", evaluations=False)
        final = state(tmp_path / name / "whole")
        own = {key.split(": ")[1]: rows for key, rows in final.items() if key.startswith("statistics")}
        assert own, "each rank's own running statistics are there"
        for key, rows in own.items():
            assert not torch.equal(rows[0], rows[1]), key
            mean = final[f"model.safetensors: {key}"]
            torch.testing.assert_close(rows.mean(0), mean, rtol=1e-6, atol=1e-6, msg=key)
        made = json.loads((newest(tmp_path / name / "whole") / "state.json").read_text())["made"]
        assert (made["world_size"], made["threads"], made["engine"]) == (2, 1, engine)
