"""What machines cost, what is said of it, and what is refused."""

from __future__ import annotations

import datetime as dt
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cost import Cost, Machine, Meter, Price, Prices, bill, listed, money, read_tables
from headrace.errors import DefinitionError, SettingError

HOUR = 3600.0
L4 = Machine("10.0.0.1", instance="g6.4xlarge", cpus=16, memory_gb=64, gpus=1, accelerator="L4")
BARE = Machine("10.0.0.2", cpus=8, memory_gb=32)
FOUR = Machine("10.0.0.3", cpus=48, memory_gb=192, gpus=4, accelerator="L4")
GROUP = Machine("10.0.0.4", instance="small-workers", cpus=4, memory_gb=16)
OWN = """
[[table]]
provider = "Own racks"
date = 2026-10-01
[table.instances]
small-workers = 0.11
"g6.4xlarge" = 0.9
[table.accelerators]
L4 = 0.5
L40S = "g6.4xlarge"
"""


def usd(machine: Machine, *options: str) -> float | None:
    """What a machine costs by these options."""
    price = Prices.parse(options).of(machine)
    return None if price is None else round(price.usd_per_hour, 6)


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A file of one's own prices."""
    (tmp_path / "own.toml").write_text(OWN)
    return str(tmp_path / "own.toml")


@pytest.mark.parametrize(
    ("machine", "options", "expected"),
    [
        (L4, [], 1.3232),
        (BARE, [], None),
        (FOUR, [], None),
        (GROUP, [], None),
        (L4, ["1.20"], 1.2),
        (BARE, ["1.20"], 1.2),
        (BARE, ["0"], 0.0),
        (L4, ["g6.4xlarge=1.10"], 1.1),
        (L4, ["g6.4xlarge=1.10", "L4=0.8", "2"], 1.1),
        (L4, ["L4=0.8"], 0.8),
        (FOUR, ["L4=0.8"], 3.2),
        (BARE, ["L4=0.8"], None),
        (FOUR, ["L4"], 2.827328),  # four times a g2-standard-4
        (L4, ["L4"], 1.3232),  # its type is known
        (FOUR, ["L4=g6.12xlarge"], 4.6016),
        (L4, ["L4=g6.12xlarge"], 1.3232),
        (GROUP, ["small-workers=0.15"], 0.15),
        (GROUP, ["small-workers=c7i.xlarge"], 0.1785),
        (BARE, ["c7i.2xlarge"], 0.357),
        (L4, ["c7i.2xlarge"], 1.3232),
        (BARE, ["cpu=0.04", "gb=0.004"], 0.448),
        (BARE, ["cpu=0.04"], 0.32),
        (BARE, ["gb=0.004", "9"], 0.128),
        (FOUR, ["cpu=0.04", "gb=0.004"], None),  # accelerators have a price of their own, and nobody said it
        (FOUR, ["cpu=0.04", "9"], 9.0),
        (L4, ["spot"], None),  # no spot price is known for it
        (Machine("a", instance="g2-standard-4"), ["spot"], 0.424056),
        (Machine("a", instance="g2-standard-4", market="spot"), [], 0.424056),
        (Machine("a", instance="g2-standard-4", market="spot"), ["on-demand"], 0.706832),
        (Machine("a", instance="g6.4xlarge", market="spot"), ["g2-standard-4"], None),
        (FOUR, ["L4=g6.12xlarge", "spot"], None),
        (FOUR, ["L4=g6.12xlarge", "spot", "9"], 9.0),
        (Machine("a", gpus=1), ["L4=0.8"], None),  # an accelerator of no known kind
    ],
)
def test_what_a_machine_costs(machine: Machine, options: list[str], expected: float | None) -> None:
    """The most particular word counts, in whatever order they come, and nothing is guessed."""
    assert usd(machine, *options) == usd(machine, *reversed(options)) == expected


def test_own_prices_come_first(own: str) -> None:
    """A file of one's own counts before cores and the tables of headrace, and after what the command line names."""
    assert usd(L4, own) == 0.9
    assert usd(GROUP, own, "cpu=1") == 0.11
    assert usd(FOUR, own) == 2.0
    assert usd(BARE, own, "small-workers") == 0.11
    assert usd(L4, own, "g6.4xlarge=0.7") == 0.7
    assert usd(Machine("a", gpus=2, accelerator="L40S"), own) == 1.8
    assert usd(Machine("a", instance="g5.xlarge"), own) == 1.006


