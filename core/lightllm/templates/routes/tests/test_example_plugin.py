from lightllm.testing import check_plugin, serve

import example_plugin


def test_it_is_a_plugin() -> None:
    check_plugin(example_plugin)


def test_a_server_has_the_route() -> None:
    with serve([example_plugin.__name__], options=["--api-key", "secret"]) as server:
        assert server.http.get("/example-plugin/hello").json() == {"message": "Hello, world!"}
        assert server.http.get("/example-plugin/hello", params={"name": "you"}).json() == {"message": "Hello, you!"}
        refused = server.http.get("/example-plugin/hello", params={"name": " "})
        assert refused.status_code == 400
        assert "name must not be empty" in refused.json()["error"]["message"]
        # the other routes still want the key
        assert server.http.get("/v1/models").status_code == 401
