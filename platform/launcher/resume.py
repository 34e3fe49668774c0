"""Before the roles of a launch start: is what the run goes on from what it has left, and what it reads what it began
with? Each refusal names the file and the way out, and changes nothing.

    settings     each key that decides numbers: its value is in the ledger from the first launch on (broker/resume.py)
    inputs       each file that a key names: its hash is in the ledger from the first launch on
    ledger       there, where there are checkpoints, and as new as they are
    scores       the newest version of the model that scores and is trained in the run
    checkpoint   the one that the ledger names: every file as it was written
    resume_from  an older one in its place (broker/older.py)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from offtrail.platform.broker.resume import check_settings
from offtrail.platform.config.checkpoints import steps_of
from offtrail.platform.config.errors import ConfigError, refuse
from offtrail.platform.config.schema import Config
from offtrail.platform.launcher.inputs import Input, hashes, inputs_of
from offtrail.platform.ledger.database import LedgerError
from offtrail.platform.ledger.ledger import FILE, Ledger
from offtrail.platform.runtime.contents import cut_short, damage_of
from offtrail.platform.runtime.context import newest_score_model

SET_ASIDE = "set_aside"
"""In checkpoints/: those that were later than the one that run.resume_from chose."""


def check_what_is_there(config: Config, run_dir: Path) -> None:
    """Raise ConfigError where the run cannot go on, or begin, from what is on disk; else go back to run.resume_from."""
    inputs = inputs_of(config, run_dir)
    refuse_cut_weights(inputs)
    steps = steps_of(run_dir)
    refuse_without_ledger(run_dir, steps)
    refuse_damaged_scores(config, run_dir)
    try:
        ledger = Ledger(run_dir / FILE)
        try:
            refuse_older_ledger(ledger, run_dir, steps)
            check_settings(ledger, config, run_dir)
            note_inputs(ledger, inputs)
            step = int(config.run.resume_from.removeprefix("step_")) if config.run.resume_from else ledger.checkpoint
            refuse_unusable(ledger, run_dir, step, steps)
            if step != ledger.checkpoint or ledger.records.get("given_up"):
                from offtrail.platform.broker.older import go_back  # pyarrow is slow to import, and rarely needed

                go_back(ledger, run_dir / "trajectories", step)
        finally:
            ledger.close()
    except LedgerError as error:
        raise ConfigError(str(error)) from error
    if config.run.resume_from:
        set_aside(run_dir, [later for later in steps if later > step])


def refuse_cut_weights(inputs: Mapping[str, Input]) -> None:
    """Weights whose download or copy was cut."""
    for key, one in inputs.items():
        for file in one.files.values():
            if file.suffix == ".safetensors" and (problem := cut_short(file)):
                mend = "fetch or copy it again" if one.value else f"delete {file.parent}, and it is made anew"
                raise refuse(key, one.value, f"{problem}: it was cut or damaged; {mend}")


def note_inputs(ledger: Ledger, inputs: Mapping[str, Input]) -> None:
    """Write the inputs' hashes into the ledger of a new run; compare them with those that an old one began with."""
    noted: dict[str, dict[str, str]] | None = json.loads(ledger.records.get("inputs") or "null")
    now = hashes(inputs)
    if noted is None:
        ledger.records.put({"inputs": json.dumps(now)})
        return
    for key in noted | now:
        files = noted.get(key, {})
        one = inputs.get(key, Input("", {}))
        for name in sorted(files.keys() | now.get(key, {}).keys()):
            if (found := now.get(key, {}).get(name)) == files.get(name):
                continue
            place = one.files.get(name, name)
            how = "is gone" if found is None else "is new" if name not in files else "is not what the run began with"
            raise refuse(
                key, one.value, f"{place} {how} (its hash is in the ledger), and one curve would join two "
                "experiments; put back what was there, or start a new run from its config.yaml",
            )  # fmt: skip


def refuse_without_ledger(run_dir: Path, steps: list[int]) -> None:
    """A run that has checkpoints and no ledger would begin anew, over its own metrics and archive."""
    ledger = run_dir / FILE
    if steps and (not ledger.is_file() or not ledger.stat().st_size):
        what = "empty" if ledger.is_file() else "missing"
        raise refuse("run.resume", True, f"{ledger} is {what}, beside {_shown(steps)}; {_way_out(run_dir, steps)}")


def refuse_older_ledger(ledger: Ledger, run_dir: Path, steps: list[int]) -> None:
    """A ledger that knows nothing of the newest checkpoint's version, nor of the one before, is another's or a copy."""
    newest = ledger.newest_ever
    if steps and steps[-1] > max(0, newest) + 1:
        raise refuse(
            "run.resume", True, f"{run_dir / FILE} ends at version {newest}, beside {_shown(steps)}: it was emptied, "
            f"or is an older copy; {_way_out(run_dir, steps)}",
        )  # fmt: skip


def refuse_unusable(ledger: Ledger, run_dir: Path, step: int, steps: list[int]) -> None:
    """The checkpoint to go on from is damaged or gone, or one that the ledger does not go back to."""
    key, value = ("run.resume", True) if step == ledger.checkpoint else ("run.resume_from", f"step_{step}")
    if step > ledger.checkpoint:
        raise refuse(key, value, f"the newest checkpoint that the ledger knows is step_{ledger.checkpoint}")
    if step and (damage := damage_of(folder_of(run_dir, step))):
        whole = [older for older in steps if older < step and not damage_of(folder_of(run_dir, older))]
        older = f"run.resume_from=step_{whole[-1] if whole else 0}"
        raise refuse(
            key, value, f"{damage}; restore it, or go on from an older checkpoint, {older}, which trains the batches "
            "after it again",
        )  # fmt: skip


def refuse_damaged_scores(config: Config, run_dir: Path) -> None:
    """Of a model that scores and is trained in the run the newest version: its number is never given to another."""
    _, folder = newest_score_model(run_dir, config.scorer.refreshed)
    if folder is not None and (damage := damage_of(folder)):
        raise refuse("run.resume", True, f"{damage}; restore it, or start a new run from its config.yaml")


def set_aside(run_dir: Path, later: list[int]) -> None:
    """Checkpoints of what is to be trained again: out of the way of the new ones, and nothing is deleted."""
    place = run_dir / "checkpoints" / SET_ASIDE
    for step in later:
        place.mkdir(exist_ok=True)
        turn, target = 1, place / f"step_{step}"
        while target.exists():
            turn, target = turn + 1, place / f"step_{step}.{turn}"
        folder_of(run_dir, step).rename(target)
        print(f"set aside: {target}", flush=True)


def folder_of(run_dir: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step_{step}"


def _shown(steps: list[int]) -> str:
    return f"the checkpoint step_{steps[-1]}" if len(steps) == 1 else f"{len(steps)} checkpoints up to step_{steps[-1]}"


def _way_out(run_dir: Path, steps: list[int]) -> str:
    return f"restore it, or start a new run from {folder_of(run_dir, steps[-1])} (model.path)"
