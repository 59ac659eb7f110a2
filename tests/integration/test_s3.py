"""S3 by its real protocol: a server on loopback, and the usual AWS environment variables."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

import headrace as hr
from headrace.errors import ChangedError, SourceError, StageError, StorageError
from headrace.features.job import FeatureJob
from headrace.features.reading import read_events
from headrace.formats import Input
from headrace.on_ray import features
from headrace.on_ray.cluster import connected
from headrace.sources import open_source

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """An S3 server with the buckets `in` and `out`; the environment points to it before Ray starts, so that workers have it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true"}.items():
            patch.setenv(name, value)
        for proxy in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(proxy, raising=False)
        client = boto3.client("s3")
        for bucket in ("reviews-in", "reviews-out"):
            client.create_bucket(Bucket=bucket)
        try:
            yield url
        finally:
            client.close()
            server.stop()


@pytest.fixture(scope="module")
def bucket(endpoint: str, shared_ray: None) -> Any:
    """Arrow's view of the server, with 300 rows in six files below s3://reviews-in/day."""
    filesystem = fs.S3FileSystem(endpoint_override=endpoint.partition("://")[2], scheme="http", region="us-east-1")
    for file in range(6):
        ids = range(file * 50, file * 50 + 50)
        pq.write_table(pa.table({"id": ids, "text": [f"text {n}" for n in ids]}), f"reviews-in/day/{file % 2}/{file}.parquet", filesystem=filesystem)
    return filesystem


@hr.stage(out={"length": int})
def length(text: hr.Column[str]) -> dict[str, Any]:
    """A function."""
    return {"length": [len(one) for one in text]}


PIPELINE = hr.Pipeline("lengths", length)


def test_from_s3_to_s3(bucket: Any) -> None:
    """A glob as input and a prefix as output, in Parquet: whole files, the mark and the events."""
    report = hr.run(PIPELINE, input=hr.Input("s3://reviews-in/day/*/*.parquet", where="id < 250"), output="s3://reviews-out/run/one", keep="id")
    files = bucket.get_file_info(fs.FileSelector("reviews-out/run/one", recursive=True))
    names = {file.base_name for file in files}
    assert report.rows_out == 250 and "_SUCCESS" in names and any(name.startswith("events-000001-") for name in names)
    parts = [file.path for file in files if file.base_name.startswith("part-")]
    assert len(parts) == report.files
    data = pa.concat_tables(pq.read_table(path, filesystem=bucket) for path in parts).sort_by("id")
    assert data["id"].to_pylist() == list(range(250))
    again = hr.run(PIPELINE, input=hr.Input("s3://reviews-in/day/*/*.parquet", where="id < 250"), output="s3://reviews-out/run/one", keep="id")
    assert again.rows_before == again.rows_out == 250, "there is nothing to do"
    with pytest.raises(ChangedError, match="--where was 'id < 250' when the output was begun, and is None now"):
        hr.run(PIPELINE, input="s3://reviews-in/day/*/*.parquet", output="s3://reviews-out/run/one", keep="id")


def test_from_s3_to_json_lines(bucket: Any, tmp_path: Path) -> None:
    """A prefix as input, a local folder as output."""
    report = hr.run(PIPELINE, input=hr.Input("s3://reviews-in/day", limit=120), output=hr.Output(str(tmp_path / "out"), format="jsonl"))
    assert report.rows_in == report.rows_out == 120


