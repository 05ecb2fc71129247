"""Models by their Hugging Face Hub id: ``org/name``, or for GGUF ``org/name:Q4_K_M`` or ``org/name/file.gguf``."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lightllm import UserError

UNWANTED = ["*/*", "consolidated*.safetensors"]
"""Subfolders (other formats) and Mistral's second copy of the weights under names of its own."""
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt"]


def hub_model(name: str, revision: str | None) -> Path:
    """The model's files in the hub's own cache, downloaded if need be. Raises UserError when they cannot be had."""
    id, _, variant = name.partition(":")
    org, model, *file = id.split("/", 2)
    repo = f"{org}/{model}"
    try:
        if variant:
            file = [_variant(repo, variant, revision)]
        patterns = file or PATTERNS
        ignored = None if file else UNWANTED
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except GatedRepoError:
        raise _error(name, "access must be asked for on its page; then log in with `hf auth login`") from None
    except RevisionNotFoundError:
        raise _error(name, f"it has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise _error(name, "there is no such repository, or it is private (`hf auth login`)") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = "it is not in the local cache, and the hub cannot be reached or HF_HUB_OFFLINE is set"
        raise _error(name, reason) from None
    except HFValidationError as problem:
        raise _error(name, str(problem).splitlines()[0]) from None
    except UserError:
        raise
    except Exception as problem:  # whichever HTTP library the hub's own happens to use
        reason = (str(problem).splitlines() or [""])[0]
        raise _error(name, f"nothing could be had ({type(problem).__name__}: {reason})") from None
    if file:
        if not (folder / file[0]).is_file():
            raise _error(name, f"it has no file {file[0]!r}")
        return folder / file[0]
    if not any(folder.glob("*.safetensors")):
        raise _error(name, "it has no safetensors; for a GGUF file write org/name:Q4_K_M or org/name/file.gguf")
    return folder


def _variant(repo: str, variant: str, revision: str | None) -> str:
    """The one .gguf file of a repository that is quantized as ``variant``; of the local cache when offline."""
    try:
        files = [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()]
    except HfHubHTTPError:  # the hub has answered
        raise
    except Exception:  # no network, or told to use none; whichever HTTP library the hub's own happens to use
        # no pattern: only where the cached files are
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[]))
        files = [str(file.relative_to(folder)) for file in folder.rglob("*.gguf")]
    files = [file for file in files if file.endswith(".gguf")]
    found = [file for file in files if variant.lower() in file.lower()]
    if len(found) != 1:
        choice = ", ".join((found or files)[:8]) or "none"
        raise _error(f"{repo}:{variant}", f"{len(found)} .gguf files match; there are: {choice}")
    return found[0]


def _error(name: str, problem: str) -> UserError:
    return UserError(f"--model {name}: on the Hugging Face Hub {problem}")
