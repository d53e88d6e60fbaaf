"""Advice that the Python interfaces give: each call is refused with it, and goes well when it is followed."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from cases.advice import not_followed, stale, typed
from cases.calibration import with_tokenizer
from cases.scripted import poison, scripted_model, write_text_files
from qwen_build.cli import main as build
from qwen_engine.errors import EngineError, QwenError
from qwen_engine.manifest import Manifest
from qwen_run import LLM, AsyncLLM, QwenForCausalLM, RequestOutput, SamplingParams
from qwen_run.api.causal_lm import EngineForCausalLM
from qwen_run.runtime.kv_cache import KVCache

TINY = "engines/tiny"
IDS = [5, 6, 7]
ROW = torch.tensor([IDS])
HI = [{"role": "user", "content": "hi"}]
STEPS = SamplingParams(temperature=0, max_tokens=2)


class Call(NamedTuple):
    """``wrong`` is refused and says ``advice``; ``right`` does what it says. Both take what ``at_hand`` has."""

    wrong: Callable[[Any], object]
    advice: str
    right: Callable[[Any], object]


def beams(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "num_beams": 2} | options)


PARAMS = [
    Call(lambda _: beams(temperature=1), "; set temperature to 0", lambda _: beams(temperature=0)),
    Call(lambda _: beams(logprobs=1), "beam search reports scores only; leave one out", lambda _: beams()),
    Call(lambda _: beams(stop=["x"]), "; use stop_token_ids", lambda _: beams(stop_token_ids=[1])),
    Call(lambda _: SamplingParams(length_penalty=2), "; set num_beams to 2 or more",
         lambda _: beams(length_penalty=2)),
    Call(lambda _: SamplingParams(stop="x", detokenize=False), "stop texts are found in the text; leave one out",
         lambda _: SamplingParams(stop="x")),
    Call(lambda _: beams(structured_outputs={"json": {}}), "and ends by itself; leave them out",
         lambda _: SamplingParams(structured_outputs={"json": {}})),
    Call(lambda _: beams(thinking_token_budget=3), "; leave one out",
         lambda _: SamplingParams(thinking_token_budget=3)),
    Call(lambda _: beams(allowed_token_ids=[1]), "; leave one out", lambda _: SamplingParams(allowed_token_ids=[1])),
]  # fmt: skip
LLMS = [
    Call(lambda _: LLM("engines/absent"), "; make it with qwen-build, whose --output names it",
         lambda _: (typed(build, "C --output engines/absent"), LLM("engines/absent"))),
    Call(lambda _: LLM(TINY, quant="int4"), "cannot change it any more; give the checkpoint instead",
         lambda _: LLM("C", quant="int4")),
    Call(lambda _: LLM(TINY, max_num_seqs=2, max_batch_size=2), "are one option; give one of them",
         lambda _: LLM(TINY, max_num_seqs=2)),
    Call(lambda _: LLM(TINY, max_batch_size=9, max_batch_tokens=8), "; change one of them",
         lambda _: LLM(TINY, max_batch_size=8, max_batch_tokens=8)),
    Call(lambda _: LLM(TINY, num_blocks=4, max_seq_len=2048), ", or for a smaller --max-seq-len",
         lambda _: LLM(TINY, num_blocks=4, max_seq_len=200)),
    Call(lambda _: LLM(TINY, num_blocks=4, max_seq_len=2048), "(in Python cache_bytes or num_blocks)",
         lambda _: LLM(TINY, num_blocks=32, max_seq_len=2048)),
    Call(lambda own: own.llm.generate([IDS, IDS], [STEPS]), "; give one, or one a prompt",
         lambda own: own.llm.generate([IDS, IDS], [STEPS, STEPS])),
    Call(lambda own: own.ids.generate("hi", STEPS), "expected token ids instead of text",
         lambda own: own.ids.generate(IDS, STEPS)),
    Call(lambda own: own.ids.generate("hi", STEPS), "; or build the engine from a checkpoint that has tokenizer.json",
         lambda own: own.llm.generate("hi", STEPS)),
    Call(lambda own: own.plain.chat(HI, STEPS), "has no chat template that can be used; use generate",
         lambda own: own.plain.generate("hi", STEPS)),
    Call(lambda own: own.plain.get_tokenizer().apply_chat_template(HI), "; give generate the prompt as text",
         lambda own: own.plain.generate("hi", STEPS)),
    Call(lambda own: own.llm.generate([IDS * 100], SamplingParams(max_tokens=None, max_length=9)),
         "; ask for a number of new tokens, which counts before it",
         lambda own: own.llm.generate([IDS * 100], SamplingParams(max_tokens=1, max_length=9))),
    Call(lambda own: own.llm.generate([IDS], every_token_ends(own, min_tokens=1)), "; leave min_tokens out",
         lambda own: own.llm.generate([IDS], every_token_ends(own))),
    Call(lambda own: own.llm.generate([IDS * 1000], STEPS), "; shorten it, or run",
         lambda own: own.llm.generate([IDS], STEPS)),
    Call(lambda own: own.llm.generate("x" * 9000, STEPS), "; shorten it", lambda own: own.llm.generate("x", STEPS)),
    Call(lambda own: own.llm.generate("\udcff", STEPS), "; convert it to UTF-8",
         lambda own: own.llm.generate("\udcff".encode(errors="surrogateescape").decode("latin-1"), STEPS)),
    Call(lambda own: own.few.generate([IDS], beams(num_beams=4, max_tokens=100)), "; set fewer beams",
         lambda own: own.few.generate([IDS], beams(num_beams=2, max_tokens=100))),
    Call(lambda own: own.few.generate([IDS], beams(num_beams=4, max_tokens=100)), ", a smaller max_tokens",
         lambda own: own.few.generate([IDS], beams(num_beams=4, max_tokens=2))),
    Call(lambda own: own.few.generate([IDS], beams(num_beams=4, max_tokens=100)), " or 1 MiB or more of cache memory",
         lambda own: own.llm.generate([IDS], beams(num_beams=4, max_tokens=100))),
    Call(lambda own: own.llm.chat(HI, STEPS, chat_template_kwargs={"eos_token": "x"}), "expected others; leave it out",
         lambda own: own.llm.chat(HI, STEPS)),
    Call(lambda own: own.llm.generate("hi", SamplingParams(structured_outputs={"regex": "("})), "; change it",
         lambda own: own.llm.generate("hi", SamplingParams(max_tokens=2, structured_outputs={"regex": "a"}))),
    Call(lambda _: SamplingParams(structured_outputs={"choice": ["a", "\ud800"]}), "; leave the others out",
         lambda _: SamplingParams(structured_outputs={"choice": ["a"]})),
    Call(lambda own: own.plain.generate("hi", SamplingParams(thinking_token_budget=3)), "has no <think>; leave it out",
         lambda own: own.plain.generate("hi", STEPS)),
    Call(lambda own: in_a_step(own, again=True), "; call it when its step is over",
         lambda own: in_a_step(own, again=False)),
    Call(lambda own: asyncio.run(asyncio.wait_for(twice("a", "a"), 60)), "; choose another request_id",
         lambda own: asyncio.run(asyncio.wait_for(twice("a", "b"), 60))),
    Call(lambda own: asyncio.run(asyncio.wait_for(after_a_drain(other=False), 60)),
         "takes no more requests; ask another",
         lambda own: asyncio.run(asyncio.wait_for(after_a_drain(other=True), 60))),
    Call(lambda own: poisoned(), "; build the engine with --kv-cache-dtype float32",
         lambda _: LLM("C", quant="int8", kv_cache_dtype="float32").generate("hi", STEPS)),
    Call(lambda own: KVCache(Manifest.read(Path(TINY)).states, 64, 2**40), "; ask for less with --kv-cache-memory",
         lambda own: KVCache(Manifest.read(Path(TINY)).states, 64, 2)),
]  # fmt: skip
MODELS = [
    Call(lambda _: QwenForCausalLM.from_pretrained(TINY, export=True), "is an engine already; leave out export",
         lambda _: QwenForCausalLM.from_pretrained(TINY)),
    Call(lambda _: QwenForCausalLM.from_pretrained("C"), "; pass export=True",
         lambda _: QwenForCausalLM.from_pretrained("C", export=True)),
    Call(lambda _: QwenForCausalLM.from_pretrained(TINY, engine_kvcache_num_blocks=1), "; or set a smaller max_seq_len",
         lambda _: small()),
    Call(lambda _: EngineForCausalLM.from_pretrained(TINY).generate(inputs_embeds=ROW),
         "; give the token ids as input_ids",
         lambda _: EngineForCausalLM.from_pretrained(TINY).generate(input_ids=ROW)),
    Call(lambda own: own.model(inputs_embeds=ROW), "; give input_ids", lambda own: own.model(input_ids=ROW)),
    Call(lambda own: own.model(ROW, output_attentions=True), "an engine returns logits alone; leave it out",
         lambda own: own.model(ROW)),
    Call(lambda own: own.model(ROW, token_type_ids=ROW), "an engine has no such input; leave it out",
         lambda own: own.model(ROW)),
    Call(lambda own: own.model(ROW, position_ids=ROW), "; leave them out", lambda own: own.model(ROW)),
    Call(lambda own: own.model(ROW, past_key_values=DynamicCache()), "; leave it out, or take new_cache()",
         lambda own: (own.model(ROW), own.model(ROW, past_key_values=own.model.new_cache()))),
    Call(lambda own: in_torch(own, seed=1), "; call torch.manual_seed instead",
         lambda own: (torch.manual_seed(1), in_torch(own))),
    Call(lambda own: in_torch(own, attention_mask=torch.tensor([[1, 1, 0]])),
         "; set padding_side='left' of the tokenizer",
         lambda own: in_torch(own, attention_mask=torch.tensor([[0, 1, 1]]))),
    Call(lambda own: own.model.to("cuda"), "; leave it out", lambda own: own.model.to("cpu")),
    Call(lambda own: own.model.train(), "train the checkpoint and build an engine of it",
         lambda _: changed(lambda model: model.train())),
    Call(lambda own: own.model.resize_token_embeddings(300), "resize the checkpoint and build an engine of it",
         lambda _: changed(lambda model: model.resize_token_embeddings(300))),
    Call(lambda _: small()(torch.cat([ROW, ROW])), "; feed fewer rows", lambda _: small()(ROW)),
    Call(lambda _: held(), ", drop what holds others (past_key_values)", lambda _: small()(ROW)),
    Call(lambda _: small()(torch.cat([ROW, ROW])), ", or set a larger kvcache_num_blocks",
         lambda _: small(engine_kvcache_num_blocks=2)(torch.cat([ROW, ROW]))),
    Call(lambda own: own.model.save_pretrained("C"), "is not empty; remove it or choose another",
         lambda own: own.model.save_pretrained("S")),
    Call(lambda own: own.model.save_pretrained("C/config.json/S"), "; choose another",
         lambda own: own.model.save_pretrained("S")),
]  # fmt: skip


def every_token_ends(own: Any, **options: Any) -> SamplingParams:
    every = range(own.llm.core.engine.manifest.model.vocab_size)
    return SamplingParams(temperature=0, max_tokens=2, stop_token_ids=every, **options)


def in_a_step(own: Any, again: bool) -> None:
    """Ask within a step, or after it."""
    said: list[EngineError] = []

    def ask(answer: list[int], logits: np.ndarray) -> np.ndarray:
        try:
            if again:
                own.llm.generate([IDS], STEPS)
        except EngineError as error:
            said.append(error)
        return logits

    own.llm.generate([IDS], SamplingParams(max_tokens=1, logits_processors=[ask]))
    if said:
        raise said[0]
    own.llm.generate([IDS], STEPS)


async def twice(first: str, second: str) -> None:
    """Two requests at once, of these names."""
    async with AsyncLLM(TINY) as llm:
        for name in (first, second):
            await llm.add_request(IDS, SamplingParams(max_tokens=500, ignore_eos=True), name)


async def after_a_drain(other: bool) -> None:
    async with AsyncLLM(TINY) as drained, AsyncLLM(TINY) as another:
        await drained.drain()
        async for _ in (another if other else drained).generate(IDS, STEPS):
            pass


def poisoned() -> None:
    """An engine whose keys overflow."""
    model, script = scripted_model(write_text_files(Path("scripted")), str.upper)
    poison(script, "hi")
    answered(LLM(model).generate("hi", STEPS))


def answered(outputs: list[RequestOutput]) -> None:
    """Tell the error of an answer that ended with one."""
    for output in outputs:
        if output.error is not None:
            raise EngineError(output.error)


def small(**options: Any) -> Any:
    """A model with room for one row."""
    sizes = {"engine_kvcache_num_blocks": 1, "engine_max_seq_len": 64} | options
    return QwenForCausalLM.from_pretrained(TINY, **sizes)


def held() -> None:
    model = small()
    _first = model(ROW)
    model(ROW)


def in_torch(own: Any, **options: Any) -> None:
    """An answer of transformers' loop, drawn."""
    own.model.generate(
        ROW, do_sample=True, max_new_tokens=2, output_scores=True, return_dict_in_generate=True, **options
    )


