"""What a compression will take, from the sizes of the layers alone: memory, disk, passes over the text, operations.

The sums follow what the stages hold. Streams of hidden states lie in the host's memory, past a limit in files; a block and what is
measured of it on the device. On a GPU that has room the streams lie there, in what is free, which is not counted. Where device and
host are one, their sum is what counts. What the interpreter and its libraries take is not counted, nor is a model that is loaded
whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from transformers import PreTrainedModel

from nsvd.compression.compress import RANKS_EVERY
from nsvd.compression.descent import TRIED
from nsvd.compression.distill import TOKENS as DISTILLED
from nsvd.compression.measure import GRADIENTS_EVERY, GRADIENTS_LEAST
from nsvd.compression.ranks import SEARCHING, TRYING
from nsvd.compression.request import Request, chosen_layers
from nsvd.compression.strs import KEPT
from nsvd.linalg import rank_for_ratio
from nsvd.linalg.neurons import MOST
from nsvd.walk.decoder import block_list
from nsvd.walk.experts import experts_apart
from nsvd.walk.shelf import LIMIT
from nsvd.walk.stream import windows_read
from nsvd.walk.sums import CHUNK, STRIPS
from nsvd.walk.targets import by_block
from nsvd.walk.text import LOGIT_BYTES, tokens_at_once, vocabulary

SINGLE, DOUBLE = 4, 8  # bytes of a number in float32, in float64
HALF = (1 + 1 / STRIPS) / 2  # of a symmetric matrix, as ``Half`` holds it
EIGH = 9  # m³ of these operations for all eigenvectors of a symmetric matrix


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer, and whether it is the first to read its input; ``alone`` if it is the only one."""

    d_out: int
    d_in: int
    rank: int
    first: bool
    alone: bool


@dataclass(frozen=True)
class Stage:
    """What one part of the work takes; bytes at its highest, on the disk with what is there from parts before; operations."""

    device: float = 0
    host: float = 0
    disk: float = 0
    passes: float = 0  # over the whole text, a backward pass as two
    forward: float = 0
    decompositions: float = 0


@dataclass(frozen=True)
class Cost:
    """Peaks over all ``stages`` in bytes, and sums of what is done: ``forward`` and ``decompositions`` in operations."""

    device: float
    host: float
    disk: float
    passes: float
    tokens: float
    forward: float
    decompositions: float
    stages: dict[str, Stage]


def cost(model: PreTrainedModel, ask: Request) -> Cost:
    """What ``carry_out`` takes for a dense model, which may be without its numbers, and the request's windows, on a lasting shelf.

    Which layers share an input is told from their sizes: neighbours of one parent with as many inputs do, but for a last one that
    leads back to the hidden states. Matrices and streams are counted, and what a block makes of one batch.
    """
    with experts_apart(model) if ask.reaches_experts else nullcontext():
        return _Sums(model, ask).total()


