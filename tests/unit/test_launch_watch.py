"""The launcher's loop when a role leaves: in order after the end, or before its time."""

import subprocess
import sys

import pytest

from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.hosts import LocalHandle
from offtrail.platform.launcher.run import Role, Run, watch
from offtrail.platform.runtime.roles import RoleSpec
from offtrail.platform.tracking.summary import write_summary


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [(0, "completed", "completed"), (0, "interrupted", "failed"), (3, "completed", "failed")],
)
def test_a_role_may_leave_by_itself_only_after_the_broker_said_completed(tmp_path, code, status, expected):
    config = Config()
    config.tracking.progress = "off"
    run = Run(config, tmp_path, hosts=None)  # no endpoint.json: the broker has left too
    process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])
    process.wait()
    handle = LocalHandle("generator-0", process, tmp_path / "generator-0.log")
    run.roles.append(Role(RoleSpec("generator"), handle))
    write_summary(tmp_path, {"status": status})
    found, reason = watch(run, [])
    assert found == expected
    assert ("generator-0 exited" in reason) == (expected == "failed")


@pytest.mark.parametrize(("code", "says"), [(0, "learner-0: ValueError: no such device"), (3, "broker-0 exited with")])
def test_a_broker_that_has_left_after_a_failure_has_written_whose_it_was(tmp_path, code, says):
    config = Config()
    config.tracking.progress = "off"
    run = Run(config, tmp_path, hosts=None)
    process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])
    process.wait()
    run.roles.append(Role(RoleSpec("broker"), LocalHandle("broker-0", process, tmp_path / "broker-0.log")))
    write_summary(tmp_path, {"status": "failed", "reason": "learner-0: ValueError: no such device"})
    status, reason = watch(run, [])
    assert status == "failed"
    assert reason.startswith(says)
