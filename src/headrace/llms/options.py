"""What the engine is started with: the user's arguments over defaults that suit the device. Nothing here loads vllm."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from headrace.errors import SettingError, nearest

VLLM_VERSION = "0.29.0"
"""What this package is written against; `constraints.txt` says the same."""

_KV_CACHE_BYTES = 2 << 30  # on a CPU, where vLLM would take most of the machine's memory
_CPU_WORKER = "headrace.llms.cpu_worker.Worker"
_BINDING, _UNBOUND = "VLLM_CPU_OMP_THREADS_BIND", "nobind"
_GPU_SHARE = 0.9  # of an accelerator's memory
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
_GRAMMAR = {"backend": "guidance", "disable_any_whitespace": True}
"""How answers are held to a form. Of vLLM's backends only this one bounds what a form may cost, whatever a client asks for: with xgrammar, a regular
expression of ten characters takes gigabytes and seconds a step, of everybody's. With white space anywhere, some models write nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All that an engine of this process depends on.

    Attributes:
        model: a folder, or a name on the hub, as `places.fetch` returns it.
        name: what requests call what it serves: the model, or the model with its adapter.
        device: `"cuda"` or `"cpu"`.
        gpus: how many of them, or which part of one.
        sequences: how many it computes at a time.
        embed: whether it turns text into vectors, instead of writing text.
        adapter: the folder of a LoRA adapter.
        arguments: vLLM's own engine arguments, which go before all defaults.
        stall_s: with sequences under way and no step for so long, the engine is given up.
    """

    model: str
    name: str
    device: str = "cpu"
    gpus: float = 1.0
    sequences: int = 64
    embed: bool = False
    adapter: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    stall_s: float = 300.0

    def engine_arguments(self) -> dict[str, Any]:
        """The arguments of vLLM's engine, as plain values."""
        chosen: dict[str, Any] = {
            "model": self.model,
            "served_model_name": [self.name if self.adapter is None else f"{self.name} without its adapter"],
            "max_num_seqs": self.sequences,
            "scheduling_policy": "priority",
            "structured_outputs_config": _GRAMMAR,
        }
        if self.embed:
            chosen |= {"runner": "pooling", "convert": "embed"}
        if self.adapter is not None:
            chosen |= {"enable_lora": True, "max_lora_rank": _rank(self.adapter)}
        if self.device == "cpu":
            # In float32 a row's answer depends least on the rows beside it; compiling for a CPU takes longer than it saves.
            chosen |= {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": _KV_CACHE_BYTES, "worker_cls": _CPU_WORKER}
        elif self.gpus > 1:
            # Processes of its own: inside of a replica vLLM would else ask Ray for the same accelerators again.
            chosen |= {"tensor_parallel_size": int(self.gpus), "distributed_executor_backend": "mp"}
        elif self.gpus < 1:
            chosen["gpu_memory_utilization"] = _GPU_SHARE * self.gpus
        return {**chosen, **self.arguments}

    @property
    def in_one_process(self) -> bool:
        """Whether a single worker is to compute in the process that schedules: on a CPU, unless the user says otherwise.

        That is by another executor, or by binding threads to cores, which vLLM only does to worker processes.
        """
        one = self.arguments.get("distributed_executor_backend", "uni") == "uni"
        return self.device == "cpu" and one and os.environ.get(_BINDING, _UNBOUND) == _UNBOUND

    def environment(self) -> dict[str, str]:
        """Variables that vLLM and its libraries read when they are loaded; those that are set already stay as they are."""
        variables = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        if self.engine_arguments()["structured_outputs_config"] == _GRAMMAR:
            variables["VLLM_ENFORCE_STRICT_TOOL_CALLING"] = "0"  # which needs xgrammar; calls that a client demands are held to their form all the same
        if os.path.isdir(self.model):
            variables["HF_HUB_OFFLINE"] = "1"  # all is here: nobody need be asked
        if self.device == "cpu":
            # Bound to cores by vLLM's own choice, replicas of one machine would share some and leave others idle: ten times slower.
            variables |= {_BINDING: _UNBOUND, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
        return variables


SPOKEN = (
    "chat_template", "chat_template_content_format", "default_chat_template_kwargs", "enable_auto_tool_choice", "enable_prompt_tokens_details",
    "exclude_tools_when_tool_choice_none", "response_role", "return_tokens_as_token_ids", "tool_call_parser", "tool_parser_plugin",
)  # fmt: skip
"""Those of vLLM's server arguments that are about how the model is spoken to; they may be among the engine's."""


def check_arguments(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise SettingError if vLLM has no engine argument of a name that is given."""
    names = sorted(known)
    for name in given:
        if name not in names:
            raise SettingError(f"{where}: engine={{{name!r}: ...}} is no engine argument of vLLM {VLLM_VERSION}" + nearest(name, names))


def check_adapter(folder: str, what: str) -> None:
    """Raise SettingError unless the folder holds a LoRA adapter: the engine itself may die of one that is not there."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise SettingError(f"{what}={folder!r} holds no adapter_config.json, and so no LoRA adapter; name the folder that peft saved")


def _rank(folder: str) -> int:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        rank = int(json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["r"])
        return next((room for room in _LORA_RANKS if room >= rank), _LORA_RANKS[-1])
    return _LORA_RANKS[1]
