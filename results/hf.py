"""The model as `transformers` knows it, and back: Qwen3MoeForCausalLM."""
from dataclasses import asdict
from functools import reduce

import torch

from moe import MoEConfig, MoETransformer

# What `transformers` calls the fields of MoEConfig, in their order ...
HF_CONFIG = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size",
             "num_attention_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok",
             "moe_intermediate_size", "rope_theta", "rms_norm_eps")
# ... and the parts of our parameters' names, replaced in this order. Our `qkv` is three tensors
# there, our `gate` and `up` are one.
HF_NAMES = {
    "attention_norm": "input_layernorm.weight", "attention": "self_attn", ".qkv.": ".qkv_proj.",
    "q_norm": "q_norm.weight", "k_norm": "k_norm.weight", "model.norm": "model.norm.weight",
    ".o.": ".o_proj.", "experts.router": "mlp.gate", "experts.gate": "mlp.experts.gate_proj",
    "experts.up": "mlp.experts.up_proj", "experts.down": "mlp.experts.down_proj",
    "experts_norm": "post_attention_layernorm.weight",
    "model.unembed": "lm_head", "embed": "embed_tokens"}


def hf_name(name):
    return reduce(lambda text, pair: text.replace(*pair), HF_NAMES.items(), "model." + name)


def halves(x, C):
    """The rows of x (heads * C, ...) in the order of `transformers`. Our rotary pairs are
    neighbours, 0 1 2 3 4 5; theirs stand half a head apart: 0 2 4 1 3 5."""
    return x.unflatten(0, (-1, C // 2, 2)).transpose(1, 2).flatten(0, 2)


def neighbours(x, C):
    """The inverse of `halves`."""
    return x.unflatten(0, (-1, 2, C // 2)).transpose(1, 2).flatten(0, 2)


def to_hf(model):
    """-> (config, state): `Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).load_state_dict(state)`
    of `transformers` 5 is the same model."""
    H, J, C = model.config.n_head, model.config.n_kv_head, model.layers[0].attention.C
    config = dict(zip(HF_CONFIG, asdict(model.config).values(), strict=True)) | {
        "head_dim": C, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "attention_bias": False, "tie_word_embeddings": False, "hidden_act": "silu"}
    state = {hf_name(name): x for name, x in model.state_dict().items()}
    for name in [name for name in state if "qkv_proj" in name]:
        for part, x in zip("qkv", state.pop(name).split((H * C, J * C, J * C))):
            state[name.replace("qkv", part)] = x if part == "v" else halves(x, C)
    for name in [name for name in state if "q_norm" in name or "k_norm" in name]:
        state[name] = halves(state[name], C)
    for at in [name.split("gate_proj")[0] for name in state if "gate_proj" in name]:
        parts = [state.pop(at + name) for name in ("gate_proj", "up_proj")]     # (E, F, D) each
        state[at + "gate_up_proj"] = torch.cat(parts, dim=1)
    return config, state


def from_hf(config, state):
    """The inverse of `to_hf`. `state` may also hold one tensor per expert, as checkpoints do.
    Raises ValueError for a variant of the architecture that this model does not have."""
    model = MoETransformer(MoEConfig(*(config[name] for name in HF_CONFIG)))
    own, state, each = to_hf(model)[0], dict(state), range(model.config.n_expert)
    C = own["head_dim"]
    if wrong := {name: config[name] for name in own if config.get(name, own[name]) != own[name]}:
        raise ValueError(f"{wrong} is another architecture: here {({k: own[k] for k in wrong})}")
    for at in [name.split("q_proj")[0] for name in state if "q_proj" in name]:
        q, k, v = (state.pop(f"{at}{part}_proj.weight") for part in "qkv")
        state[at + "qkv_proj.weight"] = torch.cat((neighbours(q, C), neighbours(k, C), v))
    for name in [name for name in state if "q_norm" in name or "k_norm" in name]:
        state[name] = neighbours(state[name], C)
    for at in [name.split("0.gate_proj")[0] for name in state if "experts.0.gate_proj" in name]:
        for part in ("gate", "up", "down"):                             # (E, F, D) twice, (E, D, F)
            each_has = [state.pop(f"{at}{e}.{part}_proj.weight") for e in each]
            state[f"{at}{part}_proj"] = torch.stack(each_has)
    for name in [name for name in state if "gate_up_proj" in name]:
        for part, x in zip(("gate", "up"), state.pop(name).chunk(2, dim=1)):
            state[name.replace("gate_up", part)] = x
    names = {hf_name(name): name for name in model.state_dict()}
    model.load_state_dict({names.get(name, name): x for name, x in state.items()})
    return model
