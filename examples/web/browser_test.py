#!/usr/bin/env python3
"""Tests the built page in a headless Chromium: it trains, and reads a digit that is drawn.

    cargo run --release --package bundle && python3 browser_test.py

It needs chromium and chromedriver, and nothing else. `--shots FOLDER` keeps pictures of the page.
"""

import argparse
import base64
import json
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

PAGE = pathlib.Path(__file__).parent / "target" / "index.html"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()
# the least share of the test digits that a training must reach, and the seconds that it may take
ACCURACY, SECONDS = 90.0, 120
# strokes in hundredths of the drawing area, as somebody may draw them
DRAWN = {
    0: [[(50, 12), (30, 25), (25, 50), (30, 75), (50, 88), (70, 75), (75, 50), (70, 25), (50, 12)]],
    1: [[(38, 28), (52, 12), (52, 88)]],
    4: [[(58, 10), (25, 58), (78, 58)], [(62, 35), (60, 90)]],
    2: [[(28, 28), (38, 14), (58, 13), (68, 26), (62, 42), (28, 86), (75, 86)]],
    3: [[(28, 18), (50, 11), (68, 22), (62, 40), (45, 48), (66, 56), (70, 75), (50, 88), (28, 82)]],
    5: [[(70, 12), (36, 12), (32, 46), (55, 42), (70, 58), (64, 80), (42, 88), (28, 80)]],
    6: [[(62, 12), (40, 30), (30, 58), (36, 82), (55, 88), (68, 74), (62, 56), (44, 54), (32, 64)]],
    7: [[(25, 14), (75, 14), (55, 50), (45, 88)], [(36, 50), (72, 50)]],
    8: [[(50, 48), (34, 34), (38, 16), (58, 13), (66, 28), (50, 48), (32, 66), (40, 86), (60, 86), (68, 68), (50, 48)]],
    9: [[(68, 30), (56, 14), (38, 18), (34, 36), (48, 48), (66, 40), (68, 30), (66, 60), (58, 88)]],
}


