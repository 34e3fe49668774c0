"""The launcher's loop when a role leaves: in order after the end, or before its time."""

import subprocess
import sys

import pytest

from offtrail.platform.config.schema import Config
from offtrail.platform.launcher import run as module
from offtrail.platform.launcher.hosts import LocalHandle
from offtrail.platform.launcher.run import Role, Run, watch
from offtrail.platform.runtime.roles import RoleSpec
from offtrail.platform.tracking.summary import write_summary
from offtrail.platform.wire.sockets import WaitError


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


def test_who_dials_again_is_the_same_process_to_the_broker(tmp_path, monkeypatch):
    """A Hello that the broker reads late has given its name away; another process's would be refused."""
    dialled = []

    class Unanswered:
        def __init__(self, endpoint, identity, keys, process):
            dialled.append((identity, process))

        def request(self, *args, **kwargs):
            raise WaitError("no welcome")

        def close(self):
            pass

    monkeypatch.setattr(module, "Client", Unanswered)
    monkeypatch.setattr(module.Endpoint, "read", lambda *args: None)
    monkeypatch.setattr(module.ClientKeys, "read", lambda *args: None)
    run = Run(Config(), tmp_path, hosts=None)
    for _ in range(2):
        with pytest.raises(WaitError):
            run.dial()
    assert len(dialled) == 2
    assert len(set(dialled)) == 1
