"""The model as `transformers` knows it, Qwen3MoeForCausalLM, and back.

    python -m lab.hf out/run-1 FOLDER     writes what AutoModelForCausalLM.from_pretrained(FOLDER)
                                          and AutoTokenizer.from_pretrained(FOLDER) load, offline

Needs transformers 5 and safetensors. `from_folder` is the way back."""
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from data import tasks
from data.tokenizer import Tokenizer
from lab import runs
from moe import MoEConfig, MoETransformer

MAX_PROMPT = 64     # tokens; as in train.py, which lab/ does not import
# The fields of MoEConfig, and what `transformers` calls them.
SIZES = {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_expert": "num_experts",
    "n_active": "num_experts_per_tok",
    "d_expert": "moe_intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
# Fields of `transformers` that have only one value in our model.
FIXED = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
# Our parameters, and what `transformers` calls them; then those of a layer.
NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "unembed.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.o.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "experts_norm.weight": "post_attention_layernorm.weight",
    "experts.router.weight": "mlp.gate.weight",
    # `transformers` has the next two in one tensor; to_hf and from_hf join and divide it.
    "experts.gate": "mlp.experts.gate_proj",
    "experts.up": "mlp.experts.up_proj",
    "experts.down": "mlp.experts.down_proj",
}
# The parameters of queries and keys: these are rotated, so the order of their rows differs.
ROTARY = (".q.weight", ".k.weight", ".q_norm.weight", ".k_norm.weight")


def names(n_layer: int) -> dict[str, str]:
    """Our name of every parameter -> that of `transformers`."""
    result = dict(NAMES)
    for i in range(n_layer):
        for ours, theirs in LAYER_NAMES.items():
            result[f"layers.{i}.{ours}"] = f"model.layers.{i}.{theirs}"
    return result


