"""The compute ledger as device hours and money: of a run, of a recipe by its stages.

    summary.json: compute/…, devices ┐
    config.yaml: cost.*, dtypes ─────┴► cost_of(run_dir) ─► table (terminal), cost.md, cost.json, cost/… of summary.json

Device hours are held time: each device from a launch's beginning to its end, all launches together (held.py), so that
failures and waiting cost what they cost. A device that several roles share is shared out by their busy seconds, so that
roles, and stages, add up. There is no default price: without `cost.prices` there is no money.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offtrail.platform.config.compose import load_config
from offtrail.platform.config.recipe import stages_of
from offtrail.platform.config.schema import Config, CostConfig
from offtrail.platform.tracking.compute import counted_once
from offtrail.platform.tracking.devices import entry_of, peak_of
from offtrail.platform.tracking.summary import finite, read_summary, write_atomic

if TYPE_CHECKING:
    from rich.table import Table

R1_STAGES = {"R1-Zero": 512 * 198.0, "SFT data": 5000.0, "R1": 512 * 80.0}
"""DeepSeek-R1's H800 hours by stage: arXiv:2501.12948v2, table 7, which rounds them to 101K, 5K and 41K of 147K; GPUs
and hours from the text beside it, and from the supplementary information of Guo et al., Nature 645 (2025)."""
R1_PRICE = 2.0
"""… and what it takes an H800's hour to cost, in USD."""
COLD_START = "cold start"
TOKENS = {
    "prefilled": ("prefilled_tokens", "reprefilled_tokens"), "prefix hits": ("prefix_hit_tokens",),
    "decoded": ("decoded_tokens",), "scored": ("scored_tokens",), "trained": ("trained_tokens", "value_tokens"),
}  # fmt: skip
"""What a role's tokens are called, and the charges that it is the sum of."""


@dataclass(frozen=True)
class RoleCost:
    """One role of a run. ``devices``: how many of what name; ``held_hours`` of them, ``busy_hours`` of its processes.

    ``flops`` are the model's, ``hardware_flops`` with what was computed again; ``mfu`` and ``hfu`` their shares of
    what the held devices ``could`` have done (None: peak not known). ``share`` of the run's device hours; ``money``
    None where a device has no price.
    """

    role: str
    devices: dict[str, int]
    held_hours: float
    busy_hours: float
    tokens: dict[str, float]
    flops: float
    hardware_flops: float
    mfu: float | None
    hfu: float | None
    money: float | None
    share: float = 0.0
    could: float | None = None


@dataclass(frozen=True)
class RunCost:
    """A run, or a recipe with its ``stages``. ``hours``: held, by device name; ``unpriced``: devices without a price.
    ``discarded``: tokens that were made for groups which were then refused.
    """

    name: str
    roles: list[RoleCost]
    hours: dict[str, float]
    money: float | None
    currency: str
    date: str
    discarded: float = 0.0
    unpriced: list[str] = field(default_factory=list)
    stages: list[RunCost] = field(default_factory=list)

    @property
    def device_hours(self) -> float:
        """Held, of all devices."""
        return sum(self.hours.values())

    @property
    def flops(self) -> float:
        """The models', of all roles."""
        return sum(role.flops for role in self.roles)

    def row(self) -> dict[str, float]:
        """cost/… of summary.json."""
        numbers: dict[str, float | None] = {"cost/device_hours": self.device_hours, "cost/money": self.money}
        for role in self.roles:
            slug = role.role.replace(" ", "_")
            numbers |= {
                f"cost/{slug}_device_hours": role.held_hours, f"cost/{slug}_share": role.share,
                f"cost/{slug}_mfu": role.mfu, f"cost/{slug}_hfu": role.hfu, f"cost/{slug}_money": role.money,
            }  # fmt: skip
        return {name: value for name, value in numbers.items() if value is not None}


