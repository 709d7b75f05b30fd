"""What users of such programs stumble over: odd tasks, options, files, terminals and tensors. Each
works, or gets one line before the long work begins."""
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import gspo
import train as train_py
from data.tokenizer import Tokenizer
from lab import extras, report
from lab.extras import critic, kl_term
from lab.tests.tools import HOUSE, PLAIN
from moe import MoEConfig, MoETransformer, generate

QUICK = ("--cold_steps", "3", "--cold_tokens", "400", "--steps", "2", "--threads", "1",
         "--max_new_tokens", "9", "--prompts", "4", "--group_size", "4", "--mini_batches", "2")


def in_dataclass(fields, imports="", decorator="@dataclass"):
    """PLAIN as a dataclass with these fields."""
    head = f"{imports}\nfrom dataclasses import dataclass\n"
    return head + PLAIN.replace("class Task:", f"{decorator}\nclass Task:\n    {fields}")


@pytest.mark.parametrize("name, text, arguments", [
    ("late", in_dataclass("size: int = 2", "from __future__ import annotations"), ("--size", "3")),
    ("maybe", in_dataclass("size: int | None = None"), ("--size", "3")),
    ("carries", in_dataclass("carry: bool = True"), ("--no-carry",)),
    ("slotted", in_dataclass("size: int = 2", decorator="@dataclass(slots=True)"), ("--size", "3")),
])
def test_an_odd_dataclass_is_a_task(train, task_file, name, text, arguments):
    task_file(name, text)
    assert train("--task", name, *QUICK, "--out", "run", *arguments) == 0
    config = report.json.loads(Path("run/config.json").read_text(encoding="utf-8"))
    assert config.get("size", 3) == 3
    assert config.get("carry", False) is False


@pytest.mark.parametrize("name, text, says", [
    ("no_default", in_dataclass("size: int"), "the field size has no default"),
    ("pathlike", in_dataclass("where: Path = Path('.')", "from pathlib import Path"),
     "the field where is of type"),
    ("listed", in_dataclass("many: tuple = ()"), "the field many is of type"),
    ("steppy", in_dataclass("steps: int = 1"), "--steps"),
    ("helpful", in_dataclass("help: int = 1"), "--help"),
    ("none", PLAIN.replace('response == "2"', "None"), "reward gives None"),
    ("texty", PLAIN.replace('response == "2"', "'1'"), "reward gives '1'"),
    ("huge", PLAIN.replace('response == "2"', "1e300"), "reward gives 1e+300"),
    ("vast", PLAIN.replace('response == "2"', "10 ** 400"), "reward gives 1000"),
    ("raises", PLAIN.replace('response == "2"', "response[99]"), "reward fails: IndexError"),
    ("mute", PLAIN.replace('rng.choice("23")', "None"), "demonstrate gives None"),
    ("thinker", PLAIN + "    def thinks(self, response):\n        return response[5]\n",
     "thinks fails: IndexError"),
    ("generous", PLAIN + "    def measure(self, *_):\n        return {'a\\nb': 1}\n",
     "a text of one line"),
    ("no_init", in_dataclass("many: int = field(default=3, init=False)",
                             "from dataclasses import field"), "the field many"),
    ("renamed", PLAIN.replace("class Task:", "class Task:\n    defaults = {'task': 'countdown'}"),
     "'task', which is no option"),
    ("not_a_number", PLAIN.replace('response == "2"', 'float("nan")'), "reward gives nan"),
    ("nothing_held", PLAIN + "    def held_out(self):\n        return []\n", "held_out is empty"),
    ("long_held", PLAIN + "    def held_out(self):\n        x = Problem()\n"
     "        x.prompt = '1' * 65\n        return [x]\n", "a prompt of 65 tokens is too long"),
    ("unknown_held", PLAIN + "    def held_out(self):\n        x = Problem()\n"
     "        x.prompt = '?'\n        return [x]\n", "'?' in '?' is not in the vocabulary"),
    ("shifty", PLAIN + "    def measure(self, problem, response, truncated):\n"
     "        return {} if truncated else {'letters': 1}\n", "the names must always be"),
    ("wordy", PLAIN + "    def measure(self, problem, response, truncated):\n"
     "        return {'letters': 'many'}\n", "measure fails: ValueError"),
    ("enumerated", "from enum import Enum\nclass Kind(str, Enum):\n    easy = 'easy'\n"
     + PLAIN.replace("class Task:", "class Task:\n    kinds = [Kind.easy]")
     .replace("def sample(self, rng)", "def sample(self, rng, kind=None)")
     .replace('prompt = "1+1="', 'prompt = "1+1="\n    kind = Kind.easy'),
     "both must be the same plain text"),
])
def test_a_task_that_would_fail_later_gets_one_line_before_the_cold_start(
        train, capsys, task_file, name, text, says):
    task_file(name, text)
    assert train("--task", name, *QUICK) == 2
    streams = capsys.readouterr()
    assert says in streams.err
    assert streams.err.count("\n") == 1
    assert "cold start" not in streams.out


