"""What a replica that is killed by one of its requests leaves behind: word that the request had begun, and why the process died."""

import asyncio
import subprocess
import sys

import pytest
from serving_doors import Peer

from headrace.serving import words
from headrace.serving.wire import Kind

pytestmark = pytest.mark.faults

SERVER = """
import ctypes, os, signal, sys
import headrace as hr
from headrace.serving import words
from headrace.serving.replica.server import ReplicaServer

@hr.stage(out={"y": int})
def stage(how: hr.Column[str]):
    for one in how:
        if one == "segmentation fault": ctypes.string_at(0)
        if one == "exit": os._exit(3)
        if one == "sigkill": os.kill(os.getpid(), signal.SIGKILL)
    return {"y": [1] * len(how)}

words.install()
pipeline = hr.Pipeline("p", stage)
server = ReplicaServer(pipeline.stages, reads=pipeline.inputs, carries=pipeline.outputs)
server.warm_up()
print(*server.start(), flush=True)
sys.stdin.read()
server.close()
"""


@pytest.mark.parametrize(("how", "said"), [("segmentation fault", "Segmentation fault"), ("exit", "os._exit(3)"), ("sigkill", "SIGKILL")])
def test_a_deadly_request_was_begun_and_its_process_says_how_it_died(how, said):
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        host, port = process.stdout.readline().split()

        async def scenario():
            peer = Peer(*await asyncio.open_connection(host, int(port)))
            assert await peer.call({"how": "not"}) == {"y": 1}
            number = peer.ask({"how": how}, alone=True)
            frames = []
            try:
                while (frame := await peer.next()) is not None:
                    frames.append(frame)
            except ConnectionResetError:
                pass
            await peer.close()
            return number, frames

        number, frames = asyncio.run(scenario())
        assert [(frame.kind, frame.number) for frame in frames] == [(Kind.STARTED, number)]
        assert process.wait(20)
        assert said in words.read(process.pid)
    finally:
        process.kill()
        process.communicate()
        words.path(process.pid).unlink(missing_ok=True)