def cost_of(run_dir: Path, prices: CostConfig | None = None) -> RunCost:
    """What a run, or all stages of a recipe, have cost so far. ``prices``: in place of those in its config.yaml.

    Raises FileNotFoundError without a config.yaml, ConfigError where it cannot be read.
    """
    config = load_config(run_dir / "config.yaml")
    settings = prices or config.cost
    if not stages_of(config):
        return cost_of_summary(run_dir.name, config, settings, read_summary(run_dir))
    files = sorted((run_dir / "stages").glob("*/config.yaml"), key=lambda file: _number(file.parent.name))
    summaries = counted_once(read_summary(file.parent) for file in files)
    stages = [
        cost_of_summary(file.parent.name, load_config(file), settings, summary)
        for file, summary in zip(files, summaries, strict=True)
    ]
    return _together(run_dir.name, stages, settings)


def _number(folder: str) -> tuple[int, str]:
    number = folder.partition("_")[0]
    return (int(number) if number.isdecimal() else 0), folder


def cost_of_summary(name: str, config: Config, settings: CostConfig, summary: Mapping[str, Any]) -> RunCost:
    """Of one run, by the contents of its summary.json."""
    held, hours = _held(summary, settings)
    roles = [_role(role, held.get(role, {}), config, settings, summary) for role in _roles(summary, held)]
    if "compute/cold_start_flops" in summary:
        made = [device | {"roles": {COLD_START: 1}} for device in summary.get("cold_start_devices", ())]
        there, spent = _held({"devices": made}, settings)
        roles.append(_role(COLD_START, there.get(COLD_START, {}), config, settings, summary))
        hours = _added([hours, spent])
    return _run(name, roles, hours, settings, float(summary.get("tokens/discarded") or 0.0))


def _run(name: str, roles: list[RoleCost], hours: dict[str, float], settings: CostConfig, discarded: float) -> RunCost:
    total = sum(hours.values())
    shared = [RoleCost(**vars(role) | {"share": role.held_hours / total if total else 0.0}) for role in roles]
    unpriced = sorted(name for name in hours if entry_of(name, settings.prices) is None)
    money = None if unpriced or not settings.prices else sum(_price(n, settings) * h for n, h in hours.items())
    return RunCost(name, shared, hours, money, settings.currency, settings.date, discarded, unpriced)


def _price(device: str, settings: CostConfig) -> float:
    """Of an hour of a device that has a price."""
    entry = entry_of(device, settings.prices)
    assert entry is not None
    return settings.prices[entry]


def _roles(summary: Mapping[str, Any], held: Mapping[str, Any]) -> list[str]:
    """Those that hold devices, in the order in which they are told."""
    order = ("learner", "generator", "scorer", "refresher", "evaluator")
    return sorted(held, key=lambda role: (order.index(role) if role in order else len(order), role))


def _busy(role: str, summary: Mapping[str, Any]) -> float:
    """Seconds, of all processes of a role."""
    if role == COLD_START:
        return float(summary.get("compute/cold_start_busy_seconds") or 0.0)
    names = [n for n in summary if n.startswith(f"compute/{role}_busy_") and n.endswith("_seconds")]
    return sum(float(summary[name] or 0.0) for name in names)


