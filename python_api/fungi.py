"""FUNGI features: what self-supervised gradients of a frozen model say about an input."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fmkernels import _checks, project_gradients
from fmkernels.ops.project_gradients import Projection

from .arrays import progress_bar
from .fungi_file import FeatureFile, FeatureRows
from .fungi_inputs import (
    checked_numbers,
    collate,
    count,
    explained,
    indexed,
    loaded,
    marks,
    part,
    without_addresses,
)
from .fungi_objectives import PRESETS, Objective
from .fungi_passes import OP, Backbone, Factors, Ready, image_pass, joined
from .fungi_pooling import Pooling, check_pooling
from .fungi_random import derived_seed
from .fungi_setup import (
    checked_projection,
    completed_views,
    made_projection,
    named_objectives,
)
from .fungi_state import ExtractorState, checksums, differences
from .fungi_tokens import embed_tokens, patch_tokens, token_pass
from .fungi_views import Views
from .gradient_capture import linear_layer

PENDING = 64 * 2**20
"""Bytes of gradients, as factors, that wait to be projected in one call."""


class FungiExtractor:
    """Embeddings of a frozen model, with projected gradients of self-supervised losses.

    For each input and objective: views, a forward pass, the loss of the views' embeddings, and the
    gradient of that loss with respect to the weight and bias of one linear layer,
    G = Σ_s δ_s ⊗ [a_s; 1], which is projected to ``dim`` numbers without ever being in memory:

        features = [embedding/‖·‖, P·vec(G_1)/‖·‖, P·vec(G_2)/‖·‖, …]

    One matrix P serves all objectives. The features of an input depend on nothing but the model,
    the extractor's state, the input and, where views are random, its number.

    Args:
        model: any module; it is called in evaluation mode and left as it was found. A tensor of
            views is its only argument, a mapping of tensors its keyword arguments.
        target_layer: the name of a ``torch.nn.Linear`` in it, usually the output projection of the
            last attention: ``"blocks.11.attn.proj"`` (timm), ``"layers.11.attention.o_proj"``
            (transformers' ViT).
        objectives: any of :class:`KL`, :class:`DINO`, :class:`SimCLR`, or your own
            :class:`Objective`. :class:`SimCLR` needs :meth:`fit_negatives`. If None, those of the
            three whose views there are: no :class:`DINO` with texts or ``per_token``.
        projection: ``"count"`` (fastest), ``"rademacher"`` (the paper's), ``"khatri_rao"``, or a
            projection made for the layer, such as a :class:`~fmkernels.Kronecker`.
        preset: what the paper's scripts do, or its published library (``"library"``).
        seed: of heads, projection, random views and the choice of negatives: an integer from 0
            to 2**63 − 1.
        dim: K, numbers per gradient; that of the embedding if None.
        pooling: from the model's output to embeddings: None (it is the embedding), ``"cls"``,
            ``"mean"``, ``"pooler"``, or a function (output, views) -> (N, E).
        views: :class:`ImageViews`, :class:`TextViews`, :class:`CustomViews` or alike;
            ``ImageViews()`` if None.
        embedding: whether the features begin with the embedding.
        per_token: features of every patch, for in-context segmentation, see :meth:`__call__`;
            ``pooling`` is then None or a function that gives tokens (N, T, E).
        prefix_tokens: tokens in front that are no patches; only with ``per_token``.
        neighbors: negatives of a token, its nearest ones in memory; only with ``per_token``.
        dtype: run the model under autocast in ``torch.bfloat16`` or ``torch.float16``. On a CPU
            with instructions for it bfloat16 takes half the time; weights are then cast once in
            each call, and the model keeps its own.
        batch_size: views, not inputs, that are made at a time; an input's views stay together. A
            CPU takes them in parts that suit its memory.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: no such layer, a layer that cannot be seen into, shapes that do not fit.

    Numerics:
        Losses in float32 (float64 for a float64 model), gradients in the model's precision, scaled
        to unit norm per input before they pass through it; features float32.

    Threads:
        Several threads may call one extractor, and several extractors one model.

    Source:
        Simoncini, Gidaris, Bursuc, Asano, *No Train, all Gain*, NeurIPS 2024.

    Example:
        >>> import torch
        >>> from fmkernels.api import KL, FungiExtractor, ImageViews
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 16), torch.nn.Linear(16, 16))
        >>> extractor = FungiExtractor(model, "2", [KL()], views=ImageViews(size=8))
        >>> extractor(torch.rand(4, 3, 10, 12)).shape
        torch.Size([4, 32])
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: str,
        objectives: Sequence[Objective] | None = None,
        *,
        projection: str | Projection = "count",
        preset: str = "paper",
        seed: int = 42,
        dim: int | None = None,
        pooling: Pooling = None,
        views: Views | None = None,
        embedding: bool = True,
        per_token: bool = False,
        prefix_tokens: int = 1,
        neighbors: int = 5,
        dtype: torch.dtype | None = None,
        batch_size: int = 64,
    ) -> None:
        self._layer = linear_layer(OP, model, target_layer)
        _checks.choice(OP, "preset", preset, PRESETS)
        check_pooling(OP, pooling)
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{OP}: dtype: expected torch.bfloat16, torch.float16, or None for that of the "
                f"model, got {dtype!r}"
            )
        self.backbone = Backbone(model, target_layer, pooling, dtype)
        self.preset, self.seed = preset, _checks.integer_below(OP, "seed", seed, 63)
        self.embedding, self.per_token = bool(embedding), bool(per_token)
        if self.per_token and isinstance(pooling, str):
            raise ValueError(
                f"{OP}: pooling: expected None or a function (output, views) -> tokens (N, T, E) "
                f"with per_token=True, got {pooling!r}"
            )
        self.prefix_tokens = _checks.integer_below(OP, "prefix_tokens", prefix_tokens, 31)
        self.neighbors = _checks.positive_integer(OP, "neighbors", neighbors)
        self.batch_size = _checks.positive_integer(OP, "batch_size", batch_size)
        self.views = completed_views(views, preset)
        self.objectives = named_objectives(objectives, preset, self.views, self.per_token)
        if not self.objectives and not self.embedding:
            raise ValueError(f"{OP}: objectives: expected one or embedding=True, got neither")
        self._dim = None if dim is None else _checks.positive_integer(OP, "dim", dim, ", or None")
        self._projection = checked_projection(projection, self._layer, self._dim)
        self.state = ExtractorState()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        objectives = ", ".join(map(repr, self.objectives.values()))
        return (
            f"FungiExtractor({type(self.backbone.model).__name__}, "
            f"{self.backbone.target_layer!r}, [{objectives}], preset={self.preset!r}, "
            f"seed={self.seed})"
        )

    # what is made in here counts for the tape, whatever mode the caller is in
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, inputs: Any, numbers: Sequence[int] | None = None) -> Tensor:
        """Features of a batch: (B, blocks · width), float32, on the model's device.

        Args:
            inputs: what the views take: for images a tensor (B, 3, H, W) or a list of images.
            numbers: of the inputs in their dataset, B integers, of which random views are a
                function; 0, 1, … if None.

        Returns:
            A block per row for the embedding (E wide) and each objective (``dim`` wide), each
            divided by its norm. With ``per_token``: (B, T, blocks · width) for the T patches of an
            image, from the plain views alone; each row as a whole has norm 1, too.
        """
        numbers = checked_numbers(inputs, numbers)
        blocks: dict[str, list[Tensor]] = {}
        pending: list[tuple[str, Factors]] = []
        state = self._prepared(inputs).to(self.backbone.device)
        for name, found in self._passes(state, inputs, numbers):
            if isinstance(found, Tensor):
                blocks.setdefault(name, []).append(F.normalize(found, dim=-1).float())
                continue
            pending.append((name, found))
            if sum(factors.nbytes for _, factors in pending) > PENDING:
                self._project(state, pending, blocks)
        self._project(state, pending, blocks)
        order = [name for name in ("", *self.objectives) if name in blocks]
        features = torch.cat([torch.cat(blocks[name]) for name in order], dim=-1)
        return F.normalize(features, dim=-1) if self.per_token else features

    @torch.inference_mode(False)
    @torch.no_grad()
    def gradients(
        self, inputs: Any, numbers: Sequence[int] | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The exact gradients of a batch as factors: objective -> δ (B, S, out), a (B, S, in).

        G_b = Σ_s δ_bs ⊗ [a_bs; 1] is the gradient of the loss of input b.
        :func:`fmkernels.gradient_similarity` compares them without a projection.
        """
        numbers = checked_numbers(inputs, numbers)
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        state = self._prepared(inputs).to(self.backbone.device)
        for name, factors in self._passes(state, inputs, numbers):
            if isinstance(factors, Factors):
                pair = factors.scaled_delta(), factors.activation
                found.setdefault(name, []).append(pair)
        return {name: joined(pairs) for name, pairs in found.items()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit_negatives(self, dataset: Any, *, progress: bool = False) -> FungiExtractor:
        """Make the fixed negatives of the objectives that need some; returns self.

        They are latents of the views of inputs that are drawn at random (all, if the dataset has
        fewer than the objective asks for); with ``per_token`` tokens of such inputs.

        Args:
            dataset: a folder of images, or a dataset with a length and items by index, each an
                input or a tuple that begins with one; usually the training set.
            progress: show a bar (needs tqdm).
        """
        op = f"{OP}.fit_negatives"
        dataset = indexed(op, dataset)
        for name, objective in self.objectives.items():
            if not objective.wanted_negatives:
                continue
            draw = torch.Generator().manual_seed(derived_seed(self.seed, "negatives", name))
            order = torch.randperm(len(dataset), generator=draw, device=draw.device)
            chosen = order[: objective.wanted_negatives]
            if not len(chosen):
                raise ValueError(f"{op}: dataset: expected at least one input, got none")
            found = []
            with progress_bar(progress, len(chosen), f"negatives of {name}") as advance:
                for rows, inputs in self._negatives(name, dataset, chosen.tolist()):
                    found.append(rows)
                    advance(inputs)
            with self._lock:
                self.state = self.state.with_negatives(name, torch.cat(found))
        return self

    @torch.inference_mode(False)
    @torch.no_grad()
    def extract(
        self,
        dataset: Any,
        path: Any = None,
        *,
        batch_size: int = 32,
        num_workers: int = 0,
        progress: bool = False,
    ) -> Any:
        """Features of a dataset, in its order.

        Args:
            dataset: a folder of images, with the folders in it, in the order of their paths; or a
                dataset with a length and items by index, each an input or a tuple that begins with
                one.
            path: of a .npy file, to which each batch is written when it is done. A run that was
                interrupted goes on there; a small file ``path`` + ``.json`` keeps count, and what
                the features are of: the weights, the extractor's state and settings, names, sizes
                and times of a folder's files, of another dataset the length, the first and the last
                input. Another one's features are refused. What lies between the first and the last
                input, and a function of the same name, it does not tell.
            batch_size: inputs that are loaded at a time.
            num_workers: processes that load them.
            progress: show a bar (needs tqdm).

        Returns:
            A tensor (N, …) on the CPU, or with ``path`` a NumPy array that is mapped from the file,
            read-only.
        """
        op = f"{OP}.extract"
        dataset = indexed(op, dataset)
        if not len(dataset):
            raise ValueError(f"{op}: dataset: expected at least one input, got none")
        batch_size = _checks.positive_integer(op, "batch_size", batch_size)
        rows: FeatureFile | FeatureRows = FeatureRows()
        if path is not None:
            if self.state.projection is None:
                self._prepared(collate([dataset[0]]))
            rows = FeatureFile(op, path, len(dataset), marks(dataset) | self._source())
        batches = loaded(dataset, rows.done, batch_size, num_workers)
        with progress_bar(progress, len(dataset), "features") as advance:
            advance(rows.done)
            for inputs in batches:
                numbers = range(rows.done, rows.done + count(inputs))
                rows.append(self(inputs, numbers).cpu())
                advance(len(numbers))
        return rows.result()

    def state_dict(self) -> dict[str, Any]:
        """Heads, projection and negatives: what another process needs for compatible features.

        Heads and projection are there from the first call on. The settings that go with them are
        there to be compared.
        """
        return {**self.state.state_dict(), "settings": self._settings()}

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the heads, the projection and the negatives of another extractor.

        Make this one with the same arguments; ``embedding``, ``dtype`` and ``batch_size`` are free,
        and so is ``projection``, which is replaced. The model is not looked at.

        Raises:
            ValueError: they are of other objectives, of a layer of another size, or go with other
                settings.
        """
        found = ExtractorState.loaded(state, self.objectives, self.per_token)
        checked_projection(found.projection, self._layer, self._dim)
        differing = differences(state["settings"], self._settings())
        if differing:
            raise ValueError(
                f"{OP}.load_state_dict: state: expected one of an extractor with the same "
                f"settings, got one with {differing}; make this one with the same arguments"
            )
        with self._lock:
            self.state = found

    def _passes(
        self, state: ExtractorState, inputs: Any, numbers: Sequence[int]
    ) -> Iterator[tuple[str, Tensor | Factors]]:
        """(objective, its gradients), or ("", embeddings), for part after part of the inputs.

        The parts of each objective come in order. Inputs go through the model once for each kind of
        views.
        """
        size, backbone = count(inputs), self.backbone.in_one_go()
        for kind, names in self._kinds().items():
            views = 1 if self.per_token else self.views.counts[kind]
            step = max(1, self.batch_size // views)
            ready = [self._ready(name, state) for name in names]
            for start in range(0, size, step):
                stop = min(start + step, size)
                made = self._views(kind, part(inputs, start, stop), numbers[start:stop])
                if self.per_token:
                    tokens, found = token_pass(backbone, made, ready, self.neighbors)
                    embeddings = patch_tokens(tokens, self.prefix_tokens)
                    found = [factors.rows(slice(self.prefix_tokens, None)) for factors in found]
                else:
                    embeddings, found = image_pass(backbone, made, stop - start, views, ready)
                    embeddings = embeddings[:, 0]
                if kind == "plain" and self.embedding:
                    yield "", embeddings
                yield from zip(names, found, strict=True)

    def _kinds(self) -> dict[str, list[str]]:
        """Kind of views -> the objectives that share its forward passes."""
        kinds: dict[str, list[str]] = {"plain": []} if self.embedding else {}
        for name, objective in self.objectives.items():
            kinds.setdefault("plain" if self.per_token else objective.view, []).append(name)
        return kinds

    def _views(self, kind: str, inputs: Any, numbers: Sequence[int]) -> Any:
        seeds = [derived_seed(self.seed, kind, int(number)) for number in numbers]
        with explained(lambda: f"inputs[i] counts among those of the numbers {list(numbers)}"):
            return self.views.make(kind, inputs, self.backbone.device, seeds)

    def _ready(self, name: str, state: ExtractorState) -> Ready:
        objective, negatives = self.objectives[name], state.negatives.get(name)
        if objective.wanted_negatives and negatives is None:
            raise ValueError(
                f"{OP}: objectives: expected negatives for {name}, got none; call "
                "fit_negatives(dataset) or load_state_dict(state) before the first features, of a "
                "FUNGIWrapper setup(dataset)"
            )
        return Ready(objective, state.heads[name], negatives)

    def _prepared(self, inputs: Any) -> ExtractorState:
        """The state with all that is in it; the first call finds out how wide embeddings are."""
        if self.state.projection is not None:
            return self.state
        views = self._views("plain", part(inputs, 0, 1), [0])
        embed = embed_tokens if self.per_token else Backbone.embed
        width = embed(self.backbone, views).shape[-1]
        with self._lock:
            if self.state.projection is None:
                projection = made_projection(
                    self._projection, self._layer, self._dim or width, self.seed
                )
                self.state = ExtractorState.drawn(self.objectives, width, self.seed, projection)
            return self.state

    def _project(
        self,
        state: ExtractorState,
        pending: list[tuple[str, Factors]],
        blocks: dict[str, list[Tensor]],
    ) -> None:
        """One call for all objectives; what is pending is done with."""
        if not pending:
            return
        assert state.projection is not None
        pairs = [factors.pair(self.per_token) for _, factors in pending]
        deltas, activations = zip(*pairs, strict=True)
        found = project_gradients(list(deltas), list(activations), state.projection)
        for (name, factors), rows in zip(pending, found, strict=True):
            shape = factors.delta.shape[: 2 if self.per_token else 1]
            features = F.normalize(rows, dim=-1).unflatten(0, shape)
            blocks.setdefault(name, []).append(features)
        pending.clear()

    def _negatives(
        self, name: str, dataset: Any, chosen: list[int]
    ) -> Iterator[tuple[Tensor, int]]:
        """Latents (M', L) of the views of some inputs, or tokens (M', E), and of how many."""
        kind = "plain" if self.per_token else self.objectives[name].view
        views = 1 if self.per_token else self.views.counts[kind]
        step, backbone = max(1, self.batch_size // views), self.backbone.in_one_go()
        for start in range(0, len(chosen), step):
            numbers = chosen[start : start + step]
            inputs = collate([dataset[number] for number in numbers])
            state = self._prepared(inputs).to(self.backbone.device)
            made = self._views(kind, inputs, numbers)
            if self.per_token:
                tokens = embed_tokens(backbone, made)
                found = patch_tokens(tokens, self.prefix_tokens).flatten(0, 1)
            else:
                embeddings = backbone.embed(made)
                found = state.heads[name]["head"].like(embeddings)(embeddings)
            yield found, len(numbers)

    def _settings(self) -> dict[str, str]:
        """What features depend on beside the state, as text."""
        found: dict[str, object] = {
            "target_layer": self.backbone.target_layer,
            "pooling": self.backbone.pooling,
            "views": self.views,
            "seed": self.seed,
            "per_token": self.per_token,
            **self.objectives,
        }
        if self.per_token:
            found |= {"prefix_tokens": self.prefix_tokens, "neighbors": self.neighbors}
        return {name: without_addresses(value) for name, value in found.items()}

    def _source(self) -> dict[str, str]:
        """What a file of features is of, but for the inputs."""
        with_dtype = {"dtype": str(self.backbone.dtype), "embedding": str(self.embedding)}
        return checksums(self.backbone.model, self.state) | self._settings() | with_dtype
