"""Machine-time x prices -> money: what a run has cost, and how much of that hardware was idle. Nothing is guessed: no price, no figure."""

from __future__ import annotations

import datetime as dt
import functools
import importlib.resources
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, cast, get_args

from headrace.errors import SettingError, check_number, listing, nearest

Market = Literal["on-demand", "spot"]
_FORMS = (
    "USD per hour for every node (1.20), for a type of node (g6.4xlarge=1.10) or per accelerator (L4=0.80), per core and per GB (cpu=0.04, gb=0.004), "
    "the type of nodes (g6.4xlarge, L4=g6.4xlarge), a kind of accelerator (L4), spot, on-demand, or a file of prices (prices.toml)"
)


@dataclass(frozen=True, slots=True)
class Machine:
    """A node of a cluster, as far as it is known.

    `instance` is the cloud's instance type, or what the cluster's configuration calls such nodes; `gpus` counts accelerators
    of kind `accelerator`, as Ray names it; `memory_gb` is in units of 10^9 bytes.
    """

    name: str
    _: KW_ONLY
    instance: str | None = None
    market: Market | None = None
    cpus: float = 0.0
    memory_gb: float = 0.0
    gpus: float = 0.0
    accelerator: str | None = None

    @property
    def what(self) -> str:
        """What kind of machine this is: `g6.4xlarge`, `node with 4 L4`, `node with 8 CPUs`; on the spot market if that is known."""
        kind = self.instance or "node with " + (f"{self.gpus:g} {self.accelerator or 'GPU'}" if self.gpus else f"{self.cpus:g} CPUs")
        return kind + (" spot" if self.market == "spot" else "")


@dataclass(frozen=True, slots=True)
class Price:
    """What a machine costs in USD per hour, and where that figure is from."""

    usd_per_hour: float
    basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Listed prices of one provider, region and market, in USD per hour; an accelerator's is that of a whole instance with one of it."""

    provider: str
    region: str = ""
    market: Market = "on-demand"
    date: dt.date | None = None
    source: str = ""
    note: str = ""
    instances: Mapping[str, float] = field(default_factory=dict)
    accelerators: Mapping[str, str | float] = field(default_factory=dict)

    def __str__(self) -> str:
        when = f", {'as listed on' if self.market == 'on-demand' else 'a snapshot of'} {self.date}" if self.date else ""
        return " ".join(filter(None, (self.provider, self.region, self.market))) + when


def _read(path: str) -> tuple[Table, ...]:
    try:
        return read_tables(Path(path).read_text(encoding="utf-8"), name=path)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"--price {path!r}: this file of prices cannot be read: {error}") from error


