"""knltrain doctor as a user meets it: the table, JSON, exit codes; and on this machine."""

import json
import sys
import time

import pytest
from click.testing import CliRunner

import knltrain.doctor
from knltrain.cli.main import main
from knltrain.doctor import examine
from knltrain.doctor import machine as checks
from knltrain.doctor.finding import SEVERITIES, Finding

FINDINGS = [
    Finding("isa", "ok", "avx2"),
    Finding("memory", "note", "a", "b", "c"),
    Finding("affinity", "warning", "a", "b", "taskset -p"),
]
BAD = Finding("kernels", "error", "1 of 2", "nothing works", "repair it")


def invoke(monkeypatch, findings, *arguments):
    asked = []
    monkeypatch.setattr(knltrain.doctor, "examine", lambda data: asked.append(data) or findings)
    return CliRunner().invoke(main, ["doctor", *arguments]), asked


@pytest.mark.parametrize(
    "findings, code, worst",
    [([FINDINGS[0]], 0, "ok"), (FINDINGS[:2], 0, "note"), (FINDINGS, 0, "warning"), ([*FINDINGS, BAD], 1, "error")],
)
def test_exit_codes_and_json(monkeypatch, findings, code, worst):
    result, asked = invoke(monkeypatch, findings, "--json")
    assert result.exit_code == code
    assert asked == [None]
    (line,) = result.stdout.splitlines()
    answer = json.loads(line)
    assert answer["worst"] == worst == answer["findings"][0]["severity"]
    assert {"name", "severity", "symptom", "cause", "remedy", "seconds"} == answer["findings"][0].keys()
    assert len(answer["findings"]) == len(findings)
    assert "isa" in result.stderr


def test_the_table_has_the_bad_ones_first(monkeypatch, tmp_path):
    result, asked = invoke(monkeypatch, [*FINDINGS, BAD], "--data", str(tmp_path))
    assert asked == [tmp_path]
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")][:4] == list(SEVERITIES)
    assert lines[0].split() == ["error", "kernels", "nothing", "works"]
    assert lines[1].split() == ["cause:", "1", "of", "2"]
    assert lines[2].split() == ["remedy:", "repair", "it"]
    assert lines[-1].endswith("1 error, 1 warning, 1 note, 1 ok")


def test_a_check_that_raises_takes_none_with_it(monkeypatch):
    def fail(machine):
        raise OSError("sysfs is gone")

    monkeypatch.setitem(checks.CHECKS, "swap", fail)
    monkeypatch.setattr(knltrain.doctor, "run_torch_checks", lambda names, data: [])
    found = {finding.name: finding for finding in examine()}
    assert "OSError: sysfs is gone" in found["swap"].cause
    assert found.keys() == {*checks.CHECKS, "interface", "libfabric"}


def test_without_torch_it_says_what_it_can(monkeypatch):
    """As on a login node."""
    monkeypatch.setattr(knltrain.doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(knltrain.doctor, "run_torch_checks", lambda names, data: pytest.fail("tried torch"))
    found = {finding.name: finding for finding in examine()}
    assert found["torch"].severity == "warning"
    assert "all-reduce" in found["torch"].cause
    assert "isa" in found


def test_this_machine(knltrain, image_folder):
    started = time.monotonic()
    result = knltrain("doctor", "--data", image_folder, "--json")
    answer = json.loads(result.stdout.splitlines()[-1])
    found = {finding["name"]: finding for finding in answer["findings"]}
    assert found.keys() == {*checks.CHECKS, "interface", "libfabric", "torch", "kernels", "engines", "openmp",
                            "all-reduce", "oneccl", "data"}  # fmt: skip
    assert result.returncode == (answer["worst"] == "error")
    assert {name: found[name]["cause"] for name in ("torch", "openmp", "all-reduce", "data")
            if found[name]["severity"] == "error"} == {}  # fmt: skip
    assert "bf16" in found["all-reduce"]["cause"]
    assert all(finding["seconds"] <= time.monotonic() - started for finding in answer["findings"])
    assert "Traceback" not in result.stderr
    print(result.stderr, file=sys.stderr)
