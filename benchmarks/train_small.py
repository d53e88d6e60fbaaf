"""Trains the small models that schemes are compared on beside the demo, whose weights are rounded already.

    python -m benchmarks.train_small --output build/small
    python -m benchmarks.train_small qwen2-medium --output build/small

`qwen2-*` have query, key and value biases, `qwen3-*` norms of queries and keys; all of these start at random and stay
clearly apart from zeros and ones. The text is the evaluation half of the built-in samples, which calibration does not
read; medium models also read much of Python's standard library, so that they know enough for rounding to cost them
something. The perplexity that is printed after every epoch is that of articles that neither half has. A model takes
about five minutes on two cores; the same seed, versions and number of threads give the same model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from benchmarks.command import run
from benchmarks.texts import HELD_OUT, by_hash, library_documents
from qwen_run.accuracy.datasets import Document, built_in_documents, load_dataset
from qwen_run.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # --help needs no torch
    import torch

WINDOW = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Recipe:
    """A model, and how it is trained.

    Attributes:
        batch: windows of a step.
        library: characters of Python's standard library that it reads besides the built-in samples.
    """

    config: dict[str, Any]
    epochs: int
    batch: int
    library: int
    learning_rate: float
    weight_decay: float
    dropout: float


# groups of 128 divide every width; the sizes that differ between models are there to differ
SIZES: dict[str, Any] = {
    "vocab_size": 3072,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2 * WINDOW,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
QWEN2 = {"model_type": "qwen2"}
QWEN3 = {"model_type": "qwen3", "num_attention_heads": 6, "head_dim": 64, "tie_word_embeddings": False}
RECIPES = {
    "qwen2-small": Recipe(SIZES | QWEN2, 12, 2, 0, 2e-3, 0.3, 0.2),
    "qwen3-small": Recipe(SIZES | QWEN3, 12, 2, 0, 2e-3, 0.3, 0.2),
    "qwen2-medium": Recipe(SIZES | QWEN2 | {"num_hidden_layers": 6}, 1, 1, 1_200_000, 2e-3, 0.1, 0.0),
    "qwen3-medium": Recipe(
        SIZES | QWEN3 | {"num_attention_heads": 8, "hidden_size": 512, "num_hidden_layers": 2},
        1, 1, 1_200_000, 2e-3, 0.1, 0.0,
    ),
}  # fmt: skip
DEFAULT_MODELS = ("qwen2-small", "qwen3-small")
WARM_UP = 50


def texts(recipe: Recipe) -> tuple[Document, ...]:
    """What the model reads, shuffled by hash."""
    documents = built_in_documents("default", "evaluation")
    if not recipe.library:
        return documents
    library, characters = [], 0
    for document in by_hash(library_documents("calibration")):
        if characters >= recipe.library:
            break
        library.append(document)
        characters += len(document.document)
    return by_hash((*documents, *library))


def train_tokenizer(documents: Iterable[Document], vocab_size: int, directory: Path) -> None:
    """Write a byte-level BPE tokenizer of ``vocab_size`` entries to ``directory``."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
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


def new_model(config: dict[str, Any], dropout: float) -> Any:
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
        kept = torch.nn.functional.dropout(kept, dropout, training=module.training)
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


def unigram_perplexity(text: torch.Tensor, held_out: torch.Tensor, vocab_size: int) -> float:
    """That of the best guess that looks at no context: the frequencies of the training text."""
    import torch

    counts = torch.bincount(text, minlength=vocab_size) + 1.0
    return math.exp(-torch.log(counts / counts.sum())[held_out].mean().item())


def train(model: Any, text: torch.Tensor, held_out: torch.Tensor, recipe: Recipe) -> None:
    """AdamW with a cosine decay, on windows that begin elsewhere in every epoch."""
    import torch
    import transformers

    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
    batches = (len(text) - WINDOW) // (recipe.batch * WINDOW)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARM_UP, recipe.epochs * batches)
    for epoch in range(1, recipe.epochs + 1):
        started, total = time.monotonic(), 0.0
        offset = int(torch.randint(WINDOW, ()))
        windows = text[offset : offset + batches * recipe.batch * WINDOW].view(-1, WINDOW)
        model.train()
        for number, rows in enumerate(torch.randperm(len(windows)).view(-1, recipe.batch), start=1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(windows[rows], labels=windows[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
            if number % 100 == 0:
                print(f"  {number} of {batches} batches, mean loss {total / number:.2f}", flush=True)
        print(
            f"  epoch {epoch}: perplexity {math.exp(total / batches):.1f} in training, "
            f"{perplexity(model, held_out):.1f} held out; {time.monotonic() - started:.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"some of: {', '.join(RECIPES)}; small ones if none")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--epochs", type=int, help="12 of a small model, 1 of a medium one if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - set(RECIPES):
        parser.error(f"no model {', '.join(sorted(unknown))}; choose from {', '.join(RECIPES)}")
    import torch

    torch.set_num_threads(arguments.threads)
    for name in arguments.models or DEFAULT_MODELS:
        recipe = RECIPES[name]
        recipe = replace(recipe, epochs=arguments.epochs or recipe.epochs)
        torch.manual_seed(arguments.seed)
        directory, vocab_size = arguments.output / name, recipe.config["vocab_size"]
        directory.mkdir(parents=True, exist_ok=True)
        documents = texts(recipe)
        train_tokenizer(documents, vocab_size, directory)
        tokenizer = Tokenizer.load(directory)
        text, held_out = encode(tokenizer, documents), encode(tokenizer, load_dataset(str(HELD_OUT)).documents)
        model = new_model(recipe.config, recipe.dropout)
        print(
            f"{name}: {model.num_parameters() / 1e6:.1f} M parameters, {len(text):,} tokens; perplexity held out of "
            f"unigrams {unigram_perplexity(text, held_out, vocab_size):.0f}",
            flush=True,
        )
        train(model, text, held_out, recipe)
        model.save_pretrained(directory)


if __name__ == "__main__":
    run(main)