def halves(x: Tensor, C: int) -> Tensor:
    """The rows of x (heads * C, ...) in the order of `transformers`. Our rotary pairs are
    neighbours, 0 1 2 3 4 5; theirs stand half a head apart: 0 2 4 1 3 5."""
    return x.unflatten(0, (-1, C // 2, 2)).transpose(1, 2).flatten(0, 2)


def neighbours(x: Tensor, C: int) -> Tensor:
    """The inverse of `halves`."""
    return x.unflatten(0, (-1, 2, C // 2)).transpose(1, 2).flatten(0, 2)


def to_hf(model: MoETransformer) -> tuple[dict, dict[str, Tensor]]:
    """-> config, state: `Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).load_state_dict(state)`
    of `transformers` 5 is the same model."""
    C = model.config.d_model // model.config.n_head
    parameters = model.state_dict()
    state = {}
    for ours, theirs in names(model.config.n_layer).items():
        x = parameters[ours]
        state[theirs] = halves(x, C) if ours.endswith(ROTARY) else x
    for i in range(model.config.n_layer):
        experts = f"model.layers.{i}.mlp.experts."
        gate = state.pop(experts + "gate_proj")                         # (E, d_expert, D)
        up = state.pop(experts + "up_proj")
        state[experts + "gate_up_proj"] = torch.cat((gate, up), dim=1)
    sizes = {theirs: getattr(model.config, ours) for ours, theirs in SIZES.items()}
    return FIXED | sizes | {"head_dim": C}, state


def from_hf(config: dict, state: dict[str, Tensor]) -> MoETransformer:
    """The inverse of to_hf, for the config and state of `transformers` 4 and 5; `state` may also
    hold one tensor for each expert, as checkpoints do. ValueError for a config that our model does
    not have."""
    model = MoETransformer(our_config(config))
    C = model.config.d_model // model.config.n_head
    state = dict(state)
    for i in range(model.config.n_layer):
        experts = f"model.layers.{i}.mlp.experts."
        if experts + "gate_up_proj" in state:
            gate, up = state.pop(experts + "gate_up_proj").chunk(2, dim=1)
            state[experts + "gate_proj"] = gate
            state[experts + "up_proj"] = up
        elif experts + "0.gate_proj.weight" in state:
            for part in ("gate_proj", "up_proj", "down_proj"):
                each = [state.pop(f"{experts}{e}.{part}.weight")
                        for e in range(model.config.n_expert)]
                state[experts + part] = torch.stack(each)
    our_name = {theirs: ours for ours, theirs in names(model.config.n_layer).items()}
    parameters = {}
    for theirs, x in state.items():
        ours = our_name.get(theirs, theirs)         # load_state_dict tells what it does not know
        parameters[ours] = neighbours(x, C) if ours.endswith(ROTARY) else x
    model.load_state_dict(parameters)
    return model


def our_config(config: dict) -> MoEConfig:
    """The config of `transformers` 4 or 5 -> ours. ValueError, naming the field, for a model that
    ours cannot be."""
    # Where a field is left out, `transformers` takes our value, except for this one.
    config = {"norm_topk_prob": False} | config
    if "num_local_experts" in config:               # what `transformers` 5 calls them
        config["num_experts"] = config["num_local_experts"]
    # `transformers` 4 has rope_theta, and rope_scaling for variants; 5 has both in rope_parameters.
    for name in ("rope_scaling", "rope_parameters"):
        rope = dict(config.get(name) or {})
        config["rope_theta"] = rope.pop("rope_theta", config.get("rope_theta", 10_000.0))
        if rope not in ({}, {"rope_type": "default"}):
            raise ValueError(f"{name} is {config[name]}; our model has only rope_type 'default'")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r}; our model has only {value!r}")
    missing = [name for name in SIZES.values() if name not in config]
    if missing:
        raise ValueError(f"the config has no {', '.join(missing)}")
    ours = MoEConfig(**{ours: config[theirs] for ours, theirs in SIZES.items()})
    C = ours.d_model // ours.n_head
    head_dim = config.get("head_dim") or C          # null in some configs
    if head_dim != C:
        raise ValueError(f"head_dim is {head_dim}; our model has only hidden_size / "
                         f"num_attention_heads, {C}")
    return ours


def tokenizer_for(tokens: list[str]):
    """The tokens of a vocabulary file -> a tokenizer of `transformers`. <end> and <pad> are special
    there: they can be left out of a decoded text. <think> and </think> are not, as in Qwen3."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # characters
    tokenizer.decoder = decoders.Fuse()                                         # without spaces
    for token in tokens:
        if token in ("<pad>", "<end>"):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif len(token) > 1:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>",
                                   padding_side="left", clean_up_tokenization_spaces=False)


def last_checkpoint(run_folder: Path) -> tuple[MoETransformer, Tokenizer, int]:
    """The model of a run's last checkpoint, its tokenizer, and its --max_new_tokens."""
    state = runs.load(run_folder / "checkpoint.pt", "name a folder that has a run")
    options = state["options"]
    tokenizer = Tokenizer(state["vocabulary"])
    sizes = {name: options[name] for name in SIZES if name in options}
    model = MoETransformer(MoEConfig(
        len(tokenizer.tokens), max_length=MAX_PROMPT + options["max_new_tokens"], **sizes))
    model.load_state_dict(state["model"])
    return model, tokenizer, options["max_new_tokens"]


def to_folder(run_folder: str, folder: str):
    """Write the model of a run's last checkpoint as `transformers` does."""
    from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
    ours, tokenizer, max_new_tokens = last_checkpoint(Path(run_folder))
    ends = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    their_config, weights = to_hf(ours)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**their_config, **ends))
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(max_new_tokens=max_new_tokens, **ends)
    model.save_pretrained(folder)
    tokenizer_for(tokenizer.tokens).save_pretrained(folder)


def from_folder(folder: str) -> MoETransformer:
    """The model in a folder that `transformers` has saved."""
    from safetensors.torch import load_file
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return from_hf(config, load_file(Path(folder) / "model.safetensors"))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        to_folder(*sys.argv[1:])
    else:
        print(__doc__)
