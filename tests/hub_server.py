"""
A small hub on this machine: the endpoints through which huggingface_hub creates, uploads, lists and downloads.

    python tests/hub_server.py    # prints the settings under which any program takes it for the hub

It keeps everything in memory, and can fail in the ways that a network and a disk do.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Hub:
    """
    Repositories, the objects of their large files, and what is to go wrong.

    Attributes:
        commits (`dict[str, list[tuple[str, dict[str, bytes]]]]`): of each repository, hash and files, oldest first.
        objects (`dict[str, bytes]`): large files by their SHA-256; a commit may name one only when it is here.
        uploads (`list[str]`): the SHA-256 of each upload that was begun.
        put_faults (`list`): for the next uploads, one each: a status to answer with, or "cut", to close the connection
            halfway, or a function to call there, before it is closed. `None`: none.
        corrupted (`str`): a file of which one bit is turned over on its way out.
    """

    def __init__(self, users: dict[str, str]):
        self.users = users
        self.commits, self.private, self.objects = {}, set(), {}
        self.uploads, self.put_faults, self.corrupted = [], [], None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, token: str | None) -> dict[str, str]:
        settings = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return settings | ({"HF_TOKEN": token} if token else {})

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The newest files of a repository but for the hub's own .gitattributes."""
        return {name: data for name, data in self.commits[repo_id][-1][1].items() if name != ".gitattributes"}

    def add(self, repo_id: str, directory: Path):
        """A repository with the files of a directory, as if they had been pushed."""
        self.commits[repo_id] = []
        self.commit(repo_id, {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()})

    def commit(self, repo_id: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{repo_id} {len(self.commits[repo_id])}".encode()).hexdigest()
        self.commits[repo_id].append((oid, files))
        return oid


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    # Requests and answers

    def body(self, limit: float = float("inf")) -> bytes:
        """The request's body, or its first `limit` bytes."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(min(limit, int(self.headers.get("Content-Length", 0)))))
        data = b""
        while (length := int(self.rfile.readline(), 16)) and len(data) < limit:
            data += self.rfile.read(length)
            self.rfile.readline()
        if length == 0:
            self.rfile.readline()
        return data

    def answer(self, status: int, value=None, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        for name, content in headers.items():
            self.send_header(name.replace("_", "-"), content)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def dispatch(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and self.command in method.split():
                return action(self, *map(unquote, match.groups()))
        self.body()
        self.answer(404, {"error": f"{self.command} {self.path} is not an endpoint of this hub"})

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    # Who may do what

    @property
    def user(self) -> str | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def may_write(self, repo_id: str) -> bool:
        if self.user == repo_id.split("/")[0]:
            return True
        self.refuse(403, "Forbidden", f"You don't have the rights to write to {repo_id}")
        return False

    def revision(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Hash and files of a revision; otherwise the refusal is sent."""
        hidden = repo_id in self.hub.private and self.user != repo_id.split("/")[0]
        if repo_id not in self.hub.commits or hidden:
            return self.refuse(401, "RepoNotFound", "Repository not found")
        commits = self.hub.commits[repo_id]
        for oid, files in reversed(commits):
            if revision in (oid, "main"):
                return oid, files
        return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    # The endpoints

    def whoami(self):
        if self.user is None:
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        self.answer(200, {"type": "user", "name": self.user, "orgs": []})

    def create(self):
        request = json.loads(self.body())
        repo_id = f"{request['organization'] or self.user}/{request['name']}"
        if not self.may_write(repo_id):
            return
        if repo_id in self.hub.commits:
            url = f"{self.hub.url}/{repo_id}"
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        self.hub.commits[repo_id] = []
        if request.get("visibility") == "private":
            self.hub.private.add(repo_id)
        self.hub.commit(repo_id, {".gitattributes": GITATTRIBUTES})
        self.answer(200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def validate_yaml(self):
        content = json.loads(self.body())["content"]
        self.answer(200 if content.startswith("---\n") else 400, {"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str):
        request = json.loads(self.body())
        if not self.may_write(repo_id) or (found := self.revision(repo_id, revision)) is None:
            return
        files = []
        for file in request["files"]:
            path, there = file["path"], found[1].get(file["path"])
            oid = None if there is None else sha256(there) if is_large(path) else git_oid(there)
            mode = "lfs" if is_large(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files, "commitOid": found[0]})

    def batch(self, repo_id: str):
        request = json.loads(self.body())
        if not self.may_write(repo_id):
            return
        for item in request["objects"]:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {
                    "upload": {"href": f"{self.hub.url}/objects/{item['oid']}"},
                    "verify": {"href": f"{self.hub.url}/objects/{item['oid']}/verify"},
                }
        self.answer(200, {"transfer": "basic", "objects": request["objects"]})

    def put(self, oid: str):
        self.hub.uploads.append(oid)
        fault = self.hub.put_faults.pop(0) if self.hub.put_faults else None
        if fault == "cut" or isinstance(fault, Callable):
            self.body(limit=int(self.headers.get("Content-Length", 0)) // 2)
            if fault != "cut":
                fault()
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        data = self.body()
        if fault is not None:
            return self.answer(fault, {"error": "no"})
        if sha256(data) != oid:
            return self.answer(400, {"error": "not the bytes that were announced"})
        self.hub.objects[oid] = data
        self.answer(200)

    def verify(self, oid: str):
        size = json.loads(self.body())["size"]
        self.answer(200 if len(self.hub.objects.get(oid, b"")) == size else 404)

    def commit(self, repo_id: str, revision: str):
        header, *operations = map(json.loads, self.body().splitlines())
        if not self.may_write(repo_id) or (found := self.revision(repo_id, revision)) is None:
            return
        files = dict(found[1])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            elif value["oid"] not in self.hub.objects:
                return self.answer(400, {"error": f"the object of {value['path']} is not there"})
            else:
                files[value["path"]] = self.hub.objects[value["oid"]]
        oid = self.hub.commit(repo_id, files)
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})

    def info(self, repo_id: str, revision: str = "main"):
        if (found := self.revision(repo_id, revision)) is None:
            return
        siblings = [{"rfilename": path} for path in sorted(found[1])]
        is_private = repo_id in self.hub.private
        self.answer(200, {"id": repo_id, "sha": found[0], "private": is_private, "siblings": siblings, "tags": []})

    def tree(self, repo_id: str, revision: str, folder: str = ""):
        if (found := self.revision(repo_id, revision)) is None:
            return
        entries = []
        for path, data in sorted(found[1].items()):
            if folder and not path.startswith(f"{folder}/"):
                continue
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            if is_large(path):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        if folder and not entries:
            return self.refuse(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self.answer(200, entries)

    def resolve(self, repo_id: str, revision: str, path: str):
        if (found := self.revision(repo_id, revision)) is None:
            return
        commit, files = found
        if path not in files:
            return self.answer(404, X_Repo_Commit=commit, X_Error_Code="EntryNotFound")
        data = files[path]
        etag = sha256(data) if is_large(path) else git_oid(data)
        if path == self.hub.corrupted:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.answer(200, data, X_Repo_Commit=commit, ETag=f'"{etag}"', Content_Type="application/octet-stream")


REPO = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"/api/models/{REPO}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/objects/([0-9a-f]+)", Handler.put),
    ("POST", "/objects/([0-9a-f]+)/verify", Handler.verify),
    ("POST", f"/api/models/{REPO}/commit/([^/]+)", Handler.commit),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/([^/]+)", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)", Handler.tree),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)/(.+)", Handler.tree),
    ("GET HEAD", f"/{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
]


if __name__ == "__main__":
    with Hub({"hf_local": "user"}) as hub:
        print(" ".join(f"{name}={value}" for name, value in hub.environment("hf_local").items()), flush=True)
        threading.Event().wait()
