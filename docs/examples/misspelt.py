from lightllm import hookimpl


@hookimpl
def lightllm_listener(config):
    return []
