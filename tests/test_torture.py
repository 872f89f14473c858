"""The short form of tests/torture.py."""

import os

import torture


def test_a_run_survives_kills_signals_and_a_full_disk(tmp_path):
    full = 1 if os.geteuid() == 0 else 0
    result = torture.torture(3, 2, full, 1, tmp_path)
    assert result["starts"] == 6
    assert result["most_done_again_at_once"] <= 2 * result["checkpoint_every_steps"]
