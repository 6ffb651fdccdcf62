"""NeCo's training loss, from the token maps of student and teacher."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fmkernels import _checks, patch_neighbor_loss
from fmkernels._autocast import without_autocast
from fmkernels.ops.patch_neighbor_loss import METRICS
from fmkernels.ops.soft_sort import check_settings, check_sorts

from .reference_queue import ReferenceQueue
from .roi_align import roi_align

FOREGROUND = 1 - 1e-6
"""A patch counts as foreground if it lies in it as a whole; less the rounding of the average."""


class NeCoLoss(nn.Module):
    """Patch neighbour consistency: student and teacher order the same references alike.

    For every global crop g and every other crop v of an image, the part that both show is aligned
    to N = grid_size² patches: teacher patches from g, student patches from v. R = N reference
    patches, drawn at random for each image, are sorted by their similarity to each patch, and

        loss = mean over the pairs (g, v) of patch_neighbor_loss(student, teacher, references)

    All pairs go through one fused call. With two global and four local crops there are ten.

    Args:
        grid_size: patches along each side of an aligned part; its square is the length of the
            sorted rows.
        queue_size: teacher patches that are remembered for each global crop, in each process;
            the references are drawn from them. None draws them from the teacher patches of the
            same pair, over the whole batch.
        metric: ``"cosine"`` or ``"euclidean"``.
        steepness: of the student's sort.
        teacher_steepness: of the teacher's sort; that of the student if None.
        network: the wiring; see :func:`fmkernels.soft_sort`.
        distribution: the soft swap's distribution function.
        art_lambda: exponent of ``logistic_phi``.
        dim: D, the width of the maps; only the queue needs it.
        num_globals: G, how many global crops there are.

    Raises:
        ValueError: a setting that does not fit, at construction.

    Numerics:
        Computed in float32 (float64 for float64 maps) also under autocast and where products of
        float32 would be rounded (TF32). The teacher and the references are never in the graph.

    Source:
        Pariza et al., *NeCo*, ICLR 2025, and its released code. Different from the code: the
        teacher is not differentiated; the queues count their own patches (there, half of the
        first references are zeros); without a queue, references are taken from the foreground of
        the pair itself.

    Example:
        >>> import torch
        >>> from fmkernels.api import NeCoLoss, intersection_boxes
        >>> crops = torch.tensor([[[0, 0, 64, 64], [32, 0, 96, 64], [40, 8, 56, 24]]])
        >>> boxes = intersection_boxes(crops, [(14, 14), (14, 14), (7, 7)])
        >>> teacher = [torch.randn(1, 256, 14, 14) for _ in range(2)]
        >>> student = [torch.randn(1, 256, size, size, requires_grad=True) for size in (14, 14, 7)]
        >>> loss = NeCoLoss(queue_size=1024)(student, teacher, boxes)
        >>> loss.backward()
    """

    def __init__(
        self,
        grid_size: int = 7,
        queue_size: int | None = 8192,
        metric: str = "cosine",
        steepness: float = 100.0,
        teacher_steepness: float | None = None,
        network: str = "bitonic",
        distribution: str = "cauchy",
        art_lambda: float = 0.25,
        *,
        dim: int = 256,
        num_globals: int = 2,
    ) -> None:
        super().__init__()
        positive = functools.partial(_checks.positive_integer, "NeCoLoss")
        grid_size = positive("grid_size", grid_size)
        dim, num_globals = positive("dim", dim), positive("num_globals", num_globals)
        _checks.choice("NeCoLoss", "metric", metric, METRICS)
        check_settings("NeCoLoss", steepness, network, distribution, art_lambda)
        if teacher_steepness is not None:
            _checks.non_negative("NeCoLoss", "teacher_steepness", teacher_steepness)
        check_sorts("NeCoLoss", network, grid_size**2)
        self.grid_size = grid_size
        self.num_globals = num_globals
        self.metric = metric
        self.steepness = steepness
        self.teacher_steepness = teacher_steepness
        self.network = network
        self.distribution = distribution
        self.art_lambda = art_lambda
        self.queue = None
        if queue_size is not None:
            queue_size = positive("queue_size", queue_size, ", or None for no queue")
            self.queue = ReferenceQueue(queue_size, dim, num_globals)

    def forward(
        self,
        student_maps: Sequence[Tensor],
        teacher_maps: Sequence[Tensor],
        boxes: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        *,
        references: Tensor | None = None,
    ) -> Tensor:
        """Loss of one batch. In training mode the teacher's patches also enter the queue.

        Args:
            student_maps: projected tokens of every crop, V maps (B, D, H_v, W_v), the G global
                crops first.
            teacher_maps: of the global crops, G maps (B, D, H_g, W_g).
            boxes: the shared part of crops g and v, as :func:`fmkernels.api.intersection_boxes`
                gives it: in patches of g, (B, G, V, 4), and in patches of v, (B, V, G, 4). Those
                of a crop with itself are not looked at. Left on the CPU, they are checked
                without waiting for a GPU.
            mask: (B, G, H_g, W_g), foreground of the global crops: bool, an integer that is not 0,
                or the share of the patch that is in it, 0 to 1. Patches that are not wholly in it
                count neither in the loss nor as references. A pair without foreground
                contributes 0.
            references: (G·(V − 1), B, grid_size², D) to be used instead of drawing them, in the
                order of the pairs (g, v): (0, 1), (0, 2), …, (1, 0), (1, 2), ….

        Returns:
            A scalar.

        Raises:
            TypeError: a tensor is not floating-point.
            ValueError: shapes, boxes or the queue do not fit; the message names the argument.
            RuntimeError: boxes that do not fit under ``torch.compile``, whose message cannot say
                which; and a queue that would be drawn from a second time for one step, by
                activation checkpointing.
        """
        dtype = self._check(student_maps, teacher_maps, boxes, mask)
        if references is not None:
            self._check_references(references, student_maps)
        if self.queue is not None:
            self._check_queue(self.queue, student_maps[0], draws=references is None)
        device = student_maps[0].device
        with without_autocast(student_maps[0]):
            student_maps = [tokens.to(dtype) for tokens in student_maps]
            teacher_maps = [tokens.detach().to(dtype) for tokens in teacher_maps]
            in_global, in_other = (box.to(device, dtype) for box in boxes)
            if self.queue is not None and self.training:
                self._remember(self.queue, teacher_maps, mask)
            with torch.no_grad():
                teacher = self._align(teacher_maps, in_global)  # (pairs, B, N, D)
                foreground = None
                if mask is not None:
                    shares = mask if mask.is_floating_point() else mask.bool()
                    masks = shares.to(dtype).clamp(0, 1).unsqueeze(2).unbind(dim=1)  # (B, 1, H, W)
                    foreground = self._align(masks, in_global).squeeze(-1) >= FOREGROUND
                if references is None:
                    references = self._draw(teacher, foreground)
            student = self._align_student(student_maps, in_other)
            weights = None if foreground is None else _weights(foreground, dtype)
            return patch_neighbor_loss(
                student.flatten(0, 1),
                teacher.flatten(0, 1),
                references.detach().to(dtype).flatten(0, 1),
                metric=self.metric,
                mask=None if weights is None else weights.flatten(0, 1),
                reduction="mean" if weights is None else "sum",
                steepness=self.steepness,
                teacher_steepness=self.teacher_steepness,
                network=self.network,
                distribution=self.distribution,
                art_lambda=self.art_lambda,
            )

    def _align(self, maps: Sequence[Tensor], in_global: Tensor) -> Tensor:
        """G maps (B, D, H, W), (B, G, V, 4) -> (pairs, B, N, D): what g shows of every other v."""
        aligned = []
        for g, tokens in enumerate(maps):
            aligned.append(roi_align(tokens, without(in_global[:, g], g), self.grid_size))
        return torch.cat(aligned, dim=1).transpose(0, 1)

    def _align_student(self, maps: Sequence[Tensor], in_other: Tensor) -> Tensor:
        """V maps (B, D, H, W), (B, V, G, 4) -> (pairs, B, N, D): what v shows of every other g."""
        parts: dict[tuple[int, int], Tensor] = {}
        for v, tokens in enumerate(maps):
            globals_ = [g for g in range(self.num_globals) if g != v]
            if globals_:
                aligned = roi_align(tokens, without(in_other[:, v], v), self.grid_size)
                parts |= {(g, v): aligned[:, k] for k, g in enumerate(globals_)}
        return torch.stack([parts[pair] for pair in sorted(parts)])

    def _remember(
        self, queue: ReferenceQueue, teacher_maps: Sequence[Tensor], mask: Tensor | None
    ) -> None:
        """Ten patches per image, as in the released code."""
        for g, tokens in enumerate(teacher_maps):
            patches = tokens.permute(0, 2, 3, 1).flatten(0, 2)
            kept = None if mask is None else mask[:, g].flatten() > 0
            queue.push(g, patches, 10 * len(tokens), kept)

    def _draw(self, teacher: Tensor, foreground: Tensor | None) -> Tensor:
        """References like the teacher's patches, (pairs, B, R, D)."""
        pairs = len(teacher)
        drawn = []
        for pair in range(pairs):
            patches = teacher[pair].flatten(0, 1)
            inside = None if foreground is None else foreground[pair]
            references = patches[_shuffled(patches, inside)]
            if self.queue is not None:
                remembered, some = self.queue.draw(
                    pair // (pairs // self.num_globals), len(patches)
                )
                references = torch.where(some, remembered.to(references.dtype), references)
            drawn.append(references.view_as(teacher[pair]))
        return torch.stack(drawn)

    def _check(
        self,
        student_maps: Sequence[Tensor],
        teacher_maps: Sequence[Tensor],
        boxes: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> torch.dtype:
        """Refuse what does not fit; returns the dtype of the arithmetic."""
        crops, globals_ = len(student_maps), self.num_globals
        for name, maps in (("student_maps", student_maps), ("teacher_maps", teacher_maps)):
            if isinstance(maps, Tensor):
                raise TypeError(
                    f"NeCoLoss: {name}: expected a list with a map (B, D, H, W) of every crop, "
                    f"got one tensor of shape {tuple(maps.shape)}"
                )
        if len(teacher_maps) != globals_:
            hint = "; are student and teacher swapped?" if crops == globals_ else ""
            raise ValueError(
                f"NeCoLoss: teacher_maps: expected one map per global crop, {globals_}, "
                f"got {len(teacher_maps)}{hint}"
            )
        if crops < max(globals_, 2):
            raise ValueError(
                f"NeCoLoss: student_maps: expected at least {max(globals_, 2)} crops, got {crops}"
            )
        first = student_maps[0]
        dtype = torch.float32
        for name, maps in (("student_maps", student_maps), ("teacher_maps", teacher_maps)):
            for index, tokens in enumerate(maps):
                argument = f"{name}[{index}]"
                _checks.floating_tensor("NeCoLoss", argument, tokens)
                _checks.dimensions("NeCoLoss", argument, tokens, "(B, D, H, W)")
                _checks.same_device("NeCoLoss", argument, tokens, "student_maps[0]", first)
                if tokens.shape[:2] != first.shape[:2]:
                    raise ValueError(
                        f"NeCoLoss: {argument}: expected shape ({first.shape[0]}, "
                        f"{first.shape[1]}, H, W), the batch and width of student_maps[0], "
                        f"got {tuple(tokens.shape)}"
                    )
                dtype = torch.promote_types(dtype, tokens.dtype)
        self._check_boxes(boxes, student_maps, teacher_maps)
        if mask is not None:
            _check_mask(mask, teacher_maps)
        return dtype

    def _check_queue(self, queue: ReferenceQueue, tokens: Tensor, draws: bool) -> None:
        batch, dim = tokens.shape[:2]
        uses_it = self.training or draws
        if uses_it and not is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "NeCoLoss: queue: expected one forward pass per step, got another inside of "
                "backward (activation checkpointing?), which would fill the queue and draw from it "
                "again; checkpoint the backbone, not the loss"
            )
        if dim != queue.patches.shape[2]:
            raise ValueError(
                f"NeCoLoss: student_maps: expected maps of the queue's width "
                f"{queue.patches.shape[2]} (the argument dim), got {dim}"
            )
        if queue.patches.device != tokens.device:
            raise ValueError(
                f"NeCoLoss: student_maps: expected the device of the queue, "
                f"{queue.patches.device}, got {tokens.device}; move the loss with .to()"
            )
        needed = batch * self.grid_size**2
        if draws and needed > queue.size:
            raise ValueError(
                f"NeCoLoss: queue_size: expected at least {needed}, the references of a batch of "
                f"{batch} images, got {queue.size}"
            )

    def _check_boxes(
        self,
        boxes: tuple[Tensor, Tensor],
        student_maps: Sequence[Tensor],
        teacher_maps: Sequence[Tensor],
    ) -> None:
        batch, crops, globals_ = len(student_maps[0]), len(student_maps), self.num_globals
        if not isinstance(boxes, (tuple, list)) or len(boxes) != 2:
            raise TypeError(
                "NeCoLoss: boxes: expected the pair that intersection_boxes returns, "
                f"got {type(boxes).__name__}"
            )
        for index, (box, maps, shape) in enumerate(
            (
                (boxes[0], teacher_maps, (batch, globals_, crops, 4)),
                (boxes[1], student_maps, (batch, crops, globals_, 4)),
            )
        ):
            argument = f"boxes[{index}]"
            _checks.floating_tensor("NeCoLoss", argument, box)
            if tuple(box.shape) != shape:
                raise ValueError(
                    f"NeCoLoss: {argument}: expected shape {shape} for {crops} crops in "
                    f"student_maps, {globals_} in teacher_maps and {batch} images, "
                    f"got {tuple(box.shape)}"
                )
            _check_inside(argument, box, maps)

    def _check_references(self, references: Tensor, student_maps: Sequence[Tensor]) -> None:
        first = student_maps[0]
        _checks.floating_tensor("NeCoLoss", "references", references)
        _checks.same_device("NeCoLoss", "references", references, "student_maps[0]", first)
        pairs = self.num_globals * (len(student_maps) - 1)
        expected = (pairs, len(first), self.grid_size**2, first.shape[1])
        if tuple(references.shape) != expected:
            raise ValueError(
                f"NeCoLoss: references: expected shape (pairs, B, R, D) = {expected}, "
                f"got {tuple(references.shape)}"
            )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows between the parentheses."""
        return (
            f"grid_size={self.grid_size}, metric={self.metric!r}, steepness={self.steepness}, "
            f"network={self.network!r}, distribution={self.distribution!r}"
        )


def without(boxes: Tensor, index: int) -> Tensor:
    """(B, K, 4) without one of the K; slices, because a list would be copied to the device."""
    return torch.cat([boxes[:, :index], boxes[:, index + 1 :]], dim=1)


def _check_inside(argument: str, boxes: Tensor, maps: Sequence[Tensor]) -> None:
    """Boxes [b, crop, other] are not empty and within the map of the crop, up to rounding."""
    widths_heights = [(tokens.shape[3], tokens.shape[2]) for tokens in maps]
    size = torch.tensor(widths_heights).to(boxes)[:, None]  # (crops, 1, 2)
    corner, opposite = boxes[..., :2], boxes[..., 2:]
    slack = 1e-4 * size
    good = ((corner >= -slack) & (opposite <= size + slack) & (opposite > corner)).all(dim=-1)
    crops = torch.arange(boxes.shape[1], device=boxes.device)[:, None]
    others = torch.arange(boxes.shape[2], device=boxes.device)
    good |= crops == others
    if is_compiling():  # the graph cannot stop for a message
        torch._assert_async(
            good.all(), f"NeCoLoss: {argument}: expected boxes within the map of their crop"
        )
    elif not bool(good.all()):
        image, crop, other = (~good).nonzero()[0].tolist()
        height, width = maps[crop].shape[2:]
        raise ValueError(
            f"NeCoLoss: {argument}: expected boxes x1 < x2, y1 < y2 within the {height} x {width} "
            f"patches of crop {crop}'s map, got {boxes[image, crop, other].tolist()} for image "
            f"{image}, crops {crop} and {other}; intersection_boxes takes the maps' sizes"
        )


def _check_mask(mask: Tensor, teacher_maps: Sequence[Tensor]) -> None:
    first = teacher_maps[0]
    expected = (len(first), len(teacher_maps), *first.shape[2:])
    if any(tokens.shape != first.shape for tokens in teacher_maps):
        raise ValueError("NeCoLoss: mask: expected teacher maps of one size to go with it")
    if not isinstance(mask, Tensor) or tuple(mask.shape) != expected:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"NeCoLoss: mask: expected shape (B, G, H, W) = {expected}, got {got}")
    if mask.is_complex():
        raise TypeError(f"NeCoLoss: mask: expected bool or real numbers, got {mask.dtype}")
    _checks.same_device("NeCoLoss", "mask", mask, "student_maps[0]", first)


def _weights(foreground: Tensor, dtype: torch.dtype) -> Tensor:
    """(pairs, B, N) bool -> weights that average over each pair's foreground, then the pairs."""
    weights = foreground.to(dtype)
    total = weights.sum(dim=(1, 2), keepdim=True)
    return weights / total.clamp_min(1) / len(foreground)


def _shuffled(patches: Tensor, foreground: Tensor | None) -> Tensor:
    """A random order of the patches (M, D); of the foreground alone, repeated, if it is given."""
    # not randperm: inductor of torch 2.13 fails to compile what it indexes (pytorch issue 158457)
    order = torch.rand(len(patches), device=patches.device).argsort()
    if foreground is None:
        return order
    inside = foreground.flatten()
    candidates = inside.logical_not().argsort(stable=True)  # the foreground first
    return candidates[order % inside.sum().clamp_min(1)]
