"""What a run leaves beside its output, however it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import headrace as hr
from headrace.cost import Prices
from headrace.errors import DeadLetterError, HeadraceError, StoppedError
from headrace.events import BlockDone, Committed, RunFinished, RunStarted
from headrace.formats import Output
from headrace.hardware import Cluster, Node
from headrace.plan import resolve
from headrace.record import Record
from headrace.sinks import open_sink
from headrace.state import State


@hr.stage(out={"text": str})
def clean(text: hr.Column[str]):
    """A stage that is never called."""
    return {"text": text}


PLAN = resolve(hr.Pipeline("reviews", clean), Cluster((Node("here", cpus=4),)))
RUN = "000001-5f2c"


def recorded(folder: Path, error: HeadraceError | None = None) -> Path:
    """What `_headrace` holds after a run of 10 rows that ended so."""
    output = str(folder / "out")
    here = State(request={"pipeline": "reviews", "input": ["in"]}, facts={"stages": "clean"}, units="_headrace/units-1.parquet")

    def run() -> None:
        with Record(open_sink(Output(output)), RUN, lambda events: None, prices=Prices()) as record:
            record.begin(RunStarted("reviews", ("in",), output, RUN, 100.0, 10, 0, (("ray", "2.60.0"),), at_s=101.0), PLAN, [], here)
            record.add([BlockDone("clean", 8, 1.0, 0, 0, at_s=103.0), Committed(8, 0, at_s=104.0)])
            if error:
                raise error
            record.add([RunFinished(8, 8, 0, 4.0)])

    Path(output, "_headrace").mkdir(parents=True)
    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    return folder / "out" / "_headrace"


@pytest.mark.parametrize(
    ("error", "state"), [(None, "succeeded"), (StoppedError("told to stop"), "stopped"), (DeadLetterError("too many\nand more"), "failed")]
)
def test_every_end_leaves_a_report_and_a_page(tmp_path: Path, error: HeadraceError | None, state: str) -> None:
    """The report says how it ended and what the run was; the page says the same."""
    home = recorded(tmp_path, error)
    assert sorted(path.name for path in home.iterdir()) == [f"events-{RUN}.jsonl", "plan.txt", "report.html", "report.json"]
    report = json.loads((home / "report.json").read_text())
    assert (report["state"], report["pipeline"], report["run"], report["rows_out"]) == (state, "reviews", RUN, 8)
    assert (report["request"]["input"], report["facts"], report["versions"]) == (["in"], {"stages": "clean"}, {"ray": "2.60.0"})
    page = (home / "report.html").read_text()
    assert f'<body class="{state}">' in page and "pipeline reviews" in page and "2.60.0" in page
    assert "DeadLetterError: too many<" in page or state != "failed"
