"""A headless Chromium that opens pages one after the other, over the pipe of its DevTools protocol."""

import itertools
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
#: Seconds without a word after which it is taken to hang.
PATIENCE = 120
#: Nothing but the pages, and nothing from outside.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
ENABLED = ("Log.enable", "Runtime.enable", "Page.enable", "Network.enable")


def find_chromium() -> str | None:
    """Return the path of an installed Chromium, or ``None``."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A browser that is running, with one page in it."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = os.fdopen(reading, "rb"), os.fdopen(writing, "wb")
        self._numbers, self._unread, self._session = itertools.count(1), b"", None
        self._events: list[dict[str, Any]] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for method in ENABLED:
            self._ask(method)

    def errors_of(self, address: str) -> list[str]:
        """Open a page, and return what its console shows as errors until it has loaded and fetched all of it."""
        self._events.clear()
        self._ask("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._read())
        self._ask("Runtime.evaluate", expression="new Promise(done => setTimeout(done, 20))", awaitPromise=True)
        return [text for event in self._events for text in _errors(event)]

    def close(self) -> None:
        self._session = None
        self._ask("Browser.close")

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._writing.write(json.dumps(message).encode() + b"\0")
        self._writing.flush()
        while (answer := self._read()).get("id") != number:
            self._events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._reading], [], [], PATIENCE)[0], f"Chromium said nothing for {PATIENCE} seconds."
            part = os.read(self._reading.fileno(), 1 << 16)
            assert part, "Chromium ended."
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)


def _errors(event: dict[str, Any]) -> Iterator[str]:
    given = event.get("params", {})
    match event["method"]:
        case "Log.entryAdded" if given["entry"]["level"] == "error":
            yield given["entry"]["text"]
        case "Runtime.exceptionThrown":
            details = given["exceptionDetails"]
            yield details.get("exception", {}).get("description") or details["text"]
        case "Runtime.consoleAPICalled" if given["type"] in ("error", "assert"):
            yield " ".join(str(part.get("value", part.get("description"))) for part in given["args"])
        case "Network.loadingFailed" if not given.get("canceled"):
            yield given["errorText"]


@contextmanager
def running_browser(program: str, profile: Path) -> Iterator[Browser]:
    """Start Chromium with a profile of its own, and end it."""
    (its_reading, writing), (reading, its_writing) = os.pipe(), os.pipe()
    # It reads from descriptor 3 and writes to descriptor 4.
    command = f'exec "$0" "$@" 3<&{its_reading} 4>&{its_writing}'
    arguments = ["bash", "-c", command, program, *FLAGS, f"--user-data-dir={profile}"]
    with subprocess.Popen(
        arguments, pass_fds=(its_reading, its_writing), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(its_reading)
        os.close(its_writing)
        try:
            browser = Browser(reading, writing)
            yield browser
            browser.close()
        finally:
            process.terminate()
