"""A model that was fine-tuned after its compression says so once it is saved; casts are no change."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import nsvd
from nsvd.cli import main
from nsvd.stored.changes import is_changed
from tests.tiny import compressed, float32, logits, tiny_model, tiny_tokenizer, token_ids  # noqa: F401

SAID = "changed after compression"


def told(folder) -> bool:
    """What config.json says, and what the weight file says of it."""
    section = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return section.get("changed_after_compression", False)


def tuned(model, folder, **arguments):
    """Three steps of transformers' Trainer, in place."""
    how = TrainingArguments(folder, max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, **arguments)
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids()]
    trainer = Trainer(model, how, train_dataset=rows)
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{"method": "svd"}, {"method": "best"}])
def test_a_model_that_trainer_has_tuned_says_so(options, tmp_path, capsys):
    """Whether ``save`` writes it or Trainer itself; ``nsvd info`` and the card tell it, and it stays known."""
    model = compressed(tiny_model(), **options)
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    assert not told(tmp_path / "low")
    model, tokenizer = nsvd.load(tmp_path / "low", device="cpu")
    trainer = tuned(model, tmp_path / "run", learning_rate=1e-3, save_strategy="no")
    trainer.save_model(tmp_path / "theirs")
    nsvd.save(model.eval(), tokenizer, tmp_path / "ours")
    nsvd.save(*nsvd.load(tmp_path / "ours", device="cpu"), tmp_path / "again")
    assert [told(tmp_path / name) for name in ("theirs", "ours", "again")] == [True] * 3
    for name in ("theirs", "ours", "again"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), logits(model)), name
    assert "changed_after_compression" in (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    capsys.readouterr()
    for name, said in (("low", False), ("ours", True)):
        assert main(["info", str(tmp_path / name)]) == 0
        assert (SAID in capsys.readouterr().out) == said


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_is_no_change(before, after, tmp_path):
    """On the way to a folder or back; one number in one factor is."""
    model = compressed(tiny_model(dtype=before), method="svd").to(after)
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    for dtype in ("auto", "float32"):
        again, _ = nsvd.load(tmp_path / "low", device="cpu", dtype=dtype)
        assert is_changed(again) is False
    with torch.no_grad():
        again.model.layers[1].mlp.down_proj.up.weight[3, 2] += 0.5
    assert is_changed(again)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_two_casts_are_no_change(dtypes):
    """Numbers that float16 makes coarser, and some that are rounded twice, are among the factors."""
    model = compressed(tiny_model(), method="svd")
    for dtype in dtypes:
        model.to(dtype)
    assert is_changed(model.float()) is False


def test_training_steps_of_the_compression_are_part_of_it(tmp_path):
    """Distillation and refinement come before the sums, in memory and from folder to folder."""
    steps = {"distill": 2, "refine": 2, "shifted": True, "method": "ridge", "mu": 0.03}
    assert is_changed(compressed(tiny_model(), **steps)) is False
    nsvd.save(tiny_model(), tiny_tokenizer(), tmp_path / "m")
    nsvd.compress(tmp_path / "m", tmp_path / "low", method="best", ratio=0.3, refine=2)
    assert is_changed(nsvd.load(tmp_path / "low", device="cpu")[0]) is False


def test_a_model_that_was_changed_stays_so_when_its_cache_is_compressed():
    """And one that was not has new sums."""
    for touch, said in ((0.0, False), (1.0, True)):
        model = compressed(tiny_model(), method="svd")
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.up.weight[0, 0] += touch
        nsvd.compress_kv_(model, method="svd", cache_ratio=0.8)
        assert is_changed(model) is said


def test_nothing_is_said_of_a_folder_without_sums(tmp_path):
    """An older one."""
    model = compressed(tiny_model(), method="svd")
    del model.hf_quantizer.quantization_config.factor_sums
    assert is_changed(model) is None
    nsvd.save(model, tiny_tokenizer(), tmp_path / "low")
    assert not told(tmp_path / "low")
    assert is_changed(tiny_model()) is None
