"""The refresher role: trains a model of scorer.models on the policy's own answers while the run trains the policy.

    broker ── groups of the batches since ──► label ──► measure the version that is out ──► train ──► keep ──► publish
                                                                                          runs/NAME/scorers   scorers

The loop is unblocked by the broker, once the policy has come scorer.refresh_every learner steps further, and unblocks
nobody: learner and generators never wait for it, and where it is slower than they are, versions are left out. Version v
of the model is made of answers up to learner step v · scorer.refresh_every.

Invariants: no answer is trained on twice; a version is kept before it is published, so that a number stands for one set
of weights whatever dies when, and neither a restart nor a resume goes back behind it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from offtrail.core.types import Group
from offtrail.platform.model.scoring import scorings
from offtrail.platform.refresher.labels import Labelled, Labeller
from offtrail.platform.refresher.model import Refreshed
from offtrail.platform.runtime.context import Connection, RoleContext
from offtrail.platform.wire.groups import arrays_per_group, group_from
from offtrail.platform.wire.messages import NextRefresh, RefreshJob

log = logging.getLogger("offtrail.refresher")


class StoppedError(Exception):
    """The run has ended in the middle of something."""


def main(context: RoleContext) -> None:
    """Run until the broker says stop."""
    refresher = Refresher.open(context)
    log.info("loaded version %d", refresher.model.version)
    try:
        while (groups := refresher.next()) is not None:
            labelled = refresher.label(groups)
            refresher.measure(labelled)
            if labelled.items and refresher.trains:
                refresher.train(labelled)
    except StoppedError:
        log.info("the run is over")
    finally:
        refresher.close()


@dataclass
class Refresher:
    """Each public method is one verb of the loop. ``seen``: the learner step up to which answers were labelled."""

    context: RoleContext
    connection: Connection
    model: Refreshed
    labeller: Labeller
    seen: int

    @classmethod
    def open(cls, context: RoleContext) -> Refresher:
        """Connect, load the newest version, and publish it again. Raises ConfigError, ValueError or ModelError where
        the model cannot be trained.
        """
        connection, config = context.connect(), context.config
        scoring = scorings(config)[config.scorer.refreshed]
        with connection.activity.busy("load"):
            model = Refreshed.open(context, scoring, connection.activity)
            labeller = Labeller(context, scoring, connection.activity)
        return cls(context, connection, model, labeller, model.version * config.scorer.refresh_every)

    @property
    def trains(self) -> bool:
        """Or else it only measures."""
        return self.context.config.scorer.refresh.updates > 0

    def next(self) -> list[Group] | None:
        """The groups to label next; None when the run stops."""
        ask = NextRefresh(after=self.seen, groups=self.context.config.scorer.refresh.groups)
        deadline, waiting_for = self.context.config.broker.deadline_seconds, "broker"
        while True:
            with self.connection.activity.waiting("a policy to label", on=waiting_for):
                job, arrays = self.connection.client.request(ask, what="groups to label", deadline_s=deadline)
            assert isinstance(job, RefreshJob)
            if job.stop:
                return None
            if job.version >= 0:
                break
            waiting_for = job.waiting or "broker"
        self.seen, groups, end = job.version, self._archived(job), 0
        for header in job.headers:
            start, end = end, end + arrays_per_group(header)
            groups.append(group_from(header, arrays[start:end]))
        return groups

    def _archived(self, job: RefreshJob) -> list[Group]:
        """Those that have left the ledger's spool; none of a shard that cannot be read."""
        import pyarrow as pa  # it starts a thread, and nothing that does can be forked (runtime/forkserver.py)

        from offtrail.platform.broker.archive import read_groups

        found: list[Group] = []
        for name, ids in job.archived.items():
            file = self.context.run_dir / "trajectories" / name
            try:
                found += read_groups(file, set(ids))
            except (OSError, pa.ArrowException) as error:
                log.warning("%d groups are left out: %s: %s", len(ids), file, " ".join(str(error).split()))
        return found

    def label(self, groups: list[Group]) -> Labelled:
        """What the model learns of them."""
        with self.connection.activity.busy("label"):
            return self.labeller(groups, self.seen, self._look)

    def measure(self, labelled: Labelled) -> None:
        """How good the version that is out is on answers that it was not trained on."""
        self._look()
        self.model.measure(labelled, self.seen)

    def train(self, labelled: Labelled) -> None:
        """The next version, kept and published."""
        self.model.train(labelled, self.seen // self.context.config.scorer.refresh_every, self._look)

    def _look(self) -> None:
        if self.connection.heartbeat.stop:
            raise StoppedError

    def close(self) -> None:
        """End the verifiers, let go of the channel, leave."""
        self.labeller.close()
        self.model.close()
        self.connection.close()
