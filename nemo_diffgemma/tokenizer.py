"""Text and token ids: the tokenizer beside a checkpoint, if it has one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.diffusion.generate import Generation
from nemo_diffgemma.json_files import read_object
from nemo_diffgemma.schema import ConfigurationError


class Text:
    """Prompts into ids and ids into text. `directory` is where a checkpoint keeps its tokenizer, or None."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.tokenizer: Any = None
        if directory is not None and (directory / "tokenizer.json").is_file():
            self.tokenizer = _read_tokenizer(directory)

    def encode(self, prompt: str, chat: bool) -> list[int]:
        """Ids of a prompt, in the chat template where there is one and `chat` is true.

        Raises `ConfigurationError` without a tokenizer, and for characters that it does not know.
        """
        if self.tokenizer is None:
            raise ConfigurationError(
                f"{self.directory or 'this checkpoint'} has no tokenizer.json, so it cannot read prompt=...; give "
                "token ids: prompt_ids=[2,10,11]"
            )
        try:
            if chat and self.tokenizer.chat_template:
                turn = [{"role": "user", "content": prompt}]
                return self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
            return self.tokenizer(prompt).input_ids
        except Exception as error:  # the tokenizers library raises nothing more special
            raise ConfigurationError(
                f"the tokenizer of this checkpoint cannot read prompt={prompt!r} ({error}); are all its characters in "
                f"the vocabulary? {self._vocabulary()}"
            ) from None

    def decode(self, ids: Sequence[int]) -> str | None:
        """Text without special tokens; None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.decode(ids, skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One piece of text a token, on one line; the id itself without a tokenizer."""
        if self.tokenizer is None:
            return [str(id) for id in ids]
        return [self.tokenizer.decode([id]).replace("\n", "↵") for id in ids]

    def _vocabulary(self) -> str:
        if len(self.tokenizer) > 1000:
            return ""
        known = sorted(token for token in self.tokenizer.get_vocab() if len(token) == 1)
        return f"They are: {''.join(known)}"


def _read_tokenizer(directory: Path) -> Any:
    """Raises `ConfigurationError` naming the file that is damaged."""
    from transformers import AutoTokenizer

    for file in map(directory.joinpath, ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")):
        if file.is_file():
            read_object(file, ConfigurationError)
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # of the tokenizers library, or whatever a wrong type leads transformers to
        raise ConfigurationError(
            f"the tokenizer in {directory} cannot be read ({' '.join(str(error).split())[:300]}); copy tokenizer.json "
            "and tokenizer_config.json again from the checkpoint"
        ) from None


def tell(found: Generation, prompt: Sequence[int], text: Text, results: Results) -> dict[str, Any]:
    """Show what was generated after one prompt -> the JSON of it."""
    new = found.sequences[0, len(prompt) :].tolist()
    answer = text.decode(new)
    results.show(" ".join(map(str, new)) if answer is None else answer)
    return {
        "sequences": found.sequences.tolist(),
        "text": answer,
        "forwards": found.forwards.tolist(),
        "tokens_per_forward": found.tokens_per_forward.tolist(),
    }
