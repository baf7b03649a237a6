"""Look at the built book in headless Chromium: python tools/browser.py [--shots FOLDER]

Every page is opened at 1280 and at 390 pixels, from its file. What is folded must open on a click,
nothing may reach beyond the window (nor at the widths in between) but inside a box that scrolls,
formulas must be TeX, sliders must move something, and the console must stay without errors and the
network without requests. It speaks the DevTools protocol itself.
"""

import argparse
import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # it reads our own files, and in a container there is often none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-default-browser-check",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-port=0",
)
WIDTHS = (1280, 390)
OTHERS = (768, 1024, 1366, 1440, 1920)  # where only the overflow is looked for
LOCAL = re.compile(r"(file|data|blob|about):")
# Elements of the text that stick out of the window without lying in a box of the text that scrolls.
OVERFLOWS = """(() => {
  const width = document.documentElement.clientWidth;
  const inside = (e) => e.getBoundingClientRect().right < width + 1;
  const scrolls = (e) => e.tagName !== "ARTICLE" && (
    (["auto", "scroll"].includes(getComputedStyle(e).overflowX) && inside(e))
    || scrolls(e.parentElement));
  const wide = [...document.querySelectorAll("article *")].filter((e) => {
    const box = e.getBoundingClientRect();
    return box.width > 1 && box.height > 1 && (!inside(e) || box.left < -1)
      && !e.closest("mjx-assistive-mml, svg *") && !scrolls(e.parentElement);
  });
  const outer = wide.filter((e) => !wide.includes(e.parentElement));
  const name = (e) => `${e.tagName.toLowerCase()} "${e.textContent.trim().slice(0, 60)}" `
    + `in "${e.parentElement.textContent.trim().slice(0, 60)}" `
    + `to ${Math.round(e.getBoundingClientRect().right)} px`;
  const page = Math.max(...["html", "body", ".content"].map(
    (name) => document.querySelector(name)?.scrollWidth || 0));
  return [...outer.slice(0, 6).map(name), ...(page > width ? [`the page, to ${page} px`] : [])];
})()"""
READY = """(async () => {
  if (window.MathJax) await MathJax.startup.promise;
  await document.fonts.ready;
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
})()"""


def program() -> str | None:
    """Where Chromium or Chrome is, if anywhere: RHOVAE_CHROMIUM, or else a name on the path."""
    names = [os.environ["RHOVAE_CHROMIUM"]] if "RHOVAE_CHROMIUM" in os.environ else NAMES
    return next(filter(None, map(shutil.which, names)), None)


def missing() -> str | None:
    """One sentence that says what is missing to look at pages, or None."""
    if not program():
        return f"No Chromium is on the path (looked for {', '.join(NAMES)})."
    try:
        import websocket  # noqa: F401
    except ImportError:
        return "The package websocket-client is missing: pip install -e '.[book]'"
    return None