@pytest.mark.parametrize("content, says", [
    ("<pad> 1 + = 2", "has no token <end>"),
    ("<end> 1 + = 2", "has no token <pad>"),
    ("<end> <pad> 1 1 + =", "has the token 1 more than once"),
    ("<end> <pad> 1 10 + =", "has the token 10"),
])
def test_a_vocabulary_that_cannot_work_is_a_value_error_that_names_the_file(
        tmp_path, content, says):
    path = tmp_path / "odd.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} {re.escape(says)}"):
        Tokenizer(path)


def test_a_byte_order_mark_is_no_part_of_a_vocabulary(tmp_path):
    path = tmp_path / "marked.txt"
    path.write_text("<end> <pad> 1 +", encoding="utf-8-sig")
    assert Tokenizer(path).tokens == ["<end>", "<pad>", "1", "+"]


@pytest.mark.parametrize("arguments", [("--ask", "1+1="), ("--resume", "--steps", "3"),
                                       ("--eval_only",), ("--inspect",)], ids=" ".join)
def test_a_vocabulary_whose_lines_were_swapped_after_training_is_refused(
        train, capsys, task_file, tmp_path, arguments):
    name = f"words_{arguments[0][2:]}"          # a module is imported once
    task_file(name, PLAIN)
    words = tmp_path / "data" / f"{name}.txt"
    words.write_text("<pad> <end> 1 + = 2 3")
    assert train("--task", name, *QUICK, "--out", "run") == 0
    words.write_text("<pad> <end> + 1 = 2 3")
    capsys.readouterr()
    assert train(*arguments, "--out", "run") == 2
    assert "vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [
    ("correction", "tiss"), ("routing_replay", "R2"), ("clip_low", -1.0),
    ("clip_low", float("nan")), ("lr", "3e-4"), ("steps", 2.5), ("algorithm", None),
    ("steps", 200.0), ("seed", False)])
def test_an_option_in_code_is_checked_as_on_the_command_line(name, value):
    with pytest.raises(ValueError, match=name):
        extras.extend(train_py.Trainer, train_py.Config(**{name: value}))


def test_a_percent_sign_in_a_help_text_is_printed(train, capsys, task_file):
    text = in_dataclass("share: int = option(1, '5 % of all')", "from lab.options import option")
    task_file("percent", text)
    assert train("--task", "percent", "--help") == 0
    assert "5 % of all" in capsys.readouterr().out


def test_a_terminal_that_knows_no_arrow_and_no_unicode_gets_the_report(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "LC_ALL": "C", "PYTHONUTF8": "0"}
    result = subprocess.run([sys.executable, str(HOUSE / "train.py"), *QUICK, "--task", "countdown",
                             "--max_new_tokens", "100", "--out", "run"], cwd=tmp_path, text=True,
                            env=environment, capture_output=True, encoding="cp1252")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run/curves.png").exists()
    assert " ? " in result.stdout


def test_a_measure_with_an_umlaut_is_resumed_where_files_are_ascii_by_default(
        tmp_path):
    text = PLAIN + ("    def measure(self, problem, response, truncated):\n"
                    "        return {'l\\u00e4nge': len(response)}\n")
    for name in ("train.py", "gspo.py", "moe.py", "lab", "data"):
        copy = shutil.copytree if (HOUSE / name).is_dir() else shutil.copy
        copy(HOUSE / name, tmp_path / name)
    (tmp_path / "data/umlaut.py").write_text(text, encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for arguments in (["--task", "umlaut", *QUICK], ["--resume", "--steps", "3"]):
        result = subprocess.run([sys.executable, "train.py", *arguments, "--out", "run"],
                                cwd=tmp_path, env=environment, capture_output=True)
        assert result.returncode == 0, result.stderr


def test_rewards_below_0_have_curves():
    summary = {"accuracy_teacher": 0.0, "accuracy_cold_start": 0.0}
    from matplotlib import pyplot as plt
    _, axis = plt.subplots()
    report.draw_panel(axis, "reward", {"reward": [(1, -9.0), (2, -1.0)]}, summary)
    low, high = axis.get_ylim()
    assert low < -9 < -5 < high         # the second point is a mean of both


def test_a_run_in_a_thread_works_and_the_callers_handlers_come_back(train, task_file):
    task_file("threaded", PLAIN)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(
        train("--task", "threaded", *QUICK, "--out", "one")))
    thread.start()
    thread.join()
    assert codes == [0]
    mine = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert train("--task", "threaded", *QUICK, "--out", "two") == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_a_cold_start_that_cannot_be_kept_is_not_lost(train, capsys, task_file):
    task_file("unkept", PLAIN)
    Path("out").write_text("a file where the folder should be")
    assert train("--task", "unkept", *QUICK, "--out", "run") == 0
    assert "is not kept for later runs" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ tensors

