"""The tokenizer says with text what encode_puzzle says with cells."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nemo_diffgemma.data import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    SEP_ID,
    VOCABULARY,
    SudokuDataset,
    SudokuTask,
    build_tokenizer,
    encode_puzzle,
)


@pytest.fixture(scope="module", params=["built", "loaded"])
def tokenizer(request, tmp_path_factory):
    built = build_tokenizer()
    if request.param == "built":
        return built
    folder = tmp_path_factory.mktemp("tokenizer")
    built.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(cells=st.lists(st.integers(0, 4), min_size=16, max_size=16), gaps=st.sampled_from(["", " ", "\n", " \r\n\t"]))
def test_text_of_a_puzzle_encodes_to_its_prompt_however_it_is_laid_out(tokenizer, cells, gaps):
    lines = ["".join(str(digit or ".") for digit in cells[start : start + 4]) for start in range(0, 16, 4)]
    assert tokenizer(gaps.join(lines) + gaps).input_ids == encode_puzzle(cells)


def test_zero_is_a_digit_and_not_an_empty_cell(tokenizer):
    assert tokenizer("0").input_ids == [BOS_ID, VOCABULARY.index("0"), SEP_ID]


def test_a_response_decodes_to_its_digits_and_back(tokenizer):
    for index in range(20):
        response = list(SudokuDataset(SudokuTask())[index].tokens[18:])
        text = tokenizer.decode([*response, EOS_ID, EOS_ID, PAD_ID], skip_special_tokens=True)
        assert len(text) == 16 and text.isdigit()
        assert tokenizer(text, add_special_tokens=False).input_ids == response


def test_the_vocabulary_is_64_different_tokens_and_position_is_id(tokenizer):
    assert len(tokenizer) == len(set(VOCABULARY)) == 64
    assert tokenizer.convert_ids_to_tokens(list(range(64))) == list(VOCABULARY)
    specials = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id)
    assert specials == (PAD_ID, EOS_ID, BOS_ID, SEP_ID) == (0, 1, 2, 3)


def test_every_character_is_one_token_and_survives_a_round_trip(tokenizer):
    text = "".join(VOCABULARY[4:])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == list(range(4, 64))
    assert tokenizer.decode(ids) == text


def test_an_unknown_character_raises_rather_than_becoming_another_puzzle(tokenizer):
    with pytest.raises(Exception, match="Missing"):
        tokenizer("1..4..3.2.....X1")


def test_prompts_of_a_batch_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["12", "1"], padding=True)
    assert batch.input_ids[1][:2] == [PAD_ID, BOS_ID]
    assert batch.attention_mask == [[1, 1, 1, 1], [0, 1, 1, 1]]
