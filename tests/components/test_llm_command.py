"""What is asked of `headrace llm` becomes pipelines, or is refused before anything starts."""

from __future__ import annotations

import dataclasses
import http.server
import importlib
import os
import pickle
import subprocess
import sys
import threading
from typing import Any

import cloudpickle
import pytest
from typer.testing import CliRunner

import headrace as hr
from headrace import cli
from headrace.errors import HeadraceError, ServingError, SettingError
from headrace.llms import places
from headrace.on_ray.intent import Face, Service, Standing
from headrace.serving import place
from headrace.serving.bodies.openapi import contract

command = importlib.import_module("headrace.cli.llm")  # the package has the command under this name


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """No services of this machine, and no model."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def made(*models: str, names: list[str] | None = None, **options: Any) -> list[hr.Pipeline]:
    options = {"lora": None, "on": [hr.cpu(1)], "engine": {}, "embed": False, "size": None, **options}
    return command.made(list(models), names or [], **options)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen3-0.6B", "qwen3_0_6b"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama_3_2_1b_instruct"),
        ("01-ai/01.Yi", "model_01_yi"),
        ("tiny", "tiny"),
        ("\u6a21\u578b", "model"),
        ("a/" + "x" * 100, "x" * 60),
    ],
)
def test_a_pipeline_is_named_after_its_model(model: str, name: str):
    assert command.pipeline_name(model) == name
    hr.Pipeline(name, hr.LLM(model="m", prompt="{text}", out="answer"))


def test_models_become_pipelines():
    chat, other = made("Qwen/Qwen3-0.6B", "acme/other", engine={"max_model_len": 512})
    assert contract(chat)["speech"] == {"model": "Qwen/Qwen3-0.6B", "paths": ["/v1/chat/completions", "/v1/completions"]}
    assert (chat.name, other.name) == ("qwen3_0_6b", "other")
    (stage,) = chat.stages
    assert stage.call.engine == {"max_model_len": 512}
    assert list(chat.inputs) == ["text"] and list(chat.outputs) == ["answer"]
    (named,) = made("Qwen/Qwen3-0.6B", names=["chat"])
    assert named.name == "chat"


def test_a_folder_is_known_by_its_whole_path(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tiny-model").mkdir()
    monkeypatch.chdir(tmp_path)
    for given in ("tiny-model", "./tiny-model", str(tmp_path / "tiny-model")):
        (pipeline,) = made(given)
        assert (pipeline.name, pipeline.stages[0].call.model) == ("tiny_model", str(tmp_path / "tiny-model"))
        assert contract(pipeline)["speech"]["model"] == "tiny-model"


def test_vectors():
    (pipeline,) = made("BAAI/bge-small-en-v1.5", embed=True, size=384)
    assert contract(pipeline)["speech"]["paths"] == ["/v1/embeddings"]
    assert str(pipeline.outputs["vector"]) == "Vector(384)"


FILES = {"/acme/vectors/resolve/main/modules.json": b"[]", "/acme/vectors/resolve/main/config.json": b'{"hidden_size": 12}'}


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub of one embedding model, which asks for a token."""

    def do_GET(self) -> None:
        found = FILES.get(self.path) if self.headers["Authorization"] == "Bearer mine" else None
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Length", str(len(found or b"")))
        self.end_headers()
        self.wfile.write(found or b"")

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_the_hub_says_which_models_give_vectors(monkeypatch: pytest.MonkeyPatch):
    hub = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
    thread.start()
    try:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        monkeypatch.setenv("HF_TOKEN", "mine")
        assert [places.embeds(name) for name in ("acme/vectors", "acme/chat")] == [False, False]  # it is not asked
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        chat, vectors = made("acme/chat", "acme/vectors")
        assert contract(chat)["speech"]["paths"][0] == "/v1/chat/completions"
        assert contract(vectors)["speech"] == {"model": "acme/vectors", "paths": ["/v1/embeddings"]}
        assert str(vectors.outputs["vector"]) == "Vector(12)"
        monkeypatch.delenv("HF_TOKEN")
        assert not places.embeds("acme/vectors")
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
    assert not places.embeds("acme/vectors")  # nobody answers


def test_a_folder_says_whether_it_gives_vectors(tmp_path: Any):
    (tmp_path / "config.json").write_text('{"hidden_size": 12}')
    assert contract(made(str(tmp_path))[0])["speech"]["paths"][0] == "/v1/chat/completions"
    (tmp_path / "modules.json").write_text("[]")
    assert contract(made(str(tmp_path))[0])["speech"]["paths"] == ["/v1/embeddings"]


def test_models_of_a_registry():
    (pipeline,) = made("models:/tiny@champion")
    assert (pipeline.name, pipeline.stages[0].call.model) == ("tiny", "models:/tiny@champion")


