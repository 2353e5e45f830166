"""What training brings back after a compression: transformers' Trainer on the factors, or PEFT's adapters beside them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from nsvd.stored.foreign import quiet
from nsvd.stored.layers import CompressedLayer
from nsvd.walk.targets import targets

HAS_PEFT = find_spec("peft") is not None
FACTORS = ["up", "down"]  # what PEFT calls the two children of a compressed layer


def fine_tuned(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    steps: Sequence[int],
    batch: int,
    rate: float,
    seed: int = 0,
    adapters: int = 0,
) -> dict[int, PreTrainedModel]:
    """Copies of a model after each of so many ``steps`` of transformers' Trainer; the model itself stays as it is.

    Trained are the factors of its compressed layers; of a dense model the weights of its target layers. Every token of the windows
    ``ids`` (count, length) is to be predicted, ``batch`` windows a step, by AdamW without weight decay. The ``rate`` falls
    linearly to zero at the last of the steps. With ``adapters`` the factors stay, and adapters of this rank beside each of
    them are trained by PEFT; they are merged into the factors of the copies.

    Raises:
        ValueError: if there is no step to copy after.
        ModuleNotFoundError: if adapters are asked for and PEFT is not installed.
    """
    if not steps or min(steps) < 1:
        raise ValueError(f"steps are whole numbers from 1, not {list(steps)}")
    tuned = copy.deepcopy(model).requires_grad_(False)
    if adapters:
        from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]  # not a dependency

        how = LoraConfig(r=adapters, lora_alpha=2 * adapters, target_modules=FACTORS, task_type="CAUSAL_LM")
        with _numbers_apart():
            torch.manual_seed(seed)
            tuned = get_peft_model(tuned, how)
    else:
        for layer in [m for m in tuned.modules() if isinstance(m, CompressedLayer)] or targets(tuned).values():
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_("bias" not in name)
    copies = _Copies(steps)
    with TemporaryDirectory() as folder, _numbers_apart():
        how = TrainingArguments(
            folder, max_steps=max(steps), per_device_train_batch_size=batch, learning_rate=rate, weight_decay=0.0, seed=seed,
            lr_scheduler_type="linear", save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
        )  # fmt: skip
        rows = [{"input_ids": window, "labels": window} for window in ids]
        trainer = Trainer(tuned, how, train_dataset=cast(Dataset, rows), callbacks=[copies])
        trainer.remove_callback(PrinterCallback)
        with quiet():
            trainer.train()
    return copies.made


@contextmanager
def _numbers_apart() -> Iterator[None]:
    """Random numbers drawn and seeds set within, as Trainer does, are none to what comes after."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class _Copies(TrainerCallback):
    """Keeps a copy of the model, its adapters merged, after some of the steps."""

    def __init__(self, steps: Sequence[int]):
        self.steps, self.made = set(steps), {}

    def on_step_end(self, args, state, control, **given) -> None:
        if state.global_step in self.steps:
            kept = copy.deepcopy(given["model"])
            kept = kept.merge_and_unload() if hasattr(kept, "merge_and_unload") else kept
            self.made[state.global_step] = kept.eval()
