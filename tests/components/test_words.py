"""Last words: a process that kills itself leaves them, one that is killed or ends well does not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from headrace.serving import words

LOAD = f"""
import ctypes, importlib.util, os, signal, sys, threading
spec = importlib.util.spec_from_file_location("words", {words.__file__!r})  # by itself: quicker than the whole package
words = importlib.util.module_from_spec(spec)
spec.loader.exec_module(words)
words.install()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def die(code):
    """Runs `code` after `install` in a process of its own; returns its id and its exit code."""
    process = subprocess.Popen([sys.executable, "-c", LOAD + code], stderr=subprocess.PIPE)
    process.communicate(timeout=30)
    return process.pid, process.returncode


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("ctypes.string_at(0)", "Segmentation fault"),
        ("os.abort()", "Aborted"),
        ("os._exit(3)", "os._exit(3), called in <module>"),
        ("def stage(): os._exit(3)\nthread = threading.Thread(target=stage); thread.start(); thread.join()", "os._exit(3), called in stage"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "os.kill of itself with SIGKILL"),
    ],
)
def test_a_process_that_kills_itself_leaves_its_last_words(folder, code, said):
    pid, status = die(code)
    assert status
    assert said in words.read(pid)


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "sys.exit(1)",
        "raise ValueError",
        "words.remove(); os._exit(0)",
        "threading.Thread(target=sys.exit).start()",
    ],
)
def test_an_end_in_order_leaves_nothing(folder, code):
    pid, _ = die(code)
    assert words.read(pid) is None
    assert not words.path(pid).exists()


@pytest.mark.parametrize(
    "code",
    [
        "os.system('kill -9 %d' % os.getpid())",
        "pid = os.fork()\nif not pid: os._exit(0)\nos.waitpid(pid, 0); os.system('kill -9 %d' % os.getpid())",  # a fork may end as it likes
        "exec('import os; os._exit(1)', {'__name__': 'ray._private.worker'})",  # Ray ends its own workers so
    ],
)
def test_what_the_process_did_not_do_to_itself_leaves_an_empty_file(folder, code):
    pid, _ = die(code)
    assert words.path(pid).read_text() == ""
    assert words.read(pid) is None


def test_a_process_that_never_installed_has_no_last_words(folder):
    assert words.read(os.getpid()) is None


def test_the_folder_is_the_users_own(folder):
    pid, _ = die("os._exit(1)")
    assert words.path(pid).parent.stat().st_mode & 0o777 == 0o700
    assert words.path(pid).parent == folder / f"headrace-words-{os.getuid()}"


def test_a_folder_of_somebody_else_is_not_believed(folder, monkeypatch):
    pid, _ = die("os._exit(1)")
    assert words.read(pid)
    name = words.path(pid)
    monkeypatch.setattr(words, "path", lambda pid: name)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert words.read(pid) is None
    with pytest.raises(PermissionError, match="another user"):
        words.install()


def test_files_of_the_long_dead_are_swept_away(folder):
    (old, _), (young, _) = die("os._exit(1)"), die("os._exit(1)")
    for pid in (old, os.getpid()):
        words.path(pid).touch()
        os.utime(words.path(pid), (time.time() - 7200,) * 2)
    die("pass")
    assert words.read(young)
    assert not words.path(old).exists()
    assert words.path(os.getpid()).exists()  # alive


def test_signals_to_others_pass(folder):
    process = subprocess.Popen(["sleep", "60"])
    pid, status = die(f"os.kill({process.pid}, signal.SIGKILL)")
    assert process.wait(10) == -signal.SIGKILL
    assert status == 0
    assert not words.path(pid).exists()
