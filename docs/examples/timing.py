"""Logs how long each request took: a plugin in one file."""

import logging

from lightllm import Listener, hookimpl

log = logging.getLogger("lightllm.timing")


def on_finish(facts):
    log.info("%s: %d tokens in %.1f s", facts["endpoint"], facts["completion_tokens"], facts["duration"])


@hookimpl
def lightllm_listeners(config):
    return [Listener(name="timing", on_finish=on_finish)]