class Browser:
    """One tab of a fresh headless Chromium, and what it complained of and asked for."""

    def __init__(self):
        self.errors, self.requests = [], []
        self._count, self._events = itertools.count(1), []

    def __enter__(self):
        import websocket

        self._stack = contextlib.ExitStack()
        try:
            # Chromium may still write into its profile while it ends.
            folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            profile = Path(self._stack.enter_context(folder))
            self._process = subprocess.Popen(
                [program(), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self._stack.callback(self._end)
            address = f"http://127.0.0.1:{self._port(profile / 'DevToolsActivePort')}/json/list"
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with direct.open(address, timeout=30) as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            self._socket = websocket.create_connection(
                pages[0]["webSocketDebuggerUrl"], timeout=60, suppress_origin=True
            )
            self._stack.callback(self._socket.close)
        except BaseException:
            self._stack.close()
            raise
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _end(self):
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _port(self, path: Path) -> str:
        for _ in range(600):
            if path.is_file() and (lines := path.read_text().splitlines()):
                return lines[0]
            if self._process.poll() is not None:
                raise RuntimeError(f"{program()} ended with {self._process.returncode} at once.")
            time.sleep(0.1)
        raise RuntimeError(f"{program()} did not open a DevTools port within a minute.")

    def _receive(self) -> dict:
        message = json.loads(self._socket.recv())
        method, data = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = data["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and data["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("type"))) for a in data["args"]))
        elif method == "Log.entryAdded" and data["entry"]["level"] == "error":
            self.errors.append(f"{data['entry']['text']} ({data['entry'].get('url', '')})")
        elif method == "Network.requestWillBeSent":
            self.requests.append(data["request"]["url"])
        return message

    def send(self, method: str, **params) -> dict:
        """Call a method of the DevTools protocol and wait for its result."""
        number = next(self._count)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (message := self._receive()).get("id") != number:
            self._events.append(message.get("method"))
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def evaluate(self, expression: str):
        """The value of a JavaScript expression; a promise is awaited."""
        result = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def resize(self, width: int, height: int = 900) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def open(self, url: str) -> None:
        """Load a page and wait until its formulas and fonts stand."""
        self._events.clear()
        self.send("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._events:
            self._events.append(self._receive().get("method"))
        self.evaluate(READY)

    def click(self, element: str) -> None:
        """Press the left button of the mouse on what a JavaScript expression gives."""
        x, y = self.evaluate(
            f"(() => {{ const e = {element};"
            " e.scrollIntoView({block: 'center', behavior: 'instant'});"
            " const b = e.getBoundingClientRect(); return [b.left + Math.min(b.width / 2, 60),"
            " b.top + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press and release a key: ArrowRight, Home, Tab."""
        code = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    def picture(self, path: Path, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(data["data"]))


def faults(browser: Browser, page: Path, width: int) -> list[str]:
    """What is wrong with one page at one width."""
    browser.errors.clear()
    browser.requests.clear()
    browser.resize(width)
    browser.open(page.as_uri())
    found = []
    for index in range(browser.evaluate("document.querySelectorAll('article details').length")):
        details = f"document.querySelectorAll('article details')[{index}]"
        if not browser.evaluate(f"{details}.open"):
            browser.click(f"{details}.querySelector('summary')")
        height = f"{details}.getBoundingClientRect().height"
        summary = f"{details}.querySelector('summary').getBoundingClientRect().height"
        if not browser.evaluate(f"{details}.open && {height} > {summary} + 4"):
            text = browser.evaluate(f"{details}.textContent.trim().slice(0, 60)")
            found.append(f"what is folded does not open on a click: {text!r}")
    found += still(browser)
    for other in (width, *(OTHERS if width == WIDTHS[0] else ())):
        browser.resize(other)
        browser.evaluate(READY)  # what has opened is laid out
        wide = browser.evaluate(OVERFLOWS)
        found += [f"reaches beyond a window of {other} px: {what}" for what in wide]
    browser.resize(width)
    wrong = "[...document.querySelectorAll('mjx-merror')].map((e) => e.textContent.trim())"
    found += [f"a formula is not TeX: {text[:80]}" for text in browser.evaluate(wrong)]
    found += [f"console: {text}" for text in browser.errors]
    found += [f"asks the network for {url}" for url in browser.requests if not LOCAL.match(url)]
    return found


def still(browser: Browser) -> list[str]:
    """What does not move on the page that is open although its sliders do."""
    found, text = [], "document.querySelector('article').textContent"
    sliders = browser.evaluate("[...document.querySelectorAll('article input')].map((e) => e.id)")
    for name in sliders:
        before = browser.evaluate(text)
        browser.evaluate(f"document.getElementById('{name}').focus()")
        browser.press("ArrowRight")
        browser.evaluate(READY)
        if browser.evaluate(text) == before:
            found.append(f"nothing follows the slider {name}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, default=ROOT / "runs" / "book" / "site")
    parser.add_argument("--shots", type=Path, help="folder for a picture of every page and width")
    parser.add_argument("--only", default="", help="pages whose path contains this")
    parser.add_argument("--required", action="store_true", help="fail where there is no Chromium")
    args = parser.parse_args()
    if reason := missing():
        sys.exit(reason) if args.required else print(f"{reason} The pages were not looked at.")
        return
    site = args.site.resolve()
    pages = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    pages = [path for path in pages if args.only in str(path.relative_to(site))]
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    found = []
    with Browser() as browser:
        for page, width in itertools.product(pages, WIDTHS):
            name = page.relative_to(site).with_suffix("")
            found += [f"{name} at {width} px {fault}" for fault in faults(browser, page, width)]
            if args.shots:
                browser.evaluate("scrollTo({top: 0, behavior: 'instant'})")
                browser.picture(args.shots / f"{str(name).replace('/', '_')}_{width}.png", True)
    if found:
        sys.exit("\n".join(found))
    print(f"{len(pages)} pages looked at, {' and '.join(map(str, WIDTHS))} pixels wide.")


if __name__ == "__main__":
    main()
