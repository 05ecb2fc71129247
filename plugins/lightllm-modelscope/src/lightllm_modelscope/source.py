"""Models by their ModelScope id: ``org/name``, or for GGUF ``org/name:Q4_K_M`` or ``org/name/path/file.gguf``.

By ModelScope's own hub library, to which `modelscope.snapshot_download` leads: importing `modelscope` itself imports
torch, which has no place in the server process.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import requests
from modelscope_hub import HubApi
from modelscope_hub.compat import snapshot_download
from modelscope_hub.config import get_default_config
from modelscope_hub.errors import (
    APIError,
    AuthenticationError,
    CacheNotFound,
    FileDownloadError,
    HubError,
    NotExistError,
    PermissionDeniedError,
)

from lightllm import UserError

log = logging.getLogger("lightllm.modelscope")

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt"]
UNWANTED = ["*/*", "consolidated*.safetensors"]
"""Subfolders (other formats) and Mistral's second copy of the weights under names of its own."""

LOG_IN = "log in with `modelscope login`, or set MODELSCOPE_API_TOKEN"

_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<variant>[\w.-]+)|/(?P<file>.+\.gguf))?")


def modelscope_model(id: str, revision: str | None) -> Path:
    """The model's files in ModelScope's own cache, downloaded if need be. Raises UserError when they cannot be had."""
    found = _ID.fullmatch(id)
    if found is None or {".", ".."} & set(id.split("/")):
        raise _error(id, "that is no model's name: write modelscope://org/name, org/name:Q4_K_M or org/name/file.gguf")
    repo, variant, file = found["repo"], found["variant"], found["file"]
    if variant:
        wanted = [start + v + ".gguf" for v in {variant, variant.lower(), variant.upper()} for start in ("", "*[-._/]")]
    else:
        wanted = [file] if file else PATTERNS
    folder = _download(id, repo, revision, wanted, None if variant or file else UNWANTED)
    if file:
        if not (folder / file).is_file():
            raise _error(id, f"it has no file {file!r}")
        return folder / file
    if variant:
        named = re.compile(rf"(?:.*[-._])?{re.escape(variant)}", re.IGNORECASE)
        there = [path for path in folder.rglob("*.gguf") if named.fullmatch(path.stem)]
        if len(there) != 1:
            names = ", ".join(sorted(str(path.relative_to(folder)) for path in there)) or "none"
            raise _error(id, f"one .gguf file must be {variant}, and there are: {names}; give org/name/file.gguf")
        return there[0]
    if not any(folder.glob("*.safetensors")):
        hint = "for a GGUF file write modelscope://org/name:Q4_K_M or modelscope://org/name/file.gguf"
        raise _error(id, f"it has no safetensors; {hint}")
    return folder


def _download(id: str, repo: str, revision: str | None, wanted: list[str], unwanted: list[str] | None) -> Path:
    if _is_cached(repo, revision) and not _answers():
        return _cached(id, repo, revision, "no answer")  # the library would try for half a minute
    log.info("looking for %s on ModelScope", repo)
    try:
        with _bars():
            folder = snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted)
        return Path(folder)
    except (HubError, OSError) as error:
        # what happened to single files is inside; "not found" and "refused" come as the cause of an HTTPError
        causes = list(error.failed_files.values()) if isinstance(error, FileDownloadError) else [error]
        causes = [cause.__cause__ if isinstance(cause.__cause__, APIError) else cause for cause in causes]
        if problem := _refusal(repo, revision, causes) or _disk(causes):
            raise _error(id, problem) from None
        reason = _reason(causes[0])
        if isinstance(error, FileDownloadError):
            names = ", ".join(list(error.failed_files)[:3])
            raise _error(id, f"the download of {names} broke off ({reason}); start again to go on with it") from None
        return _cached(id, repo, revision, reason)


def _refusal(repo: str, revision: str | None, causes: list[BaseException]) -> str | None:
    kinds = {type(cause) for cause in causes}
    if kinds & {AuthenticationError, PermissionDeniedError}:
        return f"access is refused: ask for it on its page, then {LOG_IN}"
    if NotExistError not in kinds:
        return None
    with contextlib.suppress(HubError, OSError):
        if revision is not None and HubApi().repo_exists(repo, "model"):
            return f"it has no revision {revision!r}"
    return f"there is no such model, or it is private: {LOG_IN}"


def _disk(causes: list[BaseException]) -> str | None:
    error: BaseException | None
    for error in causes:
        while error is not None:
            number = error.errno if isinstance(error, OSError) else None
            if number in (errno.ENOSPC, errno.EDQUOT):
                return "it found the disk full: make room, or set MODELSCOPE_CACHE to a folder on another disk"
            if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
                return f"it cannot be kept ({error}): set MODELSCOPE_CACHE to a folder that can be written"
            error = error.__cause__
    return None


def _reason(problem: BaseException) -> str:
    log.debug("ModelScope", exc_info=problem)
    status = getattr(problem, "status_code", None)
    return f"HTTP status {status}" if status else type(problem).__name__


# ---------------------------------------------------------------------------------------------------------------------
# What is there already


def _answers() -> bool:
    try:
        requests.head(str(get_default_config().endpoint), timeout=5)
    except OSError:
        return False
    return True


def _is_cached(repo: str, revision: str | None) -> bool:
    try:
        return _missing(Path(snapshot_download(repo, revision=revision, local_files_only=True))) is None
    except CacheNotFound:
        return False


def _cached(id: str, repo: str, revision: str | None, reason: str) -> Path:
    """The copy in the cache: nobody can be asked for anything newer."""
    unreachable = f"it cannot be reached ({reason})"
    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except CacheNotFound:
        raise _error(id, f"{unreachable}, and the model is not in the cache") from None
    if missing := _missing(folder):
        raise _error(id, f"{unreachable}, and the copy in the cache lacks {missing}") from None
    log.warning("ModelScope cannot be reached (%s): serving the copy in %s", reason, folder)
    return folder


def _missing(folder: Path) -> str | None:
    """Weights that a download which broke off has left out."""
    index = folder / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_bytes())["weight_map"].values())) if index.is_file() else []
    files += [str(path.relative_to(folder)).removesuffix(".incomplete") for path in folder.rglob("*.incomplete")]
    return next((name for name in files if not (folder / name).is_file()), None)


# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """The library's progress bars are for terminals."""
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield


def _error(id: str, problem: str) -> UserError:
    return UserError(f"--model modelscope://{id}: on ModelScope {problem}")
