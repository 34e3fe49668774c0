"""Whose message a message is: what broker.py asks before it carries a request out.

Invariant: a process that has the run's secret is still one role, and does only what that role does. A name belongs to
the process that said Hello for it, known by its random number (sockets.py), until it has died or its heartbeats are
lost: so a role that was started again always finds its name free. Who has the secret may take a name that is free.
"""

from __future__ import annotations

from offtrail.platform.broker.roster import Member, Roster, names
from offtrail.platform.broker.scheduler import RequestError
from offtrail.platform.runtime.roles import ROLES
from offtrail.platform.wire.messages import LAUNCHER, PROTOCOL, SENDERS, Failure, Heartbeat, Hello
from offtrail.platform.wire.sockets import Envelope

MAY_JOIN = (*(row.role for row in ROLES if row.role != "broker"), LAUNCHER)


def check_hello(hello: Hello, process: bytes, run: str, roster: Roster, *, here: bool) -> None:
    """Raise RequestError unless the process may take part under its name. ``here``: every role is on this host."""
    if hello.protocol != PROTOCOL:
        raise RequestError(
            f"protocol {hello.protocol} was spoken, this broker speaks {PROTOCOL}: install one version of offtrail"
        )
    if hello.run != run:
        raise RequestError(f"run {hello.run!r} was asked for, this broker serves another: dial its own endpoint.json")
    if hello.role not in MAY_JOIN:
        raise RequestError(f"role {hello.role!r} is none of a run's; there are {', '.join(MAY_JOIN)}")
    name, sender = f"{hello.role}-{hello.index}", roster.sender(process)
    holder = roster.get(name)
    if sender is not None and sender is not holder:
        raise RequestError(f"{sender.name} says Hello as {name}: a process has one name")
    if holder is not None and holder is not sender and holder.runs(here=here):
        raise RequestError(f"{holder.name} is process {holder.pid}, which is there still: a name has one process")


def check_sender(envelope: Envelope, roster: Roster) -> None:
    """Raise RequestError for a message that is not its sender's to send (messages.SENDERS)."""
    message, sender = envelope.message, roster.sender(envelope.process)
    what = type(message).__name__
    if isinstance(message, Heartbeat | Failure):
        _check_own(message, sender, envelope.peer_name, roster)
        return
    if type(message) not in SENDERS:
        return
    if sender is None:
        raise RequestError(f"{what}: {envelope.peer_name} has not said Hello; known are {names(roster)}")
    if sender.role != SENDERS[type(message)] or (sender.role == "learner" and sender.index):
        raise RequestError(f"{what} from {sender.name}: it is the {SENDERS[type(message)]}'s to send")


def _check_own(message: Heartbeat | Failure, sender: Member | None, peer: str, roster: Roster) -> None:
    """A process speaks of itself, the launcher also of a death, and a role may die before it could say Hello."""
    name = f"{message.role}-{message.index}"
    what = f"{type(message).__name__} of {name}"
    if sender is None:
        before_hello = isinstance(message, Failure) and message.role in MAY_JOIN and roster.get(name) is None
        if not before_hello:
            raise RequestError(f"{what}: {peer} has not said Hello; known are {names(roster)}")
    elif sender.name != name and not (isinstance(message, Failure) and sender.role == LAUNCHER):
        raise RequestError(f"{what} from {sender.name}: each tells its own")
