"""Runs, versions, gates and lineage in a real registry in a file: what is written is what is read, and an alias moves only as it should."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import registered
from typer.testing import CliRunner

import headrace as hr
from headrace import cli, registry
from headrace.errors import GateError, RegistryError, SettingError
from headrace.parity import Golden
from headrace.registry import releases
from headrace.registry.references import Reference

pytestmark = pytest.mark.filterwarnings("ignore")  # mlflow's own, and its dependencies'

numbers = itertools.count(1)


@hr.stage(out={"scaled": float})
class Scale:
    """A stage whose model is a number in a file of a registered folder."""

    model: str = "models:/scale@prod"

    def setup(self, device: str) -> None:
        self.factor = json.loads((registry.fetch(self.model) / "weights.json").read_text())["factor"]

    def __call__(self, x: hr.Column[float]) -> dict[str, Any]:
        return {"scaled": x * self.factor}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("registry")
    with registered.asked(registered.in_file(folder)) as client, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield client


@pytest.fixture
def name() -> str:
    """A model that no other test has."""
    return f"scale{next(numbers)}"


def weights(folder: Path, factor: float) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "weights.json").write_text(json.dumps({"factor": factor}))
    return folder


def add(name: str, folder: Path, factor: float = 2.0, **metrics: float) -> registry.Version:
    return registry.register(weights(folder, factor), name, run=registry.log_run(name, metrics=metrics))


def named(name: str, alias: str) -> str:
    return registry.model(name).aliases.get(alias, "")


# Runs


def test_a_run_is_kept_with_all_that_it_depends_on(client: Any, name: str, tmp_path: Path):
    @dataclasses.dataclass
    class Inner:
        depth: int = 6

    @dataclasses.dataclass
    class Settings:
        rate: float = 0.1
        trees: Inner = dataclasses.field(default_factory=Inner)

    (tmp_path / "labels.csv").write_text("x\n1\n")
    (tmp_path / "curve.svg").write_text("<svg/>")
    model = add(name, tmp_path / "base")
    metrics = {"auc": 0.83, "loss": [(10, 0.5), (20, 0.25)], "nan": [1, float("nan")]}
    inputs = [str(tmp_path / "labels.csv"), "view:occupancy#ab12", f"models:/{name}@candidate"]
    run = registry.log_run("trained", settings=Settings(), metrics=metrics, inputs=inputs, files=[tmp_path / "curve.svg"], facts={"code of train.py": "1"})
    found = client.get_run(run.id)
    assert str(run) == f"run:{run.id}" and found.info.status == "FINISHED"
    assert found.data.params == {"rate": "0.1", "trees.depth": "6"}
    assert (found.data.metrics["auc"], found.data.metrics["loss"]) == (0.83, 0.25)
    assert [(point.step, point.value) for point in client.get_metric_history(run.id, "loss")] == [(10, 0.5), (20, 0.25)]
    datasets = {one.dataset.name: (one.dataset.digest, one.dataset.source_type) for one in found.inputs.dataset_inputs}
    assert datasets.keys() == {str(tmp_path / "labels.csv"), "view:occupancy", str(model)}
    assert datasets["view:occupancy"] == ("ab12", "view") and datasets[str(model)] == (model.digest, "model")
    kept = {one.path for one in client.list_artifacts(run.id, "headrace")}
    assert kept == {f"headrace/{file}" for file in ("facts.json", "hardware.json", "versions.json", "settings.json")}
    assert [one.path for one in client.list_artifacts(run.id)] == ["curve.svg", "headrace"]
    folder = Path(client.download_artifacts(run.id, "headrace"))
    assert json.loads((folder / "versions.json").read_text())["headrace"] == hr.__version__
    assert json.loads((folder / "hardware.json").read_text())["cores"] == len(os.sched_getaffinity(0))


def test_a_pipeline_is_noted_with_its_code_and_its_models(client: Any, name: str, tmp_path: Path):
    add(name, tmp_path / "model")
    pipeline = hr.Pipeline("scaled", Scale(model=f"models:/{name}@candidate"))
    run = client.get_run(registry.log_run("scored", pipeline=pipeline).id)
    assert run.data.params == {"scale.model": f"'models:/{name}/1'"} and len(run.data.tags["headrace.code"]) == 16
    assert [one.dataset.name for one in run.inputs.dataset_inputs] == [f"models:/{name}/1"]
    facts = json.loads(Path(client.download_artifacts(run.info.run_id, "headrace/facts.json")).read_text())
    assert facts["scale.model"] == f"'models:/{name}/1'" and "code of test_registry_releases.py" in facts


def test_the_report_of_a_job_tells_its_input_its_models_and_its_cost(client: Any, name: str, tmp_path: Path):
    add(name, tmp_path / "model")
    report = {
        "facts": {"scale.model": f"'models:/{name}/1'"},
        "request": {"input": [str(tmp_path / "in.parquet")]},
        "units": "_headrace/units-0123456789abcdef.parquet",
        "rows_out": 24,
        "cost": {"usd": 1.5},
    }
    (tmp_path / "out" / "_headrace").mkdir(parents=True)
    (tmp_path / "out" / "_headrace" / "report.json").write_text(json.dumps(report))
    (tmp_path / "out" / "_headrace" / "plan.txt").write_text("a plan\n")
    run = client.get_run(registry.log_run("scored", output=str(tmp_path / "out")).id)
    assert {one.dataset.name: one.dataset.digest for one in run.inputs.dataset_inputs}[str(tmp_path / "in.parquet")] == "0123456789abcdef"
    assert run.data.metrics == {"run.rows_out": 24, "run.usd": 1.5} and run.data.tags["headrace.output"] == str(tmp_path / "out")
    told = registry.lineage(str(tmp_path / "out"))
    assert [one.name for one in told.made_from[0].further] == [f"models:/{name}/1", str(tmp_path / "in.parquet")]
    assert [one.name for one in registry.lineage(f"{name}@candidate").made[0].further] == [str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"metrics": {"auc": "high"}}, r"metric 'auc' must be a number, numbers, or pairs \(step, number\), got 'high'"),
        ({"metrics": {"loss": [1, float("inf")]}}, "metric 'loss' has inf"),
        ({"settings": 3}, "settings must be a dataclass or a mapping, got 3"),
        ({"inputs": ["none.parquet"]}, "input 'none.parquet' holds no files"),
        ({"inputs": [3]}, "inputs are paths, URIs, models:/name@alias, or view:name, got 3"),
        ({"files": ["none.svg"]}, "there is no file 'none.svg' to keep"),
        ({"output": "none"}, "output 'none' has no _headrace/report.json"),
    ],
)
def test_what_cannot_be_written_down_is_told_before_anything_is(client: Any, given: dict[str, Any], said: str):
    with pytest.raises(RegistryError, match=said):
        registry.log_run("never", **given)
    assert client.get_experiment_by_name("never") is None


def test_a_run_that_the_store_refuses_has_failed(client: Any):
    with pytest.raises(RegistryError, match="run of 'refused' cannot be kept in the MLflow registry at sqlite:.*Invalid"):
        registry.log_run("refused", metrics={"50 %": 1})
    experiment = client.get_experiment_by_name("refused").experiment_id
    assert [run.info.status for run in client.search_runs([experiment])] == ["FAILED"]


def test_long_settings_are_cut_where_they_are_compared_and_whole_in_the_record(client: Any):
    run = registry.log_run("long", settings={"prompt": "word " * 4000} | {f"s{at}": at for at in range(150)})
    assert len(client.get_run(run.id).data.params) == 151
    assert len(json.loads(Path(client.download_artifacts(run.id, "headrace/settings.json")).read_text())["prompt"]) == 20_000


def test_an_input_that_changes_is_another_version_of_it(tmp_path: Path):
    (tmp_path / "a.csv").write_text("x\n1\n")
    first = Reference.of(str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_text("x\n1\n2\n")
    second = Reference.of(tmp_path / "a.csv")
    assert first.name == second.name == str(tmp_path / "a.csv") and first.version != second.version


# Versions


def test_what_is_registered_is_what_is_fetched(client: Any, name: str, tmp_path: Path):
    made = registry.register(weights(tmp_path / "m", 3.0), name, stage=Scale(model=f"models:/{name}@prod"))
    assert (made.version, made.aliases, made.tags["headrace.stage"]) == ("1", ("candidate",), "scale")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["weights.json"]  # which is left as it is
    folder = registry.fetch(f"models:/{name}@candidate")
    told = json.loads((folder / "headrace.json").read_text())
    assert (
        told["stage"]["name"] == "scale" and told["stage"]["settings"] == {"model": f"'models:/{name}@prod'"} and told["stage"]["writes"] == {"scaled": "float"}
    )
    again = registry.register(folder, name, stage=Scale)  # with its headrace.json, which is written anew
    assert (again.version, again.digest, again.aliases) == ("2", made.digest, ("candidate",)) and named(name, "candidate") == "2"


def test_versions_of_one_run_keep_their_own_files(client: Any, name: str, tmp_path: Path):
    run = registry.log_run(name)
    for factor in (2.0, 3.0):
        registry.register(weights(tmp_path / "m", factor), name, run=str(run), alias=None)
    read = [json.loads((registry.fetch(f"models:/{name}/{number}") / "weights.json").read_text())["factor"] for number in (1, 2)]
    assert read == [2.0, 3.0] and registry.model(name).aliases == {}


def test_files_that_were_changed_in_the_store_are_not_loaded(client: Any, name: str, tmp_path: Path):
    made = add(name, tmp_path / "m")
    (file,) = Path(client.get_run(made.run).info.artifact_uri.removeprefix("file://")).glob("models/*/weights.json")
    file.write_text('{"factor": 1e9}')
    with pytest.raises(SettingError, match="'weights.json' is not as it was registered"):
        registry.fetch(str(made))


def test_pickles_are_refused_twice_and_loaded_only_in_words(client: Any, name: str, tmp_path: Path):
    weights(tmp_path / "m", 2.0)
    (tmp_path / "m" / "model.bin").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(RegistryError, match="has 'model.bin', which is a pickle by its content"):
        registry.register(tmp_path / "m", name)
    registry.register(tmp_path / "m", name, trust_pickles=True)
    with pytest.raises(SettingError, match=f"model='models:/{name}/1' has 'model.bin', which is a pickle by its content: .* or say trust_pickles=True where"):
        registry.fetch(f"models:/{name}@candidate")
    assert (registry.fetch(f"models:/{name}@candidate", trust_pickles=True) / "model.bin").exists()
    embedder = hr.models.Embedder(model=f"models:/{name}@candidate", size=3)
    with pytest.raises(SettingError, match="model.bin"):
        embedder.setup("cpu")


def test_what_is_not_there_is_told_with_what_is(client: Any, name: str, tmp_path: Path):
    add(name, tmp_path / "m")
    for asked, said in (
        (lambda: registry.version(f"{name}@produ"), f"models:/{name}@produ: model '{name}' has no alias 'produ'; it has 'candidate'"),
        (lambda: registry.version(f"{name}/7"), "has no version 7; it has '1'"),
        (lambda: registry.version(f"{name}x"), f"the registry has no model '{name}x'.*did you mean"),
        (lambda: registry.version(f"{name}/last"), "names no version"),
        (lambda: registry.promote(name, gates=(), of="beta"), "has no alias 'beta'"),
        (lambda: registry.rollback(name), f"@prod of model '{name}' named no version before; there is nothing to go back to"),
    ):
        with pytest.raises(RegistryError, match=said):
            asked()


# Gates


def test_an_alias_moves_only_if_every_gate_is_passed_and_back_in_one_step(client: Any, name: str, tmp_path: Path):
    gates = [registry.Metric.parse("auc >= 0.8"), registry.Metric.parse("loss<@prod")]
    first = add(name, tmp_path / "m", auc=0.85, loss=0.5)
    move = registry.promote(name, gates=gates[:1])
    assert (move.version.version, move.former, str(move)) == ("1", "", f"models:/{name}@prod is version 1 now")
    add(name, tmp_path / "m", auc=0.7, loss=0.6)
    with pytest.raises(GateError) as raised:
        registry.promote(name, gates=gates)
    assert str(raised.value).splitlines() == [
        f"models:/{name}/2 does not pass 2 of 2 gates; @prod stays at version 1",
        "  FAILED  auc >= 0.8: it is 0.7",
        "  FAILED  loss < @prod: it is 0.6, and of version 1 0.5",
    ]
    assert named(name, "prod") == "1" and json.loads(registry.version(f"{name}/2").tags["headrace.gates"])["outcomes"][0]["passed"] is False
    add(name, tmp_path / "m", auc=0.9, loss=0.4)
    move = registry.promote(name, gates=gates)
    assert [one.passed for one in move.outcomes] == [True, True] and (move.former, named(name, "prod")) == ("1", "3")
    registry.promote(name, gates=(), of="2")
    assert str(registry.rollback(name)) == f"models:/{name}@prod is version 3 now, and was 2"
    assert registry.rollback(name).version.version == first.version and named(name, "prod") == "1"
    with pytest.raises(RegistryError, match="named no version before 1; there is nothing to go back to"):
        registry.rollback(name)


def test_a_version_that_is_promoted_again_is_not_its_own_former_one(client: Any, name: str, tmp_path: Path):
    for _ in range(2):
        add(name, tmp_path / "m")
        for _ in range(2):
            registry.promote(name, gates=())
    assert registry.rollback(name).version.version == "1"


def test_golden_rows_and_latency_run_the_pipeline_with_the_version_in_question(client: Any, name: str, tmp_path: Path):
    pipeline = hr.Pipeline("scaled", Scale(model=f"models:/{name}@prod"))
    rows = Golden([{"x": 1.0}, {"x": 2.0}], [{"scaled": 2.0}, {"scaled": 4.0}], ("scaled",))
    seconds = iter(range(10_000))  # each call takes one
    gates = [registry.Parity(pipeline, rows), registry.Latency(pipeline, rows.rows, 1.5, calls=20, clock=lambda: next(seconds))]
    add(name, tmp_path / "m", 2.0)
    move = registry.promote(name, gates=gates)
    assert [one.said for one in move.outcomes] == [
        "scaled: all values are equal (2 rows, columns scaled; local against local reversed, local row by row; expected values in the input: scaled)",
        "1e+03 ms on this machine (cpu), and half of 20 calls within 1e+03 ms",
    ]
    add(name, tmp_path / "m", 2.5)
    gates[1] = dataclasses.replace(gates[1], p99_s=0.5)
    with pytest.raises(
        GateError, match=r"does not pass 2 of 2 gates.*\n.*FAILED  golden rows: .*local, row 0: scaled 2.0 became 2.5.*\n.*FAILED  p99 <= 500 ms"
    ):
        registry.promote(name, gates=gates)


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        (registry.Metric("auk", ">=", 0.5), "has no metric 'auk'; it has 'auc'; did you mean 'auc'"),
        (registry.Metric("auc", ">=", "@none"), "has no alias 'none'"),
        (registry.Metric("auc", ">", float("nan")), "it is 0.9"),
        (
            registry.Parity(hr.Pipeline("p", Scale(model="models:/scales@prod")), Golden([])),
            "no stage of pipeline 'p' uses model '.*', as .* would; it names 'scales'",
        ),
    ],
)
def test_a_gate_that_cannot_be_asked_is_not_passed(client: Any, name: str, tmp_path: Path, gate: registry.Gate, said: str):
    add(name, tmp_path / "m", auc=0.9)
    with pytest.raises(GateError, match=said):
        registry.promote(name, gates=[gate])


def test_a_gate_of_ones_own(client: Any, name: str, tmp_path: Path):
    def fair(chosen: registry.Version) -> registry.Outcome:
        return registry.Outcome("fair", chosen.version == "2", "it is even")

    add(name, tmp_path / "m")
    with pytest.raises(GateError, match="FAILED  fair: it is even"):
        registry.promote(name, gates=[fair])


@pytest.mark.parametrize("text", ["auc", "auc>=", ">=3", "auc=>0.5", "auc>=high", "auc>=@", "auc==1"])
def test_what_is_no_bound_is_told(text: str):
    with pytest.raises(SettingError, match="must be a metric, a comparison"):
        registry.Metric.parse(text)


def test_bounds_are_read_as_they_are_written():
    assert registry.Metric.parse(" val loss<=0.25 ") == registry.Metric("val loss", "<=", 0.25)
    assert registry.Metric.parse("auc>@prod").title == "auc > @prod"


# At the same time


def test_who_moved_the_alias_while_gates_were_asked_is_not_overruled(client: Any, name: str, tmp_path: Path):
    add(name, tmp_path / "m")
    add(name, tmp_path / "m")

    def slow(chosen: registry.Version) -> registry.Outcome:
        registry.promote(name, gates=(), of="1")
        return registry.Outcome("slow", True, "at last")

    with pytest.raises(RegistryError, match="@prod of .* named nothing when the gates were asked, and names version 1 now: somebody moved it; promote again"):
        registry.promote(name, gates=[slow])
    assert named(name, "prod") == "1"


def test_of_promotes_at_the_same_time_each_is_done_or_told(client: Any, name: str, tmp_path: Path):
    for _ in range(4):
        add(name, tmp_path / "m")
    together, outcomes = threading.Barrier(4), []

    def meet(chosen: registry.Version) -> registry.Outcome:
        together.wait(60)
        return registry.Outcome("meet", True, "")

    def promote(version: str) -> None:
        try:
            outcomes.append(registry.promote(name, gates=[meet], of=version).version.version)
        except RegistryError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=promote, args=(str(version),)) for version in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (done,) = (one for one in outcomes if isinstance(one, str))
    assert named(name, "prod") == done and all("somebody moved it" in str(one) for one in outcomes if not isinstance(one, str))
    assert not [tag for tag in client.get_registered_model(name).tags if tag.startswith("headrace.moving.")]


def test_an_announcement_is_respected_until_it_is_old(client: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add(name, tmp_path / "m")
    monkeypatch.setattr(releases, "_TRIES", 2)
    monkeypatch.setattr(releases, "_WAIT_S", 0.0)
    client.set_registered_model_tag(name, "headrace.moving.x", json.dumps({"at_s": 1e12, "by": "process 7 on there"}))
    with pytest.raises(RegistryError, match="are being moved by process 7 on there at the same time"):
        registry.promote(name, gates=())
    client.set_registered_model_tag(name, "headrace.moving.x", json.dumps({"at_s": 1.0, "by": "process 7 on there"}))
    assert registry.promote(name, gates=()).version.version == "1"
    assert "headrace.moving.x" not in client.get_registered_model(name).tags


def test_a_move_that_ended_between_its_two_steps_can_be_gone_back_from(client: Any, name: str, tmp_path: Path):
    for _ in range(2):
        add(name, tmp_path / "m")
        registry.promote(name, gates=())
    client.set_registered_model_tag(name, "headrace.former.prod", "1,2")  # before the alias, which still names 2
    assert registry.rollback(name).version.version == "1"


# Lineage, and the commands


def test_lineage_goes_both_ways(client: Any, name: str, tmp_path: Path):
    (tmp_path / "labels.csv").write_text("x\n1\n")
    run = registry.log_run("train", metrics={"auc": 0.9}, inputs=[tmp_path / "labels.csv", f"view:{name}"])
    registry.log_run("features", inputs=[tmp_path / "labels.csv"], output=f"view:{name}")
    made = registry.register(weights(tmp_path / "m", 2.0), name, run=run)
    child = registry.register(weights(tmp_path / "m", 3.0), f"{name}-tuned", run=registry.log_run("tune", inputs=[str(made)]))
    told = registry.lineage(f"{name}@candidate")
    assert (told.of.name, told.of.kind) == (str(made), "model") and "@candidate" in told.of.details
    (by,) = told.made_from
    assert (by.name, by.details[0]) == (str(run), "train") and "auc 0.9" in by.details
    assert {one.name: one.kind for one in by.further} == {str(tmp_path / "labels.csv"): "file", f"view:{name}": "view"}
    (view,) = (one for one in by.further if one.kind == "view")
    assert [one.details[0] for one in view.further] == ["features"]
    (tuned,) = told.made
    assert tuned.details[0] == "tune" and [one.name for one in tuned.further] == [str(child)]
    assert {one.details[0] for one in registry.lineage(str(tmp_path / "labels.csv")).made} == {"train", "features"}
    assert registry.lineage(f"view:{name}").made[0].further[0].name == str(made)
    assert registry.lineage(run.id).to_dict()["made"][0]["further"][0]["further"][0]["name"] == str(child)
    with pytest.raises(RegistryError, match="no run in the registry has read or written 'nothing'"):
        registry.lineage("nothing")
    with pytest.raises(RegistryError, match="the registry has no run"):
        registry.lineage("0" * 32)


def ask(*words: str) -> str:
    done = CliRunner().invoke(cli.app, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


PIPELINE = """
import json
import headrace as hr
from headrace import registry

