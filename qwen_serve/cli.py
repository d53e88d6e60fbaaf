"""``qwen-serve``: an engine that answers over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qwen_engine.errors import EngineError
from qwen_plugin import MOST_THREADS
from qwen_run.commands.command import (
    Command,
    kv_cache_memory_option,
    max_seq_len_option,
    pipeline_parallel_size_option,
)

_ENGINE_OPTIONS = (
    "threads",
    "cache_bytes",
    "max_seq_len",
    "pipeline_parallel_size",
    "max_batch_size",
    "prompt_tokens_beside",
    "max_drafts",
    "quant",
)


@click.command("qwen-serve", cls=Command)
@click.argument("model", required=False, metavar="[ENGINE or CHECKPOINT]")
@click.option("--host", default="127.0.0.1", help="Address to listen at; 0.0.0.0 is every one of this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen at.")
@click.option("--unix-socket", type=click.Path(path_type=Path), help="Listen at this path instead.")
@click.option(
    "--certificate", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="PEM file; turns on TLS."
)
@click.option(
    "--private-key", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="PEM file of its key."
)
@click.option("--root-path", default="", metavar="PATH", help="What a proxy takes off the beginning of paths.")
@click.option(
    "--api-key",
    multiple=True,
    envvar="QWEN_API_KEY",
    help="Ask for this key; may be given again. Better in the environment, as QWEN_API_KEY.  [default: none]",
)
@click.option("--allow-origin", multiple=True, metavar="URL", help="Let pages of this origin ask.  [default: none]")
@click.option("--served-model-name", multiple=True, metavar="NAME", help="Name of the model.  [default: its folder's]")
@click.option("--strict-model", is_flag=True, help="Refuse requests that name another model.")
@click.option("--max-queue", type=click.IntRange(0), help="Answers that may wait.  [default: 4 for each of a batch]")
@click.option("--max-batch-size", type=click.IntRange(1), default=16, help="Answers that are made at once.")
@click.option(
    "--prompt-tokens-beside",
    type=click.IntRange(1),
    default=64,
    help="Most tokens of new prompts in a step; answers under way wait for them.",
)
@click.option("--max-body-mib", type=click.IntRange(1, 1 << 12), default=8, help="Largest request.")
@click.option("--request-timeout", type=click.FloatRange(0, min_open=True), help="Seconds of a request.")
@click.option("--drain-timeout", type=click.FloatRange(0), default=30.0, help="Seconds that requests have at the end.")
@click.option("--keep-alive", type=click.FloatRange(0.1), default=15.0, help="Seconds of silence in a stream.")
@click.option("--page/--no-page", default=True, help="Serve the chat page at /.")
@click.option("--access-log/--no-access-log", default=True, help="A JSON line a request, without prompts.")
@click.option("--metrics-prefix", default="qwen:", help='Of the names at /metrics; "vllm:" for its dashboards.')
@click.option("--cache-per-key", is_flag=True, help="Requests of different keys share nothing in the cache.")
@click.option("--reasoning-budget", type=click.IntRange(0), help="Tokens of thinking.  [default: no bound]")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), help="Threads of a run.  [default: physical cores]")
@kv_cache_memory_option
@max_seq_len_option
@pipeline_parallel_size_option
@click.option("--draft-tokens", type=click.IntRange(0, 64), help="Most tokens to guess ahead.  [default: 8]")
@click.option("--quant", help="Of an engine that is built from a checkpoint.  [default: int4]")
def main(**given: Any) -> None:
    """Answer over HTTP, as OpenAI's interfaces have it, with an engine that qwen-build made.

    Without an argument it is the newest engine under engines/. A browser finds a page to chat at /, programs find /v1.
    A checkpoint is built once. What is in force is printed
    at the start. SIGTERM or Ctrl-C lets the requests end that there are; a second one does not.

    \b
    Examples:
      qwen-serve                                        the newest engine: chat at http://127.0.0.1:8000
      qwen-serve Qwen/Qwen2.5-0.5B-Instruct --port 80   a checkpoint; it is built when it is first asked for
      QWEN_API_KEY=secret qwen-serve --host 0.0.0.0     for others, who need the key
      qwen-serve --max-seq-len 4096 --max-batch-size 4  less memory
      qwen-serve --unix-socket /run/qwen.sock           behind a proxy of this machine
    \b
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    \b
      from openai import OpenAI
      client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
      messages = [{"role": "user", "content": "Hello"}]
      print(client.chat.completions.create(model="any", messages=messages).choices[0].message.content)
    """
    if (given["private_key"] is None) != (given["certificate"] is None):
        raise click.UsageError("--certificate and --private-key belong together.")
    if given["unix_socket"] is not None and given["certificate"] is not None:
        raise click.UsageError("--unix-socket and --certificate exclude each other.")
    if any(not key for key in given["api_key"]):
        raise click.UsageError("An API key is empty; leave it out, or give one.")
    if given["cache_per_key"] and not given["api_key"]:
        raise click.UsageError("--cache-per-key needs an --api-key.")
    _require_extra()
    from qwen_run.runtime.engine import newest_engine
    from qwen_serve.http.program import serve

    model = given["model"] or newest_engine()
    serve(_settings(model, given), lambda line: click.echo(line, err=True))


def _settings(model: str | Path, given: dict[str, Any]) -> Any:
    from qwen_serve.common.settings import Settings

    engine = {**given, "max_drafts": given["draft_tokens"]}
    return Settings(
        model=model,
        options={name: engine[name] for name in _ENGINE_OPTIONS if engine[name] is not None},
        host=given["host"],
        port=given["port"],
        unix_socket=given["unix_socket"],
        certificate=given["certificate"],
        private_key=given["private_key"],
        root_path=given["root_path"].rstrip("/"),
        served_names=given["served_model_name"],
        strict_model=given["strict_model"],
        api_keys=given["api_key"],
        origins=given["allow_origin"],
        max_queue=given["max_queue"],
        max_body_bytes=given["max_body_mib"] << 20,
        request_timeout_s=given["request_timeout"],
        drain_timeout_s=given["drain_timeout"],
        keep_alive_s=given["keep_alive"],
        access_log=given["access_log"],
        page=given["page"],
        metrics_prefix=given["metrics_prefix"],
        cache_per_key=given["cache_per_key"],
        thinking_budget=given["reasoning_budget"],
    )


def _require_extra() -> None:
    """
    Raises:
        EngineError: what a server needs is not installed.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        libraries = "pip install fastapi uvicorn prometheus_client llguidance"
        raise EngineError(f"{error.name} is not installed, and a server needs it; run {libraries}") from error


if __name__ == "__main__":
    main()
