"""The built-in families on a CUDA device: every log-probability equals transformers', with graphs and overlap."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_checkpoint

from lightllm.testing import check_model

pytestmark = pytest.mark.gpu

CASES = ("llama-gqa", "llama-head-dim", "llama-biases", "llama-dynamic", "mistral-window", "qwen2", "qwen2-window")
"""Of those that tests/engine/test_parity.py checks on a CPU, what differs in a kernel or in what is captured."""


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_the_same_as_in_transformers(case: str, tmp_path: Path) -> None:
    check_model(tmp_path, write_checkpoint(tmp_path, case), device="cuda")
