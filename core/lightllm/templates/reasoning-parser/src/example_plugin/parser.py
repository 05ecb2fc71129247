"""Text comes in pieces, as the model writes it, and leaves as early as it can: only a mark not yet whole is kept."""

from __future__ import annotations

from lightllm import Reasoning, Text
from lightllm.grammar import Fixed, Grammar, Joined, Marker, OneOf, Trigger, Triggered

BEGIN, END = "<<thought>>", "<<end>>"


class ExamplePluginParser:
    """`lightllm.ReasoningParser` and `lightllm.ReasoningGrammar`."""

    def __init__(self, prompt: str) -> None:
        self.unread = ""
        # some chat templates write the first mark themselves
        self.begun = prompt.endswith(BEGIN)
        self.state = "thought" if self.begun else "beginning"  # then "answer"

    def push(self, text: str) -> list[Text | Reasoning]:
        self.unread += text
        return self._read(ended=False)

    def close(self) -> list[Text | Reasoning]:
        return self._read(ended=True)

    def _read(self, ended: bool) -> list[Text | Reasoning]:
        """What the unread text decides. Nothing depends on where a piece of it ended."""
        events: list[Text | Reasoning] = []
        if self.state == "beginning":
            if self.unread.startswith(BEGIN):
                self.unread = self.unread.removeprefix(BEGIN)
                self.state = "thought"
            elif ended or not BEGIN.startswith(self.unread):
                self.state = "answer"
        if self.state == "thought":
            thought, end, rest = self.unread.partition(END)
            if not end and not ended:  # the last characters may be the beginning of the mark
                kept = next(n for n in reversed(range(len(END))) if thought.endswith(END[:n]))
                thought, rest = thought[: len(thought) - kept], thought[len(thought) - kept :]
            if thought:
                events.append(Reasoning(thought))
            self.unread = rest
            if end:
                self.state = "answer"
        if self.state == "answer" and self.unread:
            events.append(Text(self.unread))
            self.unread = ""
        return events

    def grammar(self, answer: Grammar) -> Grammar:
        """For requests that hold the answer to a grammar: any thought may come before it."""
        thought = Triggered((Trigger(Marker(END), answer),), least=1, most=1)
        return thought if self.begun else OneOf((Joined((Fixed(BEGIN), thought)), answer))
