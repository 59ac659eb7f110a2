"""`headrace llm`: language models behind OpenAI's interface, without a file."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headrace.cli.options import (
    Accounts,
    Address,
    AllowNoKeys,
    Background,
    Behind,
    CanaryShare,
    Deadline,
    Doors,
    Files,
    Follow,
    Host,
    Idle,
    Keys,
    Log,
    Port,
    Prices,
    TargetInFlight,
    Tls,
    Verbose,
    check_behind,
)
from headrace.cli.serve import SPOKEN_S, Shown, check_name, followed, opened, replica_bounds, seconds, share, takeover, tell
from headrace.errors import ServiceError, SettingError, listing
from headrace.speech import EMBEDDINGS

if TYPE_CHECKING:
    from headrace.hardware import Hardware
    from headrace.on_ray.service import Standing
    from headrace.pipeline import Pipeline

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL...", help="Each a name on the hub, a folder, a URI such as s3://models/qwen, or one in a registry, models:/name@alias."),
]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="What a model's service is called, and another name for the model; by default made of the model's. Once for each model, in their order.",
    ),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="What replicas run on; auto is a GPU where there is one, else CPUs.")]
Gpus = Annotated[float, typer.Option(metavar="N", help="GPUs of a replica; a part of one is shared, several hold a model together.")]
Cpus = Annotated[float, typer.Option(metavar="N", help="CPU cores that are reserved for a replica without a GPU.")]
Replicas = Annotated[str, typer.Option(metavar="LEAST:MOST", help="Replicas of each model: 2, 1:8, or 0:4 to end the last while idle.")]
Embed = Annotated[bool, typer.Option("--embed", help="The models turn text into vectors: /v1/embeddings. Those that sentence-transformers knows do without.")]
Size = Annotated[int | None, typer.Option(min=1, metavar="N", help="With --embed: numbers of a vector, where the model is not on this machine yet.")]
Lora = Annotated[str | None, typer.Option(metavar="NAME", help="A LoRA adapter of the one model: a folder, a URI, or a name on the hub.")]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option("--engine", metavar="KEY=VALUE", help="An engine argument of vLLM, such as max_model_len=8192; its value may be JSON; repeatable."),
]


def llm(
    context: typer.Context,
    models: Models,
    name: Names = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    behind: Behind = None,
    device: Device = "auto",
    gpus: Gpus = 1.0,
    cpus: Cpus = 1.0,
    replicas: Replicas = "1",
    target_in_flight: TargetInFlight = 64.0,
    idle: Idle = "5min",
    embed: Embed = False,
    size: Size = None,
    lora: Lora = None,
    engine: EngineOptions = None,
    deadline: Deadline = None,
    keys: Keys = None,
    accounts: Accounts = None,
    prices: Prices = None,
    files: Files = None,
    background: Background = "25%",
    tls: Tls = None,
    allow_no_keys: AllowNoKeys = False,
    doors: Doors = 2,
    canary: CanaryShare = None,
    follow: Follow = None,
    address: Address = None,
    log: Log = None,
    verbose: Verbose = False,
) -> None:
    """Serve language models behind one address with OpenAI's interface, until told to stop. One that runs gets its next version."""
    began_s = time.monotonic()
    check_behind(context, behind)
    how = takeover(canary, None)
    group, bounds_of = replica_bounds(replicas)
    if group:
        raise SettingError(f"--replicas {replicas!r} must be LEAST:MOST, such as 1:8: a model is one group")
    shown = Shown(host, port, doors, tls, keys, allow_no_keys, log)
    shown.check(accounts)
    pipelines = made(models, name or [], lora=lora, on=hardware(device, gpus, cpus), engine=engine_arguments(engine or []), embed=embed, size=size)
    follow_s = followed(follow, pipelines)
    from headrace.serving.routes import Limits

    deadline_s = SPOKEN_S if deadline is None else seconds(deadline, "--deadline")
    limits = Limits(deadline_s=deadline_s, background=share(background, "--background"))
    idle_s, opening = seconds(idle, "--idle"), opened(accounts, prices, files)
    from headrace.on_ray.deploying import Bounds, Change
    from headrace.on_ray.service import Service, Where, serve

    where, bounds, face = Where(address, None, verbose), Bounds({"": bounds_of}, target_in_flight, idle_s), shown.face(opening)
    services = [Service(pipeline, pipeline.name, where, face, limits, bounds, Change(how, follow_s=follow_s), behind) for pipeline in pipelines]
    serve(*services, tell=tell, ready=lambda standing: greet(standing, began_s))


