"""ModelScope's real library against a hub on 127.0.0.1: what it fetches, what is said where it cannot, and serving."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

import lightllm_modelscope
from lightllm.testing import check_plugin, serve, write_scripted

REPO = "org/tiny"


class Hub:
    """The parts of ModelScope's HTTP interface that its library uses to list and download a model.

    ``models``: id -> revision -> path -> content. ``refuse``: a status to answer everything with. ``cut``: what is sent
    of files.
    """

    def __init__(self) -> None:
        self.models: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refuse = 0
        self.cut: int | None = None
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                status, body = hub.answer(url.path, query)
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[: hub.cut] if url.path.endswith("/repo") else body)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, query: dict[str, str]) -> tuple[int, bytes]:
        if self.refuse:
            return self.refuse, json.dumps({"Code": self.refuse, "Message": "refused"}).encode()
        if path.startswith("/openapi/v1/models/"):
            known = path.removeprefix("/openapi/v1/models/") in self.models
            return (200, b'{"success": true, "data": {"id": 1}}') if known else (404, b"{}")
        org, name, *rest = path.removeprefix("/api/v1/models/").split("/")
        files = self.models.get(f"{org}/{name}", {}).get(query.get("Revision", "master"))
        if files is None:
            return 404, json.dumps({"Code": 404, "Message": "not found"}).encode()
        if rest == ["repo", "files"]:
            listed = [
                {"Path": path, "Type": "blob", "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
                for path, content in files.items()
            ]
            return 200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": listed}}).encode()
        self.fetched.append(query["FilePath"])
        return 200, files[query["FilePath"]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


class Client:
    """Resolves names in a process of its own, with a cache and a home of its own."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.cache = folder / "cache"
        self.env = {
            "MODELSCOPE_ENDPOINT": hub.url,
            "MODELSCOPE_CACHE": str(self.cache),
            "HOME": str(folder),
            "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",
            "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0",
        }

    def run(self, name: str, revision: str | None = None) -> str:
        """The path, or the error that the user is shown."""
        script = """if True:
            import sys
            from lightllm import UserError
            from lightllm_modelscope import lightllm_resolve_model
            try:
                print(lightllm_resolve_model(sys.argv[1], sys.argv[2] or None, None))
            except UserError as error:
                print("error:", error)
            assert "torch" not in sys.modules
        """
        done = subprocess.run(
            [sys.executable, "-c", script, name, revision or ""],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | self.env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1, done.stdout
        return done.stdout.strip()

    def path(self, name: str, revision: str | None = None) -> Path:
        found = self.run(name, revision)
        assert not found.startswith("error:"), found
        return Path(found)


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


WEIGHTS = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights", "chat_template.jinja": b"x"}
OTHERS = {
    "README.md": b"x",
    "pytorch_model.bin": b"x",
    "consolidated.safetensors": b"x",
    "onnx/model.safetensors": b"x",
    "model-Q8_0.gguf": b"x",
}


def test_the_plugin_is_valid_and_leaves_other_names_alone() -> None:
    check_plugin(lightllm_modelscope)
    for name in ("demo", "org/name", "modelscope:/x", "hf://org/name"):
        assert lightllm_modelscope.lightllm_resolve_model(name, None, None) is None
    assert "modelscope_hub" not in sys.modules


def test_only_what_can_be_read_is_fetched_and_only_once(hub: Hub, client: Client) -> None:
    hub.models[REPO] = {"master": WEIGHTS | OTHERS}
    folder = client.path(f"modelscope://{REPO}")
    assert folder.is_relative_to(client.cache)
    assert files(folder) == set(WEIGHTS) == set(hub.fetched)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert client.path(f"modelscope://{REPO}") == folder
    assert len(hub.fetched) == len(WEIGHTS)


def test_a_revision_is_had_beside_another(hub: Hub, client: Client) -> None:
    hub.models[REPO] = {"master": WEIGHTS, "v1.0": WEIGHTS | {"model.safetensors": b"older"}}
    assert (client.path(f"modelscope://{REPO}") / "model.safetensors").read_bytes() == b"weights"
    assert (client.path(f"modelscope://{REPO}", "v1.0") / "model.safetensors").read_bytes() == b"older"


def test_a_gguf_file_is_had_by_its_quantization_or_its_path(hub: Hub, client: Client) -> None:
    hub.models[REPO] = {"master": {"m-q4_k_m.gguf": b"4", "m-IQ4_K_M.gguf": b"i", "sub/m.Q8_0.gguf": b"8"} | WEIGHTS}
    assert client.path(f"modelscope://{REPO}/m-IQ4_K_M.gguf").read_bytes() == b"i"
    assert client.path(f"modelscope://{REPO}:Q4_K_M").name == "m-q4_k_m.gguf"
    assert client.path(f"modelscope://{REPO}/sub/m.Q8_0.gguf").read_bytes() == b"8"
    assert client.path(f"modelscope://{REPO}:q8_0").read_bytes() == b"8"
    assert hub.fetched == ["m-IQ4_K_M.gguf", "m-q4_k_m.gguf", "sub/m.Q8_0.gguf"]
    assert "error:" in client.run(f"modelscope://{REPO}:Q5_0")
    assert "it has no file 'm.gguf'" in client.run(f"modelscope://{REPO}/m.gguf")


def test_what_has_no_weights_that_can_be_read_is_refused(hub: Hub, client: Client) -> None:
    hub.models[REPO] = {"master": {"config.json": b"{}", "pytorch_model.bin": b"x"}}
    assert "on ModelScope it has no safetensors; for a GGUF file write" in client.run(f"modelscope://{REPO}")


@pytest.mark.parametrize("id", ["name", "a/b/c", "a//b", "../b", "a/..", "a/b:", "", "a/b c"])
def test_what_is_no_name_is_refused(client: Client, id: str) -> None:
    assert "that is no model's name: write modelscope://org/name" in client.run(f"modelscope://{id}")


def test_an_unknown_model_and_an_unknown_revision_are_told_apart(hub: Hub, client: Client) -> None:
    hub.models[REPO] = {"master": WEIGHTS}
    unknown = "there is no such model, or it is private: log in with `modelscope login`"
    assert unknown in client.run("modelscope://org/other")
    assert unknown in client.run("modelscope://org/other", "v2")
    assert "it has no revision 'v2'" in client.run(f"modelscope://{REPO}", "v2")


@pytest.mark.parametrize("status", [401, 403])
def test_refused_access_is_said(hub: Hub, client: Client, status: int) -> None:
    hub.refuse = status
    assert "access is refused: ask for it on its page, then log in" in client.run(f"modelscope://{REPO}")


def test_without_a_network_the_copy_in_the_cache_is_served(hub: Hub, client: Client) -> None:
    hub.models[REPO] = {"master": WEIGHTS}
    folder = client.path(f"modelscope://{REPO}")
    hub.refuse = 503
    assert client.path(f"modelscope://{REPO}") == folder
    client.env["MODELSCOPE_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens
    assert client.path(f"modelscope://{REPO}") == folder
    expected = "it cannot be reached (NetworkError), and the model is not in the cache"
    assert expected in client.run("modelscope://org/other")
    assert expected in client.run(f"modelscope://{REPO}", "v2")
    assert "it has no file 'm.gguf'" in client.run(f"modelscope://{REPO}/m.gguf")


def test_a_copy_that_is_not_whole_is_not_served(hub: Hub, client: Client) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    shards = {"model.safetensors.index.json": index, "model-1.safetensors": b"1", "model-2.safetensors": b"2"}
    hub.models[REPO] = {"master": {"config.json": b"{}"} | shards}
    folder = client.path(f"modelscope://{REPO}")
    (folder / "model-2.safetensors").unlink()
    client.env["MODELSCOPE_ENDPOINT"] = "http://127.0.0.1:9"
    assert "and the copy in the cache lacks model-2.safetensors" in client.run(f"modelscope://{REPO}")


def test_a_download_that_breaks_off_goes_on(hub: Hub, client: Client) -> None:
    hub.models[REPO] = {"master": WEIGHTS | {"model.safetensors": b"w" * 100}}
    hub.cut = 50
    found = client.run(f"modelscope://{REPO}")
    assert "the download of model.safetensors broke off (" in found and "start again to go on with it" in found
    hub.cut = None
    assert (client.path(f"modelscope://{REPO}") / "model.safetensors").read_bytes() == b"w" * 100


def test_a_cache_that_cannot_be_written_is_said(hub: Hub, client: Client) -> None:
    hub.models[REPO] = {"master": WEIGHTS}
    client.cache.write_text("in the way")
    found = client.run(f"modelscope://{REPO}")
    assert "it cannot be kept (" in found and "set MODELSCOPE_CACHE to a folder that can be written" in found


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_said(hub: Hub, client: Client) -> None:
    hub.models[REPO] = {"master": WEIGHTS}
    snapshot = client.cache / "models" / REPO.replace("/", "--") / "snapshots" / "master"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors.incomplete").symlink_to("/dev/full")
    expected = "it found the disk full: make room, or set MODELSCOPE_CACHE to a folder on another disk"
    assert expected in client.run(f"modelscope://{REPO}")


def test_a_model_is_served_from_it(hub: Hub, client: Client, tmp_path: Path) -> None:
    write_scripted(tmp_path / "model")
    hub.models[REPO] = {"master": {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}}
    plugins = ["lightllm_modelscope", "lightllm.testing.scripted"]
    with serve(plugins, model=f"modelscope://{REPO}", env=client.env) as server:
        assert server.model == f"modelscope://{REPO}"
        answer = server.chat("Hello from a hub")
        assert answer["choices"][0]["message"]["content"] == "Hello from a hub"
