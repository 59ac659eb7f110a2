"""An endpoint of a language model, from nothing: `make llm-demo` runs it.

It makes a tiny model with random weights, makes a key, starts the endpoint with `headrace llm`, talks to it with OpenAI's own client, streams, runs a
batch file, and shows metrics and usage. The model writes nonsense; everything else is as it would be with a real one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from openai import OpenAI

LINES = 200
HERE = Path(__file__).resolve().parent


def headrace(*words: str) -> str:
    """What a command prints."""
    return subprocess.run([sys.executable, "-m", "headrace", *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def talk(client: OpenAI, model: str) -> None:
    """One answer, and one that is streamed."""
    asked = [{"role": "user", "content": "Write me a few words."}]
    answer = client.chat.completions.create(model=model, messages=asked, max_tokens=24, temperature=0)
    print(f"\nanswered: {answer.choices[0].message.content!r}")
    print(f"          {answer.usage.prompt_tokens} tokens of prompt, {answer.usage.completion_tokens} written")
    began_s = time.perf_counter()
    print("streamed: ", end="", flush=True)
    first_s, count = 0.0, 0
    for event in client.chat.completions.create(model=model, messages=asked, max_tokens=200, stream=True, temperature=0, extra_body={"ignore_eos": True}):
        first_s = first_s or time.perf_counter() - began_s
        count += 1
        print((event.choices[0].delta.content or "").replace("\n", " ") if count < 24 else "", end="", flush=True)
    took_s = time.perf_counter() - began_s
    print(f" ...\n          first piece after {first_s * 1e3:.0f} ms, {count} pieces in {took_s:.2f} s ({count / took_s:.0f} a second)")


def run_batch(client: OpenAI, model: str, folder: Path) -> None:
    """A file of requests in the background."""
    bodies = ({"model": model, "messages": [{"role": "user", "content": f"Review {number}"}], "max_tokens": 16} for number in range(LINES))
    lines = [json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}) for number, body in enumerate(bodies)]
    path = folder / "lines.jsonl"
    path.write_text("\n".join(lines) + "\n")
    began_s = time.perf_counter()
    file = client.files.create(file=path, purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    answers = client.files.content(batch.output_file_id).text.splitlines()
    print(f"batch:    {batch.status}, {len(answers)} of {LINES} lines answered in {time.perf_counter() - began_s:.1f} s")


def show_metrics(url: str, key: str) -> None:
    """What the endpoint counted."""
    asked = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        text = answer.read().decode()
    print("\nof /metrics:")
    for line in text.splitlines():
        if re.match(r"headrace_(gen_ai|engine|requests_total)", line) and not re.search(r"_bucket|_created", line):
            print(f"  {line}")


def main() -> None:
    """All of it, in a folder that is taken away afterwards."""
    with tempfile.TemporaryDirectory(prefix="headrace-llm-") as name:
        folder = Path(name)
        subprocess.run([sys.executable, str(HERE.parent / "tests" / "tiny_llm.py"), name], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        accounts, prices = str(folder / "accounts.db"), folder / "prices.toml"
        prices.write_text("[tiny]\nprompt = 0.10\ncompletion = 0.40\n")
        key = headrace("keys", "create", "demo", "--accounts", accounts, "--owner", "You", "--budget", "5").strip()
        command = ["llm", str(folder / "tiny"), "--device", "cpu", "--port", "0", "--engine", "max_model_len=1024"]
        command += ["--accounts", accounts, "--prices", str(prices), "--files", str(folder / "files")]
        environment = {**os.environ, "XDG_RUNTIME_DIR": name}  # beside services that run already
        began_s = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "headrace", *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as served:
            try:
                url = ""
                for line in served.stderr:
                    print(line, end="")
                    if found := re.search(r"(http://[^/\s]+)/v1\b", line):
                        url = found[1]
                        break
                if not url:
                    raise SystemExit("the endpoint did not start")
                print(f"\nready {time.perf_counter() - began_s:.0f} s after the command")
                client = OpenAI(base_url=f"{url}/v1", api_key=key)
                model = client.models.list().data[0].id
                talk(client, model)
                run_batch(client, model, folder)
                show_metrics(url, key)
                print("\nheadrace keys usage:")
                print(headrace("keys", "usage", "--accounts", accounts))
            finally:
                served.terminate()


if __name__ == "__main__":
    main()
