"""The order of the house: which way imports run, and that the README speaks of what exists."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gspo

HOUSE = Path(__file__).parent.parent
OURS = {"moe", "gspo", "train", "test_gspo", "data", "lab", "results"}
MAY_IMPORT = {"moe.py": set(), "gspo.py": {"moe"}, "test_gspo.py": {"moe", "gspo", "data"},
              "train.py": {"moe", "gspo", "data", "lab.options", "lab.report"}}
# Of lab, and its tests.
MAY_IMPORT_TRAIN = ("bench.py", "hf.py", "instruments.py", "scatter.py")
FILES = sorted([*HOUSE.glob("*.py"), *HOUSE.glob("*/*.py")])
README = (HOUSE / "README.md").read_text(encoding="utf-8")


def imports(path):
    """The modules of ours that a file imports; of lab, with the module's name: `lab.report`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in names if name.split(".")[0] in OURS}
    return {".".join(name.split(".")[:2]) if name.startswith("lab") else name.split(".")[0]
            for name in ours}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_imports_run_down(path):
    room = path.relative_to(HOUSE).parts[0]
    if room == "data":
        assert imports(path) <= {"data"}
    elif room == "lab":
        may_import_train = path.name in MAY_IMPORT_TRAIN or path.name.startswith("test_")
        assert may_import_train or "train" not in imports(path)
    else:
        assert imports(path) <= MAY_IMPORT[room]


def test_results_hold_no_code():
    assert not list((HOUSE / "results").glob("*.py"))


def test_the_functions_that_the_readme_names_exist():
    """In the README, `name` in `file.py` or [`name`](file.py) is a function or class there."""
    named = re.findall(r"\[`(\w+)`\]\((\w[\w/]*\.py)\)", README)
    assert len(named) >= 6
    for name, file in named:
        defined = {node.name for node in ast.walk(ast.parse((HOUSE / file).read_text()))
                   if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert name in defined, f"{name} is not in {file}"


@pytest.mark.parametrize("page", ["README.md", "results/README.md", "results/doubts.md"])
def test_links_to_files_lead_somewhere(page):
    text = (HOUSE / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not link.startswith("http"):
            assert ((HOUSE / page).parent / link).exists(), link


def test_the_objective_of_the_readme_is_a_row_like_any_other(monkeypatch):
    code, = re.findall(r"```py\n(def soft.*?)```", README, re.DOTALL)
    monkeypatch.setattr(gspo, "ALGORITHMS", dict(gspo.ALGORITHMS))
    exec(code, vars(gspo).copy())
    logp = torch.randn(4, 5, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    loss, _ = gspo.policy_loss("soft", logp, logp.detach(), advantages, torch.ones(4, 5))
    loss.backward()
    # At equal policies tanh has slope 1: the gradient is that of GSPO, -A / (B |y|).
    torch.testing.assert_close(logp.grad, (-advantages / 20)[:, None].expand(4, 5))


def test_the_loss_in_ones_own_trainer_as_the_readme_has_it():
    code, = re.findall(r"```py\n(from gspo.*?)```", README, re.DOTALL)
    tokens = torch.randint(7, (4, 8))
    embedding = torch.nn.Embedding(7, 7)
    names = {
        "model": lambda tokens: SimpleNamespace(logits=embedding(tokens)),
        "tokens": tokens, "prompt_length": 3, "responses": tokens[:, 3:],
        "rewards": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "mask": torch.ones(4, 5),
        "logp_old": torch.full((4, 5), -2.0)}
    exec(code, names)
    assert embedding.weight.grad.abs().sum() > 0
    assert names["clipped"].shape == (4, 5)


def test_the_task_of_the_readme_runs(tmp_path):
    code, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for name in ("train.py", "gspo.py", "moe.py", "data", "lab"):
        copy = shutil.copytree if (HOUSE / name).is_dir() else shutil.copy
        copy(HOUSE / name, tmp_path / name)
    (tmp_path / "data" / "reverse.py").write_text(code)
    command = ("train.py", "--task", "reverse", "--cold_steps", "20", "--steps", "2")
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True)
