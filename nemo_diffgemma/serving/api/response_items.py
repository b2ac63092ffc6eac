"""From parts of an answer to the items of a response, and to the events that tell of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from nemo_diffgemma.serving.answer_parts import Part, Said, ToolCall

Event = dict[str, Any]
_TEXT = {  # of an item that grows: the type of its content, and the names of its events
    "message": ("output_text", "response.output_text"),
    "reasoning": ("reasoning_text", "response.reasoning_text"),
}


class Items:
    """`output` are the items so far. The events of `take` and `close`, told in their order, make them again."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._is_open = False  # the last item, which is text

    def take(self, parts: Sequence[Part]) -> Iterator[Event]:
        """More of the answer."""
        for part in parts:
            if isinstance(part, ToolCall):
                yield from self.close()
                yield from self._call(part)
            else:
                yield from self._grow("message" if isinstance(part, Said) else "reasoning", part.text)

    def close(self, status: str = "completed") -> Iterator[Event]:
        """Nothing is added to the item that is open."""
        if not self._is_open:
            return
        self._is_open, item = False, self.output[-1]
        item["status"] = status
        content, name = item["content"][0], _TEXT[item["type"]][1]
        yield self._event(f"{name}.done", content_index=0, text=content["text"], **self._no_logprobs(item))
        yield self._event("response.content_part.done", content_index=0, part=dict(content))
        yield self._about("response.output_item.done")

    def _grow(self, kind: str, text: str) -> Iterator[Event]:
        content_type, name = _TEXT[kind]
        if not self._is_open or self.output[-1]["type"] != kind:
            yield from self.close()
            more: Event = {"role": "assistant"} if kind == "message" else {"summary": []}
            self._begin({"id": _id("msg" if kind == "message" else "rs"), "type": kind, **more, "content": []})
            self._is_open = True
            yield self._about("response.output_item.added")
            content: Event = {"type": content_type, "text": ""}
            if kind == "message":
                content |= {"annotations": [], "logprobs": []}
            self.output[-1]["content"].append(content)
            yield self._event("response.content_part.added", content_index=0, part=dict(content))
        item = self.output[-1]
        item["content"][0]["text"] += text
        yield self._event(f"{name}.delta", content_index=0, delta=text, **self._no_logprobs(item))

    def _call(self, call: ToolCall) -> Iterator[Event]:
        """Calls come whole."""
        item = {"id": _id("fc"), "type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""}
        self._begin(item)
        yield self._about("response.output_item.added")
        self.output[-1] |= {"arguments": call.arguments, "status": "completed"}
        yield self._event("response.function_call_arguments.delta", delta=call.arguments)
        yield self._event("response.function_call_arguments.done", arguments=call.arguments, name=call.name)
        yield self._about("response.output_item.done")

    def _begin(self, item: dict[str, Any]) -> None:
        self.output.append(item | {"status": "in_progress"})

    def _event(self, type: str, **more: Any) -> Event:
        """About what is inside of the last item."""
        return {"type": type, "item_id": self.output[-1]["id"], "output_index": len(self.output) - 1, **more}

    def _about(self, type: str) -> Event:
        """With the last item as it is now."""
        item = self.output[-1]
        if "content" in item:
            item = item | {"content": [dict(content) for content in item["content"]]}
        return {"type": type, "output_index": len(self.output) - 1, "item": dict(item)}

    @staticmethod
    def _no_logprobs(item: dict[str, Any]) -> dict[str, Any]:
        return {"logprobs": []} if item["type"] == "message" else {}


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
