"""One program under measurement, in a process of its own: reads commands as JSON lines, answers each with one.

    python -P benchmarks/peer_worker.py llama.cpp '{"model": "model.gguf", "threads": 2}' 151936

Run by ``peer_match.py`` in the environment of that program, so this file imports nothing of the project but for
the engine itself. Every worker has the same commands:

    load                          the model, up to the first token of a prompt of one
    prefill  length               one prompt, to its first token
    decode   past, count          after ``past`` tokens, ``count`` more, one by one
    batch    requests, prompt_length, new    all at once, to their last token
    answer   ids, count           the greedy answer, to see that all run the same model
    overhead past, count          the engine alone: share of a decode step that is not spent in its matrices
    memory                        peak, and what the process held before it loaded the model

Times are seconds of the work alone. Prompts are random and new each time, but for the past of ``decode``.
"""

import json
import os
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

FIRST_ID = 10  # of random prompts, and the whole prompt of one
BATCH_TOKENS = 512  # most tokens of a step of those that mix prompts with answers


def draw(rng, vocab_size, *shape):
    """Ids of the first nine tenths of the vocabulary: special tokens are mostly its last."""
    return rng.integers(FIRST_ID, vocab_size * 9 // 10, shape)


def timed(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Engine:
    """This project's engine, through its scheduler."""

    package = "onnxruntime"

    def __init__(self, model, threads):
        from qwen_run.runtime import core, engine, request
        from qwen_run.sampling import sample as sampling

        self.engine_module, self.core, self.request, self.sampling = engine, core, request, sampling
        self.model, self.threads = Path(model), threads

    def load(self, longest):
        self.engine = self.engine_module.Engine.load(self.model, self.threads)
        self.generate([[FIRST_ID]], 1)

    def prefill(self, prompt):
        return timed(partial(self.generate, [prompt], 1))

    def decode(self, past, count):
        moments = self.generate([past], count + 1)[1]  # from the second time on, all but the last block is cached
        return moments[-1] - moments[0]

    def batch(self, prompts, new):
        return timed(partial(self.generate, prompts, new, len(prompts)))

    def answer(self, prompt, count):
        return self.generate([prompt], count)[0]

    def overhead(self, past, count):
        from benchmarks.overhead import measure_matrices, products

        step_s = self.decode(past, count) / count
        return 1 - measure_matrices(products(self.model, self.threads), count) / 1e3 / step_s

    def generate(self, prompts, new, batch=1):
        """The tokens of the last prompt, and when each step was done."""
        core = self.core.Core(self.engine, self.core.CoreOptions(max_batch_size=batch, max_batch_tokens=BATCH_TOKENS))
        params = self.sampling.SamplingParams(temperature=0, max_tokens=new)
        requests = [self.request.Request(tuple(map(int, prompt)), params) for prompt in prompts]
        for request in requests:
            core.add(request)
        moments = []
        while not core.is_done:
            if core.step():
                moments.append(time.perf_counter())
        return requests[-1].sequences[0].output, moments


class LlamaCpp:
    """llama.cpp through the C interface of llama-cpp-python."""

    package = "llama_cpp_python"

    def __init__(self, model, threads, cache="f16", flash_attention="yes"):
        import llama_cpp

        self.c, self.path, self.threads, self.cache = llama_cpp, model, threads, cache
        self.flash_attention = flash_attention == "yes"  # which a cache of q8_0 needs
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        self.context, self.shape, self.past = None, None, None

    def load(self, longest):
        self.model = self.c.llama_model_load_from_file(self.path.encode(), self.c.llama_model_default_params())
        self.vocab_size = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model))
        self.open(longest, 1)
        self.feed([FIRST_ID])

    def prefill(self, prompt):
        self.open(len(prompt), 1)
        return timed(partial(self.feed, prompt))

    def decode(self, past, count):
        self.open(len(past) + count, -(-len(past) // BATCH_TOKENS), unified=True, keep=self.past == past)
        memory = self.c.llama_get_memory(self.context)
        if self.past != past:
            self.fill(memory, past)
            self.past = past
        self.c.llama_memory_seq_rm(memory, 0, len(past) - 1, -1)  # and all that was decoded before
        self.feed(past[-1:])
        return timed(lambda: [self.feed([self.best()]) for _ in range(count)])

    def fill(self, memory, past):
        """Cache ``past`` in parts that do not see each other, then made one sequence.

        A step takes as long after them as after one prompt, which takes up to an hour itself at 16,384 tokens.
        """
        batch = self.c.llama_batch_init(BATCH_TOKENS, 0, 1)
        for sequence, start in enumerate(range(0, len(past), BATCH_TOKENS)):
            part = enumerate(past[start : start + BATCH_TOKENS], start)
            self.step(batch, [(sequence, position, token, False) for position, token in part])
            if sequence:
                self.c.llama_memory_seq_cp(memory, sequence, 0, -1, -1)
                self.c.llama_memory_seq_rm(memory, sequence, -1, -1)
        self.c.llama_batch_free(batch)

    def answer(self, prompt, count):
        self.open(len(prompt) + count, 1)
        self.feed(prompt)
        ids = []
        for _ in range(count):
            ids.append(self.best())
            self.feed(ids[-1:])
        return ids

    def batch(self, prompts, new):
        self.open(len(prompts) * (len(prompts[0]) + new), len(prompts))
        return timed(partial(self.answer_all, prompts, new))

    def answer_all(self, prompts, new):
        batch = self.c.llama_batch_init(BATCH_TOKENS, 0, 1)
        last = {}
        pending = [
            (s, i, token, i + 1 == len(prompt)) for s, prompt in enumerate(prompts) for i, token in enumerate(prompt)
        ]
        for start in range(0, len(pending), BATCH_TOKENS):
            last |= self.step(batch, pending[start : start + BATCH_TOKENS])
        for i in range(new - 1):
            last = self.step(batch, [(s, len(prompts[s]) + i, token, True) for s, token in last.items()])
        self.c.llama_batch_free(batch)

    def step(self, batch, entries):
        """Feed (sequence, position, token, whether logits are wanted); the best next token of each that wants them."""
        batch.n_tokens = len(entries)
        for i, (sequence, position, token, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        assert self.c.llama_decode(self.context, batch) == 0
        return {entry[0]: self.best(i) for i, entry in enumerate(entries) if entry[3]}

    def open(self, tokens, sequences, unified=False, keep=False):
        """An empty context (or, with ``keep``, the one there is) for so many tokens of all sequences.

        With ``unified``, sequences share one cache and may be copied into each other.
        """
        granule = 256 * (1 if unified else sequences)
        shape = -(-tokens // granule) * granule, sequences, unified
        if shape != self.shape:
            if self.context:
                self.c.llama_free(self.context)
            params = self.c.llama_context_default_params()
            params.n_ctx, params.n_seq_max, params.kv_unified = shape
            params.n_batch = params.n_ubatch = BATCH_TOKENS
            params.n_threads = params.n_threads_batch = self.threads
            flash, plain = self.c.LLAMA_FLASH_ATTN_TYPE_ENABLED, self.c.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.flash_attn_type = flash if self.flash_attention else plain
            params.type_k = params.type_v = {"f16": self.c.GGML_TYPE_F16, "q8_0": self.c.GGML_TYPE_Q8_0}[self.cache]
            self.context, self.shape = self.c.llama_init_from_model(self.model, params), shape
            assert self.context, "llama.cpp makes no context"
            keep = False
        if not keep:
            self.c.llama_memory_clear(self.c.llama_get_memory(self.context), False)
            self.past = None

    def feed(self, ids):
        for start in range(0, len(ids), BATCH_TOKENS):
            part = ids[start : start + BATCH_TOKENS]
            tokens = (self.c.llama_token * len(part))(*map(int, part))
            assert self.c.llama_decode(self.context, self.c.llama_batch_get_one(tokens, len(part))) == 0
        self.best()

    def best(self, index=-1):
        """The likeliest next token; reading the logits waits for them."""
        logits = self.c.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


class OpenVino:
    """OpenVINO GenAI reading GGUF, with its continuous batching."""

    package = "openvino_genai"

    def __init__(self, model, threads, cache=None):
        import openvino
        import openvino_genai

        self.openvino, self.genai, self.model = openvino, openvino_genai, model
        self.properties = {"INFERENCE_NUM_THREADS": threads} | ({"KV_CACHE_PRECISION": cache} if cache else {})
        self.tokenizer = openvino_genai.Tokenizer(model)
        self.caching = None

    def load(self, longest):
        self.open(caching=False)
        self.generate([[FIRST_ID]], 1)

    def prefill(self, prompt):
        self.open(caching=False)
        return timed(partial(self.generate, [prompt], 1))

    def decode(self, past, count):
        self.open(caching=True)  # the same past each time: read again from the cache of prefixes
        moments = []
        self.generate([past], count + 1, self.clock(moments))
        assert len(moments) > 1, "no token was streamed"
        return (moments[-1] - moments[0]) * count / sum(self.written[1:])

    def batch(self, prompts, new):
        self.open(caching=False)
        return timed(partial(self.generate, prompts, new))

    def answer(self, prompt, count):
        self.open(caching=False)
        return list(self.generate([prompt], count)[0].m_generation_ids[0])

    def open(self, caching):
        if caching is self.caching:
            return
        scheduler = self.genai.SchedulerConfig()
        scheduler.enable_prefix_caching = caching
        scheduler.cache_size = 2
        scheduler.max_num_batched_tokens = 2048
        self.pipeline = None
        self.pipeline = self.genai.ContinuousBatchingPipeline(
            self.model, self.tokenizer, scheduler, "CPU", **self.properties
        )
        self.caching = caching

    def clock(self, moments):
        """A streamer that notes when tokens come. (One of texts is not called while random tokens make no text.)"""
        written = self.written = []
        status = self.genai.StreamingStatus.RUNNING

        class Clock(self.genai.StreamerBase):
            def write(self, tokens):
                moments.append(time.perf_counter())
                written.append(len(tokens) if isinstance(tokens, list) else 1)
                return status

            def end(self):
                pass

        return Clock()

    def generate(self, prompts, new, streamer=None):
        config = self.genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        tensors = [self.openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        return self.pipeline.generate(tensors, [config] * len(prompts), *([streamer] if streamer else []))


class OnnxRuntimeGenAI:
    """onnxruntime-genai with the graph of its own builder; it batches statically."""

    package = "onnxruntime_genai"

    def __init__(self, model, threads):
        import onnxruntime_genai

        self.genai, self.threads, self.directory = onnxruntime_genai, threads, model
        self.past = None

    def load(self, longest):
        config = self.genai.Config(self.directory)
        options = {"intra_op_num_threads": self.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = self.genai.Model(config)
        self.start([[FIRST_ID]], 1)

    def prefill(self, prompt):
        return timed(partial(self.start, [prompt], 1))

    def decode(self, past, count):
        if self.past != past:
            self.start([past], count + 1)
            self.past = past
        else:
            self.generator.rewind_to(len(past) - 1)
            self.generator.append_tokens(np.array([past[-1:]], np.int32))
            self.generator.generate_next_token()
        return timed(lambda: [self.generator.generate_next_token() for _ in range(count)])

    def batch(self, prompts, new):
        def work():
            self.start(prompts, new)
            for _ in range(new - 1):
                self.generator.generate_next_token()

        return timed(work)

    def answer(self, prompt, count):
        self.start([prompt], count)
        for _ in range(count - 1):
            self.generator.generate_next_token()
        return [int(token) for token in self.generator.get_sequence(0)[len(prompt) :]]

    def start(self, prompts, new):
        """A new generator, fed with ``prompts``, up to the first token of each."""
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(
            max_length=len(prompts[0]) + new, min_length=len(prompts[0]) + new, batch_size=len(prompts), do_sample=False
        )
        self.generator, self.past = self.genai.Generator(self.model, params), None
        self.generator.append_tokens(np.array(prompts, np.int32))
        self.generator.generate_next_token()


WORKERS = {"engine": Engine, "llama.cpp": LlamaCpp, "OpenVINO": OpenVino, "onnxruntime-genai": OnnxRuntimeGenAI}


def memory_bytes(field):
    """``VmRSS`` (now) or ``VmHWM`` (at most so far) of this process."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main():
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    program, options, vocab_size = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    worker = WORKERS[program](**options)
    before = memory_bytes("VmRSS")
    rng = np.random.default_rng(0)
    prompt = partial(draw, rng, vocab_size)
    commands = {
        "load": lambda longest: timed(partial(worker.load, longest)),
        "prefill": lambda length: worker.prefill(prompt(length).tolist()),
        "decode": lambda past, count: worker.decode(
            draw(np.random.default_rng(past), vocab_size, past).tolist(), count
        ),
        "batch": lambda requests, prompt_length, new: worker.batch(prompt(requests, prompt_length).tolist(), new),
        "answer": lambda ids, count: worker.answer(ids, count),
        "overhead": lambda past, count: worker.overhead(prompt(past).tolist(), count),
        "memory": lambda: {"peak": memory_bytes("VmHWM"), "before": before},
        "version": lambda: metadata.version(worker.package),
    }
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(commands[command.pop("do")](**command)), file=answers)


if __name__ == "__main__":
    main()
