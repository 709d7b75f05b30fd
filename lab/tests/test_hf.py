"""Weights that travel to `transformers` and back; run `python -m pytest lab/tests/test_hf.py`.

The tests that compare with the real Qwen3MoeForCausalLM are skipped where it is not installed."""
import pytest
import torch
from torch.testing import assert_close

import train
from data import tasks
from data.tokenizer import Tokenizer
from lab import hf
from moe import MoEConfig, MoETransformer


@pytest.fixture
def model():
    """A tiny model, no parameter of which has the value that it starts with."""
    torch.manual_seed(0)
    model = MoETransformer(MoEConfig(
        20, max_length=16, n_layer=2, d_model=32, n_head=4, n_kv_head=2, n_expert=5, n_active=3,
        d_expert=12, rope_theta=500.0, norm_eps=1e-3))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def assert_same(one, other):
    assert one.config == other.config
    assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def words_of_5(config):
    """The config as `transformers` 5 writes it."""
    config = dict(config)
    config["num_local_experts"] = config.pop("num_experts")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    return config


def one_tensor_per_expert(state):
    """The state as checkpoints have it."""
    result = {}
    for name, x in state.items():
        part = name.rpartition(".")[2]
        if part == "gate_up_proj":
            gate, up = x.chunk(2, dim=1)
            result |= for_each_expert(name.replace(part, "gate_proj"), gate)
            result |= for_each_expert(name.replace(part, "up_proj"), up)
        elif part == "down_proj":
            result |= for_each_expert(name, x)
        else:
            result[name] = x
    return result


def for_each_expert(name, x):
    experts, _, part = name.rpartition(".")
    return {f"{experts}.{e}.{part}.weight": x[e] for e in range(len(x))}


# ---------------------------------------------------------------------------- without transformers

def test_there_and_back_nothing_changes(model):
    assert_same(hf.from_hf(*hf.to_hf(model)), model)


def test_the_words_of_transformers_5_mean_the_same(model):
    config, state = hf.to_hf(model)
    assert_same(hf.from_hf(words_of_5(config), state), model)


def test_a_checkpoint_may_have_one_tensor_per_expert(model):
    config, state = hf.to_hf(model)
    apart = one_tensor_per_expert(state)
    assert len(apart) == len(state) + 2 * (3 * 5 - 2)       # in 2 layers 15 tensors instead of 2
    assert_same(hf.from_hf(config, apart), model)


def test_there_is_room_for_a_prompt_as_in_train_py():
    assert hf.MAX_PROMPT == train.MAX_PROMPT


def test_rotary_pairs_are_neighbours_here_and_half_a_head_apart_there():
    ours = torch.tensor([0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15])         # two heads
    theirs = torch.tensor([0, 2, 4, 1, 3, 5, 10, 12, 14, 11, 13, 15])
    assert_close(hf.halves(ours, 6), theirs)
    assert_close(hf.neighbours(theirs, 6), ours)


@pytest.mark.parametrize("name, value", [
    ("model_type", "qwen2_moe"),
    ("hidden_act", "gelu"),
    ("norm_topk_prob", False),
    ("decoder_sparse_step", 2),
    ("mlp_only_layers", [0]),
    ("attention_bias", True),
    ("attention_dropout", 0.1),
    ("use_sliding_window", True),
    ("sliding_window", 4),
    ("tie_word_embeddings", True),
    ("head_dim", 16),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}),
])
def test_another_architecture_is_a_value_error_that_names_it(model, name, value):
    config, state = hf.to_hf(model)
    with pytest.raises(ValueError) as error:
        hf.from_hf(config | {name: value}, state)
    assert f"{name} is {value!r}; our model has only" in str(error.value)


@pytest.mark.parametrize("name", ["norm_topk_prob", "num_experts", "vocab_size"])
def test_a_config_without_a_field_that_matters_is_a_value_error(model, name):
    config, state = hf.to_hf(model)
    del config[name]
    with pytest.raises(ValueError, match=name):
        hf.from_hf(config, state)