@pytest.mark.parametrize("name, shape", [
    ("mask", (1, 3)), ("mask", (2, 1)), ("logp_old", (3,)), ("logp_old", (2, 1)),
    ("advantages", (1,)), ("advantages", ()), ("advantages", (2, 1)), ("advantages", (3,))])
@pytest.mark.parametrize("algorithm", ["gspo", "grpo"])
def test_shapes_that_would_broadcast_are_a_value_error(algorithm, name, shape):
    arguments = {"logp": torch.zeros(2, 3), "logp_old": torch.zeros(2, 3),
                 "advantages": torch.ones(2), "mask": torch.ones(2, 3)}
    gspo.policy_loss(algorithm, **arguments)
    with pytest.raises(ValueError, match="token_weights"):
        gspo.policy_loss(algorithm, **arguments, token_weights=torch.ones(1))
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        gspo.policy_loss(algorithm, **arguments | {name: torch.ones(shape)})


def test_other_losses_refuse_shapes_that_would_broadcast_too():
    x = torch.zeros(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="one shape"):
        kl_term.kl_loss(x, torch.zeros(3), mask, torch.ones(2))
    with pytest.raises(ValueError, match="returns"):
        critic.value_loss(x, x, torch.zeros(2, 1), mask, torch.ones(2))


@pytest.mark.parametrize("logp", [[0.0, float("-inf")], [0.0, -1e30]])
def test_gspo_token_is_gspo_at_a_token_that_has_become_impossible(logp):
    gradients = []
    for algorithm in ("gspo", "gspo_token"):
        x = torch.tensor([logp], requires_grad=True)
        loss, _ = gspo.policy_loss(algorithm, x, torch.full((1, 2), -1.0), torch.ones(1),
                                   torch.ones(1, 2))
        loss.backward()
        gradients.append(x.grad.tolist())
    assert gradients == [[[0, 0]], [[0, 0]]]


@pytest.mark.parametrize("rewards, expected", [
    (torch.tensor([[1, 0, 0, 1]]), [0.866, -0.866, -0.866, 0.866]),
    (torch.tensor([[True, False, False, True]]), [0.866, -0.866, -0.866, 0.866]),
    (torch.tensor([[1, 1, 1, 1.0078125]], dtype=torch.bfloat16), [-0.5, -0.5, -0.5, 1.5]),
    (torch.tensor([[1e7, 1e7 + 1, 1e7 + 2, 1e7 + 3]]), [-1.162, -0.387, 0.387, 1.162]),
    (2 ** 53 + torch.arange(4)[None], [-1.162, -0.387, 0.387, 1.162]),
])
def test_advantages_of_rewards_of_any_type(rewards, expected):
    assert gspo.group_advantages(rewards)[0].tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sampler_whose_logits_are_not_finite_says_so_and_names_the_precision(temperature):
    model = MoETransformer(MoEConfig(12, max_length=20, d_model=16, n_layer=1)).bfloat16()
    model.unembed.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="torch.bfloat16"):
        generate(model, [[1, 2]], 2, 4, temperature)


def test_a_model_in_float64_has_its_positions_whichever_way_it_was_cast():
    tokens = torch.arange(8)[None]
    mask = torch.ones(1, 8, dtype=torch.bool)
    logits = []
    for cast in (lambda model: model.double(), lambda model: model.to(torch.float64)):
        torch.manual_seed(0)
        logits.append(cast(MoETransformer(MoEConfig(12, n_layer=1)))(tokens, mask).logits)
    torch.testing.assert_close(*logits)
