"""A tokenizer trained on the data of a network from scratch, in Gemma's style.

Byte-pair encoding with spaces as U+2581 and unknown characters as bytes, so that any text comes back as it was. The
special tokens begin as Gemma's do; with the chat template a turn is `<|turn>role`, a new line, the text and `<turn|>`.

    tokenizer = from_json(train(texts, 8192))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nemo_diffgemma.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_FEWEST = len(SPECIAL) + len(_BYTES) + 64
CHAT_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' + message.content | trim }}
{{- '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|turn>model\\n' }}
{%- endif %}"""


def train(texts: Iterable[str], size: int) -> str:
    """A tokenizer of at most `size` tokens as JSON, a function of the texts, which are read twice.

    Raises `ConfigurationError` for fewer than bytes and specials.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    if size < _FEWEST:
        raise ConfigurationError(
            f"data.vocabulary_size={size}; a tokenizer needs at least {_FEWEST}: bytes, special tokens and some text"
        )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = _words()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    letters = _most_frequent(texts, size - _FEWEST)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*SPECIAL, *_BYTES],
        show_progress=False,
        initial_alphabet=letters,  # of equally frequent letters the trainer itself would keep any, each time others
        limit_alphabet=len(letters),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_bytes_as_plain_tokens(tokenizer.to_str())


def _most_frequent(texts: Iterable[str], most: int) -> list[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.replace(" ", "▁"))
    return sorted(counts, key=lambda letter: (-counts[letter], letter))[:most]


def _words() -> Any:
    """Pieces that merges do not reach over: a word with the space before it, a run of digits, a line end."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(r"▁?[^▁\n\d]+|\d|▁+|\n"), "isolated")


def _with_bytes_as_plain_tokens(state: str) -> str:
    """The trainer knows bytes as special tokens only, which a decoder would leave out and a text could spell."""
    import json

    values = json.loads(state)
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in SPECIAL]
    return json.dumps(values)


def from_json(state: str) -> PreTrainedTokenizerFast:
    """The tokenizer as Hugging Face has it, <bos> in front of a text, with a chat template."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(state)
    bos = SPECIAL.index("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")},
        extra_special_tokens=["<|turn>", "<turn|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        model_input_names=["input_ids", "attention_mask"],
    )
