"""The stage that asks a language model about each row: a prompt in, text, typed fields or a vector out. Its engine is vLLM."""

from __future__ import annotations

import asyncio
import dataclasses
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from types import MappingProxyType
from typing import Any

from headrace.batching import Rows
from headrace.columns import Column, ColumnType, Vector, types_of
from headrace.errors import DefinitionError, SettingError, check_number
from headrace.hardware import Hardware, cpu, gpu
from headrace.llms import options, places, prompts
from headrace.llms.answers import Schema
from headrace.llms.asking import Request, ask, embed, write
from headrace.llms.options import EngineConfig
from headrace.llms.prompts import Message, Template
from headrace.llms.sampling import Sampling
from headrace.speech import CHAT, COMPLETIONS, EMBEDDINGS, Speaker, Speech, Spent, Writing
from headrace.stage import MARK, Stage, stage

_AT_ONCE = {"cpu": 64, "cuda": 256}  # rows under way: what keeps an engine's batch full
_EMBEDDED_ROWS, _EMBEDDED_CALLS = 16, 8


@dataclass(kw_only=True)
class LLM:
    """A ready stage: asks a language model about each row. The engine is vLLM, in the replica's own process.

        summarise = hr.LLM(out="summary", model="Qwen/Qwen3-0.6B", prompt="Summarise: {text}", on=[hr.gpu(1), hr.cpu(4)])
        hr.Pipeline("reviews", clean, summarise)

    The columns in braces are those read. Many rows are under way in the engine at once (`concurrency`), each by itself: one that fails
    is one dead letter. At temperature 0, which is the default, `local`, batch and online give the same text.

    Attributes:
        model: a name on the hub, a folder, a URI such as `s3://models/qwen`, or a name in an MLflow registry, `models:/qwen@champion` or
            `models:/qwen/3`; the last two are fetched into the user's cache once.
        prompt: the text of a row's one message, with columns in braces; `{{` is a brace.
        messages: instead, a function whose parameters, annotated with plain types, are the columns; it returns a row's messages.
        reads: the types of columns in `prompt` that are not `str`, such as `{"stars": int}`.
        system: the system message that goes before a prompt.
        chat: whether the prompt goes through the model's chat template; else the model goes on from the text as it stands.
        out: the column of the answer's text, or of the vector.
        schema: a pydantic model. The answer is constrained to it, and each field becomes a column of its own; what no column type
            stands for (nested models, dicts) is JSON text. `out`, if given, holds the answer as it came.
        attempts: how often a row is asked, with other seeds, until its answer is of the schema. An answer that was cut off is not.
        embed: turn the prompt, `{text}` when left out, into a vector; `out` is "vector" when left out.
        size: numbers per vector; read from the model where it is on this machine.
        sampling: how words are chosen.
        lora: a LoRA adapter: a folder, a URI, a name in a registry, or a name on the hub that is in the cache.
        engine: vLLM's engine arguments by their own names, before all defaults, such as `{"max_model_len": 8192}`.
        stall_s: an engine that has rows to compute and makes no step for so long is given up, and the replica with it.

    Besides, once and not as settings: `on`, acceptable hardware; `replicas`; `name`, that of `out` when left out; `concurrency`, rows
    under way in a replica at once, 256 where `on` names a GPU and else 64; `ray`, arguments for Ray; `trust_pickles=True` where model
    or adapter are of a registry, and have pickles whose maker is trusted.

    Raises:
        DefinitionError: prompt, columns or schema do not go together; says how.
        SettingError: a setting has a wrong value, or vLLM or the model is missing.
    """

    model: str
    prompt: str | None = None
    messages: Callable[..., Sequence[Message]] | None = None
    reads: Mapping[str, Any] | None = None
    system: str | None = None
    chat: bool = True
    out: str | None = None
    schema: Any = None
    attempts: int = 3
    embed: bool = False
    size: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    lora: str | None = None
    engine: Mapping[str, Any] | None = None
    stall_s: float = 300.0
    on: InitVar[Sequence[Hardware] | Hardware] = (gpu(1), cpu(1))
    replicas: InitVar[int | tuple[int, int | None] | None] = None
    name: InitVar[str | None] = None
    concurrency: InitVar[int | None] = None
    ray: InitVar[Mapping[str, Any] | None] = None
    trust_pickles: InitVar[bool] = False

    def __post_init__(self, on: Any, replicas: Any, name: str | None, concurrency: int | None, ray: Any, trust_pickles: bool) -> None:
        if self.embed:
            self.prompt, self.out = self.prompt or "{text}", self.out or "vector"
        given = {"on": on, "replicas": replicas, "name": name, "concurrency": concurrency, "ray": ray, "trust_pickles": trust_pickles}
        vars(self).update(given)  # no settings, see models.Embedder
        self._check()
        self._template = None if self.prompt is None else Template.parse(self.prompt, self._where)
        self._schema = None if self.schema is None else Schema.of(self.schema, self._where)
        if self.embed:
            self.size = self._size()
        self._columns = self._read(), self._written()

    @property
    def _where(self) -> str:
        return f"stage {self._label!r}"

    @property
    def _label(self) -> str:
        return str(vars(self)["name"] or self.out or "llm")

    def _check(self) -> None:
        """Raise unless the settings go together."""
        where = self._where
        if (self.prompt is None) == (self.messages is None):
            got = "neither" if self.prompt is None else "both"
            raise DefinitionError(f"{where}: give it either prompt='Summarise: {{text}}' or messages=function, got {got}")
        for setting, kind, said in (("prompt", str, "text"), ("system", str, "text"), ("out", str, "a column name"), ("engine", Mapping, "a mapping")):
            if (value := getattr(self, setting)) is not None and not isinstance(value, kind):
                raise SettingError(f"{where}: {setting} must be {said}, got {value!r}")
        if self.messages is not None and (self.reads is not None or self.system is not None or not self.chat):
            raise DefinitionError(f"{where}: reads, system and chat are for a prompt; messages=function says all three itself")
        if self.embed and (self.messages or self.system or self.schema or self.lora):
            raise DefinitionError(f"{where}: messages, system, schema and lora are for models that write; embed=True turns a prompt into a vector")
        if self.system is not None and not self.chat:
            raise DefinitionError(f"{where}: system={self.system!r} needs a chat template; with chat=False put it into the prompt")
        if self.out is None and self.schema is None:
            raise DefinitionError(f"{where}: say where the answer goes: out='summary', or schema=Model for typed columns")
        if not isinstance(self.sampling, Sampling):
            raise SettingError(f"{where}: sampling must be hr.Sampling(...), got {self.sampling!r}")
        places.check(self.model, f"{where}: model")
        if self.lora is not None:
            places.check(self.lora, f"{where}: lora")
        check_number(self.attempts, f"{where}: attempts", whole=True)
        check_number(self.stall_s, f"{where}: stall_s")

    def _size(self) -> int:
        found = places.vector_size(self.model)
        if self.size is not None:
            check_number(self.size, f"{self._where}: size", whole=True)
        if found is None and self.size is None:
            raise SettingError(f"model {self.model!r} is not on this machine, so the size of its vectors is not known; fetch it, or say size=1024")
        if found is not None and self.size not in (None, found):
            raise SettingError(f"model {self.model!r} gives vectors of {found} numbers, but size={self.size} was asked for; leave size out")
        return int(self.size or found or 0)

    def _read(self) -> dict[str, ColumnType]:
        if self._template is not None:
            return prompts.template_reads(self._template, self.reads, self._where)
        assert self.messages is not None
        return prompts.function_reads(self.messages, self._where)

    def _written(self) -> dict[str, ColumnType]:
        out = {} if self.out is None else types_of({self.out: Vector(self.size) if self.embed else str}, self._where)
        fields = {} if self._schema is None else dict(self._schema.columns)
        if self.out in fields:
            raise DefinitionError(f"{self._where}: out={self.out!r} is a field of the schema, too; give the answer's text another name, or leave out away")
        return {**out, **fields}

    def setup(self, device: str) -> str:
        """Start the engine on `device`, with the model that is fetched first if need be. It ends with this instance.

        Raises:
            SettingError: vLLM, the model or the adapter is missing, or an engine argument unknown.
        """
        from headrace.llms.engine import Engine  # which loads vllm

        given, trusted = vars(self)["concurrency"], vars(self)["trust_pickles"]
        calls = stage_of(self).concurrency if given is not None or self.embed else _AT_ONCE[device]  # `on` may name a GPU, and this be a CPU
        adapter = None
        if self.lora is not None:
            adapter = places.fetch(self.lora, f"{self._where}: lora", trust_pickles=trusted)
            options.check_adapter(adapter, f"{self._where}: lora")
        config = EngineConfig(
            model=places.fetch(self.model, f"{self._where}: model", trust_pickles=trusted),
            name=self.speaks().model,
            device=device,
            gpus=next((entry.gpus for entry in _entries(self) if entry.gpus), 1.0),
            sequences=calls * _rule(self).count,
            embed=self.embed,
            adapter=adapter,
            arguments=MappingProxyType(dict(self.engine or {})),
            stall_s=self.stall_s,
        )
        self._engine = Engine.start(config, where=self._where)
        weakref.finalize(self, self._engine.close)
        return str(self._engine)

    def speaks(self) -> Speech:
        """What this stage is to clients of OpenAI's interface; see `headrace.speech`."""
        return Speech(places.public_name(self.lora or self.model), (EMBEDDINGS,) if self.embed else (CHAT, COMPLETIONS))

    def speaker(self) -> Speaker:
        """Its engine, once it is set up."""
        return self._engine

    def figures(self) -> Mapping[str, float]:
        """What the engine is doing and has done, by name: see `headrace.readings`. Empty before `setup`."""
        engine = vars(self).get("_engine")
        return {} if engine is None else engine.figures()

    def writing(self) -> Writing | None:
        """What it writes piece by piece: see `headrace.speech.Writer`. Neither vectors nor fields of a schema, which are checked as a whole."""
        if self.embed or self._schema is not None:
            return None
        return Writing(str(self.out), self.sampling.max_tokens or 0)

    def asks(self, **columns: Column[Any]) -> Request:
        """What a row asks; the columns hold one value each. See `headrace.speech.Writer`."""
        (row,) = _rows(columns)
        return self._request(row)

    def write(self, asked: Request, *, priority: int = 1, request_id: str | None = None, spent: Spent) -> AsyncIterator[str]:
        """The pieces of the answer to what a row asks: see `headrace.speech.Writer`."""
        return write(self._engine, asked, priority=priority, request_id=request_id, spent=spent)

    def __call__(self, **columns: Column[Any]) -> dict[str, list[Any]]:
        """The answers to rows: one list for each column written."""
        rows = _rows(columns)
        if self.embed:
            assert self._template is not None
            vectors = self._engine.call(embed(self._engine, [self._template.fill(row) for row in rows]))
            return {str(self.out): vectors}
        answers = self._engine.call(self._ask_all([self._request(row) for row in rows]))
        return {name: [answer[name] for answer in answers] for name in self._columns[1]}

    async def _ask_all(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """Each row's answer, all asked at once; the first row's error, when all are done, if one has failed."""
        answers = await asyncio.gather(*(ask(self._engine, one, schema=self._schema, out=self.out) for one in requests), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, dict)]

    def _request(self, row: Mapping[str, Any]) -> Request:
        if self._template is None:
            assert self.messages is not None
            messages, prompt = prompts.checked(self.messages(**row)), None
        else:
            text = self._template.fill(row)
            system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
            messages, prompt = ([*system, {"role": "user", "content": text}], None) if self.chat else ([], text)
        return Request(tuple(messages), prompt, self.sampling, self.attempts)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_engine"}  # an engine stays where it is