def _held(summary: Mapping[str, Any], settings: CostConfig) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Role → device name → its (seconds, devices), and hours by device name. A device that several roles share is
    shared out by their busy seconds; equally where none was busy.
    """
    found: dict[str, dict[str, Any]] = {}
    hours: dict[str, float] = {}
    for row in summary.get("devices", ()):
        busy = {role: _busy(role, summary) for role in row["roles"]}
        total = sum(busy.values())
        for role in row["roles"]:
            share = busy[role] / total if total else 1 / len(busy)
            name = settings.names.get(role, row["name"])
            seconds, count = found.setdefault(role, {}).get(name, (0.0, 0))
            found[role][name] = (seconds + share * row["seconds"], count + row["count"])
            hours[name] = hours.get(name, 0.0) + share * row["seconds"] / 3600
    return found, hours


def _role(
    role: str, held: Mapping[str, Any], config: Config, settings: CostConfig, summary: Mapping[str, Any]
) -> RoleCost:
    """A row of the table."""
    made = role == COLD_START
    prefix = "/".join(("compute", "cold_start_" if made else role + "_"))
    charges = {name.removeprefix(prefix): float(v or 0.0) for name, v in summary.items() if name.startswith(prefix)}
    flops = sum(value for name, value in charges.items() if name == "flops" or name.endswith("_flops"))
    hardware = flops + charges.get("repeated_operations", 0.0)
    tokens = {name: sum(charges.get(part, 0.0) for part in parts) for name, parts in TOKENS.items()}
    if made:
        tokens = {"trained": charges.get("tokens", 0.0)}
    seconds = sum(spent for spent, _ in held.values())
    dtypes = {
        "learner": config.learner.dtype,
        COLD_START: config.learner.dtype,
        "scorer": config.scorer.dtype,
        "refresher": config.learner.dtype,
    }
    could = _capacity(held, dtypes.get(role, config.engine.dtype), settings)
    priced = settings.prices and all(entry_of(name, settings.prices) for name in held)
    return RoleCost(
        role=role,
        devices={name: count for name, (_, count) in held.items()},
        held_hours=seconds / 3600,
        busy_hours=_busy(role, summary) / 3600,
        tokens={name: amount for name, amount in tokens.items() if amount},
        flops=flops,
        hardware_flops=hardware,
        mfu=flops / could if could else None,
        hfu=hardware / could if could else None,
        money=sum(_price(name, settings) * spent / 3600 for name, (spent, _) in held.items()) if priced else None,
        could=could,
    )


def _capacity(held: Mapping[str, Any], dtype: str, settings: CostConfig) -> float | None:
    """Operations that the held devices could have done; None where a peak is not known."""
    could = 0.0
    for name, (seconds, _) in held.items():
        if (peak := peak_of(name, dtype, settings.peaks)) is None:
            return None
        could += peak * seconds
    return could or None


def _together(name: str, stages: list[RunCost], settings: CostConfig) -> RunCost:
    """A recipe: roles of one name together."""
    by_role: dict[str, list[RoleCost]] = {}
    for stage in stages:
        for role in stage.roles:
            by_role.setdefault(role.role, []).append(role)
    roles = [_added_roles(parts) for parts in by_role.values()]
    whole = _run(
        name, roles, _added([stage.hours for stage in stages]), settings, sum(stage.discarded for stage in stages)
    )
    return RunCost(**vars(whole) | {"stages": stages})


def _added_roles(parts: list[RoleCost]) -> RoleCost:
    """The same role in several stages. A share of the peak needs every stage's."""
    could = [part.could if part.held_hours else 0.0 for part in parts]
    known = None if None in could else sum(value for value in could if value is not None)
    flops, hardware = (sum(getattr(part, name) for part in parts) for name in ("flops", "hardware_flops"))
    money = [part.money for part in parts]
    return RoleCost(
        role=parts[0].role,
        devices={n: max(p.devices.get(n, 0) for p in parts) for part in parts for n in part.devices},
        held_hours=sum(part.held_hours for part in parts),
        busy_hours=sum(part.busy_hours for part in parts),
        tokens=_added([part.tokens for part in parts]),
        flops=flops,
        hardware_flops=hardware,
        mfu=flops / known if known else None,
        hfu=hardware / known if known else None,
        money=None if None in money else sum(value for value in money if value is not None),
        could=known or None,
    )


def _added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


# --- what people read

HEADINGS = ("role", "devices", "held h", "busy h", "share", "tokens", "model FLOPs", "MFU", "HFU", "cost")


def write(run_dir: Path, cost: RunCost) -> None:
    """cost.json and cost.md beside the summary."""
    write_atomic(run_dir / "cost.json", json.dumps(finite(asdict(cost)), indent=2, ensure_ascii=False) + "\n")
    write_atomic(run_dir / "cost.md", markdown(cost))


