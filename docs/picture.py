"""Make docs/images/demo.svg, and report.png where there is a Chromium, from a real run of the demo.

python docs/picture.py [--documents 4000]
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURE, PAGE = ROOT / "docs/images/demo.svg", ROOT / "docs/images/report.png"
WIDTH = 112


def main(arguments: list[str]) -> None:
    """Run the demo as `make demo` does, in a folder of its own, and draw what it prints."""
    env = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "examples" / "demo.py"), *arguments]
        printed = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout  # noqa: S603 - a command of our own
        if chromium := shutil.which("chromium"):
            page = (Path(folder) / "demo-output/vectors/_headrace/report.html").as_uri()
            look = ["--headless=new", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={folder}/profile", "--window-size=1000,1150"]
            subprocess.run([chromium, *look, f"--screenshot={PAGE}", page], check=True, capture_output=True)  # noqa: S603
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text("$ make demo", style="bold"))
    console.print(Text.from_ansi(printed), no_wrap=True, crop=True)
    PICTURE.parent.mkdir(exist_ok=True)
    drawn = console.export_svg(title="headrace", unique_id="demo")
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))  # a picture loads nothing from elsewhere
    print(printed, PICTURE)


if __name__ == "__main__":
    main(sys.argv[1:])
