"""Where the services of this machine are: found while their process lives, and by their user alone."""

import json
import os
import subprocess
import sys

import pytest

from headrace.errors import ServingError
from headrace.serving import place


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "headrace"


def reviews(**changes):
    return place.Place(**{**vars_of(place.here("reviews", address="127.0.0.1:1", token="secret", url="http://127.0.0.1:8000", drain_s=60.0)), **changes})


def vars_of(thing):
    return {name: getattr(thing, name) for name in type(thing).__dataclass_fields__}


def test_what_is_written_is_found(runtime):
    place.write(reviews())
    assert place.find("reviews") == reviews()
    assert place.known() == [reviews()]
    place.forget(reviews())
    assert place.find("reviews") is None
    assert list(runtime.iterdir()) == []


def test_nobody_else_reads_the_token(runtime):
    place.write(reviews())
    assert (runtime / "reviews.json").stat().st_mode & 0o777 == 0o600
    assert runtime.stat().st_mode & 0o777 == 0o700


def test_a_process_that_is_gone_is_no_service():
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        there = reviews(pid=process.pid, born=place._born(process.pid))
        place.write(there)
        assert place.find("reviews") == there
        process.stdin.close()
        while place.find("reviews") is not None:  # as soon as it has ended, whether or not its parent has noticed
            pass
    assert not there.lives
    place.write(reviews(born="1"))  # the number is used again, by a process that began at another time
    assert place.known() == []


def test_a_service_takes_away_only_its_own_file():
    place.write(reviews(url="http://127.0.0.1:9000"))
    place.forget(reviews())
    assert place.find("reviews") is not None


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"service": "reviews"}), "\x00"])
def test_a_damaged_file_is_no_service(runtime, text):
    runtime.mkdir(mode=0o700)
    (runtime / "reviews.json").write_text(text)
    assert place.find("reviews") is None


def test_a_folder_that_others_can_open_is_refused(runtime):
    runtime.mkdir()
    runtime.chmod(0o755)
    with pytest.raises(ServingError, match="only this user can open"):
        place.find("reviews")


def test_without_a_runtime_folder_it_lies_in_the_temporary_one(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place.write(reviews())
    assert (tmp_path / f"headrace-{os.getuid()}" / "reviews.json").exists()


def test_an_unknown_name_is_told_what_there_is():
    assert "did you mean 'reviews'?" in str(place.unknown("review", ["reviews", "images"]))
    assert "headrace serve FILE starts one" in str(place.unknown("reviews", []))
