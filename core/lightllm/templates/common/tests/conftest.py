pytest_plugins = ["lightllm.testing"]
