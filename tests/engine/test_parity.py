"""Every log-probability equals Hugging Face transformers', however the work was batched, cached or interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import CASES, write_checkpoint

from lightllm.testing import check_model


@pytest.mark.parametrize("case", CASES)
def test_a_model_is_the_same_as_in_transformers(case: str, tmp_path: Path) -> None:
    check_model(tmp_path, write_checkpoint(tmp_path, case))
