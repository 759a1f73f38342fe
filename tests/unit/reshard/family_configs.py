"""One tiny config.json per family: what every family's tests run over."""

_SIZES = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# Of the eight wavelengths of head_dim 16 two stay (< 32 tokens), two are interpolated, four (> 256) grow.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}

FAMILY_CONFIGS = {
    "llama": {**_SIZES, "model_type": "llama", "head_dim": 16, "rope_theta": 10000.0, "rope_scaling": _LLAMA3_ROPE},
    "qwen2": {**_SIZES, "model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {**_SIZES, "model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
    "qwen3_moe": {
        **_SIZES,
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "rope_theta": 1e6,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "mixtral": {
        **_SIZES,
        "model_type": "mixtral",
        "rope_theta": 1e6,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "mistral": {**_SIZES, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
}
