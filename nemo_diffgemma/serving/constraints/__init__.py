"""Answers that must be of a language: regex, choice, JSON of a schema, calls of tools.

No torch: a front end may refuse with it.

    with Compiler(Vocabulary(bytes_of_tokens(tokenizer), config.vocab_size, sampler.eos_ids)) as compiler:
        constraint = Constraint(compiler.compile(json_of_schema({"type": "object"})))
    model.generate(input_ids, constraints=[constraint])

From a language to a token: `languages` and what they are made of (`patterns`, `json_schema`) give a regular
expression, `byte_automaton` and `token_automaton` what tokens may follow each other, `sequence` how far an answer has
come, `canvas` and `paths` the most probable canvas that is allowed.
"""

from nemo_diffgemma.serving.constraints.compiler import Compiler
from nemo_diffgemma.serving.constraints.constraint import Constraint
from nemo_diffgemma.serving.constraints.errors import ConstraintError, ConstraintViolation
from nemo_diffgemma.serving.constraints.languages import (
    Language,
    after_thought,
    choice,
    json_object,
    json_of_schema,
    regex,
    tool_calls,
)
from nemo_diffgemma.serving.constraints.token_bytes import bytes_of_tokens
from nemo_diffgemma.serving.constraints.worker import Limits, Vocabulary

__all__ = ["Compiler", "Constraint", "ConstraintError", "ConstraintViolation", "Language", "Limits", "Vocabulary",
           "after_thought", "bytes_of_tokens", "choice", "json_object", "json_of_schema", "regex",
           "tool_calls"]  # fmt: skip