@hr.stage(out={{"scaled": float}})
class Scale:
    model: str = "models:/{name}@prod"

    def setup(self, device: str) -> None:
        self.factor = json.loads((registry.fetch(self.model) / "weights.json").read_text())["factor"]

    def __call__(self, x: hr.Column[float]):
        return {{"scaled": x * self.factor}}

scaled = hr.Pipeline("scaled", Scale())
"""


def test_the_commands(client: Any, name: str, tmp_path: Path):
    add(name, tmp_path / "m", 2.0, auc=0.9)
    assert f"{name}  " in ask("models", "list") and "@candidate 1" in ask("models", "list")
    (tmp_path / "scale.py").write_text(PIPELINE.format(name=name))
    (tmp_path / "golden.jsonl").write_text('{"x": 1.0, "scaled": 2.0}\n{"x": 2.0, "scaled": 4.0}\n')
    rows = ["--pipeline", str(tmp_path / "scale.py"), "--input", str(tmp_path / "golden.jsonl"), "--no-batch"]
    said = ask("models", "promote", name, "--metric", "auc>=0.8", *rows, "--latency", "1min")
    assert said.splitlines()[-1] == f"models:/{name}@prod is version 1 now" and said.count("passed") == 3
    add(name, tmp_path / "m", 3.0, auc=0.5)
    with pytest.raises(GateError, match=r"does not pass 2 of 2 gates; @prod stays at version 1\n  FAILED  auc >= 0.8: it is 0.5\n  FAILED  golden rows"):
        ask("models", "promote", name, "--metric", "auc>=0.8", *rows)
    assert "gate of @prod  FAILED  auc >= 0.8: it is 0.5" in ask("models", "show", name)
    assert "is version 2 now, and was 1" in ask("models", "promote", name, "--without-gates", "--version", "2")
    assert f"models:/{name}@prod is version 1 now, and was 2" in ask("models", "rollback", name)
    shown = ask("models", "show", f"{name}@prod")
    assert f"models:/{name}/1" in shown and "metric         auc 0.9" in shown
    assert json.loads(ask("models", "show", f"{name}/2", "--json"))["figures"]["metrics"] == {"auc": 0.5}
    assert name in [one["name"] for one in json.loads(ask("models", "list", "--json"))]
    assert ask("lineage", f"{name}@prod").splitlines()[0].startswith(f"models:/{name}/1  @prod; files ")
    assert json.loads(ask("lineage", name, "--json"))["made_from"][0]["kind"] == "run"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no gate was named; ask for --metric"),
        (["--without-gates", "--metric", "auc>=1"], "gates were named, and --without-gates too"),
        (["--input", "rows.parquet"], "take both: --pipeline FILE"),
        (["--latency", "20ms"], "take both: --pipeline FILE"),
        (["--pipeline", "p.py", "--input", "r.jsonl", "--device", "gpu"], "--device 'gpu' must be cpu or cuda"),
    ],
)
def test_a_promote_that_asks_for_nothing_clear_is_told_how(words: list[str], said: str):
    with pytest.raises(SettingError, match=said):
        ask("models", "promote", "scale", *words)