def test_where_a_figure_is_from(own: str) -> None:
    """A basis says whose figure it is, and of which day."""
    aws = "AWS us-east-1 on-demand, as listed on 2026-01-19"
    gcp = "GCP us-central1"

    def basis(machine: Machine, *options: str) -> str:
        price = Prices.parse(options).of(machine)
        assert price is not None
        return price.basis

    assert basis(L4) == aws
    assert basis(BARE, "c7i.2xlarge") == f"as a c7i.2xlarge, {aws}"
    assert basis(FOUR, "L4=g6.12xlarge") == f"as a g6.12xlarge, {aws}"
    assert basis(FOUR, "L4") == f"as 4 x g2-standard-4, the cheapest with one L4, {gcp} on-demand, as listed on 2026-03-28"
    assert basis(Machine("a", instance="g2-standard-4", market="spot")) == f"{gcp} spot, a snapshot of 2026-03-28"
    assert basis(FOUR, "L4=0.80") == "4 x --price L4=0.8"
    assert basis(BARE, "cpu=0.04", "gb=0.004") == "8 x --price cpu=0.04 and 32 x --price gb=0.004"
    assert basis(BARE, "1.20") == "--price 1.2"
    assert basis(GROUP, own) == "Own racks on-demand, as listed on 2026-10-01"
    assert basis(FOUR, own) == "4 x L4, Own racks on-demand, as listed on 2026-10-01"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["1,20"], "--price '1,20' is no price and nothing with a known one; it takes USD per hour for every node (1.20), "),
        (["-1"], "is no price"),
        (["nan"], "is no price"),
        ([""], "is no price"),
        (["cpu"], "is no price"),
        (["g6.4xlrge"], "did you mean 'g6.4xlarge'"),
        (["l40s"], "is no price"),
        (["l4=0.8"], "no accelerator is called 'l4'; did you mean 'L4'"),
        (["CPU=0.04"], "did you mean 'cpu'"),
        (["L4=g6.4xlarg"], "--price 'L4=g6.4xlarg': 'g6.4xlarg' must be a number of USD per hour of at least 0, .*did you mean 'g6.4xlarge'"),
        (["L4=-1"], "must be a number"),
        (["L4=inf"], "must be a number"),
        (["cpu=g6.4xlarge"], "'g6.4xlarge' must be a number of USD per hour of at least 0, such as 0.80"),
        (["=1"], "must have the form name=price"),
        (["L4="], "must have the form name=price"),
        (["spot=0.3"], "a market has no price; --price spot takes spot prices"),
        (["spot", "on-demand"], "--price 'on-demand' contradicts another --price: spot; give one of them"),
        (["1.20", "g6.4xlarge"], "contradicts another --price: 1.2"),
        (["L4=0.8", "L4=0.9"], "contradicts another --price: L4=0.8"),
        (["missing.toml"], "this file of prices cannot be read: .*No such file"),
    ],
)
def test_refusals(options: list[str], message: str) -> None:
    """A price that is none says what is allowed, and the nearest fix."""
    with pytest.raises(SettingError, match=message.replace("(", r"\(").replace(")", r"\)")):
        Prices.parse(options)


def test_saying_the_same_twice_is_no_contradiction() -> None:
    """What is said twice is said once."""
    assert Prices.parse(["L4=0.8", "L4=0.80", "spot", "spot"]) == Prices.parse([" L4 = 0.8 ", "spot"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[table]", "own.toml is no TOML"),
        ("", "must consist of [[table]]s with [table.instances] or [table.accelerators] below them; at its top it has nothing"),
        ("prices = 3", "at its top it has 'prices'"),
        ("table = [1]", "must consist of"),
        ('[[table]]\nregoin = "x"', "own.toml, table 1 has no key 'regoin'; it may have 'provider', .*; did you mean 'region'"),
        ("[[table]]\nregion = 1", "region must be text in quotes, got 1"),
        ('[[table]]\ndate = "2026-01-19"', "date must be a day such as 2026-01-19, without quotes, got '2026-01-19'"),
        ("[[table]]\ndate = 2026-01-19T00:00:00", "date must be a day"),
        ("[[table]]\ninstances = 1", "instances must be a table of prices, [table.instances], got 1"),
        ('[[table]]\nmarket = "spto"', "market must be one of 'on-demand', 'spot', got 'spto'; did you mean 'spot'"),
        ("[[table]]", 'has no prices: below [table.instances], a line such as "g6.4xlarge" = 1.10 is one'),
        ("[[table]]\ninstances.a = 0", "'a' must be a number of USD per hour above 0, got 0"),
        ('[[table]]\ninstances.a = "1"', "'a' must be a number"),
        ("[[table]]\ninstances.a = true", "'a' must be a number"),
        ("[[table]]\n[table.instances]\ng6.xlarge = 1", "'g6' must be a number .* a type with dots in its name has to be in quotes"),
        ("[[table]]\n[table.accelerators]\nL4 = -1", "'L4' must be a number"),
        ('[[table]]\n[table.instances]\nbig = 1\n[table.accelerators]\nL4 = "bigg"', "L4 costs as much as 'bigg', .* did you mean 'big'"),
    ],
)
def test_refused_files(text: str, message: str) -> None:
    """A file of prices with a mistake says where it is."""
    with pytest.raises(SettingError, match=".*".join(re.escape(part) for part in message.split(".*"))):
        read_tables(text, name="own.toml")


