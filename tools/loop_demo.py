"""The loop, from nothing: `make loop-demo` runs it on a small city, in a folder that is taken away afterwards.

Features of listings, a training set as of the time of each label, two models trained on it and registered, gates, and then the same pipeline file as a batch
job and as a service that looks features up; at the end the service is held to what the batch job computed. Where Inside Airbnb's tables lie in
../shared/data a part of one city is taken, else a city is made up.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAYS = ROOT / "examples" / "stays"
SHARED = ROOT.parent / "shared" / "data"
BETTER = ["--metric", "gain>=0.02"]  # than the better of two guesses, on what came later


def python(file: str, *words: str) -> None:
    """One of the example's files, which prints what it did."""
    subprocess.run([sys.executable, str(STAYS / file), *words], check=True)


def headrace(*words: str) -> None:
    """A command, which prints what it did."""
    print(f"$ headrace {' '.join(words).replace(str(STAYS), 'examples/stays')}", flush=True)
    subprocess.run([sys.executable, "-m", "headrace", *words], check=True)


def say(text: str) -> None:
    """The title of a step."""
    print(f"\n— {text}", flush=True)


def on_ray(city: Path, gates: list[str]) -> None:
    """What one Ray is started for: both trainings and, when the model is in use, the batch job."""
    sys.path.insert(0, str(STAYS))
    from boosted import boosted
    from network import network
    from stays import stays

    import headrace as hr
    from headrace.on_ray.cluster import connected

    with connected():
        say("train a network on what reviews say, and boosted trees on top of it")
        for training in (network, boosted):
            print(f"{training.name}: {hr.train(training, input=str(city / 'train.parquet'), output=str(city / training.name)).record}\n", flush=True)
        say("judge them on what came later, and register them")
        python("register.py")
        say("publish the features to the online store")
        python("publish.py")
        say("let @prod name the candidate, if it passes")
        questions = ["--pipeline", str(STAYS / "stays.py"), "--input", "stays-output/questions.parquet"]
        headrace("models", "promote", "stays", *gates, *questions, "--latency", "250ms", "--no-batch")
        say("score all listings: the batch job")
        print(hr.run(stays, input=str(city / "questions.parquet"), output=str(city / "scored"), keep=["listing_id", "night", "booked"]))


def ask(url: str, city: Path) -> None:
    """One question to the service, and the answer."""
    import pyarrow.parquet as pq

    row = pq.read_table(city / "questions.parquet").slice(0, 1).to_pylist()[0]
    body = {"listing_id": row["listing_id"], "night": str(row["night"])}
    asked = urllib.request.Request(f"{url}/stays", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        print(f"{json.dumps(body)}\n{answer.read().decode().strip()}")


def served(city: Path) -> None:
    """The same file as a service: a request, and the parity gate."""
    say("serve the same file")
    command = ["serve", str(STAYS / "stays.py"), "--port", "0", "--doors", "1"]
    with subprocess.Popen([sys.executable, "-m", "headrace", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                print(line, end="", flush=True)
                if found := re.search(r"answers at (http://[^/\s]+)", line):
                    break
            else:
                raise SystemExit("the service did not start")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # so that it is never kept waiting
            say("a request")
            ask(found[1], city)
            say("the parity gate: this process and the service, beside what the batch job wrote")
            headrace("check", str(STAYS / "stays.py"), "--input", "stays-output/scored/*.parquet", "--url", found[1], "--no-batch")
        finally:
            process.terminate()


def main() -> None:
    """All of it; exit code 1 if a gate is not passed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--synthetic", action="store_true", help=f"make a city up even though {SHARED} is there")
    real = SHARED.is_dir() and not parser.parse_args().synthetic
    began_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="headrace-loop-") as name:
        os.chdir(name)
        city = Path(name) / "stays-output"
        places = {"MLFLOW_TRACKING_URI": f"sqlite:///{name}/mlflow.db", "XDG_RUNTIME_DIR": name, "XDG_CACHE_HOME": f"{name}/cache"}
        os.environ.update(places | {"HF_HUB_OFFLINE": "1", "GIT_PYTHON_REFRESH": "quiet"})
        say("a part of a real city" if real else "a city, made up")
        python("city.py", *(["--data", str(SHARED)] if real else []))
        say("features as they were known at the time of each label")
        python("dataset.py")
        on_ray(city, ["--metric", "auc>=0.7", *([] if real else BETTER)])  # a real calendar is of one day: see docs/how-to/loop.md
        say("what the model was made from")
        headrace("lineage", "stays@prod")
        served(city)
        os.chdir(ROOT)
    print(f"\nall of it in {time.perf_counter() - began_s:.0f} s")


if __name__ == "__main__":
    main()
