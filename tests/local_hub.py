"""A local stand-in for the Hugging Face Hub: the part of its HTTP interface that the real client creates,
pushes, tags and reads repos through, LFS included. `HF_ENDPOINT=hub.url` in a process's environment makes the
client use it; HF_HUB_DISABLE_XET=1 keeps it from the other protocol for large files."""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_owner"
LFS_SUFFIXES = (".safetensors", ".mp4", ".parquet")
LICENCES = {"apache-2.0", "mit", "cc-by-nc-4.0", "other"}  # of the many that the Hub accepts


class HubError(Exception):
    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # id → path → content
    branches: dict[str, str] = field(default_factory=dict)  # tags, too

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        content = repr((len(self.commits), [(p, hashlib.sha1(b).digest()) for p, b in sorted(files.items())]))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def at(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound")
        return sha


class LocalHub:
    """Repos are made by pushing, or by putting files into `root / "owner/name"` (`"datasets/owner/name"`).

    `requests` holds the path of every request, `repos` what was pushed.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.requests = root, []
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS: sha256 → content
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        # Another host, as the Hub's storage is: a redirect there carries the headers that the client wants.
        self.storage_url = self.url.replace("127.0.0.1", "localhost")
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """What makes a process use this Hub and nothing else."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(home),
            **more,
        }

    def repo(self, name: str, token: str | None) -> Repo:
        if name not in self.repos:
            folder = self.root / name
            files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            if not folder.is_dir():
                raise HubError(404 if token else 401, "RepoNotFound")
            repo = Repo()
            repo.commit(files)
            return repo
        if self.repos[name].private and token != TOKEN:
            raise HubError(401, "RepoNotFound")
        return self.repos[name]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repo(name, TOKEN)
        return repo.commits[repo.at(revision)]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    def handle_request(self) -> None:
        self.hub: LocalHub = self.server.hub
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        body = self.body()
        try:
            if parts[0] == "api":
                self.api(parts[1:], body)
            elif parts[0] == "lfs":
                self.lfs_object(parts[1], body)
            elif parts[-1] == "batch":
                self.lfs_batch(json.loads(body))
            else:
                self.resolve(parts)
        except HubError as error:
            self.answer(b"", error.status, {"X-Error-Code": error.code})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815 (http.server's names)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        self.server.hub.requests.append(self.path)

    def must_own(self) -> None:
        if self.token != TOKEN:
            raise HubError(401, "Unauthorized")

    def api(self, parts: list[str], body: bytes) -> None:
        if parts == ["repos", "create"]:
            self.must_own()
            return self.create(json.loads(body))
        if parts == ["validate-yaml"]:
            return self.validate(json.loads(body)["content"])
        kind, owner, name, *rest = parts  # models or datasets
        name = f"{owner}/{name}" if kind == "models" else f"{kind}/{owner}/{name}"
        repo = self.hub.repo(name, self.token)
        what, revision = (rest[0], rest[1] if len(rest) > 1 else "main") if rest else ("revision", "main")
        if what == "preupload":
            files = json.loads(body)["files"]
            for file in files:
                mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
                file |= {"uploadMode": mode, "shouldIgnore": False}
            return self.answer({"files": files})
        if what == "commit":
            self.must_own()
            return self.commit(repo, name, revision, body)
        if what == "tag":
            self.must_own()
            repo.branches[json.loads(body)["tag"]] = repo.at(revision)
            return self.answer({})
        sha = repo.at(revision)
        files = repo.commits[sha]
        if what == "tree":
            under = "/".join(rest[2:])
            return self.answer([self.entry(p, b) for p, b in sorted(files.items()) if p.startswith(under)])
        siblings = [{"rfilename": path} for path in sorted(files)]
        return self.answer(
            {"id": f"{owner}/{parts[2]}", "sha": sha, "private": repo.private, "siblings": siblings}
        )

    @staticmethod
    def entry(path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if path.endswith(LFS_SUFFIXES):
            oid = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
        return entry

    def create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return self.answer(url | {"error": "You already created this repo"}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repo = self.hub.repos[name] = Repo(private)
        repo.commit({".gitattributes": b""})
        self.answer(url)

    def validate(self, card: str) -> None:
        """The Hub is stricter; of its rules, those that LeRobot's cards can break."""
        errors = []
        try:
            metadata = yaml.safe_load(card.split("---")[1])
            if metadata.get("license") not in LICENCES | {None}:
                errors.append({"message": f'"license" must be one of {sorted(LICENCES)}'})
            if metadata.get("license") == "other" and not metadata.get("license_name"):
                errors.append({"message": '"license_name" is missing'})
        except (yaml.YAMLError, IndexError, AttributeError) as error:
            errors.append({"message": f"no metadata: {error}"})
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def commit(self, repo: Repo, name: str, revision: str, body: bytes) -> None:
        files = dict(repo.commits[repo.at(revision)])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, revision)
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def lfs_batch(self, wanted: dict) -> None:
        self.must_own()
        objects = []
        for entry in wanted["objects"]:
            upload = {"upload": {"href": f"{self.hub.storage_url}/lfs/{entry['oid']}"}}
            known = entry["oid"] in self.hub.objects
            objects.append({**entry, **({} if known else {"actions": upload})})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_object(self, oid: str, body: bytes) -> None:
        """In place of the storage behind the Hub."""
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                raise HubError(400, "WrongContent")
            self.hub.objects[oid] = body
            return self.answer(b"")
        if oid not in self.hub.objects:
            raise HubError(404, "EntryNotFound")
        return self.answer(self.hub.objects[oid], headers={"ETag": f'"{oid}"'})

    def resolve(self, parts: list[str]) -> None:
        """owner/name/resolve/<revision>/<file>"""
        at = parts.index("resolve") if "resolve" in parts else 0
        if not at:
            raise HubError(404, "RepoNotFound")
        repo, file = self.hub.repo("/".join(parts[:at]), self.token), "/".join(parts[at + 2 :])
        sha = repo.at(parts[at + 1])
        if file not in repo.commits[sha]:
            return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content = repo.commits[sha][file]
        if not file.endswith(LFS_SUFFIXES):
            etag = hashlib.sha1(content).hexdigest()
            return self.answer(content, headers={"X-Repo-Commit": sha, "ETag": f'"{etag}"'})
        oid = hashlib.sha256(content).hexdigest()
        self.hub.objects[oid] = content
        headers = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": sha}
        return self.answer(b"", 302, {**headers, "Location": f"{self.hub.storage_url}/lfs/{oid}"})
