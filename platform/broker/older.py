"""Going back to an older checkpoint: what was trained after it waits to be trained again, from the same batches.

A batch is replayed from payloads. Those of older batches have left for the archive: the shards that hold them are read
back and given up, whole, and are made anew once a checkpoint covers them again. So each group stands in one place at
every moment (I1), and a batch that another version un-logs is archived as what it became.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from offtrail.platform.broker.archive import read_groups
from offtrail.platform.ledger.database import LedgerError
from offtrail.platform.ledger.ledger import Ledger
from offtrail.platform.wire.groups import pack_group


def go_back(ledger: Ledger, archive: Path, step: int) -> None:
    """Make the checkpoint of ``step`` the one to restart from; one transaction, and nothing where it is that already.
    Of the archive, which may be larger than memory, one group at a time becomes a payload.

    Raises LedgerError, with nothing changed, where a batch after it is neither in the ledger nor in the archive.
    """
    if step != ledger.checkpoint:
        ledger.shards.take_back(step, lambda name, groups: _payloads(archive / name, groups))
    _remove_given_up(ledger, archive)


def _payloads(file: Path, missing: set[int]) -> Iterator[tuple[int, bytes]]:
    """(group, payload) of the groups that left the ledger for a sealed shard."""
    try:
        for group in read_groups(file, missing):
            missing.remove(group.group)
            yield group.group, pack_group(group)
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        words = " ".join(str(error).split())
        raise LedgerError(f"{file}: {words}; the batches that it holds cannot be trained again") from error
    if missing:
        raise LedgerError(f"{file}: lacks groups {sorted(missing)[:5]}; its batches cannot be trained again")


def _remove_given_up(ledger: Ledger, archive: Path) -> None:
    """The files of shards that were read back; again after a crash in between."""
    for name in ledger.shards.given_up():
        (archive / name).unlink(missing_ok=True)
    ledger.records.put({"given_up": ""})
