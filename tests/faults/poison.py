"""Stages that go wrong on a few rows, each in its own way, as a function and as a model. It is sent to workers by value."""

import contextlib
import ctypes
import os
import resource
import signal
import time

import numpy as np

import headrace as hr

GENTLE = ("raises", "wrong length", "wrong type", "memory limit")
DEADLY = ("segmentation fault", "exit", "sigkill")
_SIX_GB = 6 << 30


@contextlib.contextmanager
def _at_most(size):
    """An address space of this process that is not larger than it is now by more than `size` bytes."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def double(id, kind, bad):
    """Twice the id, unless one of the rows is bad."""
    good = [2 * int(one) for one in id]
    if not set(good) & {2 * one for one in bad}:
        return {"y": good}
    match kind:
        case "raises":
            raise ValueError("a bad row")
        case "wrong length":
            return {"y": good[:-1]}
        case "wrong type":
            return {"y": ["bad" if one // 2 in bad else one for one in good]}
        case "memory limit":
            with _at_most(1 << 30):
                np.ones(_SIX_GB, np.uint8)
        case "memory":
            held = np.ones(_SIX_GB, np.uint8)
            time.sleep(20)  # as long as a model takes: the monitor looks now and then
            del held
        case "segmentation fault":
            ctypes.string_at(0)
        case "exit":
            os._exit(3)
        case "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
    return {"y": good}


@hr.stage(out={"y": int}, replicas=2, batch=16)
class Model:
    kind: str = ""
    bad: str = ""

    def __call__(self, id: hr.Column[int]):
        return double(id, self.kind, {int(one) for one in self.bad.split(",")})


@hr.stage(out={"y": int}, on=[hr.gpu(0.5)], replicas=2, batch=16)
class Accelerated(Model):
    """On an accelerator, if only by name: a replica works on two blocks at a time."""


def pipeline(form, kind, bad):
    """The pipeline with a bad function or a bad model."""
    if form != "function":
        model = Accelerated if form == "accelerated" else Model
        return hr.Pipeline("poison", model(kind=kind, bad=",".join(map(str, bad))))

    @hr.stage(out={"y": int}, batch=16)
    def function(id: hr.Column[int]):
        return double(id, kind, set(bad))

    return hr.Pipeline("poison", function)