def read_tables(text: str, *, name: str) -> tuple[Table, ...]:
    """The tables of a file of prices: TOML with `[[table]]`s, whose keys are the fields of `Table`. `name` says whose they are.

    Raises:
        SettingError: no TOML, a key that no table has, or a value that is no price, date or market.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingError(f"{name} is no TOML: {error}") from error
    entries = content.get("table")
    if content.keys() != {"table"} or not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        shape = "must consist of [[table]]s with [table.instances] or [table.accelerators] below them"
        raise SettingError(f"{name}: a file of prices {shape}; at its top it has {listing(content)}")
    return tuple(_table(entry, where=f"{name}, table {at}", name=name) for at, entry in enumerate(entries, 1))


def _table(entry: Mapping[str, Any], *, where: str, name: str) -> Table:
    known = Table.__dataclass_fields__
    for key, value in entry.items():
        if key not in known:
            raise SettingError(f"{where} has no key {key!r}; it may have {listing(known)}" + nearest(key, known))
        right = dt.date if key == "date" else dict if key in ("instances", "accelerators") else str
        if not isinstance(value, right) or isinstance(value, dt.datetime):
            allowed = {dt.date: "a day such as 2026-01-19, without quotes", dict: f"a table of prices, [table.{key}]", str: "text in quotes"}[right]
            raise SettingError(f"{where}: {key} must be {allowed}, got {value!r}")
    table = Table(**{"provider": name, **entry})
    if table.market not in get_args(Market):
        raise SettingError(f"{where}: market must be one of {listing(get_args(Market))}, got {table.market!r}" + nearest(table.market, get_args(Market)))
    if not table.instances and not table.accelerators:
        raise SettingError(f'{where} has no prices: below [table.instances], a line such as "g6.4xlarge" = 1.10 is one')
    for kind, like in table.accelerators.items():
        if isinstance(like, str) and like not in table.instances:
            raise SettingError(f"{where}: {kind} costs as much as {like!r}, which this table has no price of" + nearest(like, table.instances))
    for key, usd in [*table.instances.items(), *(item for item in table.accelerators.items() if not isinstance(item[1], str))]:
        if isinstance(usd, str) or not _usd(usd):
            raise SettingError(f"{where}: {key!r} must be a number of USD per hour above 0, got {usd!r}; a type with dots in its name has to be in quotes")
    return table


@functools.cache
def listed() -> tuple[Table, ...]:
    """The tables that headrace comes with, read when first asked for."""
    return read_tables(importlib.resources.files("headrace").joinpath("prices.toml").read_text(encoding="utf-8"), name="prices.toml")


def _usd(value: Any) -> float | None:
    """A sum of money of at least 0, as a number or as text; None for anything else."""
    try:
        usd = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return usd if math.isfinite(usd) and usd >= 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What machines cost: as said by `--price`, in files of one's own, and in the tables that headrace comes with.

    The most particular word counts: a node's type, its accelerators, the files in order, cores and memory (of nodes without
    accelerators), every node. The tables of headrace come last, except where one of these refers to them.
    `rates` are USD per hour of a type or per accelerator, or the type that nodes with such accelerators are of, or None for
    the listed price of an accelerator. `every` is USD per hour, or the type, of nodes that nothing else has a price for.
    """

    rates: Mapping[str, float | str | None] = field(default_factory=dict)
    every: float | str | None = None
    usd_per_core_hour: float | None = None
    usd_per_gb_hour: float | None = None
    market: Market | None = None
    own: tuple[Table, ...] = ()

    @staticmethod
    def parse(options: Iterable[str]) -> Prices:
        """Prices as given by `--price`, in any order.

        Raises:
            SettingError: a word that is no price, or two that contradict each other.
        """
        words = [option.strip() for option in options]
        own = tuple(table for word in words if word.endswith(".toml") for table in _read(word))
        tables, given = (*own, *listed()), dict[str, Any]()
        for word in words:
            if not word.endswith(".toml"):
                name, value = _understood(word, tables)
                if name in given and given[name] != value:
                    raise SettingError(f"--price {word!r} contradicts another --price: {_said(name, given[name])}; give one of them")
                given[name] = value
        fixed = {"": "every", "cpu": "usd_per_core_hour", "gb": "usd_per_gb_hour", "market": "market"}
        rates = {name: value for name, value in given.items() if name not in fixed}
        return Prices(own=own, rates=rates, **{fixed[name]: value for name, value in given.items() if name in fixed})

    def of(self, machine: Machine) -> Price | None:
        """What `machine` costs, or None where nothing says so."""
        market, everywhere = self.market or machine.market or "on-demand", (*self.own, *listed())
        known = any(machine.instance in table.instances for table in everywhere)
        for name, count in ((machine.instance, 1.0), (machine.accelerator, machine.gpus)):
            # A type that is known stays what it is, whatever its accelerators are said to be the sign of.
            stated = name and name in self.rates and count and (not known or name == machine.instance or isinstance(self.rates[name], float | int))
            if stated and (price := self._rate(cast("str", name), count, market)):
                return price
        if price := _instance(machine.instance, market, self.own) or _accelerators(machine.accelerator, 0 if known else machine.gpus, market, self.own):
            return price
        if not machine.gpus and not (self.usd_per_core_hour is None and self.usd_per_gb_hour is None):
            parts = (("cpu", machine.cpus, self.usd_per_core_hour), ("gb", machine.memory_gb, self.usd_per_gb_hour))
            said = [f"{amount:g} x --price {_said(name, usd)}" for name, amount, usd in parts if usd is not None]
            return Price(math.fsum(amount * usd for _, amount, usd in parts if usd is not None), " and ".join(said))
        if isinstance(self.every, float | int):
            return Price(self.every, f"--price {_said('', self.every)}")
        return _instance(machine.instance, market, everywhere) if known else _instance(self.every, market, everywhere, says="as a ")

    def unmatched(self, machines: Iterable[Machine]) -> tuple[str, ...]:
        """The types and accelerators named by `--price` that none of `machines` is or has: most likely mistyped."""
        there = {name for machine in machines for name in (machine.instance, machine.accelerator)}
        return tuple(_said(name, value) for name, value in self.rates.items() if name not in there)

    def _rate(self, name: str, count: float, market: Market) -> Price | None:
        value, everywhere = self.rates[name], (*self.own, *listed())
        if isinstance(value, float | int):
            return Price(count * value, (f"{count:g} x " if count != 1 else "") + f"--price {_said(name, value)}")
        return _instance(value, market, everywhere, says="as a ") if value else _accelerators(name, count, market, everywhere)


