"""Training data: what an example is, how examples become batches, and the Sudoku task."""

from nemo_diffgemma.data.example import Batches, Example, collate, collate_packed
from nemo_diffgemma.data.packing import PackedBatches
from nemo_diffgemma.data.sudoku import (
    SudokuDataset,
    SudokuTask,
    all_grids,
    decode_response,
    encode_puzzle,
    format_grid,
    is_solution,
    solve,
    solve_rate,
)
from nemo_diffgemma.data.sudoku_tokenizer import BOS_ID, EOS_ID, PAD_ID, SEP_ID, VOCABULARY, build_tokenizer

__all__ = [
    "BOS_ID",
    "EOS_ID",
    "PAD_ID",
    "SEP_ID",
    "VOCABULARY",
    "Batches",
    "Example",
    "PackedBatches",
    "SudokuDataset",
    "SudokuTask",
    "all_grids",
    "build_tokenizer",
    "collate",
    "collate_packed",
    "decode_response",
    "encode_puzzle",
    "format_grid",
    "is_solution",
    "solve",
    "solve_rate",
]