def greet(standing: Standing, began_s: float) -> None:
    """Say how each new model is asked, and how long it took to come up, and to its first token, which is asked for."""
    from headrace.gateway.openai.first import first_answer
    from headrace.on_ray.deploying import lent_key
    from headrace.serving.bodies.openapi import contract

    key = lent_key(standing.host) if standing.guarded else None
    for service in standing.new:
        ready_s = time.monotonic() - began_s
        speech = contract(service.pipeline)["speech"]
        model, (path, *_) = speech["model"], speech["paths"]
        try:
            path, took_s = first_answer(standing.url, model, speech["paths"], key=key, ca=standing.ca)
            took = f"; its first {'vector' if path == EMBEDDINGS else 'token'} came {took_s * 1e3:.0f} ms after it was asked for"
        except ServiceError as error:
            took = f"; but {error}"
        alias = service.pipeline.name
        tell(f"{model} answers at {standing.url}/v1" + (f", also by the name {alias}" if alias != model else ""))
        tell(standing.curl(path, model))
        tell(f"{model} was ready {ready_s:.1f} s after the start{took}")


def made(models: list[str], names: list[str], *, lora: str | None, on: list[Hardware], engine: dict[str, Any], embed: bool, size: int | None) -> list[Pipeline]:
    """A pipeline of one stage for each model.

    Raises:
        HeadraceError: models, names and options do not go together.
    """
    from headrace.llms import places
    from headrace.llms.llm import LLM
    from headrace.pipeline import Pipeline

    if names and len(names) != len(models):
        raise SettingError(f"--name is given {len(names)} times, and there are {len(models)} models; name each, in their order, or none")
    if lora is not None and len(models) > 1:
        raise SettingError(f"--lora {lora!r} is an adapter of one model, and there are {len(models)}; serve that one with --behind, in a command of its own")
    found = [placed(model, "MODEL") for model in models]
    vectors = [embed or (lora is None and places.embeds(model)) for model in found]
    if size is not None and not any(vectors):
        raise SettingError("--size is about vectors: give it with --embed")
    adapter = None if lora is None else placed(lora, "--lora")
    called = names or [pipeline_name(places.public_name(adapter or model)) for model in found]
    for name in called:
        check_name(name, "--name")
        if "-" in name:
            raise SettingError(f"--name {name!r} is a pipeline's name, too, and can have letters, digits and '_' only")
    if twice := [name for name in called if called.count(name) > 1]:
        raise SettingError(f"two models would be called {twice[0]!r}; tell them apart with --name, once for each of {listing(models)}")
    stages = [
        LLM(model=model, embed=True, size=size or places.vector_size(model, hub=True), engine=engine, on=on)
        if embeds
        else LLM(model=model, prompt="{text}", out="answer", lora=adapter, engine=engine, on=on)
        for model, embeds in zip(found, vectors, strict=True)
    ]
    return [Pipeline(name, stage) for name, stage in zip(called, stages, strict=True)]


def placed(model: str, what: str) -> str:
    """A model or an adapter as replicas find it: a folder by its whole path.

    Raises:
        SettingError: it is no folder, and can be nothing else.
    """
    from headrace import registry
    from headrace.llms import places

    places.check(model, what)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if registry.is_address(model) or "://" in model:
        return model
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise SettingError(f"{what} {model!r} is no folder on this machine; correct the path, or name a model of the hub, such as Qwen/Qwen3-0.6B")
    return model


def pipeline_name(model: str) -> str:
    """`Qwen/Qwen3-0.6B` as a name that a pipeline can have: `qwen3_0_6b`."""
    name = re.sub(r"[^a-z0-9]+", "_", model.rpartition("/")[2].lower()).strip("_")[:60]
    return name if name[:1].isalpha() else f"model_{name}".rstrip("_")


def hardware(device: str, gpus: float, cpus: float) -> list[Hardware]:
    """What replicas may run on, in the order of preference."""
    from headrace.hardware import cpu, gpu

    return [*([gpu(gpus)] if device != "cpu" else []), *([cpu(cpus)] if device != "cuda" else [])]


def engine_arguments(words: list[str]) -> dict[str, Any]:
    """`max_model_len=8192` and its like, as a mapping; what is no JSON is text."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise SettingError(f"--engine {word!r} must be KEY=VALUE, as vLLM's engine names its arguments, such as max_model_len=8192")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