def _instance(instance: str | float | None, market: Market, tables: Sequence[Table], *, says: str = "") -> Price | None:
    """The listed price of a type of instance, from the first table that has it."""
    found = next((table for table in tables if table.market == market and instance in table.instances), None)
    return Price(found.instances[cast("str", instance)], (f"{says}{instance}, " if says else "") + str(found)) if found else None


def _accelerators(kind: str | None, count: float, market: Market, tables: Sequence[Table]) -> Price | None:
    """The listed price of so many accelerators: each as the cheapest whole instance with one of them."""
    offers = []
    for table in tables:
        like = table.accelerators.get(kind) if kind and count and table.market == market else None
        if isinstance(like, str):
            offers.append(Price(count * table.instances[like], f"as {count:g} x {like}, the cheapest with one {kind}, {table}"))
        elif like is not None:
            offers.append(Price(count * like, f"{count:g} x {kind}, {table}"))
    return min(offers, key=lambda offer: offer.usd_per_hour, default=None)


def _understood(word: str, tables: Sequence[Table]) -> tuple[str, float | str | None]:
    """What one word of `--price` is about ('' is every node), and its value."""
    types = {name: None for table in tables for name in table.instances}
    kinds = {name: None for table in tables for name in table.accelerators}
    name, equals, text = (part.strip() for part in word.partition("="))
    usd = _usd(text if equals else word)
    if not equals:
        if usd is not None or word in types:
            return "", word if usd is None else usd
        if word in kinds or word in get_args(Market):
            return (word, None) if word in kinds else ("market", word)
        raise SettingError(f"--price {word!r} is no price and nothing with a known one; it takes {_FORMS}" + nearest(word, [*types, *kinds, *get_args(Market)]))
    if not name or not text:
        raise SettingError(f"--price {word!r} must have the form name=price, such as g6.4xlarge=1.10; --price takes {_FORMS}")
    if name not in kinds and (near := [kind for kind in (*kinds, "cpu", "gb") if kind != name and kind.lower() == name.lower()]):
        raise SettingError(f"--price {word!r}: no accelerator is called {name!r}; did you mean {near[0]!r}?")
    if name == "market" or name in get_args(Market):
        raise SettingError(f"--price {word!r}: a market has no price; --price spot takes spot prices where they are known")
    if usd is None and (text not in types or name in ("cpu", "gb")):
        allowed = "a number of USD per hour of at least 0, such as 0.80" + ("" if name in ("cpu", "gb") else ", or a type of instance with a known price")
        raise SettingError(f"--price {word!r}: {text!r} must be {allowed}" + nearest(text, types))
    return name, text if usd is None else usd


def _said(name: str, value: float | str | None) -> str:
    """A price as `--price` has it."""
    shown = f"{value:.10g}" if isinstance(value, float | int) else value
    return "=".join(part for part in ("" if name == "market" else name, shown) if part)


