from pathlib import Path

from lightllm.testing import check_plugin, serve

import example_plugin


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


def test_the_file_is_there_while_the_server_is_up(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with serve([example_plugin.__name__], options=["--example-plugin-file", str(file)]) as server:
        assert server.process is not None
        assert int(file.read_text()) == server.process.pid
        assert server.chat("Hello", says="Hi.")["choices"][0]["message"]["content"] == "Hi."
    assert not file.exists()


def test_without_the_option_it_does_nothing(tmp_path: Path) -> None:
    with serve([example_plugin.__name__]) as server:
        assert server.chat("Hello", says="Hi.")["choices"][0]["message"]["content"] == "Hi."
