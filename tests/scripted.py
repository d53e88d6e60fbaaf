"""A text model without a model: a byte-level tokenizer made here, and a generate() that answers from a script."""

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from qwen_engine.errors import RequestError
from qwen_run.chat import ChatTemplate
from qwen_run.generate import Token
from qwen_run.sampling import SamplingParams
from qwen_run.text import TextModel, end_of_turn_ids
from qwen_run.tokenizer import BYTES_OF_CHARACTERS, Tokenizer

TEMPLATES = Path(__file__).parent / "data" / "chat_templates"
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
    """Answers each prompt with what ``reply`` makes of its text; requests take turns, one token each.

    ``open`` counts the answers under way, ``seen`` lists the requests.
    """

    def __init__(self, tokenizer: Tokenizer, reply: Callable[[str], str], max_seq_len: int) -> None:
        self.tokenizer, self.reply, self.max_seq_len = tokenizer, reply, max_seq_len
        self.open, self.seen, self.generators = 0, [], []

    def check(self, request):
        if len(request.prompt) >= self.max_seq_len:
            raise RequestError(f"the prompt has {len(request.prompt)} tokens, the engine takes {self.max_seq_len - 1}")

    def generate(self, requests, keep_logits=False):
        # kept, so that only close() ends one, not the end of its last reference
        self.generators.append(self._generate(requests, keep_logits))
        return self.generators[-1]

    def _generate(self, requests, keep_logits):
        self.open += 1
        self.seen += requests
        try:
            scripts = [partial(self._tokens, request, keep_logits)(i) for i, request in enumerate(requests)]
            for round_ in itertools.zip_longest(*scripts):
                yield from (token for token in round_ if token is not None)
        finally:
            self.open -= 1

    def _tokens(self, request, keep_logits, index):
        import numpy as np

        ids = [*self.tokenizer.encode(self.reply(self.tokenizer.decode(request.prompt, False))), IM_END]
        for count, token_id in enumerate(ids, start=1):
            reason = "stop" if token_id == IM_END else "length" if count == request.params.max_tokens else None
            row = np.full(5, token_id, np.float32) if keep_logits else None
            yield Token(index, token_id, reason, row)
            if reason:
                return


def scripted_model(
    directory: Path, reply: Callable[[str], str], max_seq_len: int = 4096, raw: bool = False
) -> tuple[TextModel, Script]:
    tokenizer = Tokenizer.load(directory)
    template = None if raw else ChatTemplate.load(directory)
    config = json.loads((directory / "generation_config.json").read_text("utf-8"))
    script = Script(tokenizer, reply, max_seq_len)
    model = TextModel(
        generate=script.generate,
        check=script.check,
        tokenizer=tokenizer,
        template=template,
        defaults=SamplingParams.from_generation_config(config),
        eos_token_ids=frozenset([ENDOFTEXT]) | end_of_turn_ids(tokenizer, template),
        max_seq_len=max_seq_len,
    )
    return model, script
