"""The page in Chromium, controlled through the DevTools protocol over a pipe."""

import contextlib
import fcntl
import io
import json
import os
import select
import shutil
import socket
import subprocess
import threading
import time

import pytest
import uvicorn
from PIL import Image

from ldm.serve import Limits
from ldm.serve.app import create_app
from ldm.serve.queue import Queue

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


class Browser:
    """Headless Chromium with one page: JSON messages, each ended by a zero byte, on its file descriptors 3 and 4."""

    def __init__(self, profile):
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        given = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (to_read, to_write)]
        os.close(to_read)
        os.close(to_write)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={profile}", "--window-size=1200,900", "--no-first-run", "--hide-scrollbars"]

        def as_three_and_four():
            os.dup2(given[0], 3)
            os.dup2(given[1], 4)

        assert CHROMIUM is not None
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"],
            preexec_fn=as_three_and_four,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in given:
            os.close(number)
        self._unread, self._number, self._session, self.events = b"", 0, None, []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """The browser's answer to a method; events that arrive before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _read(self, seconds=60):
        while b"\0" not in self._unread:
            assert select.select([self._from], [], [], seconds)[0], "Chromium does not answer"
            self._unread += os.read(self._from, 1 << 20) or pytest.fail("Chromium has ended")
        line, _, self._unread = self._unread.partition(b"\0")
        return json.loads(line)

    def evaluate(self, expression):
        """The value of JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression, seconds=60):
        """Wait until JavaScript returns a true value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression} is still {value!r}"
            time.sleep(0.05)
        return value

    def click(self, selector):
        """Click the mouse in the middle of an element."""
        x, y = self.evaluate(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "center", behavior: "instant"}});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector, text):
        """Replace the text of a field by typing."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._to)
        os.close(self._from)


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    made = Browser(tmp_path / "profile")
    yield made
    made.close()


# the button is enabled before the script runs, too
READY = "document.querySelector('#model')?.textContent.includes('tiny') && !document.querySelector('#generate').disabled"
PIXELS = """(async (number) => {
    const image = document.querySelectorAll(".card img")[number];
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return [image.naturalWidth, image.naturalHeight, Array.from(bytes).join(",")];
})"""


@contextlib.contextmanager
def served(worker):
    """The address of a server in this process."""
    queue, listening = Queue(4), socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(worker, queue, Limits()), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        queue.close()
        assert queue.join(20)


@pytest.mark.slow
def test_the_page_offers_the_classes_of_a_model_and_no_prompt_of_an_unconditional_one(browser, worker_of):
    visible = "[...document.querySelectorAll('label')].filter((label) => label.checkVisibility())"
    shown = f"{visible}.map((label) => label.firstChild.textContent)"
    for classes in (["ring", "<b>cat</b>"], []):
        with served(worker_of(*classes)) as address:
            browser.call("Page.navigate", url=address)
            browser.until(READY)
            labels = {*map(str.strip, browser.evaluate(shown))}
            assert ("Class" in labels, "Negative prompt" in labels, "Guidance" in labels) == (bool(classes),) * 3
            assert "Prompt" not in labels and "Steps" in labels
            options = "[...document.querySelectorAll('{} option')].map((option) => option.value)"
            assert browser.evaluate(options.format("#prompt")) == classes
            assert browser.evaluate(options.format("#negative")) == (["", *classes] if classes else [])
            if classes:
                browser.evaluate("document.querySelector('#prompt').value = '<b>cat</b>'")
            browser.type("#steps", "1")
            for count, button in enumerate(("#generate", ".again"), 1):
                browser.click(button)
                browser.until(f"document.querySelectorAll('.actions:not([hidden])').length == {count}")
            stored = browser.evaluate("fetch('/images').then((answer) => answer.json())")
            assert [image["settings"]["prompt"] for image in stored] == [classes[-1] if classes else ""] * 2
            assert stored[0]["settings"]["guidance"] == (3 if classes else 1)