def test_a_file_may_be_short() -> None:
    """A table needs no more than one price; what is not said has a plain default."""
    (table,) = read_tables("[[table]]\ninstances.node = 2", name="own.toml")
    assert (str(table), table.instances, table.date) == ("own.toml on-demand", {"node": 2}, None)


def test_names_that_no_machine_has() -> None:
    """A mistyped group or type is not silently ignored: it can be told once the machines are known."""
    prices = Prices.parse(["smal-workers=0.15", "g6.4xlarge=1.10", "L4=0.8", "H100", "cpu=0.1", "3"])
    assert prices.unmatched([L4, GROUP]) == ("smal-workers=0.15", "H100")
    assert Prices.parse(["1.2", "spot"]).unmatched([]) == ()


def test_a_bill() -> None:
    """Hours of all machines, a sum of those with a price, what is idle of it, and what it comes to per row."""
    times = [(L4, 0, HOUR), (BARE, 0, 2 * HOUR), (GROUP, HOUR, 2 * HOUR)]
    cost = bill(times, prices=Prices.parse(["cpu=0.05", "small-workers=0.10"]), rows=500_000, busy=0.75)
    assert cost.usd == pytest.approx(1.3232 + 2 * 8 * 0.05 + 0.10)
    assert cost.usd_per_million_rows == pytest.approx(2 * (cost.usd or 0))
    assert cost.idle == 0.25
    assert cost.idle_usd == pytest.approx(0.25 * (cost.usd or 0))
    assert (cost.unpriced, cost.unpriced_hours) == ((), 0)
    assert str(cost).splitlines() == [
        "2.22 USD, 4.45 USD per million rows; 25% idle: 0.56 USD",
        "   1 x g6.4xlarge: 1.00 h at 1.3232 USD/h (AWS us-east-1 on-demand, as listed on 2026-01-19)",
        "   1 x node with 8 CPUs: 2.00 h at 0.4 USD/h (8 x --price cpu=0.05)",
        "   1 x small-workers: 1.00 h at 0.1 USD/h (--price small-workers=0.1)",
    ]


def test_a_bill_with_machines_of_no_known_price() -> None:
    """They are told, with what would give them a price, and the sum says that it is not all."""
    cost = bill([(L4, 0, HOUR), (BARE, 0, HOUR), (FOUR, 0, 2 * HOUR)], prices=Prices())
    assert cost.usd == pytest.approx(1.3232)
    assert (cost.unpriced, cost.unpriced_hours) == ((BARE, FOUR), 3)
    assert str(cost).splitlines()[0] == "at least 1.32 USD"
    assert str(cost).splitlines()[2:] == [
        "   no price for 2 of the machines (node with 4 L4, node with 8 CPUs), there for 3.00 h",
        "   name one with --price cpu=USD, USD being that per hour",
    ]


@pytest.mark.parametrize(
    ("machine", "example"), [(GROUP, "small-workers=USD"), (FOUR, "L4=USD"), (BARE, "cpu=USD"), (Machine("a", gpus=2), "USD"), (Machine("a"), "cpu=USD")]
)
def test_nothing_has_a_price(machine: Machine, example: str) -> None:
    """Without any price there is no sum, not a sum of nothing."""
    cost = bill([(machine, 0, HOUR)], prices=Prices(), rows=10, busy=0.5)
    assert (cost.usd, cost.usd_per_million_rows, cost.idle_usd) == (None, None, None)
    assert cost.idle == 0.5
    assert str(cost).splitlines()[-1] == f"   name one with --price {example}, USD being that per hour"


