"""Models by their names in an MLflow registry: a real one, in a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import registered

import headrace as hr
from headrace import fingerprint, registry
from headrace.errors import SettingError
from headrace.llms import places
from headrace.registry import Address

pytestmark = pytest.mark.filterwarnings("ignore")  # mlflow's own, and its dependencies'


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The client of a registry with `tiny`, whose versions 1 and 2 are folders that say so, and which is named by two aliases, and with `other`."""
    folder = tmp_path_factory.mktemp("registry")
    with registered.asked(registered.in_file(folder)) as client:
        for number, alias in (1, "champion"), (2, "challenger"):
            registered.register(client, "tiny", model(folder / f"tiny-{number}", number), alias)
        registered.register(client, "other", f"file://{model(folder / 'other model', 1)}".replace(" ", "%20"), "only")
        yield client


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "headrace" / "registry"


def model(folder: Path, number: int) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_text(f'{{"number": {number}}}')
    (folder / "inner" / "weights").write_bytes(bytes(1000))
    return folder


def number(folder: Path | str) -> str:
    assert (Path(folder) / "inner" / "weights").stat().st_size == 1000
    return (Path(folder) / "config.json").read_text()


# Addresses


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("models:/tiny@champion", Address("tiny", alias="champion")),
        ("models:/tiny/3", Address("tiny", version="3")),
        ("models:/main.nlp.tiny model@the-best", Address("main.nlp.tiny model", alias="the-best")),
        ("models:/me@home/12", Address("me@home", version="12")),
    ],
)
def test_addresses(uri: str, address: Address):
    assert registry.is_address(uri) and Address.of(uri, "model") == address and str(address) == uri


@pytest.mark.parametrize("uri", ["models:/tiny", "models:/tiny/latest", "models:/tiny/Production", "models:/tiny@", "models:/tiny/0", "models:/tiny/1/inner"])
def test_what_names_no_version_is_told_how(uri: str):
    with pytest.raises(SettingError, match=rf"model='{uri}' names no version; name an alias, models:/tiny@champion, or a version's number, models:/tiny/3"):
        places.check(uri, "model")


def test_other_names_are_no_addresses():
    assert not any(map(registry.is_address, ("tiny", "s3://models/tiny", "/models:/tiny", None)))


def test_what_clients_call_it():
    assert places.public_name("models:/tiny@champion") == places.public_name("models:/tiny/3") == "tiny"
    assert places.public_name("models:/tiny one@champion") == "tiny-one"


# Where a version lies


def test_by_alias_and_by_version(client: Any):
    first = registry.locate("models:/tiny@champion")
    assert (first.name, first.version, str(first)) == ("tiny", "1", "models:/tiny/1") and first.uri.endswith("/tiny-1")
    assert registry.locate("models:/tiny/1") == first
    assert registry.locate("models:/tiny/2") == registry.locate("models:/tiny@challenger")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/tny@champion", "the registry has no model 'tny'; it has 'other', 'tiny'; did you mean 'tiny'"),
        ("models:/tny/1", "the registry has no model 'tny'; it has 'other', 'tiny'; did you mean 'tiny'"),
        ("models:/tiny@champoin", "model 'tiny' has no alias 'champoin'; it has 'challenger', 'champion'; did you mean 'champion'"),
        ("models:/tiny/7", "model 'tiny' has no version 7; it has '2', '1'"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(client: Any, uri: str, said: str):
    with pytest.raises(SettingError, match=f"model='{uri}': {said}"):
        registry.locate(uri)


def test_without_mlflow_the_command_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SettingError, match=r"needs mlflow, which is not installed: pip install 'headrace\[registry\]'"):
        registry.locate("models:/tiny/1")


def test_a_registry_that_is_not_there_is_not_made(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(SettingError, match=r"there is no MLflow registry at sqlite:///.*; MLFLOW_TRACKING_URI, or MLFLOW_REGISTRY_URI, says where"):
        registry.locate("models:/tiny/1")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://me:secret@127.0.0.1:9", "cannot be had from the MLflow registry at http://127.0.0.1:9: .*refused"),
        ("sqlite:///FOLDER/junk.db", "cannot be had from the MLflow registry at sqlite:////.*: .*not a database"),
        ("gopher://127.0.0.1", "cannot be had from the MLflow registry at gopher://127.0.0.1: .*unsupported URI"),
    ],
)
def test_a_registry_out_of_reach_is_told_without_its_password(client: Any, uri: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "junk.db").write_bytes(b"junk" * 1000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("FOLDER", str(tmp_path)))
    with pytest.raises(SettingError, match=said) as raised:
        registry.locate("models:/tiny/1")
    assert "secret" not in str(raised.value)