def table(cost: RunCost) -> Table:
    """For the terminal: of a recipe a row a stage, else a row a role."""
    from rich.table import Table

    headings, rows = (STAGE_HEADINGS, _stage_rows(cost)) if cost.stages else (HEADINGS, _role_rows(cost))
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    said = [i for i in range(len(headings)) if i == 0 or any(row[i] not in ("", "–") for row in rows)]
    kept = [i for i in said if headings[i] not in WIDE]
    for i in kept:
        shown.add_column(headings[i], justify="left" if headings[i] in LEFT else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*(row[i] for i in kept))
    return shown


WIDE = ("devices", "tokens")
"""Columns that cost.md alone has room for."""
LEFT = ("role", "stage", "devices", "tokens")
STAGE_HEADINGS = ("stage", "device h", "share", "model FLOPs", "cost")


def _role_rows(cost: RunCost) -> list[tuple[str, ...]]:
    rows = [
        (
            role.role, _devices(role.devices), _hours(role.held_hours), _hours(role.busy_hours), f"{role.share:.0%}",
            ", ".join(f"{_short(n)} {name}" for name, n in role.tokens.items()), f"{role.flops:.2e}", _share(role.mfu),
            _share(role.hfu if role.hardware_flops > role.flops else None), _money(role.money, cost.currency),
        )
        for role in cost.roles
    ]  # fmt: skip
    dropped = f"{_short(cost.discarded)} discarded" if cost.discarded else ""
    whole = ("all", "", _hours(cost.device_hours), "", "", dropped, f"{cost.flops:.2e}", "", "")
    return [*rows, (*whole, _money(cost.money, cost.currency))]


def _stage_rows(cost: RunCost) -> list[tuple[str, ...]]:
    whole = cost.device_hours
    return [
        (
            one.name, _hours(one.device_hours), f"{one.device_hours / whole:.0%}" if whole else "–", f"{one.flops:.2e}",
            _money(one.money, cost.currency),
        )
        for one in [*cost.stages, RunCost(**vars(cost) | {"name": "all"})]
    ]  # fmt: skip


def markdown(cost: RunCost) -> str:
    """cost.md: the roles, the stages beside DeepSeek-R1's, the devices and what their hours cost."""
    parts = [f"# What {cost.name} cost", ""]
    if cost.stages:
        parts += [*_lines(STAGE_HEADINGS, _stage_rows(cost)), ""]
    parts += [*_lines(HEADINGS, _role_rows(cost)), ""]
    priced = f", at prices of {cost.date}" if cost.money is not None else ""
    for name, hours in sorted(cost.hours.items()):
        parts.append(f"- {name}: {_hours(hours)} hours held")
    if cost.money is not None:
        parts.append(f"- {_money(cost.money, cost.currency)}{priced}")
    elif cost.hours:
        parts.append(f"- no money: `cost.prices` has no price for {', '.join(cost.unpriced)}")
    r1 = sum(R1_STAGES.values())
    parts += [
        "",
        "Beside it, DeepSeek-R1's stages (arXiv:2501.12948v2, table 7), without its base model:",
    ]
    rows = [(name, f"{h:,.0f}", f"{h / r1:.0%}", f"{h * R1_PRICE:,.0f} USD") for name, h in R1_STAGES.items()]
    rows.append(("all", f"{r1:,.0f}", "100%", f"{r1 * R1_PRICE:,.0f} USD"))
    parts += ["", *_lines(("stage", "H800 h", "share", "cost"), rows)]
    return "\n".join(parts) + "\n"


def _lines(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    rule = ["---" if heading in LEFT else "---:" for heading in headings]
    return [f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows)]


def _devices(devices: Mapping[str, int]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in devices.items())


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 1000 else f"{hours:.3g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _money(value: float | None, currency: str) -> str:
    if value is None:
        return "–"
    return f"{value:,.2f} {currency}" if value >= 1 or not value else f"{value:.2g} {currency}"


def _short(count: float) -> str:
    """Such as 1.2M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"
