"""Whole runs that are killed, stopped, moved or have no room, a few of each.

`python -m benchmarks.faults` does the same with as many as docs/reliability.md
tells of.
"""

import pytest

from benchmarks import faults

pytestmark = pytest.mark.slow


def run(name: str, folder) -> dict:
  found = faults.ROWS[name](folder, True)
  if "skipped" in found:
    pytest.skip(found["skipped"])
  return found


def test_killed_at_any_moment_a_run_comes_to_the_same_bits(tmp_path):
  found = run("kills", tmp_path)
  assert found["same_bits"] == found["kills"] == 3


def test_killed_again_and_again_a_run_comes_to_the_same_bits(tmp_path):
  found = run("kills_in_a_loop", tmp_path)
  assert found["same_state"] and found["same_metrics"] and found["kills"] > 0


def test_stopped_at_any_moment_a_run_loses_nothing(tmp_path):
  found = run("signals", tmp_path)
  for processes in ("processes_1", "processes_2"):
    counts = found[processes]
    assert counts["code_0"] == counts["signals"] == 2
    assert counts["steps_lost_most"] <= 1
    assert counts["runs_same_bits"] == counts["runs"]
  early = found["before_the_first_step"]
  assert set(early["codes"]) <= {"0", "-15"} and early["steps_lost_most"] == 0


def test_a_disk_that_is_full_at_any_moment_is_one_line(tmp_path):
  found = run("full_disks", tmp_path)
  for kind in ("checkpoints", "workdir"):
    counts = found[kind]
    assert set(counts.values()) == {1}, kind
  counts = found["store"]
  assert counts["a_line_and_code_1"] == counts["full"] == 2
  assert counts["same_bytes"] == 2


def test_moved_to_other_devices_and_processes_it_is_the_same_run(tmp_path):
  found = run("moves", tmp_path)
  assert found["same_batches"] == found["same_masks"] == found["steps"]
  assert found["parameters_differ_most"] <= 1e-5


def test_numbers_that_go_wrong_never_get_into_a_state(tmp_path):
  found = run("numbers", tmp_path)
  assert found["finite"] == found["incident_recorded"] == found["runs"] == 12
  assert found["policy_obeyed"] == 12
  assert found["killed_same_bits"] == found["killed_after_it"] == 2


def test_runs_go_on_from_damaged_checkpoints(tmp_path):
  found = run("damaged_checkpoints", tmp_path)
  assert found["silently_wrong"] == 0
  assert found["named"] == found["refused_under_strict"] == 30
  assert found["runs_same_bits"] == found["runs"] == 1
