"""The card of a reference model: what it was trained on, how it went, what it scores.

    python -m nsvd.lab.card mini-llama [--data CORPUS ...]

writes ``data/models/NAME/README.md``; the eight embedded corpora are always measured, others may be added.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nsvd.lab import analysis
from nsvd.lab.corpora import EMBEDDED, windows
from nsvd.lab.evaluation import evaluate
from nsvd.lab.models import embedded_models, load
from nsvd.lab.training import Recipe
from nsvd.stored import manifest
from nsvd.stored.files import replacing
from nsvd.walk.calibrate import calibrate

TEXT = """# {name}

A model of type {kind}: {size:,} parameters, {blocks} blocks of width {width}, with a byte-level BPE of {vocabulary} tokens over
English, Chinese and Japanese; stored in bfloat16. It is made to be compressed and measured, not to be talked to.
`recipe.json` holds everything that decided it.

* **Text**: windows of {window} tokens drawn from {sources} ({notes}). Of the text only
  what is in `data/text` is part of the project; the weights are.
* **Training**: {begin}{tokens:,} tokens ({per_parameter:.1f} a parameter), {steps:,} steps of {batch} windows; Muon for the
  matrices of the blocks (rate {lr_matrix}), AdamW for the rest ({lr_rest}), linear decay to zero over the last {decay:.0%},
  seed {seed}; {hours:.1f} hours on {machine}.

{curve}

(The full curve: `training.jsonl`; each value is the mean over the steps since the one before.)

## Scores

Windows of {window} tokens that do not overlap, without a BOS token before them, as nearly all windows of the training are;
whole sets, float32; ± one standard error over windows. Similarity:
second moments of the layers' inputs against those of {calibration}'s calibration part, mean over layers (cosine;
overlap of the leading quarter of eigenvectors, 0.25 for two random subspaces).

{scores}

Inputs of the layers on that calibration text, over the {inputs} distinct inputs:

{shape}
"""


def card(folder: Path, corpora: list[str], machine: str, calibration: str = EMBEDDED[0]) -> str:
    """Markdown text about the model in a folder that ``nsvd.lab.training`` wrote, on the kind of machine named."""
    recipe = Recipe.load(folder / "recipe.json")
    curve = [json.loads(line) for line in (folder / "training.jsonl").open()]
    model, tokenizer = load(folder, dtype="float32")
    home = calibrate(model, windows(calibration, tokenizer, split="calibration"))
    scores = []
    for corpus in corpora:
        text = windows(corpus, tokenizer)
        result = evaluate(model, text, tokenizer)
        alike = analysis.similarity(home, calibrate(model, text))[["moment", "subspace"]].mean()
        error = result.perplexity * result.standard_error
        scores.append(
            {
                "corpus": corpus.rpartition(":")[2],
                "tokens": f"{text.numel():,}",
                "perplexity": f"{result.perplexity:.2f} ± {error:.2f}",
                "bits per byte": f"{result.bits_per_byte:.3f}",
                "cosine": f"{alike.moment:.2f}",
                "subspace": f"{alike.subspace:.2f}",
            }
        )
    inputs = (
        analysis.input_shape(home)[["outlier", "effective_rank", "condition"]].describe().loc[["min", "50%", "max"]]
    )
    inputs.columns = ["largest / median channel (rms)", "effective rank of G^½", "condition number of G"]
    shape = [{"": name} | {key: f"{value:,.1f}" for key, value in row.items()} for name, row in inputs.T.iterrows()]
    picked = [curve[i] for i in sorted({round(i * (len(curve) - 1) / 9) for i in range(10)})]
    size, last, begin = model.num_parameters(), curve[-1], ""
    if recipe.start:
        start = embedded_models()[recipe.start]
        before = (start / "training.jsonl").read_text().splitlines()
        each = (json.loads(before[-1])["tokens"] + last["tokens"]) / size
        times = (
            recipe.architecture["num_hidden_layers"]
            // json.loads((start / "config.json").read_text())["num_hidden_layers"]
        )
        over = f" (its blocks {times} times over)" if times > 1 else ""
        begin = (
            f"from the weights of `{recipe.start}`{over} on, see its card (with its tokens {each:.1f} a parameter); "
        )
    return TEXT.format(
        **{name: value for name, value in vars(recipe).items() if name != "tokens"},
        kind=recipe.architecture["model_type"],
        blocks=recipe.architecture["num_hidden_layers"],
        width=recipe.architecture["hidden_size"],
        size=size,
        begin=begin,
        sources=", ".join(f"{name} {share:.0%}" for name, share in recipe.text.items()),
        tokens=last["tokens"],
        per_parameter=last["tokens"] / size,
        steps=last["step"],
        hours=last["seconds"] / 3600,
        machine=machine,
        curve=_markdown(
            [{"million tokens": f"{row['tokens'] / 1e6:.1f}", "loss": f"{row['loss']:.3f}"} for row in picked]
        ),
        calibration=calibration,
        scores=_markdown(scores),
        inputs=len(home.moments),
        shape=_markdown(shape),
    )


def _markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Write the card of an embedded reference model."""
    parser = argparse.ArgumentParser("python -m nsvd.lab.card", description=main.__doc__)
    parser.add_argument("model", choices=embedded_models())
    parser.add_argument("--data", nargs="*", default=[], metavar="CORPUS", help="measured besides the embedded corpora")
    parser.add_argument("--machine", default="a CPU", help="kind of machine it was trained on (default: a CPU)")
    chosen = parser.parse_args()
    folder = embedded_models()[chosen.model]
    text = card(folder, [*EMBEDDED, *chosen.data], chosen.machine)
    with replacing(folder / "README.md") as part:
        part.write_text(text, encoding="utf-8")
    manifest.write(folder)


if __name__ == "__main__":
    main()
