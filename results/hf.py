"""The model as `transformers` knows it, and back: Qwen3MoeForCausalLM."""
from dataclasses import asdict
from functools import reduce

import torch

from moe import MoEConfig, MoETransformer

# What `transformers` calls the fields of MoEConfig, in their order ...
HF_CONFIG = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size",
             "num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok",
             "moe_intermediate_size", "rope_theta", "rms_norm_eps")
# ... and the parts of our parameters' names, replaced in this order. Their `qkv` is three tensors.
HF_NAMES = {
    "attention_norm": "input_layernorm", "attention": "self_attn", ".qkv.": ".qkv_proj.",
    ".o.": ".o_proj.", "experts.router": "mlp.gate", "experts.gate_up": "mlp.experts.gate_up_proj",
    "experts.down": "mlp.experts.down_proj", "experts_norm": "post_attention_layernorm",
    "model.unembed": "lm_head", "embed": "embed_tokens"}


def hf_name(name):
    return reduce(lambda text, pair: text.replace(*pair), HF_NAMES.items(), "model." + name)


def to_hf(model):
    """-> (config, state): `Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).load_state_dict(state)`
    of `transformers` 5 is the same model. The tensors are the model's own, not copies."""
    H, J, C = model.config.n_head, model.config.n_kv_head, model.layers[0].attention.C
    config = dict(zip(HF_CONFIG, asdict(model.config).values(), strict=True)) | {
        "head_dim": C, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "attention_bias": False, "tie_word_embeddings": False, "hidden_act": "silu"}
    state = {hf_name(name): x for name, x in model.state_dict().items()}
    for name in [name for name in state if "qkv_proj" in name]:
        for part, x in zip("qkv", state.pop(name).split((H * C, J * C, J * C))):
            state[name.replace("qkv", part)] = x
    return config, state


def from_hf(config, state):
    """The inverse of `to_hf`. `state` may also hold one tensor per expert, as checkpoints do.
    Raises ValueError for a variant of the architecture that this model does not have."""
    model = MoETransformer(MoEConfig(*(config[name] for name in HF_CONFIG)))
    own, state, each = to_hf(model)[0], dict(state), range(model.config.n_expert)
    if wrong := {name: config[name] for name in own if config.get(name, own[name]) != own[name]}:
        raise ValueError(f"{wrong} is another architecture: here {({k: own[k] for k in wrong})}")
    for at in [name.split("q_proj")[0] for name in state if "q_proj" in name]:
        parts = [state.pop(f"{at}{part}_proj.weight") for part in "qkv"]
        state[at + "qkv_proj.weight"] = torch.cat(parts)
    for at in [name.split("0.gate_proj")[0] for name in state if "experts.0.gate_proj" in name]:
        gate, up, down = (torch.stack([state.pop(f"{at}{e}.{part}_proj.weight") for e in each])
                          for part in ("gate", "up", "down"))           # (E, F, D) twice, (E, D, F)
        state |= {at + "gate_up_proj": torch.cat((gate, up), 1), at + "down_proj": down}
    names = {hf_name(name): name for name in model.state_dict()}
    model.load_state_dict({names.get(name, name): x for name, x in state.items()})
    return model
