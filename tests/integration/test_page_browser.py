"""The page of a run in a real browser: nothing is asked of any network, nothing runs over, in light and dark, wide and narrow."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: tools/apt.sh chromium installs it")
# Stands in for what the page's own policy forbids: the frame that looks at the page may run scripts, the page may not.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><style>body {{ margin: 0 }} iframe {{ border: 0; width: {width}px; height: 9000px }}</style>
<iframe src="{page}"></iframe><pre id="told"></pre><script>
document.querySelector("iframe").onload = event => {{
  const seen = event.target.contentDocument, root = seen.documentElement;
  const room = root.clientWidth, every = [...seen.querySelectorAll("body *")];
  const over = every.filter(one => !one.closest(".scroll, pre, svg") && one.getBoundingClientRect().right > room + 1);
  if (root.scrollWidth > room) over.push(root);
  document.getElementById("told").textContent = JSON.stringify({{
    over: over.map(one => one.tagName + "." + one.className), ground: getComputedStyle(seen.body).backgroundColor,
    requests: event.target.contentWindow.performance.getEntriesByType("resource").map(one => one.name), words: seen.body.innerText.length,
  }});
}};
</script>"""


def browse(tmp_path: Path, url: str, *options: str) -> str:
    """The document after all that it does is done."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={tmp_path}/profile"]
    log = ["--enable-logging=stderr", "--allow-file-access-from-files", "--virtual-time-budget=3000"]
    done = subprocess.run([str(CHROMIUM), *flags, *log, *options, "--dump-dom", url], capture_output=True, text=True, timeout=100, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["succeeded", "failed"])
def test_the_page_in_a_browser(tmp_path: Path, name: str, width: int, scheme: str) -> None:
    shutil.copy(GOLDEN / f"page-{name}.html", tmp_path / "page.html")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page="page.html"))
    preferred = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    dom = browse(tmp_path, (tmp_path / "frame.html").as_uri(), preferred, "--window-size=1400,900")
    found = re.search(r'<pre id="told">(.*)</pre>', dom)
    assert found, dom[-2000:]
    told = found[1]
    assert '"over":[]' in told and '"requests":[]' in told, told
    assert ('"ground":"rgb(255, 255, 255)"' in told) == (scheme == "light"), told
    assert int(re.search(r'"words":(\d+)', told)[1]) > 800, told
