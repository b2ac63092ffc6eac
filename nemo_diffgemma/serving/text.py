"""Prompts into ids and ids into text, in processes without torch.

transformers reads a tokenizer's files in the replica, which sends what it has made of them; here the same tokenizer
runs without transformers, whose import brings torch along.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.serving.constraints.errors import ConstraintError
from nemo_diffgemma.serving.constraints.token_bytes import byte_reader, marked, special_tokens
from nemo_diffgemma.serving.markers import Markers
from nemo_diffgemma.serving.messages import TextFiles

if TYPE_CHECKING:
    from nemo_diffgemma.tokenizer import Text


def files_of(text: Text) -> TextFiles | None:
    """What another process needs of a checkpoint's tokenizer; None without one."""
    if text.tokenizer is None:
        return None
    template = text.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    special = {name: str(token) for name, token in text.tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return TextFiles(text.tokenizer.backend_tokenizer.to_str(), template, special)


def fingerprint(files: TextFiles | None) -> str:
    """Equal for equal tokenizers and templates; empty without."""
    if files is None:
        return ""
    parts = (files.tokenizer, files.template, sorted(files.special_tokens.items()))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class ServedText:
    """The tokenizer and chat template of a model. Its methods may be called from any thread."""

    def __init__(self, files: TextFiles) -> None:
        self._tokenizer = Tokenizer.from_str(files.tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._special_tokens = files.special_tokens
        self.markers = special_tokens(self._tokenizer)  # ids that are no text, with their names
        self.part_markers = Markers.of(self._tokenizer.token_to_id)
        self._template, self.variables = None, frozenset[str]()  # of the template
        if files.template is not None:
            environment = _environment()
            self._template = environment.from_string(files.template)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(files.template)))
        self.piece = functools.lru_cache(65536)(lambda id: self.decode([id]))  # what a token alone says
        self._bytes = _byte_reader(files)

    @property
    def takes_conversations(self) -> bool:
        """Whether there is a chat template; without, a prompt is one text."""
        return self._template is not None

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Raises `UserError` for characters that the tokenizer does not know."""
        try:
            text.encode("utf-8")
            # as a batch: alone, the library keeps Python's lock for seconds of a long text, and everybody waits
            return self._tokenizer.encode_batch([text], add_special_tokens=special_tokens)[0].ids
        except Exception as error:  # the tokenizers library raises nothing more special
            raise UserError(f"this model's tokenizer cannot read the text: {error}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens, and without Gemma's markers if a tokenizer calls them ordinary."""
        return self._tokenizer.decode([id for id in ids if id not in self.markers], skip_special_tokens=True)

    def decode_marked(self, ids: Sequence[int]) -> str:
        """Text in which a special token is its name between two U+0001, as `constraints.Language.check` reads it."""
        runs = itertools.groupby(ids, key=self.markers.get)
        return "".join(self.decode(list(run)) if name is None else marked(name) * len(list(run)) for name, run in runs)

    def token(self, id: int) -> tuple[str, bytes | None]:
        """A token's text and bytes, as OpenAI's log-probabilities show them: bytes joined are the answer's text.

        Text of which some bytes belong to a neighbour is `bytes:\\xe2\\x82`. What adds nothing to a text, as special
        tokens do, has a name and no bytes.
        """
        name = self._tokenizer.id_to_token(id)
        content = self._bytes(name) if name is not None else b""
        if not content:
            return name if name is not None else f"token_id:{id}", None
        try:
            return content.decode(), content
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content), content

    def encode_chat(self, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any] | None = None) -> list[int]:
        """Ids of a conversation with the answer's beginning behind it. `variables` are the template's: tools, others.

        A model without a template gets the text of a single message of the user's as it is. Raises `UserError` for
        what the template refuses, and for conversations where there is none.
        """
        if self._template is not None:
            try:
                prompt = self._template.render(
                    {**self._special_tokens, **(variables or {})}, messages=messages, add_generation_prompt=True
                )
            except Exception as error:  # a template is a program, and raises what it likes
                raise UserError(f"the chat template of this model does not take these messages: {error}") from None
            return self.encode(prompt, special_tokens=False)
        if len(messages) != 1 or messages[0]["role"] != "user" or (variables or {}).get("tools"):
            raise UserError(
                "this model has no chat template; send one message of the user's and no tools, or use /v1/completions"
            )
        return self.encode(messages[0]["content"])


def _byte_reader(files: TextFiles) -> Callable[[str], bytes]:
    """Bytes of a token by its name: none for special tokens, nor where a tokenizer adds or drops spaces between any."""
    described = json.loads(files.tokenizer)
    special = {token["content"] for token in described["added_tokens"] if token["special"]}
    try:
        read = byte_reader(described["decoder"])
    except ConstraintError:
        return lambda name: b""
    return lambda name: b"" if name in special else read(name)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks answers for training; here what is inside."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers.utils.chat_template_utils has it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment
