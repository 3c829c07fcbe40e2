"""report.html in a real browser: chromium without a window, asked through its DevTools pipe."""

import base64
import io
import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from gnvc_jax.evaluation.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe "
    "--proxy-server=127.0.0.1:9"  # nobody listens there: no network
).split()

LAUNCH = """
import os, sys
for theirs, ours in ((98, int(sys.argv[1])), (99, int(sys.argv[2])), (3, 98), (4, 99)):
    os.dup2(ours, theirs)
os.execv(sys.argv[3], sys.argv[3:])
"""

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium found (Debian: chromium)")


class Browser:
    """One page. Messages are JSON with a zero byte behind each, on descriptors 3 and 4."""

    def __init__(self, profile):
        options = [*OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(read), str(write), CHROMIUM, *options],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self.input = os.fdopen(self.read, "rb")
        self.numbers, self.events, self.session = itertools.count(1), [], None
        targets = self.call("Target.getTargets")["targetInfos"]
        (page,) = (t["targetId"] for t in targets if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        message = {"id": next(self.numbers), "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == message["id"]:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _receive(self):
        data = bytearray()
        while (byte := self.input.read(1)) != b"\0":
            assert byte, "chromium went away"
            data += byte
        return json.loads(data)

    def open(self, path):
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._receive())

    def run(self, expression):
        """The value of an expression, awaited."""
        options = {"returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key, code):
        for kind in ("rawKeyDown", "keyUp"):
            facts = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type=kind, **facts)

    def screenshot(self):
        data = self.call("Page.captureScreenshot")["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=20)
        self.input.close()
        os.close(self.write)


@pytest.fixture(scope="module")
def report(run):
    return write_report(*run)


@pytest.fixture(scope="module")
def browser(report, tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=1200, height=900, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    browser.open(report)
    yield browser
    browser.close()


def stage(browser, expression):
    """The value of an expression in which v is the first slider with its pictures."""
    return browser.run(f"(v => {expression})(document.querySelector('.viewer'))")


def test_opens_without_errors_and_without_network(browser, report):
    methods = [event.get("method") for event in browser.events]
    assert "Runtime.exceptionThrown" not in methods
    assert "Runtime.consoleAPICalled" not in methods
    assert "Log.entryAdded" not in methods  # also refusals of the page's own policy
    sent = [e["params"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    first, *others = [parameters["request"]["url"] for parameters in sent]
    assert first == report.as_uri()
    assert all(url.startswith("data:image/webp") for url in others)
    assert browser.run("typeof alert === 'function' && !document.querySelector('img[onerror]')")


def test_every_picture_loads(browser):
    widths = browser.run(
        "Promise.all([...document.images].map(async i => (await i.decode(), i.naturalWidth)))"
    )
    assert len(widths) > 50
    assert set(widths) == {128, 64}


def test_slider_moves_by_keys_and_by_pointer(browser):
    split = "getComputedStyle(v.querySelector('.stage')).getPropertyValue('--split')"
    assert stage(browser, split) == "50%"
    stage(browser, "v.querySelector('input').focus()")
    browser.press("ArrowRight", 39)
    assert stage(browser, split) == "50.5%"
    browser.press("Home", 36)
    assert stage(browser, split) == "0%"
    stage(browser, "v.scrollIntoView()")
    box = stage(browser, "v.querySelector('.stage').getBoundingClientRect().toJSON()")
    x, y = box["x"] + box["width"] / 4, box["y"] + box["height"] / 2
    for kind in ("mousePressed", "mouseReleased"):
        facts = {"x": x, "y": y, "button": "left", "clickCount": 1}
        browser.call("Input.dispatchMouseEvent", type=kind, **facts)
    assert stage(browser, split) == "25%"


def test_both_sides_show_what_was_chosen(browser):
    """The pixels: 2 bits a sample to the left of the border, the source to the right."""
    browser.run(
        """(() => {
            const [left, right] = document.querySelectorAll('.viewer select');
            left.value = 'gnvc2'; right.value = 'source';
            for (const s of [left, right]) s.dispatchEvent(new Event('change'));
            const range = document.querySelector('.viewer input');
            range.value = 50; range.dispatchEvent(new Event('input'));
            document.querySelector('.viewer').scrollIntoView();
        })()"""
    )
    assert stage(browser, "[...v.querySelectorAll('img.left, img.right')].length") == 2
    assert "gnvc2" in stage(browser, "v.querySelector('output').value")
    box = stage(browser, "v.querySelector('.stage').getBoundingClientRect().toJSON()")
    top, left, height, width = (int(box[k]) for k in ("y", "x", "height", "width"))
    shot = browser.screenshot()[top + 5 : top + height // 2, left : left + width, 1].astype(int)
    near = np.abs((shot + 32) % 64 - 32) < 6  # 2 bits leave multiples of 64 and little else
    assert near[:, : width // 2 - 8].mean() > 0.8
    assert np.mean(shot[:, : width // 2 - 8] > 40) > 0.8  # a picture, not the dark ground
    assert near[:, width // 2 + 8 :].mean() < 0.4


def test_dark_mode_and_narrow_windows(browser):
    colours = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.call("Emulation.setEmulatedMedia", features=[feature])
        colours.append(browser.screenshot()[5, 5].mean())
    assert colours[0] > 230 and colours[1] < 50
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=360, height=700, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    assert browser.run("document.documentElement.scrollWidth") <= 360