def test_no_machines_at_all() -> None:
    """An empty bill is empty."""
    cost = bill([], prices=Prices.parse(["1"]))
    assert (cost, str(cost)) == (Cost((), (), 0.0, 0, None), "")


def test_machines_alike_are_one_line() -> None:
    """A report of a large cluster stays short."""
    times = [(Machine(f"n{at}", instance="g6.xlarge"), 0.0, HOUR) for at in range(100)]
    (charge,) = bill(times, prices=Prices()).charges
    assert (charge.machines, charge.hours) == (100, 100)
    assert charge.usd == pytest.approx(80.48)


def test_no_second_is_paid_for_twice() -> None:
    """Spans of one machine may overlap."""
    assert bill([(BARE, 0, HOUR), (BARE, 1800, 5400), (BARE, 0, 10)], prices=Prices.parse(["1"])).usd == 1.5


def test_busy_shares() -> None:
    """More than all of it counts as all of it: cores may be promised twice."""
    assert bill([(L4, 0, 1)], prices=Prices(), busy=1.2).idle == 0
    with pytest.raises(DefinitionError, match="busy share of a bill must be a number of at least 0"):
        bill([(L4, 0, 1)], prices=Prices(), busy=-0.1)


def test_json() -> None:
    """The dictionary of a cost is plain, and has the sums that the object has."""
    cost = bill([(L4, 0, HOUR), (BARE, 0, HOUR)], prices=Prices(), rows=1000, busy=0.5)
    found = json.loads(json.dumps(cost.to_dict()))
    assert {name: found[name] for name in ("usd", "usd_per_million_rows", "rows", "busy", "idle", "complete", "unpriced_hours")} == {
        "usd": 1.3232,
        "usd_per_million_rows": pytest.approx(1323.2),
        "rows": 1000,
        "busy": 0.5,
        "idle": 0.5,
        "complete": False,
        "unpriced_hours": 1.0,
    }
    assert found["charges"][0] | {"basis": ""} == {"what": "g6.4xlarge", "machines": 1, "hours": 1.0, "usd": 1.3232, "usd_per_hour": 1.3232, "basis": ""}
    assert [machine["name"] for machine in found["unpriced"]] == ["10.0.0.2"]


def test_a_meter() -> None:
    """Machines come and go; the cost so far is that of the time they were there."""
    meter = Meter(Prices.parse(["1"]))
    assert (meter.machines, meter.cost(at_s=0).usd) == ((), None)
    meter.see([L4], at_s=0)
    meter.see([L4, BARE], at_s=HOUR)
    assert meter.cost(at_s=2 * HOUR, rows=1000).usd == 3
    meter.see([BARE], at_s=2 * HOUR)
    assert meter.cost(at_s=4 * HOUR).usd == 5
    meter.see([L4, BARE], at_s=4 * HOUR)
    assert meter.cost(at_s=5 * HOUR, busy=0.5).idle_usd == 3.5
    assert meter.cost(at_s=4 * HOUR - 9).usd == pytest.approx(5, abs=0.01)  # a clock that goes back takes nothing back but the time since


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (None, "no price"),
        (0.0, "0.00 USD"),
        (0.000_02, "0.00002 USD"),
        (0.00042, "0.00042 USD"),
        (0.042, "0.042 USD"),
        (0.1, "0.10 USD"),
        (12345.678, "12,345.68 USD"),
    ],
)
def test_money(amount: float | None, text: str) -> None:
    """To the cent; small sums to two digits."""
    assert money(amount) == text


def test_the_tables_are_read_when_they_are_needed() -> None:
    """Importing the module opens no file."""
    code = "from headrace.cost import Machine, Prices, listed as l; a = l.cache_info().currsize; Prices().of(Machine('a')); print(a, l.cache_info().currsize)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0 1\n"


def test_the_newest_table_is_not_from_the_future() -> None:
    """Dates of the tables are days that have been."""
    assert max(table.date for table in listed() if table.date) <= dt.datetime.now(dt.UTC).date()


def test_a_price_is_a_plain_pair() -> None:
    """Prices compare by what they say."""
    assert Prices.parse(["2"]).of(BARE) == Prices(every=2).of(BARE) == Price(2.0, "--price 2")