def test_a_replica_needs_no_file():
    (pipeline,) = made("Qwen/Qwen3-0.6B", lora="acme/adapter")
    code = f"import pickle, sys; stages = pickle.loads({cloudpickle.dumps(pipeline.stages)!r}); print(stages[0].call.model, stages[0].call.lora)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout == "Qwen/Qwen3-0.6B acme/adapter\n"
    assert pickle.loads(pickle.dumps(pipeline.stages[0].call)).model == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        (("acme/a", "b/a"), {}, "two models would be called 'a'; tell them apart with --name"),
        (("acme/a", "acme/b"), {"names": ["a"]}, "--name is given 1 times, and there are 2 models"),
        (("acme/a",), {"names": ["a b"]}, "--name 'a b' must be a letter"),
        (("acme/a",), {"names": ["a-b"]}, "--name 'a-b' is a pipeline's name, too"),
        (("acme/a", "acme/b"), {"lora": "x/y"}, "--lora 'x/y' is an adapter of one model, and there are 2"),
        (("acme/a",), {"size": 3}, "--size is about vectors: give it with --embed"),
        (("./none",), {}, "MODEL './none' is no folder on this machine"),
        (("a/b/c",), {}, "MODEL 'a/b/c' is no folder on this machine"),
        (("acme/a",), {"lora": "~/none"}, "--lora '~/none' is no folder"),
        (("models:/a/b/c",), {}, "models:/"),
        (("acme/a",), {"embed": True}, "is not on this machine, so the size of its vectors is not known"),
    ],
)
def test_what_does_not_go_together_is_refused(models: tuple[str, ...], options: dict[str, Any], said: str):
    with pytest.raises(HeadraceError, match=said.replace("(", r"\(")):
        made(*models, **options)


def test_engine_arguments_are_json_or_text():
    words = ["max_model_len=8192", "kv_cache_dtype=fp8", 'limit_mm_per_prompt={"image": 1}', "enforce_eager=true", "seed=0", "tokenizer=a=b"]
    found = command.engine_arguments(words)
    assert found == {
        "max_model_len": 8192, "kv_cache_dtype": "fp8", "limit_mm_per_prompt": {"image": 1}, "enforce_eager": True, "seed": 0, "tokenizer": "a=b"
    }  # fmt: skip
    for word in ("max_model_len", "=3", "max-model-len=3"):
        with pytest.raises(SettingError, match="must be KEY=VALUE"):
            command.engine_arguments([word])


def test_hardware():
    assert command.hardware("auto", 1, 1) == [hr.gpu(1), hr.cpu(1)]
    assert command.hardware("cpu", 1, 4) == [hr.cpu(4)]
    assert command.hardware("cuda", 0.5, 1) == [hr.gpu(0.5)]


@pytest.mark.parametrize(
    ("name", "value"), [("port", "80"), ("doors", "1"), ("keys", "k.json"), ("tls", "a,b"), ("files", "f"), ("accounts", "a.db"), ("log", "off")]
)
def test_behind_a_service_there_are_no_doors_to_set_up(name: str, value: str):
    for first in (["serve", "file.py"], ["llm", "acme/a"]):
        with pytest.raises(SettingError, match=f"--{name} is about doors, and with --behind chat there are none but those of 'chat'"):
            CliRunner().invoke(cli.app, [*first, "--behind", "chat", f"--{name}", value], catch_exceptions=False)


def test_a_host_must_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HEADRACE_ACCOUNTS", "")  # a setting of the environment is for whoever has doors
    place.write(place.here("chat", address="", token="", url="", drain_s=1.0))
    with pytest.raises(ServingError, match="no service 'chad' is running here.*did you mean 'chat'"):
        CliRunner().invoke(cli.app, ["llm", "acme/a", "--behind", "chad"], catch_exceptions=False)


def test_how_services_are_asked():
    (pipeline,) = made("Qwen/Qwen3-0.6B")
    service = Service(pipeline, pipeline.name, face=Face(), behind="host")
    standing = Standing((service,), (service,), "http://127.0.0.1:8000", "host", None, True)
    lines = standing.told(service)
    assert lines[0] == "qwen3_0_6b answers at http://127.0.0.1:8000/qwen3_0_6b"
    assert lines[2] == "qwen3_0_6b speaks OpenAI's interface at http://127.0.0.1:8000/v1, as the model Qwen/Qwen3-0.6B"
    assert "-H 'Authorization: Bearer hr_...'" in lines[3] and '"messages"' in lines[3]
    assert "documented at http://127.0.0.1:8000/docs" in standing.told(dataclasses.replace(service, behind=None))[0]
    assert standing.curl("/v1/completions", "m") == (
        "  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -H 'Authorization: Bearer hr_...' -d "
        """'{"model": "m", "prompt": "Good"}'"""
    )
