"""A small server that speaks as much of the Hub's protocol as downloading a model needs.

``python tests/hub_server.py ROOT`` serves ``ROOT/owner/repo/FILES`` on loopback and prints its URL, for
``HF_ENDPOINT=URL``. A folder ``ROOT/owner/repo@REV`` holds another revision (branch or tag) of the repository; every
revision can be asked for by its commit too. A file ``.gated`` in a repository makes the Hub ask for a login.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+?)(?:/revision/(?P<revision>[^/]+))?")


class HubError(Exception):
    """An answer of the Hub that is not a file."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HubServer(ThreadingHTTPServer):
    """Serves the repositories below ``root``; ``requests`` lists what was asked for, as ``METHOD PATH``."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, folder: Path) -> str:
        """40 hex digits that change with any file of the revision."""
        digest = hashlib.sha1(usedforsecurity=False)
        for path in self.files(folder):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()

    @staticmethod
    def files(folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".gated")

    def revision(self, repo: str, revision: str) -> Path:
        """The folder of one revision of a repository.

        Raises:
            HubError: the repository or the revision does not exist, or the repository is gated.
        """
        main = self.root / repo
        if "@" in repo or not main.is_dir() or main.resolve().parent.parent != self.root.resolve():
            raise HubError(401, "RepoNotFound", "Repository not found")
        if (main / ".gated").exists():
            raise HubError(403, "GatedRepo", f"Access to model {repo} is restricted")
        if revision == "main":
            return main
        for folder in (main, *main.parent.glob(f"{main.name}@*")):
            if revision in (folder.name.partition("@")[2], self.commit(folder)):
                return folder
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the URL is all that belongs on the terminal."""

    def _answer(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.server.requests.append(f"{self.command} {path}")
        headers: dict[str, str] = {}
        try:
            body = self._find(path, headers)
            status = 200
        except HubError as error:
            body, status = json.dumps({"error": str(error)}).encode(), error.status
            headers |= {"X-Error-Code": error.code, "X-Error-Message": str(error)}
        total = len(body)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or total - 1), total - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
            body, status = body[first : last + 1], 206
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _find(self, path: str, headers: dict[str, str]) -> bytes:
        if match := RESOLVE.fullmatch(path):
            folder = self.server.revision(match["repo"], match["revision"])
            headers["X-Repo-Commit"] = self.server.commit(folder)
            file = folder / match["file"]
            if file not in self.server.files(folder):
                raise HubError(404, "EntryNotFound", "Entry not found")
            body = file.read_bytes()
            headers |= {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "Accept-Ranges": "bytes"}
            headers["Content-Type"] = "application/octet-stream"
            return body
        if match := API.fullmatch(path):
            folder = self.server.revision(match["repo"], match["revision"] or "main")
            names = [file.relative_to(folder).as_posix() for file in self.server.files(folder)]
            headers["Content-Type"] = "application/json"
            return json.dumps(
                {
                    "id": match["repo"],
                    "sha": self.server.commit(folder),
                    "private": False,
                    "gated": False,
                    "siblings": [{"rfilename": name} for name in names],
                }
            ).encode()
        raise HubError(404, "RepoNotFound", "Not found")


@contextmanager
def serving(root: Path) -> Iterator[HubServer]:
    """A server in a thread of its own, for the time of a ``with`` block."""
    server = HubServer(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve ROOT/owner/repo/FILES as the Hub would.")
    parser.add_argument("root", type=Path)
    server = HubServer(parser.parse_args().root)
    print(server.url, flush=True)  # noqa: T201
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
