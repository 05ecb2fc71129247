from lightllm import hookimpl

lightllm_requires = ">=7"


@hookimpl
def lightllm_listeners(config):
    return []