@dataclass(frozen=True, slots=True)
class Charge:
    """What machines of one kind and price came to: `hours` adds up over them."""

    what: str
    machines: int
    hours: float
    price: Price

    @property
    def usd(self) -> float:
        """What they cost together."""
        return self.hours * self.price.usd_per_hour


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run costs. `busy` is the share of the hardware paid for that was at work (0 to 1), None when it was not measured.

    Sums of money are those of the machines with a price, `charges`, and None when there are none. `unpriced` are the others,
    paid for during `unpriced_hours` that no sum contains.
    """

    charges: tuple[Charge, ...]
    unpriced: tuple[Machine, ...]
    unpriced_hours: float
    rows: int
    busy: float | None

    @property
    def usd(self) -> float | None:
        """What all machines with a price cost together."""
        return math.fsum(charge.usd for charge in self.charges) if self.charges else None

    @property
    def usd_per_million_rows(self) -> float | None:
        """Cost per million rows."""
        return None if self.usd is None or not self.rows else self.usd / self.rows * 1e6

    @property
    def idle(self) -> float | None:
        """The share of the hardware paid for that did nothing (0 to 1)."""
        return None if self.busy is None else 1 - self.busy

    @property
    def idle_usd(self) -> float | None:
        """What the idle share cost; with what the busy share cost, it is `usd`."""
        return None if self.usd is None or self.idle is None else self.usd * self.idle

    def to_dict(self) -> dict[str, Any]:
        """The cost as JSON has it."""
        sums = {name: getattr(self, name) for name in ("usd", "usd_per_million_rows", "rows", "busy", "idle", "idle_usd", "unpriced_hours")}
        charges = [{"what": one.what, "machines": one.machines, "hours": one.hours, "usd": one.usd, **asdict(one.price)} for one in self.charges]
        return {**sums, "complete": not self.unpriced, "charges": charges, "unpriced": [asdict(machine) for machine in self.unpriced]}

    def __str__(self) -> str:
        lines = []
        if self.usd is not None:
            least = "at least " if self.unpriced else ""
            each = f", {money(self.usd_per_million_rows)} per million rows" if self.usd_per_million_rows is not None else ""
            idle = f"; {self.idle:.0%} idle: {money(self.idle_usd)}" if self.idle is not None and self.idle_usd is not None else ""
            lines.append(f"{least}{money(self.usd)}{each}{idle}")
        for one in self.charges:
            lines.append(f"   {one.machines} x {one.what}: {one.hours:.2f} h at {one.price.usd_per_hour:.6g} USD/h ({one.price.basis})")
        if self.unpriced:
            kinds, first = sorted({machine.what for machine in self.unpriced}), self.unpriced[0]
            example = first.instance or (first.accelerator if first.gpus else "cpu")
            lines.append(f"   no price for {len(self.unpriced)} of the machines ({', '.join(kinds)}), there for {self.unpriced_hours:.2f} h")
            lines.append(f"   name one with --price {f'{example}=USD' if example else 'USD'}, USD being that per hour")
        return "\n".join(lines)


def money(usd: float | None) -> str:
    """A sum in USD, to the cent, or to two digits when it is less than that: `12.30 USD`, `0.0042 USD`."""
    return "no price" if usd is None else f"{usd:,.2f} USD" if usd >= 0.1 or usd == 0 else f"{Decimal(f'{usd:.2g}'):f} USD"


def bill(intervals: Iterable[tuple[Machine, float, float]], *, prices: Prices, rows: int = 0, busy: float | None = None) -> Cost:
    """What machine-time costs: (machine, start_s, stop_s) in any order, seconds on one clock. A second is paid for once, however often it is named.

    A `busy` above 1, which cores that were promised twice can lead to, counts as 1.
    """
    spans: dict[Machine, list[tuple[float, float]]] = {}
    for machine, start_s, stop_s in intervals:
        assert start_s <= stop_s, f"{machine.name} was there from {start_s} to {stop_s}"
        spans.setdefault(machine, []).append((start_s, stop_s))
    return _cost({machine: _covered_s(times) for machine, times in spans.items()}, prices=prices, rows=rows, busy=busy)


def _covered_s(times: list[tuple[float, float]]) -> float:
    """Seconds that at least one of the spans covers."""
    covered, until = [], -math.inf
    for start_s, stop_s in sorted(times):
        covered.append(max(0.0, stop_s - max(start_s, until)))
        until = max(until, stop_s)
    return math.fsum(covered)


def _cost(seconds: Mapping[Machine, float], *, prices: Prices, rows: int, busy: float | None) -> Cost:
    if busy is not None:
        check_number(busy, "the busy share of a bill", zero=True)
    priced: dict[tuple[str, Price], list[float]] = {}
    unpriced = []
    for machine in sorted(seconds, key=repr):
        if price := prices.of(machine):
            priced.setdefault((machine.what, price), []).append(seconds[machine] / 3600)
        else:
            unpriced.append(machine)
    return Cost(
        charges=tuple(Charge(what, len(hours), math.fsum(hours), price) for (what, price), hours in sorted(priced.items(), key=repr)),
        unpriced=tuple(unpriced),
        unpriced_hours=math.fsum(seconds[machine] / 3600 for machine in unpriced),
        rows=rows,
        busy=None if busy is None else min(1.0, float(busy)),
    )


@dataclass(slots=True)
class Meter:
    """The bill of a run that goes on. It grows with machines, not with time."""

    prices: Prices
    _paid_s: dict[Machine, float] = field(default_factory=dict)
    _since_s: dict[Machine, float] = field(default_factory=dict)

    def see(self, machines: Iterable[Machine], *, at_s: float) -> None:
        """Note which machines there are now. One that is missing is paid for up to now, for nobody saw it go; `at_s` never goes back."""
        there = set(machines)
        for machine in self._since_s.keys() - there:
            self._paid_s[machine] = self._paid_s.get(machine, 0.0) + max(0.0, at_s - self._since_s.pop(machine))
        for machine in there - self._since_s.keys():
            self._since_s[machine] = at_s

    def cost(self, *, at_s: float, rows: int = 0, busy: float | None = None) -> Cost:
        """What the run has cost up to `at_s`."""
        running_s = {machine: self._paid_s.get(machine, 0.0) + max(0.0, at_s - since_s) for machine, since_s in self._since_s.items()}
        return _cost(self._paid_s | running_s, prices=self.prices, rows=rows, busy=busy)

    @property
    def machines(self) -> tuple[Machine, ...]:
        """Those that are there now."""
        return tuple(self._since_s)
