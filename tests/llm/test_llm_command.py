"""`headrace llm`: two models behind one address with real engines, from one command, and what it says of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ENGINE, SOURCE
from openai import OpenAI

MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]


def test_two_models_behind_one_address(tiny: Any, tmp_path: Path):
    vectors = shutil.copytree(tiny.embedder, tmp_path / "tiny-vectors")
    (vectors / "modules.json").write_text(json.dumps(MODULES))  # by which it says what it is
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "NO_COLOR": "1", "COLUMNS": "200", "XDG_RUNTIME_DIR": str(tmp_path)}
    environment.pop("RAY_ADDRESS", None)
    engine = [word for name, value in ENGINE.items() for word in ("--engine", f"{name}={value}")]
    command = [sys.executable, "-m", "headrace", "llm", tiny.lm, str(vectors), "--device", "cpu", "--port", "0", "--log", "off", *engine]
    name = Path(tiny.lm).name
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        try:
            for line in process.stderr:
                said.append(line)
                if "tiny-vectors was ready" in line:
                    break
            text = "".join(said)
            print(text)
            url = re.search(rf"{name} answers at (http://[\d.:]+)/v1", text)
            assert url, text
            assert re.search(rf"  curl {url[1]}/v1/(chat/)?completions .*\"model\": \"{name}\"", text), text
            assert re.search(rf"{name} was ready [\d.]+ s after the start; its first token came \d+ ms after it was asked for", text), text
            assert re.search(r"tiny-vectors answers at .*/v1, also by the name tiny_vectors", text), text
            assert re.search(r"tiny-vectors was ready [\d.]+ s after the start; its first vector came \d+ ms", text), text
            assert "tiny_vectors: version 1 promoted" in text, text  # each tells what happens to it
            with OpenAI(base_url=f"{url[1]}/v1", api_key="none") as client:
                assert {model.id for model in client.models.list()} >= {name, "tiny-vectors", "tiny_vectors"}
                answer = client.completions.create(model=name, prompt="a", max_tokens=3)
                assert answer.usage is not None
                assert 1 <= answer.usage.completion_tokens <= 3
                assert len(client.embeddings.create(model="tiny_vectors", input="a").data[0].embedding) > 1
        finally:
            process.terminate()
            process.stderr.read()
            process.wait(60)
    assert process.returncode == 0
    assert not list((tmp_path / "headrace").glob("*.json"))
