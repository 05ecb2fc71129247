"""A model architecture as anyone would add it: a bag of words that always says the successor of the last token."""

from lightllm import ModelRecord, hookimpl


@hookimpl
def lightllm_models():
    return [ModelRecord(name="tiny", target="tiny_arch.model:Tiny", architectures=("TinyForCausalLM",))]
