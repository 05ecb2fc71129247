import shutil
from pathlib import Path

import pytest
from lightllm.testing import check_plugin, serve

import example_plugin


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


def test_a_server_finds_the_model(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "tiny")
    options = ["--example-plugin-folder", str(tmp_path)]
    with serve([example_plugin.__name__], model="example-plugin://tiny", options=options) as server:
        assert server.complete("Hello", max_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3


def test_a_name_it_does_not_know_is_said(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    options = ["--example-plugin-folder", str(tmp_path)]
    said = "--model example-plugin://tiny: .* has no model of that name; it has: small"
    with (
        pytest.raises(AssertionError, match=said),
        serve([example_plugin.__name__], model="example-plugin://tiny", options=options),
    ):
        pass
