"""Peak memory and time of a compression against depth, width and tokens, as the operating system sees them.

python -m benchmarks.scale --preset small|tokens|width|1b|7b-block|quick [--out FILE] [--models FOLDER] [--methods asvd-1 best]

Every job runs in a process of its own on a random LLaMA in bfloat16, which is written to a folder first and kept there. Its
resident memory is read from outside every 50 ms. Files that are mapped into memory are counted apart: the system takes that
memory back when it is short of it. Results are JSON lines, bytes and seconds, with what ``nsvd.compression.cost`` had told
beside what was measured. From two depths a line is made for a third one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import nsvd
from benchmarks.machine import described
from nsvd.compression.cost import cost
from nsvd.compression.request import resolve

SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 8}
SMALL |= {"vocab_size": 2048}
BILLION = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
BILLION |= {"vocab_size": 32_000}
SEVEN = {"hidden_size": 4096, "intermediate_size": 11_008, "num_attention_heads": 32, "num_key_value_heads": 32}
SEVEN |= {"vocab_size": 32_000}
WIDE = SMALL | {"hidden_size": 512, "intermediate_size": 1376}
BOTH = ("resident", "folder")

WHOLE = {"7b-block": 32, "quick": 4}  # blocks of the model that two depths stand for
# shape, depths, (count, length) of the windows, methods, sources
PRESETS = {
    "quick": (SMALL | {"hidden_size": 64, "intermediate_size": 96}, (1, 2), ((4, 32),), ("asvd-1",), ("folder",)),
    "small": (SMALL, (12, 48), ((64, 256),), ("best",), BOTH),
    "tokens": (SMALL, (12,), ((32, 256), (128, 256)), ("asvd-1", "best"), BOTH),
    "width": (WIDE, (12,), ((64, 256),), ("asvd-1", "best"), BOTH),
    "1b": (BILLION, (22,), ((16, 512),), ("asvd-1", "best"), ("folder",)),
    "7b-block": (SEVEN, (1, 2), ((16, 2048),), ("asvd-1", "best"), ("folder",)),
}  # fmt: skip
EVERY = 0.05  # seconds between two looks at the memory
SHARD = 2**31  # bytes of a weight file


def built(models_folder: Path, shape: dict, depth: int) -> Path:
    """The folder of a random model of this shape, written tensor by tensor where it is not there."""
    folder = models_folder / f"d{shape['hidden_size']}-ff{shape['intermediate_size']}-v{shape['vocab_size']}-{depth}"
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**shape, num_hidden_layers=depth, bos_token_id=0, eos_token_id=1, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        empty = LlamaForCausalLM(config).state_dict()
    generator, shard, number, index = torch.Generator().manual_seed(0), {}, 0, {}
    last = next(reversed(empty))
    for name, tensor in empty.items():
        std = tensor.shape[-1] ** -0.5 if tensor.ndim == 2 and "embed" not in name else 1.0
        values = torch.ones(tensor.shape) if tensor.ndim == 1 else torch.randn(tensor.shape, generator=generator)
        shard[name] = (values * std).to(torch.bfloat16)
        if sum(t.nbytes for t in shard.values()) > SHARD or name == last:
            file = f"model-{number:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard, number = {}, number + 1
    told = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told), encoding="utf-8")
    letters = {"<s>": 0, "</s>": 1} | {a: i for i, a in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 2)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config.save_pretrained(folder)  # at last: a folder without it is not whole
    return folder


def accounted(config: LlamaConfig, job: dict) -> dict[str, float]:
    """What the work is said to take, from the sizes alone: bytes, and passes over the text."""
    with torch.device("meta"):
        empty = LlamaForCausalLM(config).to(torch.bfloat16)
    names = ("ranks", "allocation", "factors", "shifted", "search_count")
    rest = {"weights": "uniform", "refine": 0, "distill": 0, "seed": 0, "progress": False}
    windows = torch.zeros(job["count"], job["length"], dtype=torch.long)
    takes = cost(empty, resolve(job["method"], {}, ratio=job["ratio"], windows=windows, **dict.fromkeys(names) | rest))
    return {name: getattr(takes, name) for name in ("device", "host", "disk", "passes", "forward", "decompositions")}


def extrapolated(lines: list[dict], depth: int) -> dict:
    """What a model of so many blocks takes, on a line through two depths: seconds grow with depth, memory should not."""
    few, many = lines[0], lines[-1]
    step = (depth - few["depth"]) / (many["depth"] - few["depth"])
    along = lambda a, b: a + step * (b - a)  # noqa: E731
    found = {"wall": along(few["wall"], many["wall"]), "disk": along(few["peak"]["disk"], many["peak"]["disk"])}
    if "device_peak" in many:
        found |= {"device_peak": many["device_peak"]}
    same = ("preset", "method", "source", "count", "length", "ratio", "device", "shape", "machine")
    return {n: many[n] for n in same} | {"depth": depth, "from_depths": [few["depth"], many["depth"]]} | found


def work(job: dict) -> None:
    """What a child does: one compression, with a line of JSON at the end."""
    begun, cpu = time.perf_counter(), time.process_time()
    print(json.dumps({"begin": True}), flush=True)
    how, text = {"method": job["method"], "ratio": job["ratio"]}, {"count": job["count"], "length": job["length"]}
    if job["source"] == "resident":
        model, tokenizer = nsvd.load(job["model"], device=job["device"])
        report = nsvd.compress_(model, windows=nsvd.domains("random", model, tokenizer, **text), **how)
    else:
        report = nsvd.compress(job["model"], job["out"], calibration="random", device=job["device"], **text, **how)
    found = {"wall": time.perf_counter() - begun, "cpu": time.process_time() - cpu, "stages": report.seconds}
    found |= {"versions": report.versions, "ratio_reached": report.ratio_reached}
    if torch.cuda.is_available() and job["device"] != "cpu":
        found |= {"device_peak": torch.cuda.max_memory_allocated(), "device": torch.cuda.get_device_name()}
    print(json.dumps(found), flush=True)


def status(process: int) -> dict[str, int]:
    """What the system tells of a process's memory, in bytes: RssAnon, RssFile, VmHWM and others."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.startswith(("Rss", "Vm")))
    return {name: 1024 * int(rest.split()[0]) for name, rest in pairs}