@pytest.mark.parametrize("name", [
    "lm_head.weight",
    "model.layers.1.self_attn.k_norm.weight",
    "model.layers.1.mlp.experts.gate_up_proj",
])
def test_no_parameter_may_be_missing_or_unknown(model, name):
    config, state = hf.to_hf(model)
    with pytest.raises(RuntimeError, match="Unexpected"):
        hf.from_hf(config, state | {name + "_2": state[name]})
    del state[name]
    with pytest.raises(RuntimeError, match="Missing"):
        hf.from_hf(config, state)


# ---------------------------------------------------------------------------- with transformers

def as_transformers(transformers, config, state):
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**config))
    theirs.load_state_dict(state)
    return theirs.eval()


@torch.no_grad()
def test_the_logits_are_those_of_transformers(model, transformers):
    theirs = as_transformers(transformers, *hf.to_hf(model))
    tokens = torch.randint(20, (6, 12))
    padding_on_the_left = torch.tensor([0, 1, 5, 9, 10, 11])
    mask = torch.arange(12) >= padding_on_the_left[:, None]
    expected = theirs(tokens, attention_mask=mask.long()).logits
    assert_close(model(tokens, mask).logits[mask], expected[mask], rtol=0, atol=1e-4)


def test_what_transformers_writes_comes_back(model, transformers):
    config, state = hf.to_hf(model)
    theirs = as_transformers(transformers, config, state)
    # Its save_pretrained writes the second, without the fields that have their defaults.
    for written in (theirs.config.to_dict(), theirs.config.to_diff_dict()):
        assert_same(hf.from_hf(written, theirs.state_dict()), model)


def test_a_variant_that_transformers_writes_is_a_value_error(model, transformers):
    config, state = hf.to_hf(model)
    yarn = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
    for variant in ({"rope_parameters": yarn}, {"attention_bias": True}, {"head_dim": 16},
                    {"use_sliding_window": True, "sliding_window": 4}):
        written = transformers.Qwen3MoeConfig(**config | variant).to_dict()
        with pytest.raises(ValueError, match=list(variant)[0]):
            hf.from_hf(written, state)


@pytest.mark.parametrize("task, prompts", [
    ("arithmetic", ["3+4=", "17-8=", "6*7="]), ("countdown", ["3,8,2=30:", "9,9,1=19:"])])
def test_a_run_that_was_written_for_transformers_gives_the_same_answers(
        transformers, tmp_path, monkeypatch, capsys, task, prompts):
    monkeypatch.chdir(tmp_path)
    # A few held-out problems, to be quick.
    monkeypatch.setattr(tasks, "held_out_problems", lambda task: task.held_out()[::40])
    train.main(["--task", task, "--cold_steps", "30", "--cold_tokens", "400", "--steps", "1",
                "--prompts", "4", "--threads", "1", "--device", "cpu", "--out", "run"])
    hf.to_folder("run", "saved")
    tokenizer = transformers.AutoTokenizer.from_pretrained("saved", local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained("saved", local_files_only=True)
    for prompt in prompts:
        capsys.readouterr()
        train.main(["--ask", prompt, "--device", "cpu", "--out", "run"])
        ours = capsys.readouterr().out.removesuffix("\n")
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        text = tokenizer.decode(model.generate(ids, do_sample=False)[0])
        assert text.removesuffix("<end>") == ours
        assert tokenizer.decode(ids[0]) == prompt
    assert_close(hf.from_folder("saved").state_dict(),
                 torch.load("run/checkpoint.pt", weights_only=True)["model"], rtol=0, atol=0)


def test_the_tokenizer_for_transformers_leaves_out_only_what_is_special(transformers):
    tokens = Tokenizer().tokens
    tokenizer = hf.tokenizer_for(tokens)
    text = "3+4=<think>3+4+0=7</think>7<end>"
    ids = tokenizer(text).input_ids
    assert ids == Tokenizer().encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<end>")
