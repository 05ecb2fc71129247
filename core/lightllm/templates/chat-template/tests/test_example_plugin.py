import shutil
from pathlib import Path

from lightllm.testing import Server, check_plugin, serve

import example_plugin

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": " Hi. "},
    {"role": "user", "content": "How are you?"},
]


def prompt(server: Server) -> str:
    tokens = server.http.post("/tokenize", json={"messages": TALK}).json()["tokens"]
    return str(server.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"])


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


def test_a_model_without_a_template_gets_this_one(tmp_path: Path, tiny_llama: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").unlink()
    with serve([example_plugin.__name__], model=folder) as server:
        assert prompt(server).endswith(
            "System: Be kind.\n\nUser: Hello\n\nAssistant: Hi.\n\nUser: How are you?\n\nAssistant:"
        )
        assert server.chat(TALK, max_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3


def test_a_model_with_a_template_keeps_it(tiny_llama: Path) -> None:
    with serve([example_plugin.__name__], model=tiny_llama) as server:
        assert "<|user|>Hello<|end|>" in prompt(server)
