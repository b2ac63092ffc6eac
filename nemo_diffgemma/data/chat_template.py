"""Conversations as token ids, and which of them are answers: found through the tokenizer's own chat template.

    template = ChatTemplate(tokenizer, end_ids={1, 106})
    template.encode(conversation)       # Encoded(tokens=[2, 105, ...], answers=[(9, 31), (44, 70)], note="")

A template with generation marks says itself what is an answer. Otherwise an answer begins behind what the template
gives for the messages before it when asked to generate, and ends where the rendering of these messages and itself ends;
both are compared with the whole conversation token by token. A template that rewrites earlier turns (leaves thoughts out
of the history, say) is noticed by that: then the last answer alone is known to be what generation would see.

Some templates open a turn with more when they generate than they keep in the history (DiffusionGemma's own: an empty
thought channel where thinking is off). The context of the last answer is what generation sees, opening included;
answers before it have the context that the history has.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_diffgemma.data.bad_rows import RowError
from nemo_diffgemma.data.conversations import Conversation

REWRITTEN, OPENED = "earlier turns are rewritten", "turns are opened otherwise in generation"
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """Tokens of a conversation up to the end of its last answer; `note` is what a reader of the data should know."""

    tokens: list[int]
    answers: list[tuple[int, int]]
    note: str = ""


class ChatTemplate:
    """The chat template of a tokenizer. `end_ids` are the tokens at which generation stops."""

    def __init__(self, tokenizer: Any, end_ids: Collection[int]) -> None:
        self.tokenizer, self.end_ids = tokenizer, frozenset(end_ids)
        self.has_marks = _MARK.search(str(tokenizer.chat_template)) is not None
        self._special = self.end_ids | set(tokenizer.all_special_ids)
        self._special |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}

    def encode(self, conversation: Conversation) -> Encoded:
        """Raises `RowError` where the template refuses the conversation, drops a text or shows no answer."""
        last = conversation.answers[-1]
        conversation = replace(conversation, messages=conversation.messages[: last + 1])
        conversation = self._as_read(conversation)
        encoded = self._by_marks(conversation) if self.has_marks else self._by_prefixes(conversation)
        if not encoded.answers:
            raise RowError("no supervised token", "no answer can be told from the rest")
        end = encoded.answers[-1][1]
        return replace(encoded, tokens=encoded.tokens[:end])

    # -- rendering -----------------------------------------------------------------------------------------------

    def _render(self, conversation: Conversation, messages: int | None = None, generate: bool = False) -> str:
        """Text of the first `messages` (None: all)."""
        more = {"enable_thinking": True} if conversation.has_reasoning else {}
        try:
            return self.tokenizer.apply_chat_template(
                conversation.messages[:messages],
                tools=conversation.tools,
                add_generation_prompt=generate,
                tokenize=False,
                **more,
            )
        except Exception as error:  # a template is a program, and raises what it likes
            raise RowError("refused by the template", f"{type(error).__name__}: {error}") from None

    def _ids(self, text: str) -> list[int]:
        try:
            return self.tokenizer(text, add_special_tokens=False).input_ids
        except Exception as error:  # the tokenizers library raises nothing more special
            raise RowError("unknown characters", " ".join(str(error).split())) from None

    def _as_read(self, conversation: Conversation) -> Conversation:
        """With contents as the template reads them: as text, or as parts. Raises where it reads neither."""
        parts = [
            message | {"content": [{"type": "text", "text": message["content"]}]} for message in conversation.messages
        ]
        problem = RowError("dropped by the template", "a message's text is not in what it renders")
        for index, form in enumerate((conversation, replace(conversation, messages=parts))):
            try:
                rendered = _without_spaces(self._render(form))
            except RowError as error:
                problem = error if index == 0 else problem
                continue
            given = [message["content"] for message in conversation.messages if message["role"] != "assistant"]
            prints_parts = index == 1 and "{'type':" in rendered  # as Python writes them
            if not prints_parts and all(_without_spaces(text) in rendered for text in given):
                return form
        raise problem

    # -- with generation marks -----------------------------------------------------------------------------------

    def _by_marks(self, conversation: Conversation) -> Encoded:
        more = {"enable_thinking": True} if conversation.has_reasoning else {}
        try:
            marked = self.tokenizer.apply_chat_template(
                conversation.messages,
                tools=conversation.tools,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **more,
            )
        except Exception as error:
            raise RowError("refused by the template", f"{type(error).__name__}: {error}") from None
        tokens, mask, position = marked["input_ids"], marked["assistant_masks"], 0
        answers = []
        for is_answer, run in itertools.groupby(mask):
            begin, position = position, position + len(list(run))
            if is_answer and begin > 0:
                answers.append((begin, self._with_end(tokens, position)))
        encoded = Encoded(tokens, answers)
        prompt = self._ids(self._render(conversation, -1, generate=True))
        return self._opened_as_generated(encoded, prompt) if answers else encoded

    # -- by prefixes ---------------------------------------------------------------------------------------------

    def _by_prefixes(self, conversation: Conversation) -> Encoded:
        text = self._render(conversation)
        tokens, (*earlier, last) = self._ids(text), conversation.answers
        answers, notes = [], set()
        for index in earlier:
            is_greeting = all(message["role"] != "user" for message in conversation.messages[:index])
            try:
                span = self._span(conversation, index, tokens)
            except RowError:
                if not is_greeting:
                    raise
                continue  # the template has nothing to generate from
            if span is not None:
                answers.append(span)
            elif not is_greeting:
                notes.add(REWRITTEN)
        if REWRITTEN in notes:
            answers = []
        span = self._span(conversation, last, tokens)
        prompt_text = self._render(conversation, last, generate=True)
        prompt = self._ids(prompt_text)
        if span is not None:
            encoded = self._opened_as_generated(Encoded(tokens, [*answers, span]), prompt)
        elif text.startswith(prompt_text):  # tokens grow together over the boundary, which generation does not see
            whole = prompt + self._ids(text[len(prompt_text) :])
            same = [answer for answer in answers if whole[: answer[1]] == tokens[: answer[1]]]
            encoded = Encoded(whole, [*same, (len(prompt), self._end(whole, len(prompt)))])
        else:
            raise RowError("no supervised token", "the last answer cannot be told from what comes before it")
        return replace(encoded, note=REWRITTEN if notes else encoded.note)

    def _span(self, conversation: Conversation, index: int, tokens: Sequence[int]) -> tuple[int, int] | None:
        """Where the answer that is message `index` lies in `tokens`; None where it cannot be said."""
        prompt = self._ids(self._render(conversation, index, generate=True))
        through = self._ids(self._render(conversation, index + 1))
        start = len(prompt)
        if through[:start] != prompt:
            header = self._header(conversation, index)
            if header is None or prompt[: len(header)] != header or through[: len(header)] != header:
                return None
            start = len(header)
        end = self._end(through, start)
        if end <= start or start == 0 or list(tokens[:end]) != through[:end]:
            return None
        return start, self._with_end(tokens, end)

    def _header(self, conversation: Conversation, index: int) -> list[int] | None:
        """What the history has before the content of message `index`: what two contents have in common."""
        begins = []
        for letter in "ab":
            content: Any = letter
            if not isinstance(conversation.messages[index]["content"], str):
                content = [{"type": "text", "text": letter}]
            messages = [*conversation.messages[:index], {"role": "assistant", "content": content}]
            try:
                begins.append(self._ids(self._render(replace(conversation, messages=messages))))
            except RowError:
                return None
        common = _common(*begins)
        return begins[0][:common] if common < min(map(len, begins)) else None

    def _end(self, tokens: Sequence[int], start: int) -> int:
        """Where the answer from `start` on ends: behind its last special token, if only white space follows that."""
        end = len(tokens)
        while end > start and tokens[end - 1] not in self._special:
            if self.tokenizer.decode([tokens[end - 1]]).strip():
                return len(tokens)
            end -= 1
        return end if end > start else len(tokens)

    def _with_end(self, tokens: Sequence[int], end: int) -> int:
        """`end`, or behind the token there if that is one at which generation stops and none was before."""
        stops = end < len(tokens) and tokens[end] in self.end_ids and tokens[end - 1] not in self.end_ids
        return end + 1 if stops else end

    # -- the context of generation -------------------------------------------------------------------------------

    def _opened_as_generated(self, encoded: Encoded, prompt: list[int]) -> Encoded:
        """With what generation puts before the last answer, where the history begins the same and has less of it."""
        *earlier, (start, end) = encoded.answers
        opening = prompt[start:]
        if not opening or prompt[:start] != encoded.tokens[:start]:
            return encoded
        tokens = [*prompt, *encoded.tokens[start:]]
        return Encoded(tokens, [*earlier, (len(prompt), end + len(opening))], OPENED if earlier else "")


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _without_spaces(text: str) -> str:
    """Templates strip texts, and wrap them; they do not change their words."""
    return "".join(text.split())
