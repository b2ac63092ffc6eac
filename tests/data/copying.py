"""A second kind of data, as anyone would add one: repeat the prompt. With its line in `KINDS` it is complete."""

from dataclasses import dataclass
from random import Random

from nemo_diffgemma.data import Example
from nemo_diffgemma.data.tasks import DataGroup, Task


@dataclass
class CopyData(DataGroup):
    kind: str = "copy"
    length: int = 4


class Copy(Task):
    keys, eos_token_id, pad_token_id = CopyData, 1, 0

    def training_example(self, seed, index):
        letters = tuple(Random(f"{seed} {index}").choices(range(5, 15), k=self.data.length))
        return Example(letters * 2, ((len(letters), 2 * len(letters)),), sample=index)

    def held_out_examples(self, wanted=None):
        return [self.training_example(-1, index) for index in range(wanted or 8)]
