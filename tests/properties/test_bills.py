"""Money: sums that add up however the time is cut, nothing priced from nothing, and tables that can be believed."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headrace.cost import Machine, Meter, Prices, Table, bill, listed, read_tables
from headrace.errors import SettingError

# ray.util.accelerators.accelerators in Ray 2.60
# fmt: off
RAY_NAMES = {
    "V100", "P100", "T4", "P4", "K80", "A10G", "L4", "L40S", "A100", "H100", "H200", "H20", "B200", "B300", "GB200", "GB300", "RTX-PRO-6000",
    "A100-40G", "A100-80G", "aws-neuron-core", "TPU-V2", "TPU-V3", "TPU-V4", "TPU-V5P", "TPU-V5LITEPOD", "TPU-V6E", "TPU-V7X", "Intel-GPU-Max-1550",
    "Intel-GPU-Max-1100", "Intel-GAUDI", "AMD-Instinct-MI100", "AMD-Instinct-MI210", "AMD-Instinct-MI300X-OAM",
}
# fmt: on
ONE = {  # instances with exactly one accelerator of the kind
    "T4": [f"g4dn.{size}" for size in ("xlarge", "2xlarge", "4xlarge", "8xlarge", "16xlarge")] + [f"Standard_NC{size}as_T4_v3" for size in (4, 8, 16)],
    "A10G": [f"g5.{size}" for size in ("xlarge", "2xlarge", "4xlarge", "8xlarge", "16xlarge")],
    "L4": [*(f"g6.{size}" for size in ("xlarge", "2xlarge", "4xlarge", "8xlarge", "16xlarge")), "gr6.4xlarge", "gr6.8xlarge"]
    + [f"g2-standard-{size}" for size in (4, 8, 12, 16, 32)],
    "L40S": [f"g6e.{size}" for size in ("xlarge", "2xlarge", "4xlarge", "8xlarge", "16xlarge")],
    "V100": ["p3.2xlarge"],
    "H100": ["p5.4xlarge", "a3-highgpu-1g"],
    "A100": ["a2-highgpu-1g", "a2-ultragpu-1g", "Standard_NC24ads_A100_v4"],
    "A100-40G": ["a2-highgpu-1g"],
    "A100-80G": ["a2-ultragpu-1g", "Standard_NC24ads_A100_v4"],
    "RTX-PRO-6000": ["g4-standard-48"],
}
TYPES = ["g6.xlarge", "g2-standard-4", "c7i.large", "Standard_D4s_v5", "workers", None]
MACHINES = st.builds(
    lambda name, instance, market, cpus, memory_gb, accelerator: Machine(
        name, instance=instance, market=market, cpus=cpus, memory_gb=memory_gb, gpus=2 if accelerator else 0, accelerator=accelerator
    ),
    st.sampled_from(["a", "b", "c", "d"]),
    st.sampled_from(TYPES),
    st.sampled_from(["spot", "on-demand", None]),
    st.integers(1, 64),
    st.integers(0, 512),
    st.sampled_from(["L4", "H100", None]),
)
AMOUNTS = st.floats(0.001, 100)
OPTIONS = st.lists(
    st.one_of(
        AMOUNTS.map(str),
        st.tuples(st.sampled_from(["g6.xlarge", "workers", "L4", "H100", "cpu", "gb"]), AMOUNTS).map(lambda pair: f"{pair[0]}={pair[1]}"),
        st.sampled_from(["spot", "L4", "H100", "L4=g6.xlarge", "workers=c7i.large"]),
    ),
    max_size=4,
    unique_by=lambda option: option.partition("=")[0] if not option[0].isdigit() else "",
)
SECONDS = st.integers(0, 10**6)
TIMES = st.lists(st.tuples(MACHINES, SECONDS, st.integers(0, 10**5)).map(lambda one: (one[0], float(one[1]), float(one[1] + one[2]))), max_size=8)
BUSY = st.none() | st.floats(0, 1)


@given(TIMES, OPTIONS, st.data())
def test_a_split_interval_costs_the_same(times, options, data):
    """Cutting time in two, at any moment, changes no sum."""
    prices = Prices.parse(options)
    cut = []
    for machine, start_s, stop_s in times:
        at_s = data.draw(st.floats(start_s, stop_s))
        cut += [(machine, start_s, at_s), (machine, at_s, stop_s)]
    whole, parts = bill(times, prices=prices), bill(cut, prices=prices)
    assert parts.usd == (None if whole.usd is None else pytest.approx(whole.usd, abs=1e-9))
    assert parts.unpriced == whole.unpriced
    assert parts.unpriced_hours == pytest.approx(whole.unpriced_hours, abs=1e-9)


@given(TIMES, OPTIONS, st.randoms(use_true_random=False))
def test_order_says_nothing(times, options, random):
    """A bill is the same however intervals and prices are ordered."""
    mixed, swapped = random.sample(times, len(times)), random.sample(options, len(options))
    assert bill(mixed, prices=Prices.parse(swapped)) == bill(times, prices=Prices.parse(options))


@given(TIMES, OPTIONS, st.sampled_from([0.5, 2.0, 64.0]), st.integers(1, 10**12))
def test_money_scales_with_time(times, options, factor, rows):
    """So many times the hours cost so many times the money, per row as well."""
    once = bill(times, prices=Prices.parse(options), rows=rows)
    longer = bill([(machine, start_s * factor, stop_s * factor) for machine, start_s, stop_s in times], prices=Prices.parse(options), rows=rows)
    assert longer.usd == (None if once.usd is None else pytest.approx(once.usd * factor))
    assert longer.usd_per_million_rows == (None if once.usd is None else pytest.approx(once.usd / rows * 1e6 * factor))


@given(TIMES, AMOUNTS, st.sampled_from([0.5, 2.0, 64.0]))
def test_money_scales_with_the_price(times, usd, factor):
    """So many times the price is so many times the money."""
    once, more = (bill(times, prices=Prices(every=price)) for price in (usd, usd * factor))
    assert more.usd == (None if once.usd is None else pytest.approx(once.usd * factor))


@given(TIMES, TIMES, OPTIONS)
def test_two_clusters_cost_the_sum_of_both(ours, theirs, options):
    """The bill of machines apart is the sum of their bills."""
    prices = Prices.parse(options)
    theirs = [(Machine(f"{machine.name}!", instance=machine.instance, cpus=1), start_s, stop_s) for machine, start_s, stop_s in theirs]
    both, one, other = (bill(times, prices=prices) for times in (ours + theirs, ours, theirs))
    assert (both.usd or 0) == pytest.approx((one.usd or 0) + (other.usd or 0), abs=1e-9)
    assert len(both.unpriced) == len(one.unpriced) + len(other.unpriced)


@given(TIMES, OPTIONS, BUSY, st.integers(0, 10**9))
def test_idle_and_busy_are_all_of_it(times, options, busy, rows):
    """Idle and busy money is the total; what is not known stays unknown; no sum is below 0; the dictionary is plain JSON."""
    cost = bill(times, prices=Prices.parse(options), rows=rows, busy=busy)
    assert (cost.idle_usd is None) == (busy is None or cost.usd is None)
    if busy is not None and cost.usd is not None and cost.idle_usd is not None:
        assert 0 <= cost.idle_usd <= cost.usd
        assert cost.usd * busy + cost.idle_usd == pytest.approx(cost.usd)
    assert json.loads(json.dumps(cost.to_dict(), allow_nan=False))["usd"] == cost.usd
    assert all(charge.usd >= 0 for charge in cost.charges)


@given(TIMES, OPTIONS)
def test_nothing_is_priced_from_nothing(times, options):
    """Every machine is either charged or told; one with a price can name its source, and without any there is no sum."""
    prices = Prices.parse(options)
    cost = bill(times, prices=prices)
    machines = {machine for machine, _, _ in times}
    assert sum(charge.machines for charge in cost.charges) + len(cost.unpriced) == len(machines)
    assert set(cost.unpriced) == {machine for machine in machines if prices.of(machine) is None}
    assert (cost.usd is None) == (not cost.charges)
    known = [str(table) for table in listed()]
    for charge in cost.charges:
        assert "--price " in charge.price.basis or any(charge.price.basis.endswith(table) for table in known)


@given(MACHINES)
def test_an_unknown_type_has_no_price_by_default(machine):
    """Without --price, a machine has a price only if its very type is listed in its market."""
    market = machine.market or "on-demand"
    price = Prices().of(machine)
    offers = [table.instances[machine.instance] for table in listed() if table.market == market and machine.instance in table.instances]
    assert (price.usd_per_hour if price else None) == (offers[0] if offers else None)


@given(st.lists(st.tuples(st.sets(MACHINES, max_size=3), st.integers(0, 1000)), max_size=6), OPTIONS)
def test_a_meter_is_a_running_bill(looks, options):
    """What a meter shows is the bill of the intervals that it has seen."""
    meter, at_s, since, times = Meter(Prices.parse(options)), 0.0, {}, []
    for machines, later_s in looks:
        at_s += later_s
        times += [(machine, since.pop(machine), at_s) for machine in set(since) - machines]
        since |= dict.fromkeys(machines - set(since), at_s)
        meter.see(machines, at_s=at_s)
    at_s += 7
    expected = bill([*times, *((machine, start_s, at_s) for machine, start_s in since.items())], prices=meter.prices)
    found = meter.cost(at_s=at_s)
    assert found.usd == (None if expected.usd is None else pytest.approx(expected.usd))
    assert found.unpriced == expected.unpriced


@given(OPTIONS)
def test_options_make_the_round_trip(options):
    """What prices say of themselves, in a basis or as a name that nothing has, can be said to --price again."""
    prices = Prices.parse(options)
    again = Prices.parse([f"{name}={value}" if value is not None else name for name, value in prices.rates.items()])
    assert again.rates == prices.rates
    told = Prices.parse(prices.unmatched([])).rates
    assert told.keys() == prices.rates.keys()
    for name, value in prices.rates.items():
        assert told[name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)


@given(st.dictionaries(st.text("abcXYZ019.-_", min_size=1, max_size=12), AMOUNTS, min_size=1, max_size=5), st.sampled_from(["spot", "on-demand"]))
def test_files_make_the_round_trip(instances, market):
    """A file of prices gives back what is written in it."""
    lines = "\n".join(f"{json.dumps(name)} = {usd!r}" for name, usd in instances.items())
    (table,) = read_tables(f'[[table]]\nprovider = "P"\nmarket = "{market}"\ndate = 2026-10-01\n[table.instances]\n{lines}', name="own.toml")
    assert (table.instances, table.market, str(table.date)) == (instances, market, "2026-10-01")


@given(st.text(max_size=20))
def test_no_text_is_a_surprise(text):
    """--price takes a word or refuses it in words; it never fails otherwise."""
    assume(not text.strip().endswith(".toml"))
    try:
        prices = Prices.parse([text])
    except SettingError:
        return
    price = prices.of(Machine("a", cpus=1, memory_gb=1))
    assert price is None or math.isfinite(price.usd_per_hour)


@pytest.mark.parametrize("table", listed(), ids=str)
def test_a_table_can_be_believed(table: Table):
    """Source and date are there, prices are above 0, and accelerators have Ray's names and the price of the cheapest instance with one."""
    assert table.source.startswith("https://") and table.date and table.provider and table.region
    assert all(isinstance(usd, float) and 0.001 < usd < 500 for usd in table.instances.values())
    assert table.accelerators.keys() <= RAY_NAMES
    for kind, instance in table.accelerators.items():
        assert instance == min((one for one in ONE[kind] if one in table.instances), key=lambda one: table.instances[one])


def test_spot_is_no_dearer_than_on_demand():
    """Every spot price has an on-demand price of the same provider and region, which it does not exceed."""
    fixed = {(table.provider, table.region): table for table in listed() if table.market == "on-demand"}
    for table in listed():
        regular = fixed[table.provider, table.region]
        assert all(usd <= regular.instances[instance] for instance, usd in table.instances.items())
    assert len({(table.provider, table.region, table.market) for table in listed()}) == len(listed())


def test_a_type_is_listed_by_one_provider():
    """Types of instances are unique across providers, so that a name means one machine."""
    seen: dict[str, str] = {}
    for table in listed():
        assert all(seen.setdefault(instance, table.provider) == table.provider for instance in table.instances)
        assert not seen.keys() & table.accelerators.keys()
