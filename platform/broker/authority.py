"""Whose message a message is: what broker.py asks before it carries a request out.

Invariant: a process that has the run's secret is still one role, and does only what that role does. A name belongs to
the connection that said Hello for it last; while its process is there, only a Hello with the same process id takes it.
Trap: that id is the sender's own word, so that this keeps mistakes apart, and not whoever has the secret and lies.
"""

from __future__ import annotations

from offtrail.platform.broker.roster import Member, Roster, names
from offtrail.platform.broker.scheduler import RequestError
from offtrail.platform.runtime.roles import ROLES
from offtrail.platform.wire.messages import LAUNCHER, PROTOCOL, SENDERS, Failure, Heartbeat, Hello
from offtrail.platform.wire.sockets import Envelope

MAY_JOIN = (*(row.role for row in ROLES if row.role != "broker"), LAUNCHER)


def check_hello(hello: Hello, run: str, roster: Roster, *, here: bool) -> None:
    """Raise RequestError unless the process may take part under its name. ``here``: every role is on this host."""
    if hello.protocol != PROTOCOL:
        raise RequestError(
            f"protocol {hello.protocol} was spoken, this broker speaks {PROTOCOL}: install one version of offtrail"
        )
    if hello.run != run:
        raise RequestError(f"run {hello.run!r} was asked for, this broker serves another: dial its own endpoint.json")
    if hello.role not in MAY_JOIN:
        raise RequestError(f"role {hello.role!r} is none of a run's; there are {', '.join(MAY_JOIN)}")
    holder = roster.get(f"{hello.role}-{hello.index}")
    if holder is not None and holder.pid != hello.pid and holder.runs(here=here):
        raise RequestError(f"{holder.name} is process {holder.pid}, which is there still: a name has one process")


def check_sender(envelope: Envelope, roster: Roster) -> None:
    """Raise RequestError for a message that is not its sender's to send (messages.SENDERS)."""
    message, sender = envelope.message, roster.sender(envelope.peer)
    what = type(message).__name__
    if isinstance(message, Heartbeat):
        member = roster.get(f"{message.role}-{message.index}")
        if member is None or member.pid != message.pid:
            raise RequestError(f"{what} of {message.role}-{message.index}, process {message.pid}: it is not in the run")
        return
    if isinstance(message, Failure):
        _check_failure(message, sender, roster)
        return
    if type(message) not in SENDERS:
        return
    if sender is None:
        raise RequestError(f"{what}: {envelope.peer_name} has not said Hello; known are {names(roster)}")
    if sender.role != SENDERS[type(message)] or (sender.role == "learner" and sender.index):
        raise RequestError(f"{what} from {sender.name}: it is the {SENDERS[type(message)]}'s to send")


def _check_failure(message: Failure, sender: Member | None, roster: Roster) -> None:
    """A dying role dials anew, and is known by its process id; or it dies before it could say Hello."""
    name = f"{message.role}-{message.index}"
    if sender is not None and sender.role != LAUNCHER and sender.name != name:
        raise RequestError(f"Failure of {name} from {sender.name}: each tells its own")
    holder = roster.get(name)
    if sender is None and (holder.pid != message.pid if holder else message.role not in MAY_JOIN):
        raise RequestError(f"Failure of {name}, process {message.pid}: it is not in the run")
