"""The codes of one weight while GPTQ chooses them, column by column.

Matrices are kept transposed, (in, out) in the order of the feedback, so that a column of the weight
is contiguous.  A column takes a few short operations on vectors; what columns owe to those before
them is added in products, for half of all columns, half of a half, and so on.
"""

from __future__ import annotations

import torch

from slim_core.dtypes import TableType
from slim_core.tables import decode_table, encode_table
from slim_ptq.methods.feedback import Feedback
from slim_ptq.methods.grid import Fit, Grid, WeightGrid, minmax_grid, round_places

INNER = 16  # columns that are too few for a product
_COMPARED = 512  # columns between two looks at which rows are still undecided


class ColumnRounding:
    """A weight, its grid, and codes with their errors.

    Parameters
    ----------
    weight : torch.Tensor
        float32, shape (out, in).
    grid : WeightGrid
        From which codes are chosen.
    feedback : Feedback
    """

    def __init__(self, weight: torch.Tensor, grid: WeightGrid, feedback: Feedback) -> None:
        self.feedback = feedback
        self.scheme = grid.scheme
        self.scale, self.offset = grid.scale.T.contiguous(), grid.offset.T.contiguous()
        self._unit = grid.unit
        order = feedback.order
        self.target = weight.T.contiguous()
        if not bool((order[1:] > order[:-1]).all()):
            self.target = self.target[order]
        # Of columns whose codes are not chosen yet: the values to round.
        self.error = self.target.clone()
        self.codes = torch.empty_like(self.target, dtype=torch.int8)
        self._loss = weight.new_zeros(weight.shape[0])
        self.groups = order // (len(order) // len(self.scale))
        self._group_list: list[int] = self.groups.tolist()  # asked for column by column

    def grid(self) -> WeightGrid:
        """Return the grid as it is now."""
        scale, offset = self.scale.T.contiguous(), self.offset.T.contiguous()
        return WeightGrid(self.scheme, scale, offset, self._unit)

    def natural_codes(self) -> torch.Tensor:
        """Return the codes, int8, shape (out, in)."""
        codes = torch.empty_like(self.codes)
        codes[self.feedback.order] = self.codes
        return codes.T

    def group_grid(self, group: int) -> Grid:
        """Return scale and offset of all rows in one group, shape (out,)."""
        unit = None if self._unit is None else self._unit[:, 0]
        return Grid(self.scheme, self.scale[group], self.offset[group], unit)

    def forward(self, fit: Fit | None = None) -> None:
        """Choose all codes, on the grid as it is.

        Parameters
        ----------
        fit : Fit, optional
            Chooses the grid of each group when its turn comes, in the place of the one that is
            there.  Groups must lie in the order of the feedback.
        """
        self._choose(0, len(self.target), fit)

    def keep_nearest(self) -> None:
        """Take back the rows whose error plain rounding makes smaller.

        Losses of columns add up, so rows are decided as soon as plain rounding has lost more.
        """
        upper, weights = self.feedback.upper, self.feedback.diagonal
        rows = torch.arange(self.target.shape[1], device=self.target.device)
        error, loss = torch.empty_like(self.error), torch.zeros_like(self._loss)
        for start in range(0, len(self.target), _COMPARED):
            stop = min(start + _COMPARED, len(self.target))
            part = slice(start, stop)
            error[part] = self._nearest(part, rows)[1]
            loss += weights[part] @ (upper[:stop, part].T @ error[:stop]).square_()
            undecided = loss < self._loss[rows]
            count = int(undecided.sum())
            if not count:
                return
            if 2 * count <= len(rows) or stop == len(self.target):
                rows, loss, seen = rows[undecided], loss[undecided], error[:stop, undecided]
                error = error.new_empty(len(error), count)
                error[:stop] = seen
        self.error[:, rows] = error
        self.codes[:, rows] = self._nearest(slice(None), rows)[0]

    def levels(self, part: slice | torch.Tensor, group: int) -> torch.Tensor:
        """Return the levels, values in steps, of the codes of some columns in one group."""
        codes = self.codes[part]
        if isinstance(self.scheme.dtype, TableType):
            levels: torch.Tensor = decode_table(codes, self.scheme.dtype)
            return levels
        floats = codes.float()
        return floats if self.scheme.symmetric else floats.sub_(self.offset[group])

    def round_levels(self, places: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Round values in steps to levels, in place."""
        dtype = self.scheme.dtype
        if isinstance(dtype, TableType):
            return places.copy_(decode_table(encode_table(places, dtype), dtype))
        round_places(places, offset, self.scheme)
        return places if self.scheme.symmetric else places.sub_(offset)

    def _nearest(self, part: slice, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and errors of plain rounding, (columns, rows)."""
        every = len(rows) == self.target.shape[1]
        target = self.target[part] if every else self.target[part][:, rows]
        scale, offset = (
            item if every or item.shape[1] == 1 else item[:, rows]
            for item in (self._of_columns(self.scale, part), self._of_columns(self.offset, part))
        )
        levels = self.round_levels(target / scale, offset)
        return self.codes_of(levels, offset), torch.addcmul(target, levels, scale, value=-1)

    def _of_columns(self, parameter: torch.Tensor, part: slice) -> torch.Tensor:
        """Return scale or offset of columns, one row if they share it."""
        return parameter if len(parameter) == 1 else parameter[self.groups[part]]

    def codes_of(self, levels: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Return the codes of levels, int8."""
        dtype = self.scheme.dtype
        if isinstance(dtype, TableType):
            codes: torch.Tensor = encode_table(levels, dtype)
            return codes
        return (levels if self.scheme.symmetric else levels + offset).to(torch.int8)

    def _choose(self, start: int, stop: int, fit: Fit | None) -> None:
        """Choose the codes of columns, whose values hold what they owe to those before them.

        The second half owes to the first one, so products are as large as they can be.
        """
        size = len(self.target) // len(self.scale)
        if fit is not None and stop - start == size:
            self._choose_grid(slice(start, stop), fit)
            fit = None
        if fit is None and stop - start <= INNER:
            self._choose_few(slice(start, stop))
            return
        middle = half_way(start, stop, INNER if fit is None else size)
        self._choose(start, middle, fit)
        owed = self.feedback.upper[start:middle, middle:stop].T
        self.error[middle:stop].addmm_(owed, self.error[start:middle])
        self._choose(middle, stop, fit)

    def _choose_grid(self, part: slice, fit: Fit) -> None:
        """Choose the grid of the group of some columns for what is left to reach.

        That is the optimum of these columns and those to come, given the errors so far.
        """
        target, own = self.target[part], self.feedback.upper[part, part].T
        one = torch.eye(len(own), device=own.device, dtype=own.dtype)
        # One product with the inverse of a small triangle is faster than to solve for all rows.
        apart = torch.linalg.solve_triangular(own, one, upper=False, unitriangular=True)
        sets = torch.addmm(target, apart, self.error[part] - target).T.contiguous()
        moments = self.feedback.hessian.diagonal()[part].expand_as(sets)
        grid = fit(sets, minmax_grid(sets, self.scheme, self._unit), moments)
        group = self._group_list[part.start]
        self.scale[group] = grid.scale[:, 0]
        self.offset[group] = grid.offset[:, 0]

    def _choose_few(self, part: slice) -> None:
        """Choose the codes of a few columns, one after the other; errors replace their values."""
        target, values = self.target[part], self.error[part]
        within = self.feedback.upper[part, part].T.contiguous()
        errors, places = torch.empty_like(values), torch.empty_like(values)
        value_rows, target_rows = values.unbind(), target.unbind()
        error_rows, place_rows = errors.unbind(), places.unbind()
        for row, group in enumerate(self._group_list[part]):
            if row:
                value_rows[row].addmv_(errors[:row].T, within[row, :row])
            scale, place = self.scale[group], place_rows[row]
            torch.div(value_rows[row], scale, out=place)
            self.round_levels(place, self.offset[group])
            torch.addcmul(target_rows[row], place, scale, value=-1, out=error_rows[row])
        self.codes[part] = self.codes_of(places, self._of_columns(self.offset, part))
        # The value that was rounded, less what it became.
        self._loss += self.feedback.diagonal[part] @ values.sub_(target).add_(errors).square_()
        values.copy_(errors)


def half_way(start: int, stop: int, unit: int) -> int:
    """Return the middle of columns, a whole number of units of them from the start."""
    units = -(-(stop - start) // unit)
    return start + unit * -(-units // 2)
