"""Train the small reference models: one recipe, one resumable program.

    python -m nsvd.lab.training data/recipes/mini-llama.json --text TEXT --work WORK --out data/models/mini-llama

``TEXT`` holds the files the recipe names, gzipped JSON lines with a ``text`` field; those it lacks are looked for in
``data/text``. Stop the program at any time and
start it again with the same arguments: it goes on from the last checkpoint in ``WORK`` and, on the same machine with
the same number of threads, ends in the same bytes as a run that was never stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from nsvd.lab.models import load
from nsvd.lab.paths import data
from nsvd.stored import manifest
from nsvd.stored.files import replacing
from nsvd.stored.loading import default_device

BOS, EOS = "<s>", "</s>"
BLOCK = re.compile(r"(\.layers\.)(\d+)\.")  # the number of a block in the name of its parameters


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a reference model becomes."""

    name: str
    architecture: dict  # arguments of the transformers configuration, ``model_type`` among them
    text: dict[str, float]  # source file (without .jsonl.gz) -> share of the training windows
    tokens: int  # length of the run
    start: str = ""  # embedded model whose weights and tokenizer the run begins with; see ``deepened`` for more blocks
    tokenizer: str = ""  # embedded model whose tokenizer is used; by default one is trained
    vocabulary: int = 4096
    window: int = 256
    batch: int = 16
    lr_matrix: float = 0.02  # Muon, for the matrices inside the blocks
    lr_rest: float = 6e-3  # AdamW, for embeddings, norms and biases
    warmup: int = 50  # steps
    decay: float = 0.5  # the last part of the run, in which both rates fall linearly to zero
    tokenizer_characters: int = 4_000_000  # per source
    max_characters: int = 24_000_000  # read from one source
    bf16: bool = False  # autocast of the forward and backward pass
    seed: int = 0
    notes: str = field(default="", compare=False)  # on the text, for the card

    @property
    def steps(self) -> int:
        return self.tokens // (self.window * self.batch)

    def rate(self, step: int) -> float:
        """Fraction of the learning rates at a step: warm-up, plateau, linear decay to zero."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, left)

    @classmethod
    def load(cls, file: str | Path) -> Recipe:
        return cls(**json.loads(Path(file).read_text()))


def documents(text: Path, name: str, recipe: Recipe) -> list[str]:
    """The source's documents in seeded order, up to ``max_characters`` in all and 60 000 each."""
    places = [folder / f"{name}.jsonl.gz" for folder in (text, data() / "text")]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"recipe {recipe.name} needs {places[0]}")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"][:60_000] for line in lines]
    random.Random(recipe.seed).shuffle(texts)
    kept, size = [], 0
    for one in texts:
        if size >= recipe.max_characters:
            break
        kept.append(one)
        size += len(one)
    return kept


def train_tokenizer(recipe: Recipe, text: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every source contributes the same number of characters.

    It puts no BOS before a text, as the windows of the training begin anywhere.
    """

    def sample():
        for name in recipe.text:
            size = 0
            for document in documents(text, name, recipe):
                if size >= recipe.tokenizer_characters:
                    break
                size += len(document[:20_000])
                yield document[:20_000]

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sample(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=recipe.architecture["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def known_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of an embedded model."""
    return PreTrainedTokenizerFast.from_pretrained(data() / "models" / name)


def untrained(recipe: Recipe) -> PreTrainedModel:
    """The model at step 0, in float32: random by the recipe's seed, or the one it starts from."""
    torch.manual_seed(recipe.seed)
    if recipe.start:
        model = load(recipe.start, dtype="float32", device="cpu")[0]
        return deepened(model, recipe.architecture["num_hidden_layers"])
    ids: dict = {"vocab_size": recipe.vocabulary, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**recipe.architecture, **ids))


