"""llama.cpp's part of ``benchmarks.quality``, in the environment that has it: imports nothing of the project.

    python -P benchmarks/quality_worker.py quantize FLOAT.gguf TARGET.gguf Q4_K_M [IMPORTANCE.npz]
    python -P benchmarks/quality_worker.py logits MODEL.gguf WINDOWS.npy LOGITS.npy THREADS

``quantize`` lets llama.cpp choose a type for each tensor. With importance (arrays of one number a column, by tensor) it
then rounds again what has some, in the same types: the interface for programs takes no importance matrix in all
versions, and the types of four bits and more do not depend on it.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np

STEP_TOKENS = 512


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__)
        return
    COMMANDS[sys.argv[1]](*sys.argv[2:])


def quantize(source, target, kind, importance=None):
    c = quiet()
    params = c.llama_model_quantize_default_params()
    params.ftype = getattr(c, f"LLAMA_FTYPE_{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}")
    if c.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp does not quantise {source} to {kind}")
    if importance:
        round_again(source, target, np.load(importance))


def round_again(source, target, importance):
    """Replace the tensors of the file ``target`` that ``importance`` has by ones that it weighed."""
    import gguf

    library = ctypes.CDLL(str(base_library()))
    chunk = library.ggml_quantize_chunk
    pointer = ctypes.c_void_p
    chunk.argtypes = [ctypes.c_int, pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer]
    chunk.restype = ctypes.c_size_t
    floats = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    unweighted = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0}
    places = [
        (tensor.name, int(tensor.tensor_type), tensor.data_offset, tensor.data.nbytes)
        for tensor in gguf.GGUFReader(target).tensors
        if tensor.name in importance and tensor.tensor_type not in unweighted
    ]
    if not places:
        sys.exit(f"{target} has no tensor that importance is known of")
    with Path(target).open("r+b") as file:
        for name, kind, offset, size in places:
            weight = np.ascontiguousarray(floats[name].data, np.float32)
            weights = np.ascontiguousarray(importance[name], np.float32)
            rows, columns = weight.shape
            if weights.shape != (columns,):
                sys.exit(f"{name} has {columns} columns, its importance {weights.shape}")
            rounded = np.empty(size, np.uint8)
            written = chunk(kind, weight.ctypes.data, rounded.ctypes.data, 0, rows, columns, weights.ctypes.data)
            if written != size:
                sys.exit(f"{name} became {written} bytes in place of {size}")
            file.seek(offset)
            file.write(rounded.tobytes())


def base_library():
    import llama_cpp

    (path,) = [*Path(llama_cpp.__file__).parent.rglob("libggml-base.so")][:1]
    return path


def logits(model, windows, target, threads):
    """float32 (windows, tokens, vocabulary) of token ids (windows, tokens)."""
    c = quiet()
    token_ids = np.load(windows)
    loaded = c.llama_model_load_from_file(model.encode(), c.llama_model_default_params())
    if not loaded:
        sys.exit(f"llama.cpp does not load {model}; its own log says why")
    vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(loaded))
    params = c.llama_context_default_params()
    params.n_ctx = -(-token_ids.shape[1] // 256) * 256
    params.n_batch = params.n_ubatch = STEP_TOKENS
    params.n_threads = params.n_threads_batch = int(threads)
    context = c.llama_init_from_model(loaded, params)
    batch = c.llama_batch_init(STEP_TOKENS, 0, 1)
    found = np.lib.format.open_memmap(target, "w+", np.float32, (*token_ids.shape, vocabulary))
    for number, window in enumerate(token_ids):
        c.llama_memory_clear(c.llama_get_memory(context), False)
        for start in range(0, len(window), STEP_TOKENS):
            part = window[start : start + STEP_TOKENS]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = int(token), start + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if c.llama_decode(context, batch):
                sys.exit(f"llama.cpp does not compute {model}")
            rows = np.ctypeslib.as_array(c.llama_get_logits(context), (len(part), vocabulary))
            found[number, start : start + len(part)] = rows


def quiet():
    """llama.cpp's functions, without its log."""
    import llama_cpp

    global _log
    _log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(_log, None)
    llama_cpp.llama_backend_init()
    return llama_cpp


COMMANDS = {"quantize": quantize, "logits": logits}

if __name__ == "__main__":
    main()
