"""The doors' lines on one output: whole, whoever writes, and whoever is gone."""

import os

from headrace.serving.watch.pipes import Pipes, writer


class Out:
    def __init__(self):
        self.text = b""

    def write(self, data):
        self.text += data

    def flush(self):
        pass


def test_lines_stay_whole():
    out = Out()
    with Pipes("01", out) as pipes:
        files = [writer(pipes.pattern, door) for door in "01"]
        for line in range(200):
            for number, file in enumerate(files):
                file.write(f"{number} {line} {'x' * 3000}\n")
                file.flush()
        for file in files:
            file.close()
    lines = out.text.decode().splitlines()
    for number in range(2):
        assert [line.split()[1] for line in lines if line.startswith(f"{number} ")] == [str(line) for line in range(200)]
    assert {len(line.split()[2]) for line in lines} == {3000}


def test_a_door_that_comes_back_writes_on():
    out = Out()
    with Pipes("0", out) as pipes:
        for line in range(400):
            with writer(pipes.pattern, "0") as file:
                file.write(f"{line}\n")
    assert out.text.decode().split() == [str(line) for line in range(400)]
    assert not os.path.exists(pipes.pattern.format(0))


def test_without_a_reader_there_is_no_pipe(tmp_path):
    (tmp_path / "1").write_text("")
    os.mkfifo(tmp_path / "2")
    assert [writer(str(tmp_path / "{}"), door) for door in "012"] == [None, None, None]
