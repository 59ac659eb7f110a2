"""The runtimes: how a model is loaded, converted and run in each. Their libraries are imported here, inside functions, and only those in use."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from headrace.models.choice import Forward, Ids, Vectors

_LIBRARIES = ("onnx", "onnxruntime", "openvino", "sentence-transformers", "tokenizers", "torch", "transformers")
_ONNX, _OPENVINO = "model.onnx", "model.xml"
_OPSET = 17
_TALKATIVE = ("transformers", "sentence_transformers", "huggingface_hub", "torch.onnx")


def versions() -> dict[str, str]:
    """The versions of the libraries that have a say in speed and numbers; empty for one that is missing."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def hardware(device: str) -> str:
    """What kind of processor a device is: the accelerator's name, or the CPU's with what it can compute."""
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = dict(line.split(":", 1) for line in reversed(lines) if line.startswith(("model name", "flags", "Features")) and ":" in line)
    return " ".join([platform.machine(), *(" ".join(value.split()) for _, value in sorted(told.items()))])


def encoder(folder: Path, device: str, longest: int, *, attention: str | None = None) -> Any:
    """The model as sentence-transformers loads it, in float32: the reference. `attention` names transformers' implementation of it."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with quiet():
        from sentence_transformers import SentenceTransformer
    with quiet():  # again, now that what it brings along is there to be silenced
        options = {"attn_implementation": attention} if attention else {}
        loaded = SentenceTransformer(str(folder), device=device, local_files_only=True, model_kwargs=options).float().eval()
    loaded.max_seq_length = longest
    return loaded


def download(model: str) -> Path:
    """The folder of a hub's model, fetched if it is not in the cache. OSError or ValueError if it cannot be had."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download

    name = model if "/" in model else f"sentence-transformers/{model}"
    with quiet():
        return Path(snapshot_download(name, ignore_patterns=["*.onnx", "*.bin", "*.h5", "*.msgpack", "*.ot", "openvino/*", "onnx/*"]))


