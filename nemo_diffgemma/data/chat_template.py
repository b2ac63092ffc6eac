"""Conversations as token ids, and which of them are answers: found through the tokenizer's own chat template.

    template = ChatTemplate(tokenizer, end_ids={1, 106})
    template.encode(conversation)       # Encoded(tokens=[2, 105, ...], answers=[(9, 31), (44, 70)], note="")

A template with generation marks says itself what is an answer. Otherwise an answer begins behind what the template
gives for the messages before it when asked to generate, and ends where the rendering of these messages and itself ends;
both are compared with the whole conversation token by token. By that a template is noticed that rewrites earlier turns
(leaves thoughts out of the history, say): then the last answer alone is known to be what generation would see.

Some templates open a turn with more when they generate than they keep in the history (DiffusionGemma's own: an empty
thought channel where thinking is off). The context of the last answer is what generation sees, opening included;
answers before it have the context that the history has.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from nemo_diffgemma.data.bad_rows import RowError
from nemo_diffgemma.data.conversations import Conversation

REWRITTEN = "the template rewrites earlier turns: the last answer alone is supervised"
MERGED = "tokens reach over the beginning of an earlier answer: the last answer alone is supervised"
OPENED = "generation opens a turn with more than the history keeps: so does the last one alone"
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
        added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self.added = re.compile("(" + "|".join(map(re.escape, added)) + ")") if added else None

    def encode(self, conversation: Conversation) -> Encoded:
        """Raises `RowError` where the template refuses the conversation, drops a text or shows no answer."""
        last = conversation.answers[-1]
        conversation = replace(conversation, messages=conversation.messages[: last + 1])
        rendering = self._as_read(conversation)
        encoded = self._by_marks(rendering) if self.has_marks else self._by_prefixes(rendering)
        if not encoded.answers:
            raise RowError("no supervised token", "no answer can be told from the rest")
        end = encoded.answers[-1][1]
        return replace(encoded, tokens=encoded.tokens[:end])

    # -- rendering -----------------------------------------------------------------------------------------------

    def render(self, conversation: Conversation, messages: int | None = None, generate: bool = False) -> str:
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

    def ids(self, text: str) -> list[int]:
        try:
            return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the tokenizers library raises nothing more special
            raise RowError("unknown characters", " ".join(str(error).split())) from None

    def _as_read(self, conversation: Conversation) -> Rendering:
        """With contents as the template reads them: as text, or as parts. Raises where it reads neither."""
        parts = [
            message | {"content": [{"type": "text", "text": message["content"]}]} for message in conversation.messages
        ]
        problem = RowError("dropped by the template", "a message's text is not in what it renders")
        for index, form in enumerate((conversation, replace(conversation, messages=parts))):
            rendering = Rendering(self, form)
            try:
                rendered = _without_spaces(rendering.text())
            except RowError as error:
                problem = error if index == 0 else problem
                continue
            given = [message["content"] for message in conversation.messages if message["role"] != "assistant"]
            prints_parts = index == 1 and "{'type':" in rendered  # as Python writes them
            if not prints_parts and all(_without_spaces(text) in rendered for text in given):
                return rendering
        raise problem

    # -- with generation marks -----------------------------------------------------------------------------------

    def _by_marks(self, rendering: Rendering) -> Encoded:
        """Tokens that begin inside of a mark.

        The mask that transformers makes leaves out the last bytes of a character that the vocabulary spells in bytes.
        """
        text, marks = self._marked(rendering.conversation)
        try:
            made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except Exception as error:
            raise RowError("unknown characters", " ".join(str(error).split())) from None
        tokens, begins = made.input_ids, [begin for begin, _ in made.offset_mapping]
        answers = []
        for first, last in marks:
            start, end = bisect.bisect_left(begins, first), bisect.bisect_left(begins, last)
            if 0 < start < end:
                answers.append((start, self._with_end(tokens, end)))
        encoded = Encoded(tokens, answers)
        last = rendering.conversation.answers[-1]
        return self._opened_as_generated(encoded, rendering.ids(last, generate=True)) if answers else encoded

    def _marked(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and which of its characters are inside of generation marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        more = {"enable_thinking": True} if conversation.has_reasoning else {}
        try:
            rendered: Any = render_jinja_template(
                conversations=[conversation.messages],
                tools=cast(Any, conversation.tools),
                chat_template=self.tokenizer.get_chat_template(None, conversation.tools),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **more},
            )
        except Exception as error:
            raise RowError("refused by the template", f"{type(error).__name__}: {error}") from None
        (text,), (marks,) = rendered
        return text, [(first, last) for first, last in marks if first < last]

    # -- by prefixes ---------------------------------------------------------------------------------------------

    def _by_prefixes(self, rendering: Rendering) -> Encoded:
        tokens, (*earlier, last) = rendering.ids(), rendering.conversation.answers
        answers, note = [], ""
        for index in earlier:
            before = rendering.conversation.messages[:index]
            is_greeting = all(message["role"] != "user" for message in before)
            try:
                span = self._span(rendering, index)
            except RowError:
                if not is_greeting:
                    raise
                continue  # the template has nothing to generate from
            if span is not None:
                answers.append(span)
            elif not is_greeting:
                merges = rendering.text().startswith(rendering.text(index + 1).rstrip())
                note, answers = MERGED if merges else REWRITTEN, []
                break
        span = self._span(rendering, last)
        prompt_text, prompt = rendering.text(last, generate=True), rendering.ids(last, generate=True)
        if span is not None:
            encoded = self._opened_as_generated(Encoded(tokens, [*answers, span]), prompt)
        elif rendering.text().startswith(prompt_text):  # tokens reach over the boundary, which generation does not see
            whole = prompt + self.ids(rendering.text()[len(prompt_text) :])
            same = [answer for answer in answers if whole[: answer[1]] == tokens[: answer[1]]]
            encoded = Encoded(whole, [*same, (len(prompt), self._end(whole, len(prompt)))])
        else:
            raise RowError("no supervised token", "the last answer cannot be told from what comes before it")
        return replace(encoded, note=note or encoded.note)

    def _span(self, rendering: Rendering, index: int) -> tuple[int, int] | None:
        """Where the answer that is message `index` lies among all tokens; None where it cannot be said."""
        through, tokens = rendering.ids(index + 1), rendering.ids()
        start = self._start(rendering, index)
        if not start:
            return None
        end = self._end(through, start)
        return (start, self._with_end(tokens, end)) if end > start and tokens[:end] == through[:end] else None

    def _start(self, rendering: Rendering, index: int) -> int | None:
        """How many tokens of the conversation that ends with message `index` are before that answer."""
        through, prompt = rendering.ids(index + 1), None
        if index > 0:
            prompt = rendering.ids(index, generate=True)
            if rendering.text(index + 1).startswith(rendering.text(index, generate=True)):
                return len(prompt) if through[: len(prompt)] == prompt else None
        header = self._header(rendering.conversation, index)
        if header is None or through[: len(header)] != header:
            return None
        return len(header) if prompt is None or prompt[: len(header)] == header else None

    def _header(self, conversation: Conversation, index: int) -> list[int] | None:
        """What the history has before the content of message `index`: what two contents have in common."""
        begins = []
        for letter in "ab":
            content: Any = letter
            if not isinstance(conversation.messages[index]["content"], str):
                content = [{"type": "text", "text": letter}]
            messages = [*conversation.messages[:index], {"role": "assistant", "content": content}]
            try:
                begins.append(self.ids(self.render(replace(conversation, messages=messages))))
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


class Rendering:
    """A conversation through a template: each text and its tokens are made once.

    Prefixes of a conversation are as many as its turns, and as long. What stands between added tokens is tokenised by
    itself in most tokenizers; where that gives the tokens of the whole conversation, each such piece is tokenised once.
    """

    def __init__(self, template: ChatTemplate, conversation: Conversation) -> None:
        self.template, self.conversation = template, conversation
        self._texts: dict[tuple[int, bool], str] = {}
        self._ids: dict[tuple[int, bool], list[int]] = {}
        self._pieces: dict[str, list[int]] = {}
        self._has_pieces = True

    def text(self, messages: int | None = None, generate: bool = False) -> str:
        """Of the first `messages` (None: all), with what `generate` puts behind them."""
        key = (len(self.conversation.messages) if messages is None else messages, generate)
        if key not in self._texts:
            self._texts[key] = self.template.render(self.conversation, *key)
        return self._texts[key]

    def ids(self, messages: int | None = None, generate: bool = False) -> list[int]:
        """Its tokens."""
        key = (len(self.conversation.messages) if messages is None else messages, generate)
        whole = (len(self.conversation.messages), False)
        if whole not in self._ids:
            self._ids[whole] = self.template.ids(self.text(*whole))
            self._has_pieces = self._by_pieces(self.text(*whole)) == self._ids[whole]
        if key not in self._ids:
            text = self.text(*key)
            self._ids[key] = self._by_pieces(text) if self._has_pieces else self.template.ids(text)
        return self._ids[key]

    def _by_pieces(self, text: str) -> list[int]:
        tokens: list[int] = []
        for piece in self.template.added.split(text) if self.template.added else [text]:
            if piece not in self._pieces:
                self._pieces[piece] = self.template.ids(piece) if piece else []
            tokens += self._pieces[piece]
        return tokens


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _without_spaces(text: str) -> str:
    """Templates strip texts, and wrap them; they do not change their words."""
    return "".join(text.split())
