"""A model architecture for tests: it writes what its prompt tells it to, token by token."""

from lightllm import ModelRecord, hookimpl


@hookimpl
def lightllm_models():
    return [
        ModelRecord(name="scripted", target="scripted_model.model:Scripted", architectures=("ScriptedForCausalLM",))
    ]