def torch_forward(model: Any, device: str, kind: str = "float32") -> Forward:
    """The encoder in torch, its transformer in numbers of `kind`; pooling and what follows stay in float32."""
    import torch

    dtype = getattr(torch, kind)
    transformer, *rest = list(model)
    transformer = transformer.to(dtype)

    def forward(ids: Ids, mask: Ids) -> Vectors:
        with torch.inference_mode():
            features = transformer({"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)})
            features["token_embeddings"] = features["token_embeddings"].float()
            for module in rest:
                features = module(features)
            vectors: Vectors = features["sentence_embedding"].float().cpu().numpy()
            return vectors

    return forward


def export(folder: Path, made: Path, longest: int) -> Path:
    """The model as an ONNX file in the folder `made`, the pooling and what follows included; made once."""
    path = made / _ONNX
    if path.is_file():
        return path
    import onnx  # noqa: F401  # torch's exporter needs it: better missed here, by its name, than inside
    import torch

    # Attention as plain products: the other implementations skip the mask where, as in an example, nothing is masked.
    modules = list(encoder(folder, "cpu", longest, attention="eager"))

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = torch.nn.ModuleList(modules)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            features = {"input_ids": input_ids, "attention_mask": attention_mask}
            for step in self.steps:
                features = step(features)
            return features["sentence_embedding"]

    ids = torch.arange(3 * 17).reshape(3, 17) % 97 + 3
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    axes = {name: {0: "rows", 1: "tokens"} for name in ("input_ids", "attention_mask")} | {"vectors": {0: "rows"}}
    with quiet(), torch.inference_mode():
        torch.onnx.export(
            Network().eval(),
            (ids, mask),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["vectors"],
            dynamic_axes=axes,
            opset_version=_OPSET,
            dynamo=False,
        )
    return path


def onnx_forward(path: Path, threads: int) -> Forward:
    """The ONNX file in ONNX Runtime, float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # replicas share the machine with Ray's own processes
    with _onnx_errors():
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(ids: Ids, mask: Ids) -> Vectors:
        vectors: Vectors = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return vectors

    return forward


def openvino_convert(path: Path, made: Path) -> Path:
    """The ONNX file as OpenVINO keeps models, in float32; made once."""
    if not (made / _OPENVINO).is_file():
        openvino = _openvino()
        openvino.save_model(openvino.Core().read_model(str(path)), str(made / _OPENVINO), compress_to_fp16=False)
    return made / _OPENVINO


def openvino_forward(path: Path, threads: int, kind: str = "f32") -> Forward:
    """OpenVINO's own file, computed in numbers of `kind`."""
    core = _openvino().Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # pinned, every replica of a machine would sit on the same first cores
        "INFERENCE_PRECISION_HINT": kind,
    }
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    request = compiled.create_infer_request()

    def forward(ids: Ids, mask: Ids) -> Vectors:
        return np.array(request.infer([ids, mask], share_inputs=True, share_outputs=True)[0], np.float32)  # a copy: the request's own is used again

    return forward


def loader(folder: Path, made: Path, *, device: str, threads: int, longest: int, reference: Any) -> Callable[[str], Forward]:
    """What loads a runtime by its name for a first trial, with `reference` as the encoder already loaded; converts into `made`."""

    def load(runtime: str) -> Forward:
        match runtime:
            case "torch":
                return torch_forward(reference, device)
            case "torch-bf16" | "torch-fp16":
                return _halved(folder, device, longest, runtime)
            case "onnx":
                import onnxruntime  # noqa: F401  # before the model is converted for nothing

                return onnx_forward(export(folder, made, longest), threads)
            case _:
                _openvino()
                return openvino_forward(openvino_convert(export(folder, made, longest), made), threads, "bf16" if runtime.endswith("bf16") else "f32")

    return load


def again(runtime: str, folder: Path, kept: Path, *, device: str, threads: int, longest: int) -> Forward:
    """The runtime that was chosen before, from the files kept then: loads no library but its own."""
    match runtime:
        case "torch":
            return torch_forward(encoder(folder, device, longest), device)
        case "torch-bf16" | "torch-fp16":
            return _halved(folder, device, longest, runtime)
        case "onnx":
            return onnx_forward(kept / _ONNX, threads)
        case _:
            return openvino_forward(kept / _OPENVINO, threads, "bf16" if runtime.endswith("bf16") else "f32")


def leave_only(runtime: str, made: Path) -> None:
    """Remove what was converted for other runtimes than the chosen one."""
    ours = (_OPENVINO, "model.bin")
    for path in made.iterdir():
        wanted = path.name in ours if runtime.startswith("openvino") else path.name not in ours and runtime == "onnx"
        if not wanted:  # an ONNX model of over 2 GB has its weights in files of their own beside it
            path.unlink()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings, log lines and progress bars that the libraries show while they load."""
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    with warnings.catch_warnings(), contextlib.ExitStack() as after:
        warnings.simplefilter("ignore")
        for name, level in levels.items():
            logging.getLogger(name).setLevel(logging.ERROR)
            after.callback(logging.getLogger(name).setLevel, level)
        if "transformers" in sys.modules:  # which has a switch of its own; not imported for this, since it takes a second
            shown = sys.modules["transformers"].utils.logging
            if shown.is_progress_bar_enabled():
                shown.disable_progress_bar()
                after.callback(shown.enable_progress_bar)
        yield


def _halved(folder: Path, device: str, longest: int, runtime: str) -> Forward:
    return torch_forward(encoder(folder, device, longest), device, "bfloat16" if runtime.endswith("bf16") else "float16")


def _openvino() -> Any:
    """OpenVINO without its telemetry, which would report the import to its makers: without that package it does nothing of the kind."""
    if loaded := sys.modules.get("openvino"):
        return loaded
    absent = "openvino_telemetry" not in sys.modules
    if absent:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # as Python marks a module that cannot be imported
    try:
        with quiet():
            import openvino
    finally:
        if absent:
            del sys.modules["openvino_telemetry"]
    return openvino


@contextlib.contextmanager
def _onnx_errors() -> Iterator[None]:
    """ONNX Runtime's own exceptions, which derive from nothing but Exception, as RuntimeError."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = tuple(kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception))
    try:
        yield
    except kinds as error:
        raise RuntimeError(str(error)) from error
