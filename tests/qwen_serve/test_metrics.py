"""``/metrics``: what Prometheus reads, by vLLM's names; and the dashboard asks for what is there."""

import json
import re

import pytest

from cases import ROOT
from cases.scripted import scripted_model, write_text_files
from cases.serving import running

DASHBOARD = json.loads((ROOT / "docs" / "grafana-qwen-serve.json").read_text("utf-8"))
# of vLLM's, those that its dashboards show
NAMES = [
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total", "num_preemptions_total",
    "request_success_total", "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket", "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket", "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket", "request_prompt_tokens_bucket", "request_generation_tokens_bucket",
    "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
]  # fmt: skip


def values(text):
    """Each series and its value."""
    lines = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


@pytest.fixture
def model(tmp_path):
    return scripted_model(write_text_files(tmp_path), str.upper, max_seq_len=600)[0]


def test_what_was_answered_is_counted(model):
    with running(model) as server:
        for _ in range(2):
            server.post("/v1/completions", {"prompt": "x" * 100, "max_tokens": 5})
        server.post("/v1/completions", {"prompt": ["ab", "c"], "stream": True})
        response = server.client.get("/metrics")
        found = values(response.text)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    label = '{model_name="scripted"}'
    assert found[f"qwen:prompt_tokens_total{label}"] == 203
    assert found[f"qwen:generation_tokens_total{label}"] == 5 + 5 + 3 + 2
    assert found[f"qwen:prompt_tokens_cached_total{label}"] == found[f"qwen:prefix_cache_hits_total{label}"] == 96
    ends = {reason: found[f'qwen:request_success_total{{finished_reason="{reason}",model_name="scripted"}}']
            for reason in ("length", "stop")}  # fmt: skip
    assert ends == {"length": 2, "stop": 2}
    assert found[f"qwen:e2e_request_latency_seconds_count{label}"] == 4
    assert found[f"qwen:time_to_first_token_seconds_sum{label}"] > 0
    assert (found[f"qwen:num_requests_running{label}"], found[f"qwen:kv_cache_usage_perc{label}"]) == (0, 0)


def test_names_are_vllms(model):
    with running(model, metrics_prefix="vllm:") as server:
        server.post("/v1/completions", {"prompt": "ab"})
        found = server.client.get("/metrics").text
    assert [name for name in NAMES if f"\nvllm:{name}{{" not in found] == []


def test_the_dashboard_asks_for_what_is_there(model):
    with running(model) as server:
        server.post("/v1/completions", {"prompt": "ab"})
        found = server.client.get("/metrics").text
    asked = {name for panel in DASHBOARD["panels"] for target in panel["targets"]
             for name in re.findall(r"qwen:\w+", target["expr"])}  # fmt: skip
    assert len(asked) > 12
    assert [name for name in asked if f"\n{name}{{" not in found] == []
