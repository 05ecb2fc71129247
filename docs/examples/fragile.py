"""A tool parser that fails at what it does not expect."""

from lightllm import Text, ToolParserRecord, hookimpl


@hookimpl
def lightllm_tool_parsers():
    return [ToolParserRecord(name="fragile", target="fragile:Fragile")]


class Fragile:
    def __init__(self, tools):
        pass

    def push(self, text):
        if "<" in text:
            raise NotImplementedError("what does < mean?")
        return [Text(text)]

    def close(self):
        return []
