"""Products of matrices whose right side is there one part of its columns at a time.

Memory-centric tiling (Rajbhandari et al., 2021, ZeRO-Infinity, section 5.1.3): what is gathered of a parameter at once
is a tile of it, and each tile gives some columns of a result, or some rows of a gradient. No sum is divided: an element
is added up as in the whole product, as far as the library adds up alike for matrices of other widths.
"""

from __future__ import annotations

import torch

from zgraph.errors import ZgraphError


def columns_of(num_columns: int, num_blocks: int, start: int, width: int) -> list[tuple[int, int]]:
    """Start and length of the columns that a tile gives: ``width`` of them from ``start`` on in each equal block."""
    return [(block * (num_columns // num_blocks) + start, width) for block in range(num_blocks)]


def product_columns_into(
    rest: torch.Tensor | None,
    x: torch.Tensor,
    tile: torch.Tensor,
    num_blocks: int,
    start: int,
    num_columns: int,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """Store ``x @ tile`` in some columns of ``out``, and ``rest`` in the others: ``out`` may be ``rest``.

    Args:
        rest: of shape (rows, num_columns); None leaves the other columns as they are.
        x: of shape (rows, depth).
        tile: of shape (depth, num_blocks * width).
        num_blocks, start, num_columns: see ``columns_of``.
    """
    if rest is not None and rest.data_ptr() != out.data_ptr():
        out.copy_(rest)
    width = tile.shape[1] // num_blocks
    if num_blocks == 1:
        torch.mm(x, tile, out=out[:, start : start + width])
        return out
    blocks = out.view(len(out), num_blocks, num_columns // num_blocks)[:, :, start : start + width]
    blocks.copy_(torch.mm(x, tile).view(len(out), num_blocks, width))
    return out


def product_columns(
    rest: torch.Tensor | None, x: torch.Tensor, tile: torch.Tensor, num_blocks: int, start: int, num_columns: int
) -> torch.Tensor:
    """The same, in new memory."""
    out = x.new_empty(len(x), num_columns)
    return product_columns_into(rest, x, tile, num_blocks, start, num_columns, out=out)


def product_columns_shape(
    rest: torch.Tensor | None, x: torch.Tensor, tile: torch.Tensor, num_blocks: int, start: int, num_columns: int
) -> torch.Tensor:
    """The form of the result.

    Raises:
        ZgraphError: the tile does not fit.
    """
    fits = tile.shape[1] % num_blocks == 0 and num_columns % num_blocks == 0
    fits = fits and 0 <= start <= num_columns // num_blocks - tile.shape[1] // num_blocks
    if not fits or (rest is not None and rest.shape != (len(x), num_columns)):
        raise ZgraphError(f"a tile of {tile.shape[1]} columns in {num_blocks} blocks from {start} on has no place")
    return x.new_empty(len(x), num_columns)


def embedding_rows_backward(
    gradient: torch.Tensor, indices: torch.Tensor, num_weights: int, num_blocks: int, start: int, width: int
) -> torch.Tensor:
    """Some rows of the gradient of a table: ``width`` of them from ``start`` on in each of ``num_blocks`` equal blocks.

    Each row is added up as ``aten::embedding_dense_backward`` does for the whole table. Behind them lies one for all
    other rows.

    Args:
        gradient: of shape (*indices.shape, columns).
        indices: of rows of the table.
        num_weights: how many rows it has.

    Returns:
        Of shape (num_blocks * width, columns).
    """
    each = num_weights // num_blocks
    block, within = indices.div(each, rounding_mode="floor"), indices.remainder(each) - start
    num_rows = num_blocks * width
    mine = torch.where((within >= 0) & (within < width), block * width + within, num_rows)
    rows: torch.Tensor = torch.ops.aten.embedding_dense_backward(gradient, mine, num_rows + 1, num_rows, False)
    return rows[:num_rows]


def embedding_rows_shape(
    gradient: torch.Tensor, indices: torch.Tensor, num_weights: int, num_blocks: int, start: int, width: int
) -> torch.Tensor:
    """The form of the result.

    Raises:
        ZgraphError: there are no such rows.
    """
    if num_weights % num_blocks or not 0 <= start <= num_weights // num_blocks - width:
        raise ZgraphError(f"{width} rows from {start} on in {num_blocks} blocks are no rows of {num_weights}")
    return gradient.new_empty(num_blocks * width + 1, gradient.shape[indices.dim()])[:-1]