def test_a_delta_table_on_s3(bucket: Any, endpoint: str) -> None:
    """The commit goes to the bucket, too."""
    hr.run(PIPELINE, input="s3://reviews-in/day", output=hr.Output("s3://reviews-out/table", format="delta"), keep="id")
    options = {"AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}
    table = deltalake.DeltaTable("s3://reviews-out/table", storage_options=options)
    assert table.version() == 0
    found = sum(pq.read_metadata(f"reviews-out/table/{os.path.basename(uri)}", filesystem=bucket).num_rows for uri in table.file_uris())
    assert found == 300


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://no-such-bucket/x/*.parquet", r"no file matches 's3://no-such-bucket/x/\*\.parquet'; check the path"),
        ("s3://reviews-in/none/*.parquet", r"no file matches 's3://reviews-in/none/\*\.parquet'"),
        ("s3://reviews-in/day/*.csv", "no file matches"),
    ],
)
def test_nothing_there(bucket: Any, uri: str, message: str) -> None:
    """A bucket or a prefix that is not there is named as it was written."""
    with pytest.raises(SourceError, match=message):
        open_source(Input(uri))


def test_a_server_that_does_not_answer(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that cannot be listed, and an output that cannot be written, are told apart."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(SourceError, match=r"cannot list 's3://reviews-in/day'"):
        open_source(Input("s3://reviews-in/day"))


def test_an_output_bucket_that_does_not_exist(bucket: Any) -> None:
    """It is told before anything runs."""
    with pytest.raises(StorageError, match="cannot write '_headrace/.*' in 's3://no-such-bucket/out'"):
        hr.run(PIPELINE, input="s3://reviews-in/day", output="s3://no-such-bucket/out")


def test_features_of_events_there(bucket: Any) -> None:
    """Through the view's pipeline, in parts, and back to a bucket; a second time there is nothing to do."""
    at = dt.datetime(2026, 3, 1, tzinfo=dt.UTC)
    who, days, text = [n % 17 for n in range(200)], [at - dt.timedelta(days=n % 60) for n in range(200)], ["x" * (n % 9) for n in range(200)]
    pq.write_table(pa.table({"who": who, "at": days, "text": text}), "reviews-in/said/0.parquet", filesystem=bucket, row_group_size=64)
    sums = {"times": hr.features.count(over="30d"), "letters": hr.features.sum("length", over="30d")}
    view = hr.FeatureView("said", "s3://reviews-in/said/*.parquet", key="who", time="at", features=sums, pipeline=hr.Pipeline("lengths", length))
    job = FeatureJob.of([view], output="s3://reviews-out/known", at=at, parts=3)
    report = features.run(job, connect=connected)
    assert (report.rows, report.events, report.parts) == (17, 200, 3)
    found = pa.concat_tables(job.tables()).sort_by("who").to_pylist()
    assert found == hr.features.latest(view, read_events(view).whole(), at=at).to_pylist()
    assert features.run(job, connect=connected) == report


def learn(shard: Any, settings: Any, run: Any) -> None:
    """Counts the letters it was given, from where it was cut off; what it saved there says so."""
    folder = run.resume()
    letters = int((folder / "letters").read_text()) if folder else 0

    def save(folder: Path) -> None:
        (folder / "letters").write_text(str(letters))

    for batch in shard.batches(20):
        letters += int(batch["length"].sum())
        run.report(letters=letters)
        if letters > 1000 and folder is None:
            raise ArithmeticError("too many")
        run.checkpoint(save)


def test_a_training_keeps_its_checkpoints_there_and_goes_on(bucket: Any) -> None:
    """What is uploaded while the loop goes on is what the next run begins with."""
    training = hr.Training("letters", learn, data=hr.Pipeline("p", length), checkpoint_every=2)
    options: dict[str, Any] = {"input": "s3://reviews-in/day", "output": "s3://reviews-out/letters"}
    with pytest.raises(StageError, match="too many"):
        hr.train(training, **options)
    result = hr.train(training, **options)
    assert result.metrics == {"letters": float(sum(len(f"text {n}") for n in range(300)))}
    assert 0 < result.record.rows_in < 300 and result.record.step == 15
    assert result.checkpoint == "s3://reviews-out/letters/checkpoint"
    with bucket.open_input_stream("reviews-out/letters/checkpoint/letters") as stream:
        assert float(stream.read()) == result.metrics["letters"]
    assert hr.train(training, **options).record.rows_in == 0
