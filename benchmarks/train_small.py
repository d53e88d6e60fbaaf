"""Trains the two small models that schemes are compared on beside the demo, whose weights are rounded already.

    python -m benchmarks.train_small --output build/small

`qwen2-small` has query, key and value biases, `qwen3-small` norms of queries and keys; all of these start at random and
stay clearly apart from zeros and ones. The text is the calibration half of the built-in samples, the perplexity that is
printed after every epoch that of the evaluation half's Wikipedia articles. It takes about five minutes a model on two
cores; the same seed, versions and number of threads give the same model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from benchmarks.command import run
from qwen_run.accuracy.datasets import Document, built_in_documents
from qwen_run.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # --help needs no torch
    import torch

VOCAB_SIZE = 3072
WINDOW = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# groups of 128 divide every width; the sizes that differ between the two are there to differ
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2 * WINDOW,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
CONFIGS = {
    "qwen2-small": SIZES | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3-small": SIZES
    | {"model_type": "qwen3", "num_attention_heads": 6, "head_dim": 64, "tie_word_embeddings": False},
}
BATCH = 2
LEARNING_RATE, WARM_UP, WEIGHT_DECAY, DROPOUT = 2e-3, 50, 0.3, 0.2


def train_tokenizer(documents: Iterable[Document], directory: Path) -> None:
    """Write a byte-level BPE tokenizer of ``VOCAB_SIZE`` entries to ``directory``."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.document for document in documents), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL_TOKENS[0]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> torch.Tensor:
    """The ids (T,) int64 of all documents, an end of text after each."""
    import torch

    return torch.tensor([token for one in documents for token in [*tokenizer.encode(one.document), 0]])


def new_model(config: dict[str, Any]) -> Any:
    """A model with random norms and biases, and dropout behind every block."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.exp(0.3 * torch.randn_like(parameter)))
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.5)

    def drop(module: torch.nn.Module, _: object, output: Any) -> Any:
        kept, *others = output if isinstance(output, tuple) else (output,)
        kept = torch.nn.functional.dropout(kept, DROPOUT, training=module.training)
        return (kept, *others) if isinstance(output, tuple) else kept

    for block in [model.model.embed_tokens, *(m for layer in model.model.layers for m in (layer.self_attn, layer.mlp))]:
        block.register_forward_hook(drop)
    return model


def perplexity(model: Any, token_ids: torch.Tensor) -> float:
    """``exp`` of the mean negative log-likelihood over windows of ``WINDOW`` tokens."""
    import torch

    windows = token_ids[: len(token_ids) // WINDOW * WINDOW].view(-1, 1, WINDOW)
    model.eval()
    with torch.no_grad():
        losses = [model(window, labels=window).loss.item() for window in windows]
    return math.exp(np.mean(losses))


def unigram_perplexity(text: torch.Tensor, held_out: torch.Tensor) -> float:
    """That of the best guess that looks at no context: the frequencies of the training text."""
    import torch

    counts = torch.bincount(text, minlength=VOCAB_SIZE) + 1.0
    return math.exp(-torch.log(counts / counts.sum())[held_out].mean().item())


def train(model: Any, text: torch.Tensor, held_out: torch.Tensor, epochs: int) -> None:
    """AdamW with a cosine decay, on windows that begin elsewhere in every epoch."""
    import torch
    import transformers

    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    batches = (len(text) - WINDOW) // (BATCH * WINDOW)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARM_UP, epochs * batches)
    for epoch in range(1, epochs + 1):
        started, total = time.monotonic(), 0.0
        offset = int(torch.randint(WINDOW, ()))
        windows = text[offset : offset + batches * BATCH * WINDOW].view(-1, WINDOW)
        model.train()
        for rows in torch.randperm(len(windows)).view(-1, BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(windows[rows], labels=windows[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(
            f"  epoch {epoch}: perplexity {math.exp(total / batches):.1f} in training, "
            f"{perplexity(model, held_out):.1f} held out; {time.monotonic() - started:.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"some of: {', '.join(CONFIGS)}")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    texts = built_in_documents("default", "calibration")
    for name in arguments.models or CONFIGS:
        torch.manual_seed(arguments.seed)
        directory = arguments.output / name
        directory.mkdir(parents=True, exist_ok=True)
        train_tokenizer(texts, directory)
        tokenizer = Tokenizer.load(directory)
        text, held_out = encode(tokenizer, texts), encode(tokenizer, built_in_documents("wikitext2"))
        model = new_model(CONFIGS[name])
        print(
            f"{name}: {model.num_parameters() / 1e6:.1f} M parameters, {len(text):,} tokens; perplexity held out of "
            f"unigrams {unigram_perplexity(text, held_out):.0f}",
            flush=True,
        )
        train(model, text, held_out, arguments.epochs)
        model.save_pretrained(directory)


if __name__ == "__main__":
    run(main)
