"""Characters as tokens: the 64-entry vocabulary of the Sudoku task, also as a Hugging Face tokenizer.

Text and cells give the same prompt: `build_tokenizer()("1..4 ..3. 2... ...1").input_ids` is
`encode_puzzle([1, 0, 0, 4, 0, 0, 3, 0, 2, 0, 0, 0, 0, 0, 0, 1])`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Sudoku needs the specials, '.' and digits; the rest makes a round 64 that other character tasks (sums, sorting) use.
# Position is id. '<' and '>' stay out: they could be mistaken for the start of a special token.
VOCABULARY: tuple[str, ...] = (
    *("<pad>", "<eos>", "<bos>", "<sep>"),
    *".0123456789",
    *"abcdefghijklmnopqrstuvwxyz",
    *"+-*/=,;:!?'\"()[]{}|_#%&",
)
PAD_ID, EOS_ID, BOS_ID, SEP_ID = range(4)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """The vocabulary as a tokenizer: one token a character, <bos> in front, <sep> behind, whitespace dropped.

    Dropping whitespace lets a puzzle be pasted as four lines. A character outside the vocabulary raises `Exception`
    when encoded (that is what the tokenizers library raises): an unknown cell has no honest substitute. Pads on the
    left, as prompts of a batch are padded for generation.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: id for id, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids))  # no unk_token: an unknown character raises
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <sep>", special_tokens=[("<bos>", BOS_ID), ("<sep>", SEP_ID)]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        sep_token="<sep>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def is_sudoku(tokenizer: Any) -> bool:
    """Whether a checkpoint's tokenizer is this one, so that its network reads puzzles and writes grids.

    A chat template means that the characters were trained to say something else.
    """
    return tokenizer.chat_template is None and tokenizer.get_vocab() == {
        token: id for id, token in enumerate(VOCABULARY)
    }
