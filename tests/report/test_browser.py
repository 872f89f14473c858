"""The page in a browser: it renders, asks the network for nothing, and has nothing to complain of."""

import json
import re
import shutil
import subprocess

import pytest
from cluster.hosts import without
from PIL import Image
from report.folders import RATIOS, run_folder

from knltrain.report import report
from knltrain.runlog.console import Console

# The first run's colour in every figure.
BLUE = (37, 99, 235)
TROUBLE = """<!doctype html><title>x</title><img src="http://knltrain.invalid/a.png">
<script>console.error("something is wrong")</script>"""


@pytest.fixture(scope="module")
def chromium():
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    without("no Chromium here; .ci/run installs Debian's")
    return None


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    one = run_folder(folder / "<i>one</i>".replace("/", "|"), ratios=RATIOS, noise_scale=300.0)
    two = run_folder(folder / "two & </title>".replace("/", "|"), optimizer="sgd", batch=512, noise_scale=700.0)
    report([one, two], folder / "out", Console(silent=True))
    return folder / "out" / "report.html"


def browse(chromium, url, folder, *arguments):
    """Opens a page without a network; returns its elements, what the console said, and what the page asked for."""
    folder.mkdir()
    log = folder / "network.json"
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
        f"--log-net-log={log}", "--virtual-time-budget=2000", *arguments, url,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    said = re.findall(r"CONSOLE:?\S*\] (.*)", result.stderr)
    network = json.loads(log.read_text())
    kinds = {number: kind for kind, number in network["constants"]["logEventTypes"].items()}
    # What the browser asks for itself has no page for its origin.
    asked = [
        params["url"]
        for event in network["events"]
        if kinds[event["type"]] == "URL_REQUEST_START_JOB" and "url" in (params := event.get("params", {}))
        if params["initiator"] != "not an origin"
    ]
    return result.stdout, said, asked


def test_trouble_would_be_seen(chromium, tmp_path):
    (tmp_path / "page.html").write_text(TROUBLE)
    _, said, asked = browse(chromium, (tmp_path / "page.html").as_uri(), tmp_path / "browser", "--dump-dom")
    assert any("something is wrong" in line for line in said)
    assert asked == ["http://knltrain.invalid/a.png"]


def test_it_renders_and_asks_for_nothing(chromium, page, tmp_path):
    elements, said, asked = browse(chromium, page.as_uri(), tmp_path / "browser", "--dump-dom")
    assert (said, asked) == ([], [])
    assert elements.count("<svg") == 8
    assert elements.count("<figure") == 8
    assert elements.rstrip().endswith("</html>")
    assert "<script" not in elements
    assert "&lt;i&gt;one&lt;|i&gt;" in elements


def pixels(chromium, url, folder, size):
    picture = folder.with_suffix(".png")
    _, said, asked = browse(chromium, url, folder, f"--window-size={size}", f"--screenshot={picture}")
    assert (said, asked) == ([], [])
    with Image.open(picture) as image:
        return image.convert("RGB").getcolors(1 << 24)


@pytest.mark.parametrize("size", ["1280,2600", "390,4200"])
def test_its_figures_can_be_seen_and_a_run_can_be_hidden(chromium, page, tmp_path, size):
    whole = pixels(chromium, page.as_uri(), tmp_path / "whole", size)
    assert len(whole) > 200, "letters and lines have many shades, an empty page has one"
    blue = {colour: count for count, colour in whole}[BLUE]
    text = page.read_text("utf-8")
    hidden = tmp_path / "hidden.html"
    hidden.write_text(text.replace('id="show-0" checked', 'id="show-0"'), "utf-8")
    without_one = {colour: count for count, colour in pixels(chromium, hidden.as_uri(), tmp_path / "less", size)}
    # The bars of time split have the same blue, and stay.
    assert 0 < without_one.get(BLUE, 0) < blue - 100