def changed(change: Callable[[Any], object]) -> None:
    """The model of an engine of the checkpoint, which transformers has changed."""
    model = AutoModelForCausalLM.from_pretrained("C")
    change(model)
    model.save_pretrained("C")
    QwenForCausalLM.from_pretrained("C", export=True)


@pytest.fixture
def at_hand(chat_engine: Path, tiny_checkpoint: Any, build_engine: Any, tmp_path: Path, monkeypatch: Any) -> Any:
    """A folder with a checkpoint C and an engine under engines/, and what is opened when it is first asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(Manifest.read(chat_engine).origin.checkpoint, "C")
    shutil.copytree(chat_engine, TINY)

    class AtHand:
        @cached_property
        def llm(self) -> LLM:
            return LLM(TINY)

        @cached_property
        def few(self) -> LLM:
            """Of four blocks."""
            return LLM(TINY, num_blocks=4)

        @cached_property
        def ids(self) -> LLM:
            """Without text."""
            return LLM(TINY, skip_tokenizer_init=True)

        @cached_property
        def plain(self) -> LLM:
            """With a tokenizer of letters, and no chat template."""
            return LLM(build_engine(with_tokenizer(tiny_checkpoint("qwen2").path, Path("P").resolve()), quant="int8"))

        @cached_property
        def model(self) -> Any:
            return QwenForCausalLM.from_pretrained(TINY)

    return AtHand()


def named(call: Any) -> str:
    return call.advice.strip("; ,")[:60]


@pytest.mark.parametrize("call", [*PARAMS, *LLMS, *MODELS], ids=named)
def test_advice_works_when_it_is_followed(at_hand: Any, call: Call) -> None:
    with pytest.raises((QwenError, ValueError), match=re.escape(call.advice)):
        call.wrong(at_hand)
    call.right(at_hand)


FOLDERS = ("qwen_run/api", "qwen_run/harness", "qwen_run/runtime", "qwen_run/sampling", "qwen_run/torch_model")
COMMANDS = "tests/test_advice_of_commands.py"
# what is not followed here: a piece of the message -> why, or where it is
ELSEWHERE = {
    "build it with --inputs-embeds": "tests/qwen_run/torch_model/test_embeds.py builds so",
    "and attn_impl 'eager'": "either alone: tests/qwen_run/api/test_engine_config.py",
    "is {}, expected the {} of kvcache_partition_len": "either alone: tests/qwen_run/api/test_engine_config.py",
    "leave attn_impl out, which": "tests/qwen_run/api/test_engine_config.py",
    "leave kvcache_partition_len out, which": "tests/qwen_run/api/test_engine_config.py",
    "ask for gradients": "tests/qwen_run/torch_model/test_embeds.py gives them so",
    "leave subfolder out, or mend it": "tests/qwen_run/torch_model/test_hub.py does both",
    "are put before texts": "texts are what tests/whole/test_pooled.py gives",
    "make one with qwen-build, or name one": COMMANDS,
    "; build the engine again": COMMANDS,
    "exclude fewer": "tests/qwen_run/sampling/test_sample.py; other requests exclude none",
    "is not a UTF-8 path; rename it": COMMANDS,
    "; set XDG_CACHE_HOME": "tests/qwen_run/api/test_build_on_demand.py sets it",
    "; set TMPDIR": "tests/qwen_run/api/test_causal_lm.py",
    "the engine has stopped": "tests/qwen_run/api/test_threads.py asks again",
    "run it with a newer qwen-engine": "there is no newer one",
    "to build a checkpoint of the Hub": "needs the Hub",
    "; run it whole, without stages": "tests/qwen_run/runtime/test_stage.py runs every engine whole, too",
    "use lm_eval's hf model": "tests/qwen_run/harness/test_engine_lm.py runs it",
}


def test_every_advice_is_followed_or_says_why_not() -> None:
    followed = [call.advice for call in (*PARAMS, *LLMS, *MODELS)]
    assert not_followed(FOLDERS, followed, ELSEWHERE) == []
    assert stale(FOLDERS, ELSEWHERE) == []
