"""Tasks of lm-evaluation-harness, by its own names: for models at hand, and its own program on compressed folders."""

# pyright: reportMissingImports=false
# The harness is no dependency: it is imported where it is asked for.
from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8  # texts read at a time


def program(arguments: Sequence[str]) -> None:
    """Run the harness's own command ``lm_eval`` with these arguments; transformers knows compressed folders here.

    Raises ``ValueError`` if the harness is not installed.
    """
    _check_installed()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


def measured(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    count: int | None = None,
    bos: bool | None = None,
) -> Iterator[dict]:
    """A row a task: its name, what the harness measures there, and the number of questions, the first ``count`` if given.

    ``tasks`` are names of the harness, or paths of its YAML files; ``bos`` is as in ``windows``.

    Raises:
        ValueError: if the harness is not installed, or knows no such task.
    """
    _check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager()
    for task in tasks:
        if not task.endswith(".yaml") and not manager.match_tasks([task]):
            raise ValueError(f"lm-evaluation-harness has no task {task}")
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, add_bos_token=bos)
    found = simple_evaluate(model=harness, tasks=list(tasks), task_manager=manager, limit=count)
    for task, numbers in found["results"].items():
        told = {key.removesuffix(",none"): value for key, value in numbers.items() if isinstance(value, float)}
        told = {
            "standard_error" if key == "acc_stderr" else key: value for key, value in told.items()
        }  # as ours is called
        yield {"task": task} | told | {"questions": found["n-samples"].get(task, {}).get("effective")}


def _check_installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("lm-evaluation-harness is not installed: pip install lm-eval") from error
