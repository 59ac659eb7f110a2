"""A small city: listings, a calendar of two years and reviews, made up; or a part of a real one, from Inside Airbnb's tables.

python examples/stays/city.py --output stays-output
python examples/stays/city.py --output stays-output --data ../shared/data --city Oakland
"""

import argparse
import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BEGIN, DAYS = dt.date(2023, 1, 1), 730
NEWEST = 5  # reviews of a listing that are taken of a real city
PRAISE = ["Spotless and bright.", "So quiet at night!", "The host was warm and helpful.", "Close to everything.", "A very comfortable bed.", "We will be back."]
BLAME = ["It was dirty.", "Noise all night long.", "The host never answered.", "Far from everything.", "The bed was hard.", "We will not come back."]


def make(listings: int) -> dict[str, pa.Table]:
    """What people like is booked more: a listing's quality shows in its reviews, its price in the calendar, and weekends and summer go first."""
    random = np.random.default_rng(0)
    quality, ids = random.normal(size=listings), np.arange(1, listings + 1)
    room = random.choice(["Entire home/apt", "Private room"], size=listings)
    accommodates = random.integers(1, 7, size=listings)
    worth = 35 + 22 * accommodates + 30 * (room == "Entire home/apt")
    dear = random.normal(0, 0.35, size=listings)  # its price beside what others take for as much
    left, stay = np.zeros(listings, int), np.zeros(listings, int)
    calendar, told = [], []
    for day in range(DAYS):
        date = BEGIN + dt.timedelta(days=day)
        season, weekend = -np.cos(2 * np.pi * day / 365), date.weekday() in (4, 5)
        wanted = 1 / (1 + np.exp(2.2 - 1.1 * quality + 1.4 * dear - 1.2 * season - 1.5 * weekend))
        begins = (left == 0) & (random.random(listings) < wanted)
        stay = np.where(begins, random.integers(1, 4, size=listings), stay)
        left = np.where(begins, stay, left)
        price = np.round(worth * np.exp(dear) * (1 + 0.15 * season + 0.1 * weekend)).astype("float32")
        calendar.append(pa.table({"listing_id": ids, "date": [date] * listings, "available": left == 0, "price": pa.array(price, mask=left > 0)}))
        ends = (left == 1) & (random.random(listings) < 0.12)
        for at in np.flatnonzero(ends):
            likes = random.random(2) < 1 / (1 + np.exp(-1.8 * quality[at]))
            told.append((int(ids[at]), date, " ".join(str(random.choice(PRAISE if one else BLAME)) for one in likes)))
        left = np.maximum(left - 1, 0)
    about = {"listing_id": ids, "city": ["Anywhere"] * listings, "room_type": room, "accommodates": accommodates.astype("int16")}
    about |= {"price": (worth * np.exp(dear)).astype("float32"), "scrape_date": [BEGIN] * listings}
    whom, when, text = zip(*told, strict=True)
    reviews = {"review_id": range(len(told)), "listing_id": whom, "date": when, "reviewer_id": range(len(told)), "text": text}
    return {"listings": pa.table(about), "calendar": pa.concat_tables(calendar), "reviews": pa.table({name: list(one) for name, one in reviews.items()})}


def take(data: Path, city: str, listings: int) -> dict[str, pa.Table]:
    """Every so many of a real city's listings, and the newest reviews of each: embedding all of them takes a while."""
    about = pq.read_table(data / "listings.parquet")
    about = about.filter(pc.equal(about["city"].cast(pa.string()), city)).sort_by("listing_id")
    if not about.num_rows:
        raise SystemExit(f"{data} has no city {city!r}; it has {sorted(set(pq.read_table(data / 'listings.parquet')['city'].to_pylist()))}")
    about = about.take(np.arange(0, about.num_rows, max(1, about.num_rows // listings))[:listings])
    calendar, reviews = (pq.read_table(data / f"{name}.parquet") for name in ("calendar", "reviews"))
    calendar, reviews = (one.filter(pc.is_in(one["listing_id"], about["listing_id"].combine_chunks())) for one in (calendar, reviews))
    reviews = reviews.sort_by([("listing_id", "ascending"), ("date", "descending"), ("review_id", "ascending")])
    whom = reviews["listing_id"].to_numpy()
    return {"listings": about, "calendar": calendar, "reviews": reviews.filter(pa.array(np.arange(len(whom)) - np.searchsorted(whom, whom) < NEWEST))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("stays-output"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--city", default="Oakland")
    parser.add_argument("--listings", type=int, default=120)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for name, table in (take(given.data, given.city, given.listings) if given.data else make(given.listings)).items():
        pq.write_table(table, given.output / f"{name}.parquet", row_group_size=8192)
        print(f"{given.output / name}.parquet  {table.num_rows:,} rows")