class _Sums:
    """The sizes that all stages are told from."""

    def __init__(self, model: PreTrainedModel, ask: Request):
        self.ask, layers = ask, chosen_layers(model, ask)
        self.hidden = model.config.get_text_config().hidden_size
        first = next(iter(layers.values()))
        self.vocabulary = vocabulary(model)
        self.bytes, self.logits = first.weight.element_size(), tokens_at_once(model)
        self.blocks = [_layers(names, layers, self.hidden, ask) for names in by_block(model, layers).values()]
        self.largest = max(self.blocks, key=lambda block: sum(one.d_out * one.d_in for one in block))
        name, _ = block_list(model)
        outside = {id(p): p for n, p in model.named_parameters() if not n.startswith(f"{name}.")}
        self.outside = sum(p.numel() * p.element_size() for p in outside.values())
        self.block = self.bytes * sum(one.d_out * one.d_in for one in self.largest)
        self.shapes = [tuple(ids.shape) for ids in ask.domains]
        self.tokens, self.length = sum(n * t for n, t in self.shapes), max(t for _, t in self.shapes)
        self.share = sum(self._gradient_windows(n) * t for n, t in self.shapes) / self.tokens

    def total(self) -> Cost:
        stages, ask = {}, self.ask
        ends = 2 if ask.searches and ask.shifted and ask.judge.needs_gradients else 1
        if ask.method.needs_moments and (ask.searches or ask.splits or not ask.shifted):
            stages["moments"] = self.moments(1 / RANKS_EVERY if ask.shifted else 1.0)
        if ask.judge.needs_gradients or ask.allocation == "fisher":
            stages["gradients"] = self.gradients(ends)
        if ask.neurons:
            stages["neurons"] = self.neurons()
        stages["decompositions"] = self.decompositions(ends)
        if ask.allocation in TRYING:
            stages["search"] = self.search(len(KEPT) if ask.allocation == "strs" else 1)
        if ask.allocation == "zero-sum":
            stages["search"] = self.slopes(ends)
        if ask.shifted:
            stages["in order"] = self.in_order(ends)
        if ask.refine:
            stages["refinement"] = self.refinement()
        if ask.distill:
            stages["distillation"] = self.distillation()
        found = stages.values()
        add = lambda part: sum(getattr(stage, part) for stage in found)  # noqa: E731
        peak = lambda part: max(getattr(stage, part) for stage in found)  # noqa: E731
        passes, work = add("passes"), (add("forward"), add("decompositions"))
        return Cost(peak("device"), peak("host"), peak("disk"), passes, passes * self.tokens, *work, stages)

    def moments(self, share: float) -> Stage:
        """A stream, and the second moments of the inputs of one block."""
        leaders, batch = [one.d_in for one in self.largest if one.first], self._batch
        grams, largest = DOUBLE * sum(d * d for d in leaders), max(leaders)
        seen = max(self._activations(batch) + self._product(batch, largest, largest), DOUBLE * largest**2)
        device = self._held + HALF * grams + seen
        host = min(LIMIT, share * self._stream) + grams + DOUBLE * largest**2
        products = 2 * share * self.tokens * self._grams / DOUBLE
        disk = self._measured + 3 * share * self._stream
        return Stage(device, host, disk, share, share * self._forward + products)

    def gradients(self, ends: int) -> Stage:
        """Borders on the disk, one block's graph, and the second moments of the gradients at its outputs."""
        share, outputs = self.share, [one.d_out for one in self.largest]
        batch, largest = self._batch, max(outputs)
        H = DOUBLE * sum(d * d for d in outputs)
        seen = 2 * self._activations(batch) + self._product(batch, largest, largest)
        graph = HALF * H + max(seen, DOUBLE * largest**2)
        logits = 7 * min(LOGIT_BYTES, SINGLE * self.vocabulary * batch)  # in float32 and float64, and their gradients
        device = self._held + max(graph, logits)
        host = min(LIMIT, 2 * share * self._stream) + 2 * DOUBLE * largest**2
        borders = share * self._stream * (len(self.blocks) + 4)
        disk = self._measured + ends * self._outer + borders + (ends - 1) * self._exchanged + self._narrow
        passes = share * (4 * ends + (ends == 2))
        products = 2 * share * ends * self.tokens * self._outer / DOUBLE
        return Stage(device, host, disk, passes, passes * self._forward + products)

    def neurons(self) -> Stage:
        """One feed-forward at a time: the moments of its neurons, scaled, factored and inverted; then its smaller layers."""
        sizes = [(one.d_in, one.d_out) for block in self.blocks if (one := _reader(block))]
        work = sum(
            (4 / 3 + 2 * MOST) * n**3 + (4 + 2 * MOST) * d * n**2 + 2 * d**2 * n + 2 * d**3 / 3 for n, d in sizes
        )
        n, d = max(sizes, default=(0, 0))
        device = self._held + DOUBLE * 3 * (n**2 + d * n + d**2)
        disk = self._measured + self._outer + self._narrow
        return Stage(device, DOUBLE * (2 * n**2 + d**2), disk, decompositions=work)

    def decompositions(self, ends: int) -> Stage:
        """One layer's matrices at a time; those of all ranks are kept where a search looks at them first."""
        ask, every = self.ask, self._every
        peak, pivots = max(map(self._decomposed, self.largest)), max(map(self._pivoted, self.largest))
        metric = DOUBLE * max(one.d_in**2 + self._judged * one.d_out**2 for one in self.largest)
        largest = DOUBLE * max(one.d_out * one.d_in + min(one.d_out, one.d_in) ** 2 for one in self.largest)
        keeps = ((ask.searches or ask.splits) and not (ask.shifted and ends == 1)) or ask.allocation in SEARCHING
        count = ends if ask.searches or ask.shifted else 1
        disk = self._measured + self._judged * self._outer + self._exchanged + self._narrow
        disk += DOUBLE * sum(self._pieces(one) for one in every) * keeps
        work = count * sum(self._operations(one) for one in every)
        return Stage(self._held + max(peak, pivots), metric + 2 * largest, disk, decompositions=work)

    def search(self, fractions: int) -> Stage:
        """STRS, LEMS: every layer at some fractions, from its block on; the borders of all blocks wait."""
        share = self._searched
        borders, passes = share * self._stream * len(self.blocks), share * (1 + fractions * len(self._every) / 2)
        logits = 3 * min(LOGIT_BYTES, SINGLE * self.vocabulary * self.tokens)
        device = self._held + self._activations(max(self.length, self.logits)) + logits
        return Stage(device, min(LIMIT, borders), borders, passes, passes * self._forward)

    def slopes(self, ends: int) -> Stage:
        """Zero-sum selection: borders, one block's graph with its inputs, and the gradients of all weights in float64."""
        share, batch = self._searched, self._batch
        weights = DOUBLE * sum(one.d_out * one.d_in for one in self.largest)
        wide, high = (max(sizes) for sizes in zip(*((one.d_out, one.d_in) for one in self.largest), strict=True))
        graph = 3 * self._activations(batch) + weights + self._product(batch, wide, high)
        logits = 7 * min(LOGIT_BYTES, SINGLE * self.vocabulary * batch)
        host = min(LIMIT, 2 * share * self._stream) + 2 * DOUBLE * wide * high
        every = sum(one.d_out * one.d_in for one in self._every)
        pieces = DOUBLE * sum(self._pieces(one) for one in self._every)
        disk = self._measured + self._judged * self._outer + pieces + DOUBLE * every
        disk += share * self._stream * (len(self.blocks) + 4)
        passes = 4 * share * ends
        work = passes * self._forward + ends * 2 * share * self.tokens * every + ends * 2 * pieces / DOUBLE
        return Stage(self._held + max(graph, logits), host, disk, passes, work)

    def in_order(self, ends: int) -> Stage:
        """Two streams, what the dense one holds at the landmarks, and what the parts of a block remember."""
        groups = [one for one in self.largest if one.first]
        single = [one for one in groups if one.alone]
        places = self.hidden + sum(one.d_out if one.alone else one.d_in for one in groups)
        places -= self.hidden if single and single[-1] is groups[-1] else 0  # the last layer's is the end of the block
        remembered = self.hidden * max(0, len(single) - 1) + max((one.d_in for one in single), default=0)
        batch = self._batch
        sums = DOUBLE * max(HALF * one.d_in**2 + one.d_in * max(one.d_in, one.d_out) for one in groups)
        missing = DOUBLE * max(2 * one.d_in * max(one.d_in, one.d_out) for one in groups)  # and the shift
        wide = max(max(one.d_in, one.d_out) for one in groups)
        seen = self._product(batch, wide, wide) + SINGLE * batch * wide + self._activations(batch)
        solved = DOUBLE * max(2 * one.d_in**2 for one in groups)
        made = max(solved, *map(self._decomposed, self.largest), *map(self._pivoted, self.largest))
        device = self._held + max(sums + seen, missing + made + self._fits)
        waiting = self.tokens * self.bytes * (places + self.hidden + remembered)
        metric = DOUBLE * max(one.d_out for one in self.largest) ** 2 * self._judged
        host = min(LIMIT, waiting) + metric
        disk = self._measured + self._judged * self._outer + ends * self._exchanged + 4 * self._stream + self._narrow
        disk += max(0, waiting - LIMIT)
        products = 2 * self.tokens * sum(one.d_in * (one.d_in + one.d_out) for one in self._every if one.first)
        work = sum(self._operations(one) + 2 * one.d_out * one.d_in**2 for one in self._every)
        work += sum(
            one.d_in**3 / 3 + 2 * one.d_in**3 for one in self._every if one.first
        )  # factored once for all that read it
        return Stage(device, host, disk, 2, 2 * self._forward + products, work)

    def refinement(self) -> Stage:
        """Factors of one block in float32, and its graph; all batches once, then one a step. Three rates are tried."""
        numbers = sum(one.rank * (one.d_out + one.d_in) for one in self.largest)
        metric = SINGLE * self.hidden**2 * self._judged
        device = self._held + (4 * SINGLE + self.bytes) * numbers + metric + 3 * self._activations(self._batch)
        steps = self.ask.refine + 3 * min(TRIED, self.ask.refine)
        passes = 1 + 3 * steps * self._batch / self.tokens
        return Stage(device, 0, 0, passes, passes * self._forward)

    def distillation(self) -> Stage:
        """Factors in float32, their gradients, Adam's two averages, how they began, and the graph of a batch through all blocks.

        Three rates are tried; few models need more.
        """
        numbers = sum(one.rank * (one.d_out + one.d_in) for one in self._every)
        tokens = min(DISTILLED, self.logits)
        graph = len(self.blocks) * self._activations(tokens) + 7 * SINGLE * self.vocabulary * tokens
        passes = 4 * (self.ask.distill + 3 * min(TRIED, self.ask.distill)) * tokens * len(self.shapes) / self.tokens
        return Stage((4 * SINGLE + self.bytes) * numbers + graph, 0, 0, passes, passes * self._forward)

    @property
    def _searched(self) -> float:
        """The share of the text that a search reads."""
        return sum(min(n, self.ask.search_count or n) * t for n, t in self.shapes) / self.tokens

    @property
    def _every(self) -> list[Layer]:
        return [one for block in self.blocks for one in block]

    @property
    def _grams(self) -> float:
        """Bytes of the second moments of all inputs."""
        return DOUBLE * sum(one.d_in**2 for one in self._every if one.first)

    @property
    def _measured(self) -> float:
        """Those of them that are kept to the end."""
        ask = self.ask
        kept = ask.method.needs_moments and (ask.searches or ask.splits or not ask.shifted) and not ask.one_by_one
        return self._grams if kept else 0

    @property
    def _outer(self) -> float:
        """Bytes of the second moments of the gradients at all outputs."""
        return DOUBLE * sum(one.d_out**2 for one in self._every)

    @property
    def _exchanged(self) -> float:
        """Bytes of the factors."""
        return self.bytes * sum(one.rank * (one.d_out + one.d_in) for one in self._every)

    @property
    def _narrow(self) -> float:
        """Bytes of the layers that have lost neurons, without these."""
        if not self.ask.neurons:
            return 0
        size = lambda layers: sum(one.d_out * one.d_in for one in layers)  # noqa: E731
        parts = ((block, reader.d_in) for block in self.blocks if (reader := _reader(block)))
        before = sum(size(one for one in block if n in (one.d_in, one.d_out)) for block, n in parts)
        return self.bytes * max((1 - MOST) * before, before - self.ask.neurons * self.ask.removed * size(self._every))

    @property
    def _batch(self) -> int:
        """Tokens that are read at a time."""
        return min(self.tokens, windows_read(self.length) * self.length)

    def _product(self, tokens: int, wide: int, high: int) -> float:
        """Bytes of a product of a batch with itself: some tokens in float32, and a strip of rows."""
        return SINGLE * (min(tokens, CHUNK) * (wide + high) + wide * high / STRIPS)

    @property
    def _held(self) -> float:
        """Bytes of a block, and of what is no block's."""
        return self.outside + self.block

    @property
    def _stream(self) -> float:
        return self.tokens * self.hidden * self.bytes

    @property
    def _forward(self) -> float:
        """Operations of a pass of all tokens through the blocks."""
        products = sum(one.d_out * one.d_in for block in self.blocks for one in block)
        return 2 * self.tokens * (products + len(self.blocks) * self.length * self.hidden)

    @property
    def _judged(self) -> bool:
        """Whether outputs have a metric, too."""
        return self.ask.judge.needs_gradients

    def _gradient_windows(self, count: int) -> int:
        step = max(1, min(GRADIENTS_EVERY, count // GRADIENTS_LEAST))
        return len(range(0, count, step))

    def _activations(self, tokens: int) -> float:
        """What a block makes of a batch: the outputs of all layers, and hidden states in float32 in its norms."""
        return tokens * (self.bytes * sum(one.d_out for one in self.largest) + 12 * self.hidden)

    def _decomposed(self, one: Layer) -> float:
        """Bytes of a decomposition: metrics as they are, that of the outputs factored, the weight, its core, eigenvectors."""
        m, square = min(one.d_out, one.d_in), one.d_out * one.d_in
        metrics = one.d_in**2 + 2 * one.d_out**2 * self._judged
        core = (one.d_out * m + m * one.d_in) * (one.d_out > one.d_in) + m * one.d_in + 5 * m * m
        return DOUBLE * (metrics + 2 * square + max(core, one.d_in**2, one.d_out**2 * self._judged))

    def _pieces(self, one: Layer) -> int:
        """Numbers of a decomposition that are kept."""
        return min(one.d_out, one.d_in) * (one.d_out + one.d_in)

    @property
    def _fits(self) -> float:
        """Bytes of what layers that read one input should be, but for the last of them: all wait until their input is done with."""
        groups: list[list[int]] = []
        for one in self.largest:
            fit = one.rank * (one.d_out + one.d_in) if one.rank else one.d_out * one.d_in
            if one.first or not groups:
                groups.append([])
            groups[-1].append(fit)
        return DOUBLE * max(sum(fits) - min(fits) for fits in groups)

    def _pivoted(self, one: Layer) -> float:
        """Bytes of the factors, of LU of the left one twice, and of what the other rows are in terms of the chosen ones."""
        return DOUBLE * one.rank * (6 * one.d_out + one.d_in) * (self.ask.factors == "pivoted")

    def _operations(self, one: Layer) -> float:
        """Of a decomposition, and of pivoting."""
        m, d_out, d_in = min(one.d_out, one.d_in), one.d_out, one.d_in
        work = EIGH * m**3 + 2 * m * d_in**2 + 4 * m * m * d_in + 2 * d_out * m * m + 4 * d_out * m * m * (d_out > d_in)
        work += (d_out**3 / 3 + 2 * d_out**2 * d_in + d_out**2 * m) * self._judged
        return work + 6 * one.rank**2 * d_out * (self.ask.factors == "pivoted")


def _reader(block: Sequence[Layer]) -> Layer | None:
    """The layer of a block that reads the neurons of its feed-forward: the one of most inputs that nothing else reads."""
    return max((one for one in block if one.alone), key=lambda one: one.d_in, default=None)


def _layers(names: Sequence[str], layers: dict[str, nn.Linear], hidden: int, ask: Request) -> list[Layer]:
    """The layers of a block, and which of them read one input."""
    parent = lambda name: name.rpartition(".")[0]  # noqa: E731
    ends = {parent(name): name for name in names}  # the last of every parent
    shared = {}  # whether a layer reads what the one before it reads
    for before, name in pairwise(names):
        back = ends[parent(name)] == name and layers[name].out_features == hidden
        beside = parent(before) == parent(name) and layers[before].in_features == layers[name].in_features
        shared[name] = beside and not back
    after = dict(pairwise(names))
    found = []
    for name in names:
        d_out, d_in = layers[name].weight.shape
        rank = rank_for_ratio(d_out, d_in, ask.ratio, ask.factors) if ask.ratio else (ask.ranks or {}).get(name, 0)
        first = not shared.get(name, False)
        found.append(Layer(d_out, d_in, rank, first, first and not shared.get(after.get(name), False)))
    return found
