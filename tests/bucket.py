"""A folder served as the bucket of a Google Cloud Storage on this machine: as much of it as reading and
writing need."""

import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
from etils import epath

# Or gcsfs, which reads it when it is imported, asks for a minute what kind of bucket this is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


class Bucket:
    """Serves the files below `folder` as gs://bucket/...; `requests` has the paths that were asked for."""

    def __init__(self, folder: Path):
        self.requests: list[str] = []
        requests = self.requests
        parts: dict[str, bytes] = {}  # of objects that are being uploaded

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                url = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                _, _, name = url.path.partition("/bucket/o/")
                file = folder / unquote(name)
                requests.append(unquote(name))
                if not name:
                    self.answer(json.dumps(self.listing(query)).encode())
                elif not file.is_file():
                    self.answer(b"{}", 404)
                elif query.get("alt") == "media":
                    self.answer_part(file.read_bytes())
                else:
                    self.answer(json.dumps(self.about(file)).encode())

            def do_POST(self):
                """An upload: the first request gets an address, to which the content is sent in parts; or all
                of it comes in one request, which may ask that there is no such object yet."""
                url, body = urlsplit(self.path), self.rfile.read(int(self.headers["Content-Length"]))
                query = parse_qs(url.query)
                if query.get("uploadType") == ["multipart"]:
                    _, about, content, _ = body.split(b"--==0==")
                    file = folder / json.loads(about.split(b"\n\n", 1)[1])["name"]
                    if query.get("ifGenerationMatch") == ["0"] and file.exists():
                        self.answer(b"{}", 412)
                        return
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(content.split(b"\n\n", 1)[1].removesuffix(b"\n"))
                    self.answer(json.dumps(self.about(file)).encode())
                    return
                name = query["name"][0]
                if url.path != "/content":
                    parts[name] = b""
                    self.answer(
                        b"{}", headers={"Location": f"http://{self.headers['Host']}/content?name={name}"}
                    )
                    return
                parts[name] += body
                if self.headers["Content-Range"].endswith("/*"):  # more will come
                    self.answer(b"", 308, {"Range": f"bytes=0-{len(parts[name]) - 1}"})
                    return
                file = folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(parts.pop(name))
                self.answer(json.dumps(self.about(file)).encode())

            def do_DELETE(self):
                file = folder / unquote(urlsplit(self.path).path.partition("/bucket/o/")[2])
                status = 204 if file.is_file() else 404
                file.unlink(missing_ok=True)
                self.answer(b"", status)

            def about(self, file: Path) -> dict:
                name = str(file.relative_to(folder))
                size = str(file.stat().st_size)
                return {"kind": "storage#object", "bucket": "bucket", "name": name, "size": size}

            def listing(self, query: dict) -> dict:
                prefix, items, prefixes = query.get("prefix", ""), [], set()
                for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                    rest = str(file.relative_to(folder)).removeprefix(prefix)
                    if not str(file.relative_to(folder)).startswith(prefix):
                        continue
                    if query.get("delimiter") and "/" in rest:
                        prefixes.add(prefix + rest.split("/")[0] + "/")
                    else:
                        items.append(self.about(file))
                return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

            def answer_part(self, data: bytes) -> None:
                wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
                if wanted is None:
                    self.answer(data)
                    return
                start = int(wanted[1]) if wanted[1] else max(0, len(data) - int(wanted[2]))
                end = min(int(wanted[2]) + 1 if wanted[1] and wanted[2] else len(data), len(data))
                self.answer(data[start:end], 206, {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

            def answer(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": "application/octet-stream", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def use(self, monkeypatch) -> None:
        """Makes it what gs:// means for gcsfs, which reads and writes files, and for ArrayRecord's reader."""
        monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon", "endpoint_url": self.address})
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", self.address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        # Both keep the file system of a bucket that another test has served.
        epath.backend.fsspec_backend._get_filesystem.cache_clear()
        fsspec.get_filesystem_class("gs").clear_instance_cache()
