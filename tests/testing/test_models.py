"""The kit's check of models: right and wrong Llamas beside one of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint

from lightllm.testing import check_model

PLUGIN = """
import torch
from lightllm import ModelRecord, hookimpl
from lightllm_builtin.llama.model import Llama

class Wrong(Llama):
    # wrong: which sequences of a step come out wrong

    def sizes(self, batch):
        return list(zip(batch.query_lengths, batch.context_lengths))

    def wrong(self, batch):
        return [False] * len(batch.tables)

    def forward(self, tokens, positions, batch):
        wrong = torch.tensor(self.wrong(batch)).repeat_interleave(torch.tensor(batch.query_lengths))
        return super().forward(tokens, positions, batch) + 0.05 * wrong.unsqueeze(1)

    {body}

@hookimpl
def lightllm_models():
    return [ModelRecord(name="wrong", target=f"{{__name__}}:Wrong", architectures=("Another",))]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, write_checkpoint(folder, "llama-mqa")


def test_a_right_model_passes(checkpoint: tuple[Path, Any]) -> None:
    folder, model = checkpoint

    def logits(tokens: list[int]) -> Any:
        with torch.no_grad():
            return 3 + model(torch.tensor([tokens])).logits[0].numpy()

    check_model(folder, logits)


WRONG = {
    "alone": "logits = lambda self, hidden: Llama.logits(self, hidden) * 1.01",
    # looks at what else is in the step
    "in a batch of mixed lengths": "wrong = lambda self, batch: [len(batch.tables) > 1 for _ in batch.tables]",
    # takes what comes in a step for all there is
    "with its prefill in chunks": "wrong = lambda self, batch: [1 < n < c for n, c in self.sizes(batch)]",
    "joining a batch that is being decoded": """
    def wrong(self, batch):
        decoding = any(n == 1 < c for n, c in self.sizes(batch))
        return [decoding and n > 16 for n, c in self.sizes(batch)]""",
    # knows only sequences whose last token it has just seen
    "after a prefix-cache hit": """
    last = frozenset()

    def wrong(self, batch):
        sizes = zip(batch.query_lengths, batch.context_lengths, batch.tables)
        found = [n < c and int(table[c - n - 1]) not in self.last for n, c, table in sizes]
        self.last = {*self.last, *batch.slots.tolist()} if max(batch.query_lengths) > 1 else {*batch.slots.tolist()}
        return found""",
    # something stays where a slot was used before
    "after a preemption": """
    used = frozenset()

    def wrong(self, batch):
        found = [any(slot in self.used for slot in part.tolist()) for part in batch.slots.split(batch.query_lengths)]
        self.used = {*self.used, *batch.slots.tolist()}
        return found""",
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_model_is_told_where_it_goes_wrong(checkpoint: tuple[Path, Any], how: str, tmp_path: Path) -> None:
    folder, model = checkpoint
    name = f"wrong_model_{list(WRONG).index(how)}"
    (tmp_path / f"{name}.py").write_text(PLUGIN.format(body=WRONG[how]))
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
