"""The kit's check of models: right and wrong Llamas beside one of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from torch import Tensor

from lightllm.testing import check_model

PLUGIN = """
import torch
from lightllm import ModelRecord, hookimpl

class {name}({base}):
    {body}

@hookimpl
def lightllm_models():
    return [ModelRecord(name="wrong", target=f"{{__name__}}:{name}", architectures=("Another",))]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, write_checkpoint(folder, "llama-mqa")


def test_a_right_model_passes_with_any_form_of_reference(checkpoint: tuple[Path, Any]) -> None:
    folder, model = checkpoint

    def log_probabilities(tokens: list[int]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    check_model(folder, log_probabilities)


WRONG = {
    "alone": "def logits(self, hidden): return super().logits(hidden) * 1.01",
    # looks at what else is in the step
    "in a batch of mixed lengths": """
    def forward(self, tokens, positions, batch):
        return super().forward(tokens, positions, batch) + 0.05 * (len(batch.tables) > 1)""",
    # keeps what it should have from the pool
    "with its prefill in chunks": """
    def forward(self, tokens, positions, batch):
        begins = torch.tensor([c == n or n == 1 for n, c in zip(batch.query_lengths, batch.context_lengths)])
        wrong = (~begins).repeat_interleave(torch.tensor(batch.query_lengths)).unsqueeze(1)
        return super().forward(tokens, positions, batch) + 0.05 * wrong""",
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_model_is_told_where_it_goes_wrong(
    checkpoint: tuple[Path, Any], how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = checkpoint
    name = "wrong_model_" + how.split()[-1]
    source = PLUGIN.format(name="Wrong", base="Llama", body=WRONG[how])
    (tmp_path / f"{name}.py").write_text("from lightllm_builtin.llama.model import Llama\n" + source)
    config = (folder / "config.json").read_text()
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(config.replace("LlamaForCausalLM", "Another"))
    with pytest.raises(AssertionError, match=r"(?s)^this rule is broken: a model's log-prob.*expected: -\d") as failure:
        check_model(tmp_path, model, plugins=[tmp_path / f"{name}.py"])
    assert f"the reference's: {how}" in str(failure.value)


def test_a_reference_of_another_form_is_refused(checkpoint: tuple[Path, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"the reference gave \[5\] for \d+ tokens of a vocabulary of 199: it must give"
    ):
        check_model(checkpoint[0], lambda tokens: torch.zeros(5))


def test_tensor_parallelism_is_not_there_yet(checkpoint: tuple[Path, Any]) -> None:
    with pytest.raises(NotImplementedError, match="tensor parallelism is not there yet"):
        check_model(*checkpoint, world_size=2)
