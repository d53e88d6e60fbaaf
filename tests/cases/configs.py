"""config.json as models were published with it."""

from __future__ import annotations

# As published: Qwen2.5-0.5B-Instruct's values
PUBLISHED = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# Mixtures of experts as published: what of their values says how large they are.
_MIXTURE = {
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN2_MOE = _MIXTURE | {"model_type": "qwen2_moe", "norm_topk_prob": False}
_QWEN3_MOE = _MIXTURE | {
    "model_type": "qwen3_moe", "norm_topk_prob": True, "head_dim": 128, "attention_bias": False,
    "num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4, "max_position_embeddings": 40960,
    "sliding_window": None,
}  # fmt: skip
MIXTURES = {
    "Qwen1.5-MoE-A2.7B": _QWEN2_MOE | {
        "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "moe_intermediate_size": 1408, "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
    },
    "Qwen2-57B-A14B": _QWEN2_MOE | {
        "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
        "moe_intermediate_size": 2560, "num_attention_heads": 28, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "shared_expert_intermediate_size": 20480,
        "sliding_window": 65536,
    },
    "Qwen3-30B-A3B": _QWEN3_MOE | {
        "hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48, "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_hidden_layers": 48,
    },
    "Qwen3-235B-A22B": _QWEN3_MOE | {
        "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 94, "moe_intermediate_size": 1536,
        "num_attention_heads": 64, "num_hidden_layers": 94,
    },
}  # fmt: skip
