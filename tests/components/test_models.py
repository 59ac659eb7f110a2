"""The ready stage's pure parts: reading a model's folder, choosing among trials, keeping what was found out. No library for models is loaded."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import headrace as hr
from headrace.errors import DefinitionError, SettingError
from headrace.models import choice, folder, prepare, shelf
from headrace.models.choice import Trial, Verdict
from headrace.models.slicing import padded
from headrace.settings import override
from headrace.stage import Stage


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a model's description, without the model."""
    return write_model(tmp_path / "model")


def write_model(at: Path, *, kinds=("Transformer", "Pooling", "Normalize"), files=None) -> Path:
    at.mkdir(parents=True)
    modules = [
        {"idx": n, "name": str(n), "path": "" if not n else f"{n}_{kind}", "type": f"sentence_transformers.models.{kind}"} for n, kind in enumerate(kinds)
    ]
    contents = {
        "modules.json": modules,
        "tokenizer.json": {},
        "config.json": {"max_position_embeddings": 512},
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": 12, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
    } | (files or {})
    for name, content in contents.items():
        (at / name).parent.mkdir(exist_ok=True)
        (at / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return at


# The folder


def test_a_card_says_what_the_files_say(model: Path):
    assert folder.read(model) == folder.Card(size=12, longest=256, prompt="", lower=False, tokenizer=model / "tokenizer.json")


def test_a_dense_layer_two_pooling_modes_and_a_prompt_count(tmp_path: Path):
    both = {"embedding_dimension": 12, "pooling_mode": ["cls", "mean"], "include_prompt": True}
    prompts = {"prompts": {"query": "query: ", "document": "passage: "}, "default_prompt_name": "document"}
    found = folder.read(write_model(tmp_path / "two", files={"1_Pooling/config.json": both, "config_sentence_transformers.json": prompts}))
    assert (found.size, found.prompt) == (24, "passage: ")
    dense = {"2_Dense/config.json": {"in_features": 12, "out_features": 7}}
    assert folder.read(write_model(tmp_path / "dense", kinds=("Transformer", "Pooling", "Dense"), files=dense)).size == 7


def test_without_a_stated_limit_tokenizer_and_positions_set_it(tmp_path: Path):
    files = {"sentence_bert_config.json": {}, "tokenizer_config.json": {"model_max_length": 1e30}}
    assert folder.read(write_model(tmp_path / "model", files=files)).longest == 512


@pytest.mark.parametrize(
    ("kinds", "files", "said"),
    [
        (("CLIPModel",), {}, "has a module 'CLIPModel'"),
        (("Transformer", "Normalize"), {}, "then a Pooling"),
        (("Transformer", "Pooling"), {"modules.json": "{"}, "is no JSON"),
        (
            ("Transformer", "Pooling"),
            {
                "1_Pooling/config.json": {"word_embedding_dimension": 12, "include_prompt": False},
                "config_sentence_transformers.json": {"prompts": {"a": "Say: "}, "default_prompt_name": "a"},
            },
            "leaves its prompt 'Say: ' out of the pooling",
        ),
    ],
)
def test_a_model_that_would_come_out_wrong_is_refused(tmp_path: Path, kinds, files, said: str):
    with pytest.raises(DefinitionError, match=said):
        folder.read(write_model(tmp_path / "model", kinds=kinds, files=files))


def test_a_folder_without_modules_or_a_fast_tokenizer_is_refused(model: Path, tmp_path: Path):
    (model / "tokenizer.json").unlink()
    with pytest.raises(DefinitionError, match="no tokenizer.json; make one with AutoTokenizer"):
        folder.read(model)
    with pytest.raises(DefinitionError, match="no modules.json.*SentenceTransformer"):
        folder.read(tmp_path)


def test_a_hub_model_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--acme--small"
    write_model(kept / "snapshots" / "abc")
    assert folder.find("acme/small") is None
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc\n")
    assert folder.find("acme/small") == kept / "snapshots" / "abc"
    assert folder.find("acme/other") is None and folder.find("a/b/c") is None


def test_the_digest_sees_every_file(model: Path):
    before = folder.digest(model)
    assert folder.digest(model) == before
    (model / "weights").write_bytes(b"1" * (3 << 20))
    with_weights = folder.digest(model)
    content = bytearray(b"1" * (3 << 20))
    content[-1] = 0
    (model / "weights").write_bytes(content)
    assert len({before, with_weights, folder.digest(model)}) == 3


# The stage


def test_an_embedder_is_a_stage_with_its_own_columns(model: Path):
    reviews = hr.Pipeline("reviews", hr.models.Embedder(model=str(model), text="body", out="meaning", name="meanings", replicas=2, on=hr.cpu(2)))
    stage = reviews.stage("meanings")
    assert str(stage.reads["body"]) == "str" and str(stage.writes["meaning"]) == "Vector(12)"
    assert stage.replicas == (2, 2) and stage.on == (hr.cpu(2),)
    assert stage.settings["size"] == 12 and "text" not in stage.settings
    again = pickle.loads(pickle.dumps(stage.call))
    assert Stage.of(again).reads == stage.reads and again == stage.call


def test_settings_are_overridden_without_losing_the_wiring(model: Path):
    reviews = hr.Pipeline("reviews", hr.models.Embedder(model=str(model), text="body"))
    changed = override(reviews, ["embedder.runtime=onnx", "embedder.slice_tokens=512", "embedder.prompt=passage: "]).stage("embedder")
    assert (changed.call.runtime, changed.call.slice_tokens, changed.call.prompt) == ("onnx", 512, "passage: ")
    assert list(Stage.of(changed.call).reads) == ["body"]
    with pytest.raises(SettingError, match="no setting 'text'"):
        override(reviews, ["embedder.text=title"])
    with pytest.raises(SettingError, match="runtime"):
        override(reviews, ["embedder.runtime=fast"])


def test_a_model_of_another_size_cannot_slip_in_later(model: Path, tmp_path: Path):
    other = write_model(tmp_path / "other", files={"1_Pooling/config.json": {"word_embedding_dimension": 99}})
    with pytest.raises(SettingError, match="vectors of 99 numbers, but the pipeline was defined with size=12"):
        override(hr.Pipeline("reviews", hr.models.Embedder(model=str(model))), [f"embedder.model={other}"])


def test_mistakes_are_told_when_the_stage_is_made(model: Path):
    with pytest.raises(SettingError, match="runtime must be one of .*got 'openvin'; did you mean 'openvino'"):
        hr.models.Embedder(model=str(model), runtime="openvin")
    with pytest.raises(SettingError, match="say size=384"):
        hr.models.Embedder(model="acme/nowhere")
    assert hr.models.Embedder(model="acme/nowhere", size=384).size == 384
    with pytest.raises(DefinitionError, match="slice_tokens must be a whole number"):
        hr.models.Embedder(model=str(model), slice_tokens=0)
    with pytest.raises(DefinitionError, match="Embedder is a class"):
        hr.Pipeline("reviews", hr.models.Embedder)


def test_defining_one_loads_no_library(model: Path):
    code = f"import headrace as hr, sys; hr.models.Embedder(model={str(model)!r}); print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "tokenizers", "openvino", "onnxruntime", "huggingface_hub", "ray"} & set(loaded)


# The choice


class Clock:
    """A timer that forward passes move on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def forward(self, us_per_token: float, *, off: float = 0.0, fixed_s: float = 0.0):
        def run(ids, mask):
            self.now_s += fixed_s + us_per_token * ids.size * 1e-6
            return np.stack([mask.sum(axis=1), ids.sum(axis=1) + off, np.ones(len(ids))], axis=1).astype(np.float32)

        return run


def hold(speeds: dict[str, object], clock: Clock, least_cosine: float = 0.9999):
    ids = np.arange(60).reshape(4, 15) + 3

    def load(name: str):
        given = speeds[name]
        if isinstance(given, Exception):
            raise given
        return given

    def embed(forward):
        return forward(ids, np.ones_like(ids)), ids.size

    reference = clock.forward(0)(ids, np.ones_like(ids))
    return choice.audition(tuple(speeds), load, embed=embed, reference=reference, least_cosine=least_cosine, timer=clock)


def test_the_fastest_of_the_equal_is_chosen_and_the_others_say_why_not():
    clock = Clock()
    trials, loaded = hold(
        {
            "torch": clock.forward(300),
            "torch-bf16": clock.forward(100, off=1e6),
            "openvino": clock.forward(200),
            "openvino-bf16": clock.forward(9000),
            "onnx": ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"),
        },
        clock,
    )
    best = choice.fastest(trials)
    assert best is not None and best.runtime == "openvino" and best.tokens_per_s == pytest.approx(5000)
    assert set(loaded) == {"torch", "openvino"}
    said = {trial.runtime: trial.problem for trial in trials}
    assert "not equal: cosine similarity 0." in said["torch-bf16"]
    assert said["openvino-bf16"] == "is 45 times slower than the best"
    assert said["onnx"] == "needs onnxruntime, which is not installed: pip install 'headrace[embeddings]'"


def test_a_candidate_that_breaks_is_left_out_and_none_at_all_is_none():
    clock = Clock()
    trials, loaded = hold({"torch": RuntimeError("no such device\nmore"), "onnx": OSError("cannot open")}, clock)
    assert choice.fastest(trials) is None and not loaded
    assert [trial.problem for trial in trials] == ["does not work here: RuntimeError: no such device", "does not work here: OSError: cannot open"]


def test_a_single_candidate_is_not_raced():
    clock = Clock()
    trials, _ = hold({"onnx": clock.forward(200)}, clock)
    assert choice.fastest(trials) is not None and trials[0].problem == ""


def test_equality_is_the_worst_row():
    one = np.eye(3, dtype=np.float32)
    bent = one.copy()
    bent[2] = [0, 1, 1]
    assert choice.cosine(one, one * 2) == pytest.approx(1)
    assert choice.cosine(one, bent) == pytest.approx(2**-0.5)
    assert choice.cosine(one * np.nan, one) == -1
    assert choice.cosine(one * 0, one * 0) == 1
    assert choice.cosine(one * 0, one) == 0


def test_larger_slices_must_be_worth_their_padding():
    clock = Clock()
    assert choice.budget(clock.forward(100), "cpu", timer=clock) == 512
    assert choice.budget(clock.forward(100, fixed_s=1.0), "cpu", timer=clock) == 2048
    assert choice.budget(clock.forward(1, fixed_s=1.0), "cuda", timer=clock) == 131_072


def test_candidates_fit_the_device_and_a_forced_one_is_alone():
    assert choice.candidates("auto", "cpu") == ("torch", "torch-bf16", "openvino", "openvino-bf16", "onnx")
    assert choice.candidates("auto", "cuda") == ("torch", "torch-bf16", "torch-fp16")
    assert choice.candidates("onnx", "cpu") == ("onnx",)


def test_a_verdict_reads_well_and_survives_json():
    verdict = Verdict("openvino", 1024, (Trial("torch", 1.0, 3000.0), Trial("openvino", 1.0, 4000.0), Trial("onnx", problem="is not there")))
    assert str(verdict) == "openvino, slices of 1,024 tokens (torch 3,000 tokens/s; openvino 4,000 tokens/s; onnx is not there)"
    assert Verdict.of_json(json.loads(json.dumps(verdict.to_json()))) == verdict
    with pytest.raises(ValueError, match="no such verdict"):
        Verdict.of_json({"runtime": "abacus", "slice_tokens": 1, "trials": []})


# Slices


def test_slices_hold_every_row_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(2, 256, 500)
    parts = choice.slices(lengths, 1024)
    assert sorted(np.concatenate(parts)) == list(range(500))
    assert max(len(part) * lengths[part].max() for part in parts) <= 1024
    assert 1 - lengths.sum() / sum(len(part) * lengths[part].max() for part in parts) < 0.04


def test_padded_rows_keep_their_tokens():
    tokens = [[5, 6], [7], [], [8, 9, 10]]
    ids, mask = padded(tokens, np.array([2, 1, 0, 3]), np.array([3, 0, 2]))
    assert ids.tolist() == [[8, 9, 10], [5, 6, 0], [0, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert padded(tokens, np.array([2, 1, 0, 3]), np.array([2]))[0].shape == (1, 1)


def test_samples_have_all_lengths_and_go_beyond_the_limit():
    words = [len(text.split()) for text in prepare.samples(256)]
    assert words[0] == 0 and words[1] == 1 and words[-1] > 256 and len(set(words)) == len(words)


# The shelf


def made(shelf_folder: Path, name: str, **files: bytes) -> Path:
    with shelf.desk(shelf_folder, name) as desk:
        for file, content in files.items():
            (desk / file).write_bytes(content)
        where = shelf.put(shelf_folder, name, {"runtime": name}, desk)
    assert where is not None
    return where


def test_what_is_put_is_there_and_nothing_else_is_left(tmp_path: Path):
    place = tmp_path / "shelf"
    assert shelf.get(place, "a") is None
    where = made(place, "a", weights=b"123")
    assert shelf.get(place, "a") == ({"runtime": "a"}, where)
    assert [path.name for path in place.iterdir()] == ["a"]
    assert shelf.get(place, "b") is None


@pytest.mark.parametrize("damage", ["weights", "missing", "index", "nonsense", "content", "no index"])
def test_a_damaged_entry_is_removed_and_made_anew(tmp_path: Path, damage: str):
    where = made(tmp_path, "a", weights=b"123")
    index = where / "entry.json"
    match damage:
        case "weights":
            (where / "weights").write_bytes(b"124")
        case "missing":
            (where / "weights").unlink()
        case "index":
            index.write_bytes(index.read_bytes()[:20])
        case "nonsense":
            index.write_text("[1]")
        case "content":
            index.write_text(index.read_text().replace('"runtime": "a"', '"runtime": "b"'))
        case "no index":
            index.unlink()
    assert shelf.get(tmp_path, "a") is None
    assert list(tmp_path.iterdir()) == []
    assert shelf.get(tmp_path, "a") is None
    assert shelf.get(tmp_path, made(tmp_path, "a", weights=b"123").name) is not None


def test_the_first_entry_stays(tmp_path: Path):
    first = made(tmp_path, "a", weights=b"1")
    assert made(tmp_path, "a", weights=b"2") == first
    assert (first / "weights").read_bytes() == b"1"


def test_where_nothing_can_be_kept_the_work_still_goes_on(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with shelf.alone(blocked / "shelf", "a") as held:
        assert not held
    with shelf.desk(blocked / "shelf", "a") as desk:
        assert desk.is_dir()
        assert shelf.put(blocked / "shelf", "a", 1, desk) is None
    assert shelf.get(blocked / "shelf", "a") is None


def test_what_a_killed_process_left_is_tidied_up_in_time(tmp_path: Path):
    old, new = tmp_path / ".a.old", tmp_path / ".a.new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    made(tmp_path, "b")
    assert {path.name for path in tmp_path.iterdir()} == {".a.new", "b"}


def _hold(place: str, begun, end) -> None:
    with shelf.alone(Path(place), "a") as held:
        assert held
        begun.set()
        end.wait(20)


def test_a_lock_is_held_by_one_and_ends_with_its_process(tmp_path: Path):
    spawn = multiprocessing.get_context("spawn")
    begun, end = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(str(tmp_path), begun, end))
    other.start()
    assert begun.wait(20)
    with shelf.alone(tmp_path, "a", wait_s=0.1) as held:
        assert not held
    other.kill()
    other.join()
    with shelf.alone(tmp_path, "a", wait_s=5) as held:
        assert held


def test_the_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert shelf.place() == tmp_path / "headrace" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert shelf.place() == Path("/home/someone/.cache/headrace/models")


def test_the_key_sees_every_fact():
    facts = {"model": "abc", "threads": 1, "versions": {"torch": "2.13.0"}}
    assert shelf.key(facts) == shelf.key(dict(reversed(facts.items())))
    assert shelf.key(facts) != shelf.key(facts | {"threads": 2}) != shelf.key(facts | {"versions": {"torch": "2.14.0"}})
