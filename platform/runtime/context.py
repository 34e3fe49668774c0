"""What every role process is given: RoleContext, and the Connection it opens to the broker.

Called by role.py (one process a role); roles call `connect()` once, before anything slow, so that a dead broker is told
from a slow role.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from offtrail.platform.config.checkpoints import steps_of
from offtrail.platform.config.schema import Config
from offtrail.platform.runtime.activity import Activity
from offtrail.platform.runtime.attempt import current
from offtrail.platform.runtime.devices import devices_of
from offtrail.platform.runtime.heartbeat import HeartbeatThread
from offtrail.platform.wire.messages import PROTOCOL, Hello, Welcome
from offtrail.platform.wire.sockets import Client, ClientKeys, Endpoint, new_process

log = logging.getLogger("offtrail")

SCORES = "scores-"
"""How the folders of models that score begin, in the weights folder."""
OWN_NAMES = re.compile(r"v\d{8,}\.(safetensors|json)|lock|handles\.sock|verdict-\w+\.\d+(\.writing)?")


@dataclass
class Connection:
    """A role's lines to the broker: requests, heartbeats, and what the role is doing."""

    client: Client
    heartbeat: HeartbeatThread
    activity: Activity
    welcome: Welcome

    def close(self) -> None:
        """Stop the heartbeat and close the sockets."""
        self.heartbeat.close()
        self.client.close()


@dataclass(frozen=True)
class RoleContext:
    """One role process: who it is, its configuration and its run directory.

    ``process``: the random number that says to the broker that its lines are one process's.
    """

    config: Config
    run_dir: Path
    role: str
    index: int
    process: str = field(default_factory=new_process, repr=False)

    @property
    def start_model(self) -> Path:
        """The Hugging Face directory that version 0 comes from: a link that the launcher makes."""
        return self.run_dir / "start"

    def model_of(self, version: int) -> Path:
        """The Hugging Face directory that a version is in where it was kept: the start model, or its checkpoint."""
        return self.run_dir / "checkpoints" / f"step_{version}" if version else self.start_model

    @property
    def weights_folder(self) -> Path:
        """The weight channel's folder, the same for every role of the attempt."""
        return weights_folder(self.config, self.run_dir)

    def connect(self) -> Connection:
        """Dial the broker named by endpoint.json, say Hello, start the heartbeat.

        Raises WaitError when no broker answers in broker.deadline_seconds and RefusedError when it speaks another
        protocol or serves another run.
        """
        settings = self.config.broker
        endpoint = Endpoint.read(self.run_dir / "endpoint.json", settings.deadline_seconds)
        keys = ClientKeys.read(self.run_dir)
        activity = Activity()

        def dial(suffix: str = "") -> Client:
            return Client(endpoint, f"{self.role}-{self.index}{suffix}", keys, self.process)

        client = dial()
        hello = Hello(
            role=self.role, index=self.index, pid=os.getpid(), run=self.run_dir.name, protocol=PROTOCOL,
            devices=devices_of(self.config, self.role, self.index),
        )  # fmt: skip
        welcome, _ = client.request(hello, what="a welcome", deadline_s=settings.deadline_seconds)
        assert isinstance(welcome, Welcome)
        log.info("welcomed")
        beating = partial(dial, "-heartbeat")
        heartbeat = HeartbeatThread(beating, self.role, self.index, activity, settings.heartbeat_seconds)
        return Connection(client, heartbeat, activity, welcome)


def weights_folder(config: Config, run_dir: Path, attempt: str = "") -> Path:
    """An attempt's own folder offtrail-USER-TAG-ATTEMPT in weights.dir if set, else in shared memory; channel=disk:
    runs/NAME/weights, or offtrail-USER-TAG in weights.dir, which a resumed run finds again.

    TAG comes from the run directory: two runs never share a folder. ``attempt``: this process's, unless given.
    """
    disk = config.weights.channel == "disk"
    if disk and not config.weights.dir:
        return run_dir / "weights"
    stem, attempt = own_name(run_dir), attempt or current()
    return Path(config.weights.dir or "/dev/shm") / (stem if disk or not attempt else f"{stem}-{attempt}")


