"""Batches of a service, by OpenAI's own client: through the death of the runner and of everything each line is answered once and paid for once."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from test_service import Served, until

from headrace.gateway.accounts.database import Database
from headrace.gateway.accounts.keys import Keys
from headrace.gateway.accounts.usage import sums

from conftest import TESTS  # isort: skip

LINES = 500
OPTIONS = ("--doors", "1", "--replicas", "1", "--accounts", "accounts.sqlite", "--prices", "prices.toml", "--files", "files")


class Talking(Served):
    """A service whose engine says the words of a prompt again, seven lines at a time, each in a twelfth of a second."""

    file = "talk.py"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.environment["PYTHONPATH"] += os.pathsep + str(TESTS)
        (folder / self.file).write_text("import headrace as hr\nfrom speakers import Parrot\n\ntalk = hr.Pipeline('talk', Parrot(word_s=0.02))\n")
        (folder / "prices.toml").write_text("[parrot]\nprompt = 1.0\ncompletion = 1.0\n")
        self.accounts = Database(folder / "accounts.sqlite")
        self.key = Keys(self.accounts).create("ann")

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=8)


@pytest.fixture
def talking(tmp_path: Path) -> Iterator[Talking]:
    talking = Talking(tmp_path)
    try:
        yield talking
    finally:
        talking.end()
        talking.accounts.close()


@pytest.mark.faults
def test_a_batch_goes_on_through_kills_and_a_restart(talking: Talking):
    talking.start(*OPTIONS)
    client = talking.client()
    lines = [
        {
            "custom_id": f"r{at}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "talk", "messages": [{"role": "user", "content": f"line {at}"}]},
        }
        for at in range(LINES)
    ]
    file = client.files.create(file=("lines.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")

    def done() -> int:
        found = client.batches.retrieve(batch.id)
        assert found.status in ("validating", "in_progress", "finalizing", "completed"), found
        return 0 if found.request_counts is None else found.request_counts.completed

    for share in (50, 150):
        until(lambda: done() >= share)  # noqa: B023
        (runner,) = talking.processes("ray::Backstage")
        os.kill(runner, signal.SIGKILL)
    asked = client.chat.completions.create(model="talk", messages=[{"role": "user", "content": "and people"}])
    assert asked.choices[0].message.content == "and people and people"
    until(lambda: done() >= 250)
    talking.kill()
    assert sums(talking.accounts)[0].requests <= LINES
    talking.start(*OPTIONS)
    client = talking.client()
    until(lambda: client.batches.retrieve(batch.id).status == "completed", 60)

    found = client.batches.retrieve(batch.id)
    assert found.request_counts is not None and found.request_counts.model_dump() == {"total": LINES, "completed": LINES, "failed": 0}
    assert found.error_file_id is None and found.output_file_id is not None
    answers = [json.loads(line) for line in client.files.content(found.output_file_id).text.splitlines()]
    said = {answer["custom_id"]: answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers}
    assert len(answers) == LINES and said == {f"r{at}": f"line {at} line {at}" for at in range(LINES)}
    (used,) = sums(talking.accounts)
    assert (used.key, used.model, used.requests, used.prompt_tokens, used.completion_tokens) == ("ann", "parrot", LINES + 1, 2 * LINES + 2, 4 * LINES + 4)