class _Spec:
    """The stage behind an `LLM`: what `@hr.stage` leaves on other classes, here after the instance's own columns and hardware."""

    def __get__(self, llm: LLM | None, kind: type[LLM]) -> Stage:
        return stage_of(kind(model="none", prompt="{text}", out="llm") if llm is None else llm)


def stage_of(llm: LLM) -> Stage:
    """The stage behind an `LLM`, with the columns and the hardware of that instance."""
    given, (reads, writes) = vars(llm), llm._columns  # noqa: SLF001 - of this module
    device = "cuda" if any(entry.gpus for entry in _entries(llm)) else "cpu"
    at_once = given["concurrency"]
    if at_once is None:
        at_once = _EMBEDDED_CALLS if llm.embed else _AT_ONCE[device]

    @stage(out=writes, on=given["on"], batch=_rule(llm), replicas=given["replicas"], name=llm._label, ray=given["ray"], concurrency=at_once)  # noqa: SLF001
    class Shape:
        def __call__(self, text: Column[str]) -> None: ...

    return dataclasses.replace(Stage.of(Shape()), reads=MappingProxyType(reads), call=llm)


def _rows(columns: Mapping[str, Column[Any]]) -> list[dict[str, Any]]:
    """The rows of columns, of plain Python values."""
    given = {name: values.tolist() if hasattr(values, "tolist") else list(values) for name, values in columns.items()}
    return [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]


def _entries(llm: LLM) -> list[Hardware]:
    """The acceptable hardware, as far as it is any; `@stage` tells of what is not."""
    on = vars(llm)["on"]
    return [entry for entry in ((on,) if isinstance(on, Hardware) else tuple(on)) if isinstance(entry, Hardware)]


def _rule(llm: LLM) -> Rows:
    """One row a call: the engine makes batches itself, and a row that fails takes none with it. Vectors are quicker than calls."""
    return Rows(_EMBEDDED_ROWS if llm.embed else 1)


setattr(LLM, MARK, _Spec())
