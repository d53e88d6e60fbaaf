"""A text model without a model: a byte-level tokenizer made here, and an engine that answers from a script."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cases import TESTS
from qwen_engine.graph_io import TensorSpec
from qwen_engine.tasks import GENERATE
from qwen_run.runtime.engine import Batch
from qwen_run.runtime.kv_cache import KVCache
from qwen_run.sampling.params import SamplingParams
from qwen_run.text.chat_template import ChatTemplate
from qwen_run.text.text_model import TextModel, end_of_turn_ids
from qwen_run.text.token_text import BYTES_OF_CHARACTERS
from qwen_run.text.tokenizer import Tokenizer

TEMPLATES = TESTS / "data" / "chat_templates"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<工具 x>"]
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("ä", "½"), ("ł", "å"), ("Ċ", "Ċ")]  # some across characters' bytes
ENDOFTEXT, IM_START, IM_END = (len(BYTES_OF_CHARACTERS) + len(MERGES) + i for i in range(3))


def core_tokenizer() -> tokenizers.Tokenizer:
    """256 bytes, a few merges, the special tokens of Qwen, and added tokens that are not special."""
    vocab = [*sorted(BYTES_OF_CHARACTERS), *(left + right for left, right in MERGES)]
    core = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    core.add_tokens(ADDED)
    return core


def write_text_files(directory: Path, template: str = "qwen2_5", **generation_config: object) -> Path:
    """The files of an engine that text goes through."""
    directory.mkdir(parents=True, exist_ok=True)
    core_tokenizer().save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": (TEMPLATES / f"{template}.jinja").read_text("utf-8")}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (directory / "generation_config.json").write_text(json.dumps(generation_config), "utf-8")
    return directory


class Script:
    """An engine that answers each prompt with what ``reply`` makes of its text.

    Like a model it knows of earlier runs only what they wrote to the cache: token id + 1 for every position.
    ``seen`` lists the requests that were made, ``num_runs`` counts runs.
    """

    BLOCK_SIZE = 32

    def __init__(self, tokenizer: Tokenizer, reply: Callable[[str], str], max_seq_len: int) -> None:
        self.tokenizer, self.reply = tokenizer, reply
        self.seen, self.num_runs = [], 0
        self.directory = Path("scripted")
        self.manifest = SimpleNamespace(
            limits=SimpleNamespace(max_seq_len=max_seq_len),
            model=SimpleNamespace(vocab_size=IM_END + len(ADDED) + 1, experts=None),
            parts={},
            task=GENERATE,
        )
        pool = TensorSpec("tokens", "paged_state", "int32", ("num_blocks", self.BLOCK_SIZE))
        self.cache = KVCache([pool], self.BLOCK_SIZE, 16 * -(-max_seq_len // self.BLOCK_SIZE))

    @property
    def is_idle(self) -> bool:
        """No request owns a block."""
        return self.cache.num_free == self.cache.num_blocks

    def run(self, batch: Batch) -> np.ndarray:
        self.num_runs += 1
        pool, logits = self.cache.pools["tokens"], []
        starts, ends = batch.cumulative_lengths[:-1], batch.cumulative_lengths[1:]
        for start, end, past, table in zip(starts, ends, batch.past_lengths, batch.block_table, strict=True):
            for position, token_id in enumerate(batch.input_ids[start:end], start=past):
                pool[table[position // self.BLOCK_SIZE], position % self.BLOCK_SIZE] = token_id + 1
            written = (pool[table].reshape(-1) - 1).tolist()
            wanted = [past + index - start + 1 for index in batch.logits_indices if start <= index < end]
            logits += [self._logits(written[:length]) for length in wanted]
        return np.array(logits, np.float32).reshape(-1, self.manifest.model.vocab_size)

    def answer_to(self, prompt: tuple[int, ...]) -> list[int]:
        return [*self.tokenizer.encode(self.reply(self.tokenizer.decode(prompt, False))), IM_END]

    def _logits(self, tokens: list[int]) -> np.ndarray:
        """Logits that leave no choice but the next token of the answer to the prompt that ``tokens`` begin with."""
        seen = list(self.seen)  # others add to it meanwhile
        prompt = max((r.prompt for r in seen if tuple(tokens[: len(r.prompt)]) == r.prompt), key=len, default=None)
        if prompt is None:  # in the middle of one, whose own tokens are judged
            return np.zeros(self.manifest.model.vocab_size, np.float32)
        answer = self.answer_to(prompt)
        logits = np.zeros(self.manifest.model.vocab_size, np.float32)
        logits[[*answer, *[0] * len(tokens)][len(tokens) - len(prompt)]] = 1000
        return logits


class ScriptedModel(TextModel):
    """A text model that shows its script every request."""

    def new_request(self, prompt, params):
        request = super().new_request(prompt, params)
        self.engine.seen.append(request)
        return request


def scripted_model(
    directory: Path, reply: Callable[[str], str], max_seq_len: int = 4096, raw: bool = False
) -> tuple[TextModel, Script]:
    tokenizer = Tokenizer.load(directory)
    template = None if raw else ChatTemplate.load(directory)
    config = json.loads((directory / "generation_config.json").read_text("utf-8"))
    script = Script(tokenizer, reply, max_seq_len)
    model = ScriptedModel(
        engine=script,
        tokenizer=tokenizer,
        template=template,
        defaults=SamplingParams.from_generation_config(config),
        eos_token_ids=frozenset([ENDOFTEXT]) | (end_of_turn_ids(tokenizer, template) if template else {IM_END}),
    )
    return model, script


def last_question(prompt: str) -> str:
    return re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", prompt, re.DOTALL)[-1]


def shout(prompt: str) -> str:
    return f"«{last_question(prompt).upper()}» 你🤗"


def poison(script: Script, word: str) -> None:
    """Let ``script`` have no numbers for logits once ``word`` is in what it has read, as a key that overflows does."""
    honest = script._logits

    def logits(tokens: list[int]) -> np.ndarray:
        found = honest(tokens)
        return np.full_like(found, np.nan) if word in script.tokenizer.decode(tokens, False) else found

    script._logits = logits