def deepened(model: PreTrainedModel, blocks: int) -> PreTrainedModel:
    """A model with ``blocks`` blocks: those of ``model`` as often as needed, the whole stack upon itself (arXiv 2405.15319).

    It predicts worse than ``model`` at first, and every one of its blocks is at work from the beginning.

    Raises:
        ValueError: if ``blocks`` is not a multiple of the blocks that there are.
    """
    before = model.config.num_hidden_layers
    copies, rest = divmod(blocks, before)
    if rest or copies < 1:
        raise ValueError(f"{blocks} blocks are not a multiple of the {before} of the model that the run starts from")
    known = model.state_dict()
    deep = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**model.config.to_dict(), "num_hidden_layers": blocks})
    )
    deep.load_state_dict(
        {name: known[BLOCK.sub(lambda m: f"{m[1]}{int(m[2]) % before}.", name)] for name in deep.state_dict()}
    )
    return deep


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All documents as one row of token ids, each opened by the start token."""
    ids = []
    for start in range(0, len(texts), 500):
        made = tokenizer(texts[start : start + 500], add_special_tokens=False)["input_ids"]
        ids += [np.array([tokenizer.bos_token_id, *e], dtype=np.uint16) for e in made]
    return np.concatenate(ids)


class Batches:
    """Random windows of the mixture; the windows of step t depend on (seed, t) alone, so resuming needs no state.

    Documents follow one another, each opened by the start token; windows begin anywhere, so hardly one begins with it.
    """

    def __init__(self, recipe: Recipe, text: Path, work: Path, tokenizer: PreTrainedTokenizerFast):
        self.recipe, self.sources = recipe, []
        for name in recipe.text:
            file = work / f"{name}.npy"
            if not file.exists():
                ids = encode(tokenizer, documents(text, name, recipe))
                with replacing(file) as part, open(part, "wb") as stream:
                    np.save(stream, ids)
            self.sources.append(np.load(file, mmap_mode="r"))
        shares = np.array(list(recipe.text.values()), dtype=float)
        self.shares = shares / shares.sum()

    def __getitem__(self, step: int) -> Tensor:
        rng = np.random.default_rng((self.recipe.seed, step))
        rows = []
        for source in rng.choice(len(self.sources), size=self.recipe.batch, p=self.shares):
            ids = self.sources[source]
            start = rng.integers(len(ids) - self.recipe.window)
            rows.append(ids[start : start + self.recipe.window].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


def optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else; no weight decay."""
    tied = {id(model.get_input_embeddings().weight)}
    if (head := model.get_output_embeddings()) is not None:
        tied.add(id(head.weight))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and id(p) not in tied and "embed" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=recipe.lr_matrix, weight_decay=0.0, momentum=0.95),
        torch.optim.AdamW(rest, lr=recipe.lr_rest, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def save_checkpoint(
    file: Path, model: torch.nn.Module, opts: Sequence[torch.optim.Optimizer], step: int, seconds: float
) -> None:
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for i, opt in enumerate(opts):
        for j, state in opt.state_dict()["state"].items():
            tensors |= {f"opt.{i}.{j}.{k}": torch.as_tensor(v).contiguous() for k, v in state.items()}
    with replacing(file) as part:
        save_file(tensors, part, metadata={"step": str(step), "seconds": str(seconds)})


def load_checkpoint(file: Path, model: torch.nn.Module, opts: Sequence[torch.optim.Optimizer]) -> tuple[int, float]:
    with safe_open(file, "pt") as stored:
        keys = stored.keys()  # safe_open itself cannot be iterated
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(stored.get_tensor(f"model.{n}"))
        for i, opt in enumerate(opts):
            state: dict = {}
            for key in keys:
                if key.startswith(f"opt.{i}."):
                    _, _, j, name = key.split(".")
                    state.setdefault(int(j), {})[name] = stored.get_tensor(key)
            opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})
        return int(stored.metadata()["step"]), float(stored.metadata()["seconds"])


def train(
    recipe: Recipe,
    text: Path,
    work: Path,
    out: Path,
    *,
    device: str = "auto",
    compile: bool = False,
    every: int = 200,
    stop: int | None = None,
) -> list[dict]:
    """Train (or go on training) and save the finished model in bfloat16 under ``out``; returns the loss curve.

    ``every`` steps a checkpoint and a line of the curve are written; ``stop`` ends this call early at that step
    without saving a model, as an interrupt would; ``compile`` fuses the pass with ``torch.compile`` (needs a C++
    compiler on a CPU), about a quarter faster.
    """
    work.mkdir(parents=True, exist_ok=True)
    device = default_device() if device == "auto" else device
    known = work / "recipe.json"
    if known.exists() and Recipe.load(known) != recipe:
        raise ValueError(f"{work} holds the training of another recipe; compare {known}, or use another folder")
    with replacing(known) as part:
        part.write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    if not (work / "tokenizer").exists():
        with replacing(work / "tokenizer") as part:
            own = recipe.start or recipe.tokenizer
            (known_tokenizer(own) if own else train_tokenizer(recipe, text)).save_pretrained(part)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    batches = Batches(recipe, text, work, tokenizer)

    model = untrained(recipe).to(device)  # pyright: ignore[reportArgumentType]  # transformers wraps it
    opts = optimizers(model, recipe)
    checkpoint, log = work / "checkpoint.safetensors", work / "training.jsonl"
    step, seconds = load_checkpoint(checkpoint, model, opts) if checkpoint.exists() else (0, 0.0)
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    curve = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill cuts the last one short
    curve = [row for row in curve if row["step"] <= step]
    with replacing(log) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in curve))

    forward = torch.compile(model) if compile else model

    begin, running = time.perf_counter() - seconds, []
    while step < recipe.steps:
        if step == stop:
            return curve
        for opt, rate in zip(opts, (recipe.lr_matrix, recipe.lr_rest), strict=True):
            for group in opt.param_groups:
                group["lr"] = rate * recipe.rate(step)
        x = batches[step].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=recipe.bf16):
            loss = forward(input_ids=x, labels=x, use_cache=False).loss
        model.zero_grad(set_to_none=True)
        loss.backward()
        for opt in opts:
            opt.step()
        step += 1
        running.append(loss.detach())
        if step % every == 0 or step == recipe.steps:
            mean, running = torch.stack(running).double().mean().item(), []
            if not np.isfinite(mean):
                raise FloatingPointError(f"loss is {mean} at step {step}")
            seconds = time.perf_counter() - begin
            row = {"step": step, "tokens": step * x.numel(), "loss": round(mean, 5), "seconds": round(seconds)}
            curve.append(row)
            with log.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            save_checkpoint(checkpoint, model, opts, step, seconds)
    with replacing(out) as part:
        model.bfloat16().save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
        (part / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
        manifest.write(part)
    return curve


def main() -> None:
    """Train the reference model that a recipe describes."""
    parser = argparse.ArgumentParser("python -m nsvd.lab.training", description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="JSON file, see data/recipes")
    parser.add_argument("--text", type=Path, required=True, help="folder of the text files that the recipe names")
    parser.add_argument("--work", type=Path, required=True, help="folder for token files and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--compile", action="store_true", help="fuse the training step with torch.compile")
    chosen = parser.parse_args()
    recipe = Recipe.load(chosen.recipe)
    last = train(recipe, chosen.text, chosen.work, chosen.out, compile=chosen.compile)[-1]
    print(f"{chosen.out}: {last['tokens']:,} tokens, loss {last['loss']:.3f}, {last['seconds']} s")


if __name__ == "__main__":
    main()
