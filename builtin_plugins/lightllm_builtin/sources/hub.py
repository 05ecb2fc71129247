"""Models by their Hugging Face Hub id: ``org/name``, or for GGUF ``org/name:Q4_K_M`` or ``org/name/file.gguf``."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lightllm import UserError

PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt"]


def hub_model(name: str, revision: str | None) -> Path:
    """The model's files in the hub's own cache, downloaded if need be. Raises UserError when they cannot be had."""
    repo, _, variant = name.partition(":")
    org, model, *file = repo.split("/", 2)
    repo = f"{org}/{model}"
    try:
        if file:
            return Path(hf_hub_download(repo, file[0], revision=revision))
        if variant:
            return Path(hf_hub_download(repo, _gguf(repo, variant, revision), revision=revision))
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=PATTERNS))
    except GatedRepoError:
        raise _error(name, "access must be asked for on its page; then log in with `hf auth login`") from None
    except RevisionNotFoundError:
        raise _error(name, f"it has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise _error(name, "there is no such repository, or it is private (`hf auth login`)") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise _error(
            name, "it is not in the local cache, and the hub cannot be reached or HF_HUB_OFFLINE is set"
        ) from None
    except EntryNotFoundError:
        raise _error(name, f"it has no file {file[0] if file else variant!r}") from None
    except HFValidationError as problem:
        raise _error(name, str(problem).splitlines()[0]) from None
    except UserError:
        raise
    except Exception as problem:  # whichever HTTP library the hub's own happens to use
        raise _error(name, f"nothing could be had ({type(problem).__name__}: {problem})") from None
    if not any(folder.glob("*.safetensors")):
        raise _error(name, "it has no safetensors; for a GGUF file write org/name:Q4_K_M or org/name/file.gguf")
    return folder


def _gguf(repo: str, variant: str, revision: str | None) -> str:
    """The one .gguf file of a repository that is quantized as ``variant``."""
    files = [f for f in HfApi().list_repo_files(repo, revision=revision) if f.endswith(".gguf")]
    found = [f for f in files if variant.lower() in f.lower()]
    if len(found) != 1:
        choice = ", ".join((found or files)[:8]) or "none"
        raise _error(f"{repo}:{variant}", f"{len(found)} .gguf files match; there are: {choice}")
    return str(found[0])


def _error(name: str, problem: str) -> UserError:
    return UserError(f"--model {name}: on the Hugging Face Hub {problem}")