def disk(folder: Path) -> int:
    """Bytes in a folder as of now; files may go while it is read."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).stat().st_size
            except OSError:
                continue
    return total


def measured(job: dict) -> dict:
    """Run a job in a child; what it told, and its peaks of memory and disk, before it began and at the highest."""
    with tempfile.TemporaryDirectory(prefix="nsvd-scale-", dir=job["scratch"]) as scratch:
        command = [sys.executable, "-m", "benchmarks.scale", "--child", json.dumps(job | {"out": f"{scratch}/out"})]
        environment = os.environ | {"TMPDIR": scratch}  # what does not fit in memory goes there, too
        told, peaks, before, looks = Path(scratch) / "told", {}, {}, 0
        with told.open("w", encoding="utf-8") as out:
            child = subprocess.Popen(command, stdout=out, env=environment)
            while child.poll() is None:
                now = status(child.pid)
                if now and looks % 20 == 0:
                    now["disk"] = disk(Path(scratch))
                before = before or (now if told.stat().st_size else {})
                peaks = {name: max(now.get(name, 0), peaks.get(name, 0)) for name in now | peaks}
                looks += 1
                time.sleep(EVERY)
        lines = told.read_text(encoding="utf-8").splitlines()
    if child.returncode:
        raise SystemExit(f"a job ended with {child.returncode}: {job}")
    kinds = {"anonymous": "RssAnon", "files": "RssFile", "high_water": "VmHWM", "disk": "disk"}
    found = {"peak": {name: peaks.get(key) for name, key in kinds.items()}, "anonymous_before": before.get("RssAnon")}
    return found | json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--out", default="scale.jsonl", help="JSON lines are added to this file")
    parser.add_argument("--models", default=str(Path(tempfile.gettempdir()) / "nsvd-scale-models"))
    parser.add_argument("--scratch", default=None, help="folder for progress and what does not fit in memory")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ratio", type=float, default=0.3)
    for name in ("depths", "count", "length"):
        parser.add_argument(f"--{name}", type=int, nargs="+" if name == "depths" else None)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--sources", nargs="+", choices=("resident", "folder"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        return work(json.loads(chosen.child))
    shape, depths, texts, methods, sources = PRESETS[chosen.preset]
    device = nsvd.default_device() if chosen.device == "auto" else chosen.device
    measurements: dict[tuple, list[dict]] = {}
    if chosen.count or chosen.length:
        texts = [(chosen.count or texts[0][0], chosen.length or texts[0][1])]
    for depth in chosen.depths or depths:
        folder = built(Path(chosen.models), shape, depth)
        for method in chosen.methods or methods:
            for source in chosen.sources or sources:
                for count, length in texts:
                    job = {"preset": chosen.preset, "model": str(folder), "depth": depth, "method": method}
                    job |= {"source": source, "count": count, "length": length, "ratio": chosen.ratio}
                    job |= {"device": chosen.device, "scratch": chosen.scratch}
                    line = {n: v for n, v in job.items() if n not in ("model", "scratch")} | {"shape": shape}
                    line |= {"model_bytes": disk(folder), "told": accounted(LlamaConfig.from_pretrained(folder), job)}
                    line |= measured(job) | {"machine": described(device)}
                    added(chosen.out, line)
                    measurements.setdefault((method, source, count, length), []).append(line)
                    peak = line["peak"]["anonymous"] / 2**20
                    what = f"{depth} blocks, {count} × {length}, {method}, {source}"
                    print(f"{what}: {peak:.0f} MiB, {line['wall']:.0f} s", flush=True)
    for lines in measurements.values():
        if len(lines) > 1 and chosen.preset in WHOLE:
            whole = extrapolated(lines, WHOLE[chosen.preset])
            added(chosen.out, whole)
            print(f"{whole['depth']} blocks, {whole['method']}: {whole['wall']:.0f} s, on a line through two depths")


def added(file: str, line: dict) -> None:
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