@pytest.mark.slow
def test_the_page_generates_and_repeats_images_without_requests_to_other_hosts(browser, address, tmp_path):
    browser.call("Page.navigate", url=address)
    browser.until(READY)
    finished = "document.querySelectorAll('.actions:not([hidden])').length"
    before = browser.evaluate(finished)  # images of other tests

    def wait_for_images(count):
        browser.until(f"{finished} == {before + count}")
        browser.until("[...document.querySelectorAll('.card img')].every((image) => image.complete && image.naturalWidth)")

    browser.type("#prompt", "a red circle")
    browser.click("#random")  # off: keep the seed
    for field, value in {"#seed": "7", "#steps": "3"}.items():
        browser.type(field, value)
    chosen = "const size = document.querySelector('#size'); size.value = '32×16'; size.dispatchEvent(new Event('change'));"
    browser.evaluate(f"(() => {{ {chosen} }})()")
    browser.click("#generate")
    wait_for_images(1)
    assert browser.evaluate(f"{PIXELS}(0)")[:2] == [32, 16]
    shown = browser.evaluate("document.querySelector('.card').textContent")
    assert "a red circle" in shown and "32×16" in shown and "dog 0.5" in shown
    assert "sks dog" in browser.evaluate("document.querySelector('#adapters').textContent")

    # other settings, then those of the image again
    browser.type("#prompt", "something else")
    browser.type("#seed", "8")
    browser.type("#adapters input", "0")
    browser.click(".again")
    wait_for_images(2)
    first, second = browser.evaluate(f"{PIXELS}(0)"), browser.evaluate(f"{PIXELS}(1)")
    assert first == second and len(first[2]) > 100
    restored = "['#prompt', '#seed', '#adapters input'].map((field) => document.querySelector(field).value)"
    assert browser.evaluate(restored) == ["a red circle", "7", "0.5"]
    browser.type("#adapters input", "0")
    browser.type("#seed", "9")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    wait_for_images(3)
    assert browser.evaluate(f"{PIXELS}(0)")[2] != first[2]

    # a job comes back after a reload, with its preview, and can be cancelled; then finished images alone come back
    working = "document.querySelector('.card:has(.waiting:not([hidden])) img')?.src?.startsWith('data:image/jpeg')"
    browser.type("#prompt", "right\u202eleft")
    for field, value in {"#steps": "2000", "#width": "256", "#height": "256"}.items():
        browser.type(field, value)
    browser.click("#generate")
    browser.until(working)
    browser.call("Page.reload")
    wait_for_images(3)
    browser.until(working)
    assert browser.evaluate("document.querySelector('.card .prompt').textContent") == r"right\u202eleft"
    browser.click(".cancel")
    browser.until("document.querySelector('.card.failed .state')?.textContent == 'Cancelled.'")
    browser.until("fetch('/jobs').then((answer) => answer.json()).then((jobs) => jobs.every((job) => job.state != 'working'))")
    browser.call("Page.reload")
    wait_for_images(3)
    assert browser.evaluate("document.querySelectorAll('.card').length") == before + 3

    # start from an image
    Image.linear_gradient("L").save(tmp_path / "start.png")
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    file = browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=file, files=[str(tmp_path / "start.png")])
    browser.until("!document.querySelector('#start').hidden")
    browser.type("#prompt", "a blue ring")
    browser.type("#steps", "4")
    browser.click("#generate")
    wait_for_images(4)
    browser.click(".again")
    wait_for_images(5)
    assert browser.evaluate(f"{PIXELS}(0)") == browser.evaluate(f"{PIXELS}(1)")
    assert "strength" in browser.evaluate("document.querySelector('.card').textContent")

    # of a transparent one the hole alone is generated
    start = Image.new("RGBA", (64, 64), "red")
    start.paste((0, 0, 0, 0), (0, 0, 32, 64))
    start.save(tmp_path / "hole.png")
    browser.call("DOM.setFileInputFiles", nodeId=file, files=[str(tmp_path / "hole.png")])
    browser.until("!document.querySelector('#transparent').hidden && document.querySelector('#strength').value == '1'")
    browser.click("#generate")
    wait_for_images(6)
    browser.click(".again")
    wait_for_images(7)
    first, second = browser.evaluate(f"{PIXELS}(0)"), browser.evaluate(f"{PIXELS}(1)")
    assert first == second
    kept = Image.open(io.BytesIO(bytes(map(int, first[2].split(",")))))
    assert kept.size == (16, 16) and {kept.getpixel((x, y)) for x in range(12, 16) for y in range(16)} == {(255, 0, 0)}
    assert kept.getpixel((2, 8)) != (255, 0, 0)

    # nothing overflows on a phone
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360

    # every field has a label for screen readers
    assert browser.evaluate("[...document.querySelectorAll('input, select, textarea')].every((field) => field.labels.length)")
    asked = {event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"}
    outside = {url for url in asked if not url.startswith((f"{address}/", "data:", "blob:", "about:"))}
    assert len(asked) > 10 and not outside
    logged = [event["params"] for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert not logged
