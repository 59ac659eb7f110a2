"""The page of a run in a real browser: nothing is asked for, nothing goes wrong, nothing sticks out, and all can be read.

Pages stand side by side in frames of a width each, of a page that measures them. The browser's own words and a server's list of requests
tell the rest.
"""

from __future__ import annotations

import contextlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest
import reports

from headrace.console.page import page

WIDTHS = (390, 1280)  # pixels: a phone, a laptop
CONTRAST = 4.5  # of text to what is behind it: level AA of the Web Content Accessibility Guidelines 2.2
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DARK = "--blink-settings=preferredColorScheme=0"
PAGES = {f"{name}.html": page(made(), plan=reports.PLAN) for name, made in reports.ALL.items()}

MEASURE = """
function light(colour) {  // relative luminance, as the guidelines have it
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (!/, 0\\)$/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
}
function measure(frame) {
  const page = frame.contentDocument, faint = [];
  for (const element of page.body.querySelectorAll("*")) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    if (element.closest("svg")) continue;
    const [low, high] = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < CONTRAST) faint.push(`${element.outerHTML.slice(0, 80)}: ${contrast.toFixed(1)}`);
  }
  return {
    page: frame.dataset.page, width: frame.clientWidth, shown: page.body.innerText.length, faint,
    wide: page.documentElement.scrollWidth - frame.clientWidth,
    ground: getComputedStyle(page.body).backgroundColor,
    asked: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
  };
}
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(measure);
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


class Look(NamedTuple):
    """What a browser made of some pages: the measures of each frame, the paths asked for, and what was said on the console."""

    frames: list[dict[str, Any]]
    requests: list[str]
    console: list[str]


@pytest.fixture(scope="module")
def browser() -> str:
    """The command of a browser; `make test` installs one where it may."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is here, and tools/apt.sh could not install the first: it needs Debian, and root or sudo")
    return found


@pytest.fixture
def look(browser: str, tmp_path: Path) -> Callable[..., Look]:
    """Shows pages in the browser, each in all widths."""

    def show(pages: Mapping[str, str], *options: str) -> Look:
        frames = "".join(
            f'<iframe data-page="{name}" src="/{name}" width="{width}" height="800" style="border:0"></iframe>' for name in pages for width in WIDTHS
        )
        script = MEASURE.replace("CONTRAST", str(CONTRAST))
        every = {**pages, "frames": f'<!DOCTYPE html><link rel="icon" href="data:,"><title>x</title>{frames}<pre id="found"></pre><script>{script}</script>'}
        requests: list[str] = []

        class Site(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                requests.append(self.path)
                body = every.get(self.path[1:])
                self.send_response(200 if body is not None else 404)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write((body or "").encode())

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
        Thread(target=server.serve_forever, daemon=True).start()
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
        command += ["--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={tmp_path}/profile"]
        command += ["--enable-logging=stderr", "--v=0", "--window-size=1400,900", *options, "--dump-dom", f"http://127.0.0.1:{server.server_port}/frames"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        finally:
            server.shutdown()
            server.server_close()
        found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
        assert found, f"the browser measured nothing: {done.stdout[-500:]} {done.stderr[-2000:]}"
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return Look(json.loads(html.unescape(found[1])), sorted(requests), console)

    return show


@pytest.mark.parametrize("options", [(), (DARK,)], ids=["light", "dark"])
def test_every_page_in_every_width(look: Callable[..., Look], options: tuple[str, ...]) -> None:
    """No errors, no request but for the pages themselves, nothing wider than the window, and text that stands out from its ground."""
    seen = look(PAGES, *options)
    assert seen.console == []
    assert set(seen.requests) == {"/frames", *(f"/{name}" for name in PAGES)}
    assert len(seen.frames) == len(PAGES) * len(WIDTHS)
    for frame in seen.frames:
        where = f"{frame['page']} in {frame['width']} pixels"
        assert frame["width"] in WIDTHS and frame["shown"] > 200, where
        assert frame["wide"] <= 0, f"{where} sticks out by {frame['wide']}"
        assert frame["asked"] == [] and frame["faint"] == [], where
        ground = sum(map(int, re.findall(r"\d+", frame["ground"])[:3]))
        assert (ground < 200) == bool(options), f"{where} is on {frame['ground']}"


def test_what_these_tests_would_see(look: Callable[..., Look]) -> None:
    """A page with all the faults that the other one must not have."""
    bad = '<!DOCTYPE html><body><img src="a.png"><div style="width:2000px;color:#ccc">faint</div><script>console.error("wrong")</script>'
    seen = look({"bad.html": bad})
    assert "/a.png" in seen.requests
    assert any("wrong" in line for line in seen.console)
    assert all(frame["wide"] > 0 and frame["faint"] and frame["asked"] for frame in seen.frames)


def test_a_page_that_was_tampered_with(look: Callable[..., Look]) -> None:
    """The page's own policy refuses scripts and requests, should one ever find its way into it."""
    text = PAGES["usual.html"].replace("</main>", '<img src="/pixel.png"><script>fetch("/beacon")</script><script src="/x.js"></script></main>')
    seen = look({"usual.html": text})
    assert set(seen.requests) == {"/frames", "/usual.html"}
    assert seen.console, "the browser says what it refused"
