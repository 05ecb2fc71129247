from lightllm.testing import check_plugin, serve

import example_plugin
from example_plugin import ExamplePluginCounts


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


def test_it_counts() -> None:
    counts = ExamplePluginCounts()
    counts.on_request({})
    counts.on_request({})
    counts.on_finish({"status": "ok", "completion_tokens": 7})
    assert (counts.requests, counts.running, counts.tokens) == (2, 1, 7)


def test_a_server_tells_it_of_its_requests() -> None:
    with serve([example_plugin.__name__]) as server:
        used = [server.chat("Hello", says=says)["usage"]["completion_tokens"] for says in ("Hi.", "Good evening!")]
    assert f"ok: requests 1, running 0, tokens {used[0]}\n" in server.log
    assert f"ok: requests 2, running 0, tokens {sum(used)}\n" in server.log