class Browser:
    """A Chromium, driven over the WebDriver protocol."""

    def __init__(self, driver, dark, width):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.profile = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen([driver, f"--port={port}", "--silent"], stdout=subprocess.DEVNULL)
        self.base = f"http://127.0.0.1:{port}"
        flags = [*FLAGS, f"--user-data-dir={self.profile.name}", f"--window-size={width},1500"]
        if dark:
            flags.append("--force-dark-mode")
        options = {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
        for attempt in range(50):
            try:
                session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": options}})
                break
            except urllib.error.URLError:
                if attempt == 49:
                    raise
                time.sleep(0.1)
        self.base += f"/session/{session['sessionId']}"
        # a window is never as narrow as a phone
        metrics = {"width": width, "height": 1500, "deviceScaleFactor": 1, "mobile": width < 500}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.call("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait()
            self.profile.cleanup()

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)["value"]

    def devtools(self, command, parameters):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def script(self, code):
        return self.call("POST", "/execute/sync", {"script": code, "args": []})

    def text(self, name):
        return self.script(f"return document.getElementById('{name}').textContent")

    def press(self, name):
        self.script(f"document.getElementById('{name}').click()")

    def wait(self, what, holds, seconds=20):
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"{what}: not within {seconds} s; the page says: {self.text('status')}"
            time.sleep(0.1)

    def draw(self, strokes):
        """Draws with a pointer, as a hand does: down, many small moves, up."""
        box = self.script(
            "const pad = document.getElementById('pad'); pad.scrollIntoView({block: 'center'});"
            "const box = pad.getBoundingClientRect(); return [box.left, box.top, box.width]"
        )
        place = lambda point: [round(box[axis] + box[2] * point[axis] / 100) for axis in (0, 1)]
        move = lambda point: dict(zip("xy", place(point)), type="pointerMove", duration=0, origin="viewport")
        actions = []
        for stroke in strokes:
            actions += [move(stroke[0]), {"type": "pointerDown", "button": 0}]
            for start, end in zip(stroke, stroke[1:]):
                between = [[a + (b - a) * i / 5 for a, b in zip(start, end)] for i in range(1, 6)]
                actions += [move(point) for point in between]
            actions.append({"type": "pointerUp", "button": 0})
        pointer = {"type": "pointer", "id": "pen", "parameters": {"pointerType": "pen"}, "actions": actions}
        self.call("POST", "/actions", {"actions": [pointer]})

    def shot(self, folder, name):
        if folder:
            shot = self.devtools("Page.captureScreenshot", {"captureBeyondViewport": True})["data"]
            (folder / f"{name}.png").write_bytes(base64.b64decode(shot))


def number(text):
    return float(text.split()[0].replace(",", ""))


def finish(browser):
    """Waits for the end of the training; returns the accuracy."""
    browser.wait("training ends", lambda: browser.text("status").startswith("Done"), SECONDS)
    accuracy = number(browser.text("accuracy"))
    assert accuracy >= ACCURACY, f"{accuracy} % of the test digits, at least {ACCURACY} were expected"
    return accuracy


def train(browser):
    browser.press("train")
    return finish(browser)


def check(browser, shots, name, seeds):
    browser.call("POST", "/url", {"url": PAGE.resolve().as_uri()})
    browser.wait("the page starts", lambda: browser.text("status").startswith("Ready"))
    width = browser.script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], f"the page is wider than its window: {width}"
    before = number(browser.text("accuracy"))
    assert before < 40, f"{before} % before training"

    browser.press("train")
    browser.wait("steps", lambda: number(browser.text("step")) > 20)
    browser.press("train")
    assert browser.text("status") == "Paused." and browser.text("train") == "Go on"
    paused = browser.text("step")
    time.sleep(0.3)
    assert browser.text("step") == paused, "it trains on in a pause"
    browser.press("train")
    accuracy, status = finish(browser), browser.text("status")
    assert browser.script("return document.getElementById('line').getAttribute('d')").count("L") >= 3

    read = {}
    for digit, strokes in DRAWN.items():
        browser.press("clear")
        browser.draw(strokes)
        read[digit] = int(browser.text("answer").removeprefix("The network reads a ").rstrip("."))
        if digit == 4:
            browser.shot(shots, name)
    browser.press("sample")
    assert "It is a" in browser.text("answer")
    browser.press("clear")
    assert browser.text("answer").startswith("Draw"), browser.text("answer")
    assert all(digit == seen for digit, seen in read.items()), f"drawn digits and what was read: {read}"

    accuracies = [accuracy]
    for _ in range(max(seeds, 2) - 1):
        browser.press("again")
        assert number(browser.text("step")) == 0 and number(browser.text("accuracy")) < 40
        if len(accuracies) < seeds:
            accuracies.append(train(browser))
    said = [entry["message"] for entry in browser.call("POST", "/se/log", {"type": "browser"})]
    assert not said, f"the browser complains: {said}"
    if seeds > 1:
        mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
        print(f"{seeds} seeds: {mean:.1f} ± {spread:.1f} %, {accuracies}")
    print(f"{name}: {before} % before, {accuracy} % after training; drawn and read {read}. {status}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=pathlib.Path, help="folder for pictures of the page")
    parser.add_argument("--seeds", type=int, default=1, help="trainings on the wide page, for a mean over seeds")
    arguments = parser.parse_args()
    shots = arguments.shots
    driver = shutil.which("chromedriver")
    if not driver:
        sys.exit("error: chromedriver is missing; on Debian install chromium and chromium-driver")
    if not PAGE.exists():
        sys.exit(f"error: {PAGE} is missing; run 'cargo run --release --package bundle' in its folder first")
    if shots:
        shots.mkdir(parents=True, exist_ok=True)
    for name, dark, width in [("light", False, 900), ("dark-phone", True, 360)]:
        with Browser(driver, dark, width) as browser:
            if dark:
                scheme = [{"name": "prefers-color-scheme", "value": "dark"}]
                browser.devtools("Emulation.setEmulatedMedia", {"features": scheme})
            check(browser, shots, name, 1 if dark else arguments.seeds)


if __name__ == "__main__":
    main()
