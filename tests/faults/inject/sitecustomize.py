"""Faults from the inside: loaded by every Python process whose path has this folder, and carries out HEADRACE_FAULT_PLAN.

A plan is JSON; each of its parts is optional:

    limits   {module: {name: value}}: small limits, so that a small job merges, compacts and publishes often
    strike   {"who": "driver" or "worker", "at": n, "when": "before", "between" or "after", "signal": number, "mark": path,
              "only": regex}: this process signals itself at its nth operation on the output whose name matches; with `mark`, only once
    log      path: every operation of the driver, one a line
    clock    seed: time.time, and headrace's time.monotonic, jump back and forth by days, every half second

An operation is a put, a move or a delete of `headrace.store.Folder`; the heartbeat's own are not counted. `between` is after a
put has written its partial file and before it has its name; of a move on an object store, after the copy. What has no middle is
struck after.
"""

import importlib.abc
import importlib.util
import itertools
import json
import os
import queue  # noqa: F401 - it and threading take the clock as it is now: a lock's own time-out does not jump
import random
import re
import sys
import threading
import time

PLAN = json.loads(os.environ.get("HEADRACE_FAULT_PLAN") or "{}")
WHO = "worker" if any(argument.endswith("default_worker.py") for argument in sys.orig_argv) else "driver" if "headrace" in sys.orig_argv[:3] else None


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls what belongs to a module once it has been loaded."""

    def __init__(self, actions):
        self.actions = actions

    def find_spec(self, name, path, target=None):
        if name not in self.actions:
            return None
        action = self.actions.pop(name)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_then_act(module):
            run(module)
            action(module)

        spec.loader.exec_module = run_then_act
        return spec


def _narrow(module):
    for name, value in PLAN.get("limits", {}).get(module.__name__, {}).items():
        assert hasattr(module, name)
        setattr(module, name, tuple(value) if isinstance(value, list) else value)


class _Strike:
    """A signal to this process itself at one of its operations."""

    def __init__(self, strike):
        self.armed = strike if strike.get("who") == WHO else {}
        self.only, self.counter, self.lock = re.compile(self.armed.get("only", "")), itertools.count(), threading.Lock()

    def due(self, name):
        """Count an operation; when to strike in it, or None."""
        if name.endswith("alive.json"):
            return None
        with self.lock:
            now = self.armed and self.only.search(name) and next(self.counter) == self.armed["at"]
            return self.armed["when"] if now else None

    def fire(self):
        if "mark" in self.armed:
            try:
                os.close(os.open(self.armed["mark"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
        os.kill(os.getpid(), self.armed["signal"])

    def middle(self, kind, folder, paths):
        """Strike in the middle of an operation, now or when it comes to that; False when it has no middle."""
        if folder.place.is_local and kind != "delete":
            replace = os.replace

            def fire_first(*names):
                os.replace = replace
                self.fire()
                replace(*names)

            os.replace = fire_first
        elif kind == "move":
            folder.place.filesystem.copy_file(*paths)
            self.fire()
        else:
            return False
        return True


def _hook_store(module):
    _narrow(module)
    strike = _Strike(PLAN.get("strike", {}))

    def wrapped(kind, operation):
        def run(folder, name, *rest):
            if "log" in PLAN and WHO == "driver":
                with open(PLAN["log"], "a") as file:
                    file.write(f"{kind} {name}\n")
            when = strike.due(name)
            if when == "before":
                strike.fire()
            if when == "between" and not strike.middle(kind, folder, [folder._path(one) for one in (name, *rest) if isinstance(one, str)]):
                when = "after"
            result = operation(folder, name, *rest)
            if when == "after":
                strike.fire()
            return result

        return run

    for kind in ("put", "move", "delete"):
        setattr(module.Folder, kind, wrapped(kind, getattr(module.Folder, kind)))


class _Jumping:
    """A clock that jumps by up to thirty days, back or forth, every half second."""

    def __init__(self, clock, seed):
        self.clock, self.chance, self.at, self.by = clock, random.Random(seed), STEADY(), 0.0

    def __call__(self):
        if STEADY() - self.at > 0.5:
            self.at, self.by = STEADY(), self.chance.uniform(-30, 30) * 86_400
        return self.clock() + self.by


# Functions of this module, because Ray pickles what refers to time.time, and finds them by their names.
def jumping_time():
    return CLOCKS["time"]()


def jumping_monotonic():
    # Headrace's alone: no system lets this clock jump, and Ray Data takes a jump for half an hour without progress.
    return CLOCKS["monotonic"]() if sys._getframe(1).f_globals.get("__name__", "").startswith("headrace") else STEADY()


STEADY = time.monotonic
CLOCKS = {"time": _Jumping(time.time, PLAN.get("clock")), "monotonic": _Jumping(time.monotonic, PLAN.get("clock", 0) + 1)}

if PLAN and WHO:
    sys.meta_path.insert(0, _AfterImport({"headrace.store": _hook_store} | {name: _narrow for name in PLAN.get("limits", {}) if name != "headrace.store"}))
    if "clock" in PLAN:
        time.time = jumping_time
        if WHO == "driver":
            time.monotonic = jumping_monotonic
