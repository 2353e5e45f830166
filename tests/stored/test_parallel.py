"""Two processes share a compressed model by transformers' own plan of tensor parallelism."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import nsvd
from tests.tiny import PIVOTED, compressed, float32, tiny_model, tiny_tokenizer  # noqa: F401

WORK = """
import sys, torch, nsvd
from transformers import AutoModelForCausalLM
from tests.tiny import logits
whole = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
shared = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto").eval()
torch.testing.assert_close(logits(shared), logits(whole), rtol=0, atol=1e-5)
for name in ("self_attn.q_proj.up", "mlp.down_proj.down"):
    name = f"model.layers.1.{name}.weight"
    part, full = shared.get_parameter(name).to_local(), whole.get_parameter(name)
    assert 2 * part.numel() == full.numel(), name
"""
SIZES = {"hidden_size": 64, "num_key_value_heads": 4, "intermediate_size": 96}


def saved(folder, **options):
    model = compressed(tiny_model("mistral", **SIZES), **options)
    nsvd.save(model, tiny_tokenizer(), folder)
    return folder


def plan(folder) -> dict:
    return {
        name: style for name, style in AutoModelForCausalLM.from_pretrained(folder).tp_plan.items() if "_proj" in name
    }


def test_the_plan_names_the_factors(tmp_path):
    """The outputs of ``up``, or the inputs of ``down``; none where that cannot be, of which transformers tells."""
    dense = tiny_model("mistral", **SIZES).tp_plan
    wanted = {f"{n}.{'up' if s == 'colwise' else 'down'}": s for n, s in dense.items() if "_proj" in n}
    assert len(wanted) == 7
    assert plan(saved(tmp_path / "plain", method="asvd-1")) == wanted
    assert plan(saved(tmp_path / "pivoted", **PIVOTED)) == {}
    assert plan(saved(tmp_path / "some", method="asvd-1", exclude="layers.0.mlp.*")) == {}


@pytest.mark.slow
def test_two_processes_share_the_factors(tmp_path):
    """Half of them each, and the same logits."""
    saved(tmp_path / "low", method="asvd-1")
    (tmp_path / "work.py").write_text(WORK, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*command, tmp_path / "work.py", tmp_path / "low"], env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
