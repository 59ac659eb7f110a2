"""`headrace llm`: two models behind one address with real engines, and what it says of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ENGINE, SOURCE
from openai import OpenAI


def test_two_models_behind_one_address(tiny: Any, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "NO_COLOR": "1", "COLUMNS": "200", "XDG_RUNTIME_DIR": str(tmp_path)}
    environment.pop("RAY_ADDRESS", None)
    engine = [word for name, value in ENGINE.items() for word in ("--engine", f"{name}={value}")]
    begin = [sys.executable, "-m", "headrace", "llm", "--device", "cpu"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*begin, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    host = [*begin, tiny.lm, "--name", "chat", "--port", "0", "--log", "off", *engine]
    with subprocess.Popen(host, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        try:
            for line in process.stderr:
                said.append(line)
                if "was ready" in line:
                    break
            text = "".join(said)
            name = Path(tiny.lm).name
            url = re.search(rf"{name} answers at (http://[\d.:]+)/v1, also by the name chat", text)
            assert url, text
            assert re.search(rf"  curl {url[1]}/v1/(chat/)?completions .*\"model\": \"{name}\"", text), text
            assert re.search(rf"{name} was ready [\d.]+ s after the start; its first token came \d+ ms after it was asked for", text), text
            done = run(tiny.embedder, "--embed", "--behind", "chat", "--name", "vectors")
            assert re.search(r"was ready [\d.]+ s after the start; its first vector came \d+ ms", done.stderr), done.stderr
            with OpenAI(base_url=f"{url[1]}/v1", api_key="none") as client:
                assert {model.id for model in client.models.list()} == {name, "chat", Path(tiny.embedder).name, "vectors"}
                answer = client.completions.create(model="chat", prompt="a", max_tokens=3)
                assert answer.usage is not None
                assert answer.usage.completion_tokens <= 3
                assert len(client.embeddings.create(model="vectors", input="a").data[0].embedding) > 1
        finally:
            process.terminate()
            process.wait(60)
    assert process.returncode == 0
