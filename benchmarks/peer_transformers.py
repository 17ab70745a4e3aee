"""HF transformers' DeepSeek-V4 as a peer: the same configuration, the same weights, in float32."""

from __future__ import annotations

import os
import re
import sys

import torch
from torch import Tensor

from dsv4_hal.formats import Weight, dequantize
from dsv4_hal.model.transformer import Model

# Where torch_npu is installed without CANN, torch and transformers would import it and fail.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
sys.modules.setdefault("torch_npu", None)  # type: ignore[arg-type]

import transformers  # noqa: E402

# Names of the weight table to transformers' names, applied in order.
RENAME = [
    (r"^embed$", "model.embed_tokens.weight"),
    (r"^head$", "lm_head.weight"),
    (r"^norm$", "model.norm.weight"),
    (r"^hc_head_(fn|base|scale)$", r"model.hc_head.hc_\1"),
    (r"^layers", "model.layers"),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
    (r"\.attn_norm$", ".input_layernorm.weight"),
    (r"\.ffn_norm$", ".post_attention_layernorm.weight"),
    (r"\.attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
    (r"\.attn\.indexer\.wq_b$", ".self_attn.compressor.indexer.q_b_proj.weight"),
    (r"\.attn\.indexer\.weights_proj$", ".self_attn.compressor.indexer.scorer.weights_proj.weight"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.ape$", ".position_bias"),
    (r"(compressor.*)\.norm$", r"\1.kv_norm.weight"),
    (r"\.wgate$", ".gate_proj.weight"),
    (r"\.wkv$", ".kv_proj.weight"),
    (r"\.wq_a$", ".q_a_proj.weight"),
    (r"\.wq_b$", ".q_b_proj.weight"),
    (r"\.wo_a$", ".o_a_proj.weight"),
    (r"\.wo_b$", ".o_b_proj.weight"),
    (r"self_attn\.q_norm$", "self_attn.q_a_norm.weight"),
    (r"self_attn\.kv_norm$", "self_attn.kv_norm.weight"),
    (r"mlp\.gate$", "mlp.gate.weight"),
    (r"mlp\.gate\.bias$", "mlp.gate.e_score_correction_bias"),
    (r"mlp\.experts\.w13$", "mlp.experts.gate_up_proj"),
    (r"mlp\.experts\.w2$", "mlp.experts.down_proj"),
    (r"shared_experts\.w2$", "shared_experts.down_proj.weight"),
]


def hf_state(model: Model) -> dict[str, Tensor]:
    """The table's weights, dequantised to float32, under transformers' names."""
    state: dict[str, Tensor] = {}
    for name, held in model.weights.items():
        if name.startswith("mtp."):
            continue
        value = dequantize(held, torch.float32) if isinstance(held, Weight) else held
        value = value.float() if value.is_floating_point() else value
        for pattern, target in RENAME:
            name = re.sub(pattern, target, name)
        if name.endswith("shared_experts.w13"):
            gate, up = value.chunk(2)
            state[name.replace("w13", "gate_proj.weight")] = gate
            state[name.replace("w13", "up_proj.weight")] = up
        else:
            state[name] = value
    return state


def hf_model(model: Model) -> torch.nn.Module:
    fields = model.cfg.to_dict()
    for key in ("architectures", "model_type", "torch_dtype", "topk_method", "quantization_config", "expert_dtype"):
        fields.pop(key, None)
    fields["rope_parameters"] = {k if k != "type" else "rope_type": v for k, v in fields.pop("rope_scaling").items()}
    config = transformers.DeepseekV4Config(**fields)
    config._attn_implementation = "eager"
    oracle = transformers.DeepseekV4ForCausalLM(config).float().eval()
    missing, unexpected = oracle.load_state_dict(hf_state(model), strict=False)
    assert not unexpected, unexpected
    assert all("rotary" in name for name in missing), missing
    return oracle
