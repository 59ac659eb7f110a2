"""What a replica tells of the features that it looks up, and what of it stands in a door's metrics."""

from __future__ import annotations

import threading

import pytest

from headrace.errors import OnlineStoreError
from headrace.serving.replica.lookups import Lookups
from headrace.serving.watch import lookups
from headrace.serving.watch.metrics import DoorMetrics


class Stage:
    """Looks up features of view `stays`, and its store has been asked for `asked` when it was asked twice."""

    def __init__(self, keys: int, missing: int, *answers: float | OnlineStoreError | None) -> None:
        self.counts, self._answers, self.asked = (keys, missing), list(answers), threading.Event()

    def __call__(self) -> None: ...

    def lookups(self) -> tuple[str, int, int]:
        return "stays", *self.counts

    def newest_s(self) -> float | None:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if len(self._answers) == 1:
            self.asked.set()
        if isinstance(answer, OnlineStoreError):
            raise answer
        return answer


def test_a_replica_adds_up_what_its_stages_looked_up() -> None:
    one, two = Stage(10, 3, 5.0), Stage(4, 0, 5.0)
    told = Lookups([print, one, two])
    assert told.told() == {"stays": (11, 3, 5.0)}
    told.forget()
    one.counts = 12, 4
    assert told.told() == {"stays": (1, 1, 5.0)}
    told.close()
    assert Lookups([print]).told() is None


def test_a_store_that_is_away_stays_as_new_as_it_was() -> None:
    stage = Stage(1, 0, 5.0, OnlineStoreError("away"), OnlineStoreError("away"), 7.0)
    told = Lookups([stage])
    for expected in (5.0, 5.0, 7.0):
        told.ask()
        assert told.told() == {"stays": (1, 0, expected)}
    told.close()
    assert Lookups([Stage(1, 0, OnlineStoreError("away"))]).told() == {"stays": (1, 0, None)}


def test_the_store_is_asked_again_and_again_by_a_thread() -> None:
    stage = Stage(1, 0, 5.0, OnlineStoreError("away"), 8.0)
    told = Lookups([stage], each_s=0.001)
    assert stage.asked.wait(30)
    told.close()


def test_series_are_of_no_door_and_age_goes_on() -> None:
    shown = lookups.Lookups("score", clock=lambda: 100.0)
    shown.told = {(1, "a"): {"stays": (3, 1, 40.0), "hosts": (0, 0, None)}, (1, "b"): {"stays": (2, 0, 60.0)}, (2, "c"): {"stays": (0, 2, 60.0)}}
    lines = [line for _, family in shown.lines() for line in family]
    assert 'headrace_lookup_keys_total{service="score",version="1",replica="a",view="stays",found="true"} 3' in lines
    assert 'headrace_lookup_keys_total{service="score",version="2",replica="c",view="stays",found="false"} 2' in lines
    assert [line for line in lines if "age" in line] == [
        f'headrace_feature_age_seconds{{service="score",version="{version}",view="stays"}} 40.0' for version in (1, 2)
    ]


@pytest.mark.parametrize("name", lookups.HELP)
def test_doors_that_hear_the_same_show_it_once(name: str) -> None:
    doors = [DoorMetrics("score", door, process=False) for door in "01"]
    for door in doors:
        door.lookups({(1, "a"): {"stays": (3, 1, 40.0)}})
    lines = doors[0].text([doors[1].text()]).decode().splitlines()
    assert len([line for line in lines if line.startswith(f"{name}{{")]) == (2 if name.endswith("total") else 1)