def score_weights_folder(config: Config, run_dir: Path, model: str) -> Path:
    """Where new versions of a model of scorer.models are published, in the attempt's weights folder."""
    return weights_folder(config, run_dir) / f"{SCORES}{model}"


def score_models_folder(run_dir: Path, model: str) -> Path:
    """Where the newest versions of a model of scorer.models are kept that the run trains: version v is step_v of its
    checkpoints/, as those of a run.
    """
    return run_dir / "scorers" / model


def newest_score_model(run_dir: Path, model: str) -> tuple[int, Path | None]:
    """The newest of these versions, and where it is; 0 and None where there is none."""
    folder = score_models_folder(run_dir, model)
    version = max(steps_of(folder), default=0)
    return version, folder / "checkpoints" / f"step_{version}" if version else None


def own_name(run_dir: Path) -> str:
    """offtrail-USER-TAG: how the names of all begin that the processes of a run make elsewhere."""
    tag = hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=6).hexdigest()
    return f"offtrail-{os.getuid()}-{tag}"


def make_temporary(run_dir: Path, name: str) -> Path:
    """A new folder for temporary files, which goes with the attempt's leftovers also where its maker is killed."""
    return Path(tempfile.mkdtemp(prefix=f"{own_name(run_dir)}-{current()}-{name}-"))


def reuses_files(config: Config) -> bool:
    """Whether the store keeps a retired file to write into. Not where the learner computes in the same memory, which a
    version more would lift at its peak; new pages then cost little beside a step.
    """
    return config.learner.device != "cpu"


def servers_folder(run_dir: Path) -> Path:
    """Where the roles of this attempt list their servers, as OWNER.json."""
    return run_dir / "servers" / current()


def remove_earlier(config: Config, run_dir: Path) -> None:
    """What earlier attempts of the run have left where not even their reaper lived. Of a process that still leaves, it
    takes no file that this attempt knows.
    """
    shutil.rmtree(run_dir / "servers", ignore_errors=True)
    for earlier in weights_folder(config, run_dir).parent.glob(f"{own_name(run_dir)}*"):
        _remove_own(config, earlier)
    _remove_temporary(f"{own_name(run_dir)}-*-*")


def remove_leftovers(config: Config, run_dir: Path, attempt: str = "") -> None:
    """Give back what the processes of an attempt shared: shared memory, sockets in it, temporary folders, and the
    addresses of servers.

    Called when none of them is left: by the launcher, or by its reaper where it was killed.
    """
    attempt = attempt or current()
    remove_shared_memory(config, run_dir, attempt)
    shutil.rmtree(run_dir / "servers" / attempt, ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or another attempt's are in it
        (run_dir / "servers").rmdir()
    _remove_temporary(f"{own_name(run_dir)}-{attempt}-*")


def _remove_temporary(names: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(names):
        shutil.rmtree(folder, ignore_errors=True)


def remove_shared_memory(config: Config, run_dir: Path, attempt: str = "") -> None:
    """Give an attempt's shared memory back; what a reader has mapped stays valid. A folder on disk stays for a
    resume.
    """
    _remove_own(config, weights_folder(config, run_dir, attempt))


def _remove_own(config: Config, folder: Path) -> None:
    """Invariant: only what the weight channel made goes (the names of weights/, which would import torch). A file of
    anybody else stays, and so does the folder that it lies in.
    """
    for unfinished in (*folder.glob("offtrail-v*"), folder / "writing"):  # under names that safetensors chose
        shutil.rmtree(unfinished, ignore_errors=True)
    if config.weights.channel == "disk":
        return
    for scores in folder.glob(f"{SCORES}*"):
        _remove_own(config, scores)
    with contextlib.suppress(OSError):
        for path in [*folder.glob("pinned/*"), *folder.glob("*")]:
            if OWN_NAMES.fullmatch(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)
    for own in (folder / "pinned", folder):
        with contextlib.suppress(OSError):  # not there, or it holds something of someone else's
            own.rmdir()