def test_the_registry_has_a_variable_of_its_own(client: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", os.environ["MLFLOW_TRACKING_URI"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert registry.locate("models:/tiny@champion").version == "1"


def test_what_mlflow_is_told_is_told_for_as_long_as_it_is_asked(client: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    before = dict(os.environ)
    registry.locate("models:/tiny@champion")
    assert dict(os.environ) == before


# Fetching


def test_a_version_is_fetched_once_and_a_moved_alias_names_another(client: Any, cache: Path):
    first = places.fetch("models:/tiny@champion", "model")
    assert number(first) == '{"number": 1}' and Path(first).parent == cache
    written = Path(first, "config.json").stat().st_mtime_ns
    assert places.fetch("models:/tiny/1", "model") == first and Path(first, "config.json").stat().st_mtime_ns == written
    client.set_registered_model_alias("tiny", "champion", "2")
    try:
        second = places.fetch("models:/tiny@champion", "model")
    finally:
        client.set_registered_model_alias("tiny", "champion", "1")
    assert number(second) == '{"number": 2}' and number(first) == '{"number": 1}'
    assert places.fetch("models:/tiny@champion", "model") == first
    assert number(places.fetch("models:/other@only", "model")) == '{"number": 1}'  # by file://
    assert not [left for left in cache.iterdir() if left.name.startswith(".")]


def test_artifacts_of_runs_and_of_logged_models(client: Any, tmp_path: Path):
    import mlflow

    experiment = client.create_experiment("logged", artifact_location=str(tmp_path / "artifacts"))
    with mlflow.start_run(experiment_id=experiment) as run:
        mlflow.log_artifacts(str(model(tmp_path / "run", 3)), "weights")
    registered.register(client, "logged", f"runs:/{run.info.run_id}/weights", "run", run_id=run.info.run_id)
    logged = mlflow.create_external_model(name="made", experiment_id=experiment)
    client.log_model_artifacts(logged.model_id, str(model(tmp_path / "model", 4)))
    registered.register(client, "logged", f"models:/{logged.model_id}", "model")
    assert number(registry.fetch("models:/logged@run", "model")) == '{"number": 3}'
    assert number(registry.fetch("models:/logged@model", "model")) == '{"number": 4}'


@pytest.mark.parametrize(("source", "said"), [("/no/such/folder", "cannot be fetched"), ("empty", "are no files"), ("runs:/none/weights", "cannot be had")])
def test_artifacts_that_cannot_be_had_leave_nothing(client: Any, tmp_path: Path, cache: Path, source: str, said: str):
    (tmp_path / "empty").mkdir()
    registered.register(client, "broken", tmp_path / source if source == "empty" else source, "last")
    with pytest.raises(SettingError, match=rf"model='models:/broken/\d': artifacts='.*' {said}"):
        registry.fetch("models:/broken@last", "model")
    assert [left.suffix for left in cache.iterdir()] == [".lock"]


# Stages


def test_a_pipeline_is_pinned_to_the_versions_of_its_beginning(client: Any):
    said = hr.LLM(out="said", model="models:/tiny@champion", lora="models:/other@only", prompt="Say: {text}", engine={"dtype": "float32"})
    vector = hr.models.Embedder(model="models:/tiny@challenger", size=12)
    plain = hr.LLM(name="plain", out="more", model="acme/small", prompt="Say: {text}")
    pipeline = hr.Pipeline("p", said, vector, plain)
    first = pipeline.pinned()
    assert {**first.stage("said").settings, **pipeline.stage("said").settings, "model": "models:/tiny/1", "lora": "models:/other/1"} == first.stage(
        "said"
    ).settings
    assert first.stage("embedder").settings["model"] == "models:/tiny/2" and first.stage("embedder").call.size == 12
    assert first.stage("plain") is pipeline.stage("plain")
    assert first.pinned().stage("said").settings == first.stage("said").settings
    client.set_registered_model_alias("tiny", "champion", "2")
    try:
        second = pipeline.pinned()
    finally:
        client.set_registered_model_alias("tiny", "champion", "1")
    told = fingerprint.differences(fingerprint.facts(first, {}), fingerprint.facts(second, {}))
    assert told == ["said.model: was 'models:/tiny/1', is 'models:/tiny/2'"]


def test_an_alias_that_is_not_there_stops_a_run_before_it_begins(client: Any):
    with pytest.raises(SettingError, match="stage 'said': model='models:/tiny@champ': model 'tiny' has no alias 'champ'"):
        hr.Pipeline("p", hr.LLM(out="said", model="models:/tiny@champ", prompt="Say: {text}")).pinned()


def test_an_embedder_needs_a_size_and_a_version():
    with pytest.raises(SettingError, match="embedder: model='models:/tiny' names no version"):
        hr.models.Embedder(model="models:/tiny", size=12)
    with pytest.raises(SettingError, match="say size=384"):
        hr.models.Embedder(model="models:/tiny@champion")
