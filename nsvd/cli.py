"""The command line: ``nsvd run | runs | results | advise | compress | evaluate | lm_eval | info``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for _library in ("TRANSFORMERS", "HF_HUB", "DATASETS"):  # what matters of what they say is raised
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one line on standard error for bad input, 1 for a notebook that failed."""
    chosen = _parser().parse_args(arguments)
    from torch import OutOfMemoryError, linalg

    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.filterwarnings(
                    "ignore", module=r"(?!nsvd\b)"
                )  # those of libraries would stand before the one line
            code = chosen.command(chosen) or 0
        _flush()
    except KeyboardInterrupt:
        print(f"nsvd {chosen.name}: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # whoever read our output has seen enough
        code = 0
    except (ValueError, OSError, ArithmeticError, linalg.LinAlgError, OutOfMemoryError) as error:
        print(f"nsvd {chosen.name}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    with suppress(OSError):
        _flush()
    return code


def run(chosen: argparse.Namespace) -> int:
    """Execute notebooks."""
    try:
        from nsvd.lab import parameters, workbook
    except ModuleNotFoundError as error:
        raise ValueError(f"notebooks need {error.name}: pip install 'nsvd[notebooks]'") from error
    if chosen.list:
        return _list(workbook.notebooks(chosen.notebooks or ["all"]), chosen.out)
    given = parameters.from_pairs(chosen.parameter)
    outcomes = workbook.run(
        chosen.notebooks or ["all"], given, preset=chosen.preset, out=chosen.out, jobs=chosen.jobs,
        shard=chosen.shard, progress=sys.stderr.isatty(),
    )  # fmt: skip
    for outcome in outcomes:
        if outcome.skipped:
            print(f"skipped {outcome.notebook}: {outcome.skipped}")
            continue
        print(f"failed  {outcome.file}\n        {outcome.error}" if outcome.error else f"done    {outcome.file}")
    return int(any(outcome.error for outcome in outcomes))


def _list(sources: Sequence[Path], out: str | None) -> int:
    """Tell of every notebook its question, its running time and its parameters."""
    from nsvd.lab import listing
    from nsvd.lab.paths import checkout

    executed = Path(out) if out else checkout() / "notebooks" / "executed"
    print(listing.told(listing.entry(source, executed) for source in sources))
    return 0


def runs(chosen: argparse.Namespace) -> None:
    """Make a page of the notebooks that were run into a folder; compare two such folders."""
    from nsvd.lab.runs import difference, index

    page = index(chosen.folder, chosen.other, chosen.page)
    print(page)
    if chosen.other:
        print(difference(chosen.folder, chosen.other).to_string(index=False, float_format=lambda value: f"{value:.4g}"))


def results(chosen: argparse.Namespace) -> None:
    """Write measurements as a table."""
    from nsvd.lab.results import results, written

    print(written(results(chosen.files), chosen.format), end="")


def compress(chosen: argparse.Namespace) -> None:
    """Compress a model into a folder."""
    import nsvd
    from nsvd.compression.request import RECIPES, base_method
    from nsvd.lab.compress import compressed
    from nsvd.lab.overview import largest
    from nsvd.walk.processes import rank, together

    names = ("k1", "alpha", "mu", "eta", *nsvd.METHODS["sola"].options)
    options = {name: value for name in names if (value := getattr(chosen, name)) is not None}
    same = (
        "method",
        "ratio",
        "cache_ratio",
        "joint",
        "calibration",
        "count",
        "length",
        "bos",
        "seed",
        "weights",
        "allocation",
    )
    same += ("factors", "shifted", "neurons", "refine", "distill", "search_count", "layers", "exclude")
    same += ("dtype", "device")
    arguments = {name: getattr(chosen, name) for name in same} | options
    tell = lambda sentence: print(f"nsvd compress: {sentence}", file=sys.stderr)  # noqa: E731
    with together(chosen.device):
        done = compressed(chosen.model, chosen.out, **arguments, progress=sys.stderr.isatty(), tell=tell)
        if rank() != 0:
            return
    said = []
    if report := done.weights:
        dense = sum(row["dense"] for row in report.rows)
        said.append(
            f"{report.ratio_reached:.1%} of the layers' {report.params_before:,} parameters removed "
            f"({report.params_after:,} left), {len(report.rows) - dense} layers factored, {dense} dense"
        )
        said.append(
            f"{report.model_ratio_reached:.1%} of the whole model's {report.model_params_before:,} removed, "
            f"left alone {largest(report.left_alone)}"
        )
        said += report.reservations
    if report := done.cache:
        said.append(f"KV cache of {report.bytes_after:,} bytes a token ({report.bytes_before:,} dense)")
    label = chosen.method if chosen.method in RECIPES else base_method(chosen.method).label
    print(f"{chosen.out}: {label}, {'; '.join(said)}")


def _text(chosen: argparse.Namespace) -> dict:
    """How a text is cut."""
    return {"length": chosen.length, "count": chosen.count, "seed": chosen.seed, "bos": chosen.bos}


def advise(chosen: argparse.Namespace) -> None:
    """Show what each ratio costs a model, recommend one, and compress by it where an output is named."""
    import nsvd
    from nsvd.lab.models import check_apart
    from nsvd.stored.checkpoint import check_target

    if chosen.out:
        check_target(chosen.out)
        check_apart(chosen.model, chosen.out)
    if chosen.figure:
        _check_figure(chosen.figure)
    tell = lambda sentence: print(f"nsvd advise: {sentence}", file=sys.stderr)  # noqa: E731
    text = {name: getattr(chosen, name) for name in ("calibration", "count", "length", "bos", "seed")}
    model, tokenizer = nsvd.load(chosen.model, dtype=chosen.dtype, device=chosen.device)
    how = {"ratios": chosen.ratios, "limit": chosen.rise, "progress": sys.stderr.isatty(), "tell": tell}
    advice = nsvd.advise(model, tokenizer, **text, **how)
    del model, tokenizer  # it is compressed from its folder
    print(advice, flush=True)
    if chosen.figure:
        _write_figure(advice.figure(), chosen.figure)
    if chosen.out and not advice.ratio:
        raise ValueError(f"{chosen.out} is not written: {advice.sentence()}")
    if not chosen.out:
        return
    same = {name: getattr(chosen, name) for name in ("calibration", "seed", "dtype", "device")}
    same |= {"windows": advice.used, "progress": sys.stderr.isatty(), "tell": tell}
    nsvd.compress(chosen.model, chosen.out, method="best", ratio=advice.ratio, **same)
    perplexity = advice.perplexity(nsvd.load(chosen.out, device=chosen.device)[0])
    rise = perplexity / advice.rows[0]["perplexity"] - 1
    if chosen.figure:
        _write_figure(advice.figure(rise), chosen.figure)
    print(
        f"{chosen.out}: compressed by best at ratio {advice.ratio:g}; perplexity {perplexity:.2f} ({rise:+.1%}) on the same windows"
    )
    if rise > advice.limit:
        print(
            f"that is more than the {advice.limit:.0%} accepted: best fits each layer to its inputs, which may take more text; "
            "try more windows (--count, --length) or a smaller ratio (--ratios)"
        )


def _check_figure(file: str) -> None:
    """Raise, before any work is done, if no figure can be written there."""
    from nsvd.stored.files import check_writable

    if Path(file).suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--figure is {file!r}, but a figure ends in .png, .pdf or .svg")
    check_writable(file)


def _write_figure(figure: Figure, file: str) -> None:
    import nsvd

    with nsvd.replacing(file) as part:
        figure.savefig(part, dpi=150)
    print(f"{file}: the trade-off as a figure")


def evaluate(chosen: argparse.Namespace) -> None:
    """Perplexity and bits per byte of models on corpora, or accuracy in multiple-choice tasks."""
    import pandas as pd

    import nsvd
    from nsvd.lab.records import finite, origin
    from nsvd.stored.files import check_writable

    if chosen.json:
        check_writable(chosen.json)
    if chosen.tasks and chosen.data:
        raise ValueError("give corpora (--data) or tasks (--tasks), not both")
    rows, dtype = [], chosen.dtype
    if dtype == "auto" and "cpu" in (chosen.device, nsvd.default_device()):
        dtype = "float32"
    measured = _accuracies if chosen.tasks else _perplexities
    for source in chosen.models:
        model, tokenizer = nsvd.load(source, dtype=dtype, device=chosen.device)
        rows += [{"model": source} | row for row in measured(model, tokenizer, chosen)]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    if chosen.json:
        with nsvd.replacing(chosen.json) as part:
            part.write_text(
                json.dumps({"results": [finite(row) for row in rows], "origin": origin()}, indent=1) + "\n",
                encoding="utf-8",
            )


def _perplexities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chosen: argparse.Namespace
) -> Iterator[dict]:
    """A row a corpus."""
    import nsvd
    from nsvd.lab.calibration import begins_with_bos

    for corpus in chosen.data or nsvd.EMBEDDED:
        windows = nsvd.windows(corpus, tokenizer, **_text(chosen))
        result = nsvd.evaluate(model, windows, tokenizer, progress=sys.stderr.isatty())
        yield {
            "corpus": corpus,
            "perplexity": result.perplexity,
            "standard_error": result.perplexity * result.standard_error,
            "bits_per_byte": result.bits_per_byte,
            "windows": len(windows),
            "length": windows.shape[1],
            "bos": begins_with_bos(windows, tokenizer),
        }


def _accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chosen: argparse.Namespace
) -> Iterator[dict]:
    """A row a task."""
    import nsvd
    from nsvd.lab import harness

    if chosen.length is not None:
        raise ValueError("a question is read as long as it is: --length goes with --data")
    how = {"count": chosen.count, "bos": chosen.bos}
    ours, theirs = _tasks(chosen.tasks)
    for task in ours:
        result = nsvd.multiple_choice(model, tokenizer, task, **how, seed=chosen.seed, progress=sys.stderr.isatty())
        yield {
            "task": task,
            "acc": result.accuracy,
            "acc_norm": result.accuracy_normalized,
            "standard_error": result.standard_error,
            "chance": result.chance,
            "questions": len(result.plain),
        }
    if theirs:
        yield from harness.measured(model, tokenizer, theirs, **how)


