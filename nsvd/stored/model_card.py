"""The README.md of a compressed folder, as the hub shows it: what it was made of, how, and how it is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from nsvd.stored.files import short_name
from nsvd.stored.groups import groups
from nsvd.stored.kinds import auto_class
from nsvd.stored.layers import NarrowLinear

NAME = "README.md"
MARK = "<!-- written by nsvd; delete this line to keep your own text when the folder is saved again -->"
FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
FOLDERS = re.compile(r"(^|(?<=\+))/[^+]*/")  # of the machine, before the name of a file
LICENCE = ("license", "license_name", "license_link")
TEXT = """---
{front}---
{mark}

# {base}, compressed

{base}, compressed by low-rank factors with [nsvd](https://arxiv.org/abs/2503.17101): {removed}.

## Load it

```python
import nsvd  # first: it teaches transformers to read the factors
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

`model.dequantize()` gives plain dense weights, for programs that know no factors.

## How it was made

{made}

| layers | number | outputs × inputs | stored as | rank | parameters kept |
|---|---|---|---|---|---|
{rows}

{licence}
"""


def text(model: PreTrainedModel, section: Mapping, report: Mapping | None = None) -> str:
    """The card of a model with this ``quantization_config``; what a report as ``nsvd_report.json`` knows besides is told, too."""
    source, report = section.get("base_model"), report or {}
    licence = _licence(model.config._name_or_path) if source else {}
    hub = isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    auto = auto_class(model.config)
    task = {"pipeline_tag": "text-generation"} if auto is AutoModelForCausalLM else {}
    front = {"library_name": "transformers"} | task | {"tags": ["nsvd", "low-rank"]}
    front |= ({"base_model": source} if hub else {}) | licence
    keys = ("method", "options", "allocation", "factors", "shifted", "neurons", "refine", "distill", "latent_cache")
    keys += ("changed_after_compression",)
    made = {key: section[key] for key in keys if section.get(key) not in (None, False, 0, {})}
    if "latent_cache" in made:
        made["latent_cache"] = {key: value for key, value in made["latent_cache"].items() if key != "layers"}
    made |= {key: report[key] for key in ("seed", "versions") if report.get(key) is not None}
    if (about := report.get("calibration")) and isinstance(about.get("corpus"), str):
        names = FOLDERS.sub("", about["corpus"])
        made["calibration"] = {"corpus": names} | {key: about[key] for key in ("windows", "bos") if key in about}
    told = f"Its licence is that of the base model, {licence['license']}." if licence else ""
    return TEXT.format(
        front=yaml.safe_dump(front, sort_keys=False), mark=MARK,
        auto=auto.__name__, base=f"`{source}`" if source else "A model", removed=_removed(section),
        made="\n".join(f"* {key}: `{json.dumps(value, ensure_ascii=False)}`" for key, value in made.items()),
        rows="\n".join(_rows(model)),
        licence=told or "The licence of the base model, which this one is bound to, was not told in its folder.",
    )  # fmt: skip


def is_ours(file: Path) -> bool:
    """Whether a card was written here, and not changed into somebody's own."""
    return MARK in file.read_text(encoding="utf-8", errors="replace")


def _removed(section: Mapping) -> str:
    """Shares of parameters that are gone."""
    shares = {"of the compressed layers": "ratio_reached", "of the whole model": "model_ratio_reached"}
    found = [f"{section[key]:.1%} of the parameters {what}" for what, key in shares.items() if section.get(key)]
    return f"{' and '.join(found)} removed" if found else "its KV cache holds latents"


def _rows(model: nn.Module) -> list[str]:
    """A line for the layers of one kind."""
    lines = []
    for one in groups(model):
        low, _, high = one.ranks
        span = str(low) if low == high else f"{low} to {high}"
        span = "dense" if one.kind == NarrowLinear.kind else span
        shape = f"{one.d_out} × {one.d_in}"
        lines.append(f"| `{one.place}` | {len(one.layers)} | {shape} | {one.kind} | {span} | {one.kept:.0%} |")
    return lines


def _licence(source: str) -> dict[str, str]:
    """What the card of the base model tells of its licence; that of a hub id is looked for in the local cache alone."""
    file = Path(source) / NAME
    if not Path(source).is_dir():
        try:
            cached = try_to_load_from_cache(source, NAME)
        except ValueError:  # no hub id
            return {}
        file = Path(cached) if isinstance(cached, str) else None
    found = (
        FRONT.match(file.read_text(encoding="utf-8", errors="replace")) if file is not None and file.is_file() else None
    )
    try:
        front = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    told = {key: front[key] for key in LICENCE if isinstance(front.get(key), str)} if isinstance(front, dict) else {}
    return told if "license" in told else {}


def base_of(model: nn.Module) -> str:
    """The name of what a model was loaded from, which tells nothing of the machine; empty where it was loaded from nothing."""
    source = getattr(model.config, "_name_or_path", "")
    return short_name(source) if source else ""
