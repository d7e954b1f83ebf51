"""Memory-centric tiling (Rajbhandari et al., 2021, ZeRO-Infinity, section 5.1.3): large parameters a tile at a time.

The head of a language model and its gradient are the largest tensors at the peak of a step. What is gathered of it, and
what is made of its gradient before ranks divide it, are tiles of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from zgraph import ops
from zgraph.layout import Bucket
from zgraph.passes.copies import derived, readers_of
from zgraph.passes.gathers import gathers_of_params
from zgraph.passes.tidy import remove_dead
from zgraph.pipeline import Pass
from zgraph.program import FlatGradient, Mesh, Origin, Program, Stage, operand

aten = torch.ops.aten

_Tile = tuple[fx.Node, int, int]
"""What stands on the right side of a product, and number of blocks and start as in ``zgraph.tiling.columns_of``."""


@dataclass(frozen=True)
class TileProducts(Pass):
    """Gather parameters that only products of matrices read, and reduce their gradients, a tile at a time.

        y = mm(x, t(view(wait(gather(w)))))            y = product_columns(None, x, t(wait(gather(w[0:n]))), ...)
                                                       y = product_columns(y, x, t(wait(gather(w[n:2n]))), ...)
        gx = mm(gy, view(wait(gather(w))))       ->    gx = product_columns(None, gy, wait(gather(w[:, 0:m])), ...)
                                                       gx = product_columns(gx, gy, wait(gather(w[:, m:2m])), ...)
        gw = wait(reduce_scatter(mm(t(gy), x)))        gw = cat([wait(reduce_scatter(mm(t(gy[:, 0:n]), x))), ...])

    A tile is of some rows of what each rank has, or of some columns of all of it, so that no sum is divided. Of an
    embedding's table, which forward reads whole, gradients are tiled. Buckets of one matrix that is larger than
    ``tile_bytes`` are, where a rank's part is of whole rows and no padding.

    Args:
        mesh: the ranks.
        tile_bytes: that a tile has at most, where that is one row of each rank's, or a column.
    """

    mesh: Mesh
    tile_bytes: int

    takes, gives = Stage.SHARDED, Stage.SHARDED

    def rewrite(self, program: Program) -> None:
        assert program.layout is not None
        large = {b.name: b for b in program.layout.buckets if self._is_large(b)}
        for start, wait, param in gathers_of_params(program):
            bucket = large.get(param.meta["input"].name)
            if bucket is not None and start.args[-1] == self.mesh.shard_axis:
                self._tile_gather(program, bucket, start, wait)
        for start in list(program.graph.find_nodes(op="call_function", target=ops.reduce_scatter)):
            holds = operand(start).meta.get("holds")
            if isinstance(holds, FlatGradient) and holds.bucket in large:
                self._tile_gradient(program, large[holds.bucket], start)
        remove_dead(program)

    def _is_large(self, bucket: Bucket) -> bool:
        """Whether a bucket is a matrix of which every rank has some rows, and more than a tile."""
        if len(bucket.segments) != 1 or len(bucket.segments[0].shape) != 2 or bucket.owners:
            return False
        rows, _ = bucket.segments[0].shape
        is_whole = bucket.segments[0].numel == bucket.numel and rows % self.mesh.shard_size == 0
        return is_whole and self.mesh.shard_size > 1 and bucket.num_bytes > self.tile_bytes

    def _bounds(self, size: int, num_bytes: int) -> Iterator[tuple[int, int]]:
        """Where tiles begin and end, of ``size`` rows or columns that take so many bytes."""
        most = max(self.tile_bytes * size // num_bytes, 1)
        num_tiles = -(-size // most)
        return pairwise(size * tile // num_tiles for tile in range(num_tiles + 1))

    def _tile_gather(self, program: Program, bucket: Bucket, start: fx.Node, wait: fx.Node) -> None:
        """Let what reads a gathered matrix read tiles of it, if all of it can."""
        rows, columns = bucket.segments[0].shape
        readers = list(readers_of(wait))
        if any(program.output_node in node.users for node in (wait, *derived(wait))):
            return
        turned = {reader: _is_turned(reader, wait, (rows, columns)) for reader in readers}
        if not readers or None in turned.values():
            return
        for reader, is_turned in turned.items():
            tiles = (self._of_rows if is_turned else self._of_columns)(program, reader, start, rows, columns)
            origin, width, made = reader.meta["origin"], rows if is_turned else columns, None
            for tile, num_blocks, first in tiles:
                made = program.call(
                    ops.product_columns, made, operand(reader), tile, num_blocks, first, width,
                    origin=origin, before=reader,
                )  # fmt: skip
            assert made is not None
            _keep_facts(reader, made)
            reader.replace_all_uses_with(made)

    def _of_rows(self, program: Program, product: fx.Node, start: fx.Node, rows: int, columns: int) -> Iterator[_Tile]:
        """Of ``mm(x, t(w))``: rows of the matrix give columns of the product."""
        world, origin, part = self.mesh.shard_size, start.meta["origin"], operand(start)
        for first, last in self._bounds(rows // world, start.meta["val"].nbytes):
            begin, end = first * columns, last * columns
            sent = program.call(aten.slice.Tensor, part, 0, begin, end, origin=origin, before=product)
            tile = self._gather(program, sent, [world * (last - first), columns], start, product)
            yield program.call(aten.t.default, tile, origin=product.meta["origin"], before=product), world, first

    def _of_columns(
        self, program: Program, product: fx.Node, start: fx.Node, rows: int, columns: int
    ) -> Iterator[_Tile]:
        """Of ``mm(gy, w)``: columns of the matrix give columns of the product."""
        origin, part, each = start.meta["origin"], operand(start), rows // self.mesh.shard_size
        for first, last in self._bounds(columns, start.meta["val"].nbytes):
            here = program.call(aten.view.default, part, [each, columns], origin=origin, before=product)
            some = program.call(aten.slice.Tensor, here, 1, first, last, origin=origin, before=product)
            dense = {"memory_format": torch.contiguous_format}
            copied = program.call(aten.clone.default, some, origin=origin, before=product, **dense)
            sent = program.call(aten.view.default, copied, [-1], origin=origin, before=product)
            yield self._gather(program, sent, [rows, last - first], start, product), 1, first

    def _gather(self, program: Program, sent: fx.Node, shape: list[int], instead: fx.Node, before: fx.Node) -> fx.Node:
        """What all ranks send, as a matrix."""
        origin, others = instead.meta["origin"], instead.args[1:]
        start = program.call(ops.all_gather, sent, *others, origin=origin, before=before)
        whole = program.call(ops.wait, start, origin=origin, before=before)
        return program.call(aten.view.default, whole, shape, origin=origin, before=before)

    def _tile_gradient(self, program: Program, bucket: Bucket, start: fx.Node) -> None:
        """Make a gradient, and reduce it, some rows of each rank's part at a time."""
        rows, _ = bucket.segments[0].shape
        flat, world = operand(start), self.mesh.shard_size
        made = ops.root_of(flat)
        val = made.meta["val"]
        is_whole = tuple(val.shape) == bucket.segments[0].shape and val.is_contiguous()
        if not is_whole or made.target not in _GRADIENTS or not _can_be_tiled(made, start):
            return
        (wait,) = start.users
        origin: Origin = start.meta["origin"]
        parts = []
        for first, last in self._bounds(rows // world, val.nbytes):
            some = self._rows_of(program, made, first, last, start)
            sent = program.call(aten.view.default, some, [-1], origin=made.meta["origin"], before=start)
            tile = program.call(ops.reduce_scatter, sent, *start.args[1:], origin=origin, before=start)
            parts.append(program.call(ops.wait, tile, origin=origin, before=start))
            if len(parts) == 1:
                _keep_facts(made, some)
        wait.replace_all_uses_with(program.call(aten.cat.default, parts, origin=origin, before=start))

    def _rows_of(self, program: Program, made: fx.Node, first: int, last: int, before: fx.Node) -> fx.Node:
        """The rows of a gradient from ``first`` to ``last`` of each rank's part."""
        world, origin = self.mesh.shard_size, made.meta["origin"]
        if made.target is aten.embedding_dense_backward.default:
            gradient, indices, num_weights, *_ = made.args
            return program.call(
                ops.embedding_rows_backward, gradient, indices, num_weights, world, first, last - first,
                origin=origin, before=before,
            )  # fmt: skip
        turned, x = operand(made), operand(made, 1)
        gradient = operand(turned)
        num, rows = gradient.meta["val"].shape
        blocks = program.call(aten.view.default, gradient, [num, world, rows // world], origin=origin, before=before)
        some = program.call(aten.slice.Tensor, blocks, 2, first, last, origin=origin, before=before)
        block = program.call(aten.reshape.default, some, [num, world * (last - first)], origin=origin, before=before)
        tile = program.call(aten.t.default, block, origin=origin, before=before)
        return program.call(aten.mm.default, tile, x, origin=origin, before=before)


_GRADIENTS = (aten.mm.default, aten.embedding_dense_backward.default)


def _is_turned(product: fx.Node, whole: fx.Node, shape: tuple[int, int]) -> bool | None:
    """Whether a product of matrices reads a whole gathered matrix on its right with its rows as columns, or as it is.

    None for other calls. Of one column, both have the same strides, and other shapes; square ones have other strides.
    """
    if product.target is not aten.mm.default or product.kwargs:
        return None
    right = operand(product, 1)
    if ops.root_of(right) is not whole or ops.root_of(operand(product)) is whole:
        return None
    val, (rows, columns) = right.meta["val"], shape
    forms = {((rows, columns), (columns, 1)): False, ((columns, rows), (1, columns)): True}
    is_same = val.dtype == whole.meta["val"].dtype
    return forms.get((tuple(val.shape), tuple(val.stride()))) if is_same else None


def _can_be_tiled(made: fx.Node, start: fx.Node) -> bool:
    """Whether nothing reads a gradient that can be tiled but, through views, the call by which ranks divide it."""
    node = made
    while node is not start:
        if len(node.users) != 1:
            return False
        (node,) = node.users
    if made.target is aten.embedding_dense_backward.default:
        return made.args[3:] == (-1, False)
    turned, x = operand(made), operand(made, 1)
    if _has_some_columns(x):
        return False
    return turned.target is aten.t.default and operand(turned).meta["val"].is_contiguous()


def _has_some_columns(x: fx.Node) -> bool:
    """Whether a matrix is a slice of another's columns: the verifier cannot tell rows of such products to be parts."""
    while (source := ops.view_of(x)) is not None:
        if x.target is aten.slice.Tensor and (x.args[1] if len(x.args) > 1 else 0) != 0:
            return True
        x = source
    return False


def _keep_facts(node: fx.Node, made: fx.Node) -> None:
    """Let what is made instead of a call be known by the same facts."""
    made.meta = {**node.meta, **made.meta}