def _tasks(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tasks of ours, and those that lm-evaluation-harness knows; in ``DIR:a,b`` both are of DIR."""
    from nsvd.lab.choices import EMBEDDED_TASKS

    ours, theirs = [], []
    for names in given:
        folder = ""
        for name in filter(None, names.split(",")):
            folder = name[: name.rfind(":") + 1] or folder
            if name.startswith("mini/") or name in EMBEDDED_TASKS:
                ours.append(name)
            elif folder:
                ours.append(name if ":" in name else folder + name)
            else:
                theirs.append(name)
    return ours, theirs


def lm_eval(chosen: argparse.Namespace) -> None:
    """Run lm-evaluation-harness's own command with these arguments; it then reads compressed folders."""
    from nsvd.lab import harness

    harness.program(chosen.arguments)


def info(chosen: argparse.Namespace) -> None:
    """What a model folder holds."""
    import nsvd
    from nsvd.lab.overview import overview

    model, _ = nsvd.load(chosen.model, device="auto" if chosen.speed else "cpu")
    for line in overview(model, chosen.model, every=chosen.layers):
        print(line)
    if chosen.speed:
        _speed(model)


def _speed(model: PreTrainedModel) -> None:
    """Measure up to which rank factors are no slower than the dense layer; name the layers beyond it, and those that are dense."""
    from nsvd.lab.speed import dense, slower, speed
    from nsvd.linalg.factors import n_params

    table = speed(model)
    print(f"times as fast as the dense layer, measured on {model.device.type} in {model.dtype}:")
    ratios = [column for column in table if isinstance(column, float)]
    for row in table.to_dict("records"):
        shape, read = f"{row['d_out']} × {row['d_in']}", f"{row['tokens']} token{'s' * (row['tokens'] > 1)}"
        times = ", ".join(f"{row[ratio]:.2f} at {ratio:.0%} removed" for ratio in ratios)
        removed = 1 - n_params(row["d_out"], row["d_in"], row["rank"], row["factors"]) / (row["d_out"] * row["d_in"])
        up_to = (
            f"no slower up to rank {row['rank']} ({removed:.0%} removed)" if row["rank"] else "slower at all of them"
        )
        print(f"  {shape} ({row['layers']}), {row['factors']}, {read}: {times}; {up_to}")
    for names, what in ((slower(model, table), "compressed and slower here than dense"), (list(dense(model)), "dense")):
        if names:
            print(f"{what}: {', '.join(names[:6])}{f' and {len(names) - 6} others' * (len(names) > 6)}")


def _flush() -> None:
    """Bring what was printed to its place; what cannot be brought there, to a full disk or a closed pipe, is let go."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong with the arguments in one line; the usage, which can be long, is in ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; {self.prog} --help tells more\n")


def _shard(text: str) -> tuple[int, int]:
    try:
        i, n = map(int, text.split("/"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n, two whole numbers") from error
    return i, n


def _seed(text: str) -> int:
    with suppress(ValueError):
        if -(2**63) <= int(text) < 2**64:  # what a generator takes
            return int(text)
    raise argparse.ArgumentTypeError("a whole number of 64 bits is needed")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("nsvd", description="Low-rank compression of language models.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def command(function, **about) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__, **about)
        sub.set_defaults(command=function)
        return sub

    def common(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--count",
            type=int,
            help="number of windows (default: 256 to calibrate, 128 of own text or random tokens alone; all to evaluate)",
        )
        sub.add_argument(
            "--length",
            type=int,
            help="tokens a window, half of it in own text (default: what the tokenizer allows, 2048 at most)",
        )
        sub.add_argument("--seed", type=_seed, default=0, help="of the choice of windows (default: 0)")
        sub.add_argument(
            "--bos",
            action=argparse.BooleanOptionalAction,
            help="begin every window with the token that begins a text (default: as the tokenizer does by itself)",
        )
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: auto)")
        sub.add_argument(
            "--dtype", default="auto", help="float32, bfloat16, …; auto: as stored, evaluated in float32 on a CPU"
        )

    sub = command(run)
    sub.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="path, name or number, or all (default: all)")
    sub.add_argument(
        "--list", action="store_true", help="run nothing; tell what notebooks there are, their parameters and times"
    )
    sub.add_argument("-p", dest="parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    sub.add_argument("--preset", metavar="FILE", help="YAML file of parameters")
    sub.add_argument("--out", metavar="DIR", help="where executed notebooks go (default: notebooks/executed)")
    sub.add_argument("--jobs", type=int, default=1, help="notebooks run at a time (default: 1)")
    sub.add_argument("--shard", type=_shard, default=(1, 1), metavar="i/n", help="run only the i-th of n parts")

    sub = command(compress)
    sub.add_argument("model", metavar="MODEL", help="embedded name, folder, .gguf file or hub id")
    sub.add_argument("out", metavar="OUT", help="folder to write")
    sub.add_argument("--method", required=True, help="svd, asvd-0, asvd-1, …, nsvd-1, …, best")
    sub.add_argument("--ratio", type=float, help="fraction of the parameters to remove, in [0, 1)")
    sub.add_argument("--cache-ratio", type=float, help="fraction of the KV cache's bytes to keep, in (0, 1]")
    sub.add_argument(
        "--joint", action=argparse.BooleanOptionalAction, help="one latent for keys and values in the cache"
    )
    sub.add_argument("--k1", type=float, help="fraction of the rank for the outer step (nsvd-*, nid-*)")
    sub.add_argument("--alpha", type=float, help="exponent of the channel scales (asvd)")
    sub.add_argument("--mu", type=float, help="ridge, as a multiple of mean(diag G) (ridge, kfac, best)")
    sub.add_argument("--eta", type=float, help="ridge on the output side, as a multiple of mean(diag H) (kfac, best)")
    sub.add_argument("--prime", type=float, help="fraction of the neurons that stay dense (sola)")
    sub.add_argument("--inner", help="method of the blocks that are factored (sola)")
    sub.add_argument("--grid", type=int, help="ranks are multiples of it (sola)")
    sub.add_argument("--floor", type=float, help="share of its energy below which a block is left alone (sola)")
    sub.add_argument("--keep-outer", type=int, help="blocks at each end that stay dense (sola)")
    sub.add_argument("--compress-v", action="store_true", default=None, help="compress value projections, too (sola)")
    sub.add_argument("--o-from", type=float, help="ratio from which on output projections are compressed (sola)")
    sub.add_argument(
        "--calibration", metavar="CORPUS",
        help="a corpus, self (sampled from the model), random, or a sum such as self+wikitext2 "
        "(default: self for best; mini/encyclopedia for other methods on an embedded model)",
    )  # fmt: skip
    sub.add_argument(
        "--weights", choices=["uniform", "worst-case"], default="uniform",
        help="how the parts of a sum count: all the same, or so that the largest loss is as small as possible (default: uniform)",
    )  # fmt: skip
    sub.add_argument(
        "--allocation", help="how ranks are shared out",
        choices=["uniform", "strs", "spectrum", "fisher", "lems", "zero-sum", "svd-llm-v2", "sola"],
    )  # fmt: skip
    sub.add_argument("--factors", choices=["plain", "pivoted"], help="how factors are stored")
    sub.add_argument(
        "--shifted", action=argparse.BooleanOptionalAction, help="fit every layer to the inputs it will really get"
    )
    sub.add_argument(
        "--neurons",
        type=float,
        metavar="SHARE",
        help="of what is removed that goes as whole neurons of the feed-forwards (best, kfac; for best by default 0.5, at the most "
        "1.5 times the ratio)",
    )
    sub.add_argument(
        "--refine",
        type=int,
        default=0,
        metavar="STEPS",
        help="of gradient descent on each block's factors, a hundred or two, with --shifted (default: 0)",
    )
    sub.add_argument(
        "--distill",
        type=int,
        default=0,
        metavar="STEPS",
        help="of gradient descent on all factors towards the dense model, a hundred or two (default: 0)",
    )
    sub.add_argument(
        "--search-count",
        type=int,
        help="calibration windows that strs, lems and zero-sum read (default: 32, zero-sum all)",
    )
    sub.add_argument(
        "--layers", nargs="+", metavar="NAME", help="names or patterns of the layers to compress, such as 'mlp.*'"
    )
    sub.add_argument("--exclude", nargs="+", metavar="NAME", help="names or patterns of layers that stay dense")
    common(sub)

    sub = command(runs)
    sub.add_argument(
        "folder", metavar="DIR", help="where nsvd run --out put executed notebooks, or a folder of such folders"
    )
    sub.add_argument("other", nargs="?", metavar="OTHER", help="the folder of a second run, to compare with")
    sub.add_argument("--page", metavar="FILE", help="where the page goes (default: build/runs/NAME.html)")

    sub = command(results)
    sub.add_argument("files", nargs="+", metavar="FILE", help="files of results (.jsonl), or folders of them")
    sub.add_argument("--format", default="csv", help="csv, latex or markdown (default: csv)")

    sub = command(advise)
    sub.add_argument("model", metavar="MODEL", help="embedded name, folder, .gguf file or hub id")
    sub.add_argument("--out", metavar="DIR", help="also compress by best at the recommended ratio, into this folder")
    sub.add_argument("--figure", metavar="FILE", help="also draw the trade-off, as .png, .pdf or .svg")
    sub.add_argument(
        "--ratios",
        nargs="+",
        type=float,
        default=[0.05, 0.1, 0.2, 0.3, 0.4, 0.5],
        metavar="RATIO",
        help="fractions removed to try",
    )
    sub.add_argument(
        "--rise", type=float, default=0.1, help="of the perplexity that is still accepted, 0.1 for 10 %% (default: 0.1)"
    )
    sub.add_argument(
        "--calibration", default="self", metavar="CORPUS", help="as in compress (default: self, the model's own text)"
    )
    common(sub)

    sub = command(evaluate)
    sub.add_argument("models", nargs="+", metavar="MODEL", help="embedded name, folder, .gguf file or hub id")
    sub.add_argument("--data", nargs="+", metavar="CORPUS", help="corpora (default: the eight embedded ones)")
    sub.add_argument(
        "--tasks", nargs="+", metavar="TASK",
        help="multiple choice in place of perplexity: mini/completion_en, …, DIR:name for DIR/name/test.jsonl, "
        "or a task of lm-evaluation-harness",
    )  # fmt: skip
    sub.add_argument("--json", metavar="FILE", help="also write the table there")
    common(sub)

    sub = command(lm_eval, prefix_chars="\0", add_help=False)  # whatever stands there is the harness's own
    sub.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="of lm_eval")

    sub = command(info)
    sub.add_argument("model", metavar="MODEL", help="embedded name, folder, .gguf file or hub id")
    sub.add_argument(
        "--layers", action="store_true", help="a line for every compressed layer in place of one for all of a kind"
    )
    sub.add_argument(
        "--speed", action="store_true", help="measure up to which rank factors are no slower than dense layers here"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
