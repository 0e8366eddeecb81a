"""The codes of weights while GPTQ chooses them, column by column.

Matrices are kept transposed, (batch, in, out) in the order of the feedback, so that a column of a
weight is contiguous.  A column takes a few short operations on vectors, for all weights of a batch
at once; what columns owe to those before them is added in products, for half of all columns, half
of a half, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slim_core.dtypes import TableType
from slim_core.tables import decode_table, encode_table
from slim_ptq.methods.feedback import Feedback
from slim_ptq.methods.grid import Fit, Grid, WeightGrid, fit_sets, round_places

INNER = 16  # columns that are too few for a product
_COMPARED = 512  # columns between two looks at which rows are still undecided


class ColumnRounding:
    """Weights of one shape, their grids, and codes with their errors.

    Parameters
    ----------
    weights : sequence of torch.Tensor
        Each float32, shape (out, in).
    grids : sequence of WeightGrid
        From which codes are chosen, of each weight; of one scheme.
    feedback : Feedback
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], grids: Sequence[WeightGrid], feedback: Feedback
    ) -> None:
        self.feedback = feedback
        self.scheme = grids[0].scheme
        # (batch, groups, out), out being 1 where all rows share a scale.
        self.scale = torch.stack([grid.scale.T for grid in grids])
        self.offset = torch.stack([grid.offset.T for grid in grids])
        units = [grid.unit for grid in grids if grid.unit is not None]
        self._unit = torch.stack(units) if units else None
        order = feedback.order
        out, width = weights[0].shape
        self.target = weights[0].new_empty(len(weights), width, out)
        for target, weight in zip(self.target, weights, strict=True):
            target.copy_(weight.T)  # faster than the transposes of a batch
        if not bool((order[:, 1:] > order[:, :-1]).all()):
            self.target = take(self.target, order)
        # Of columns whose codes are not chosen yet: the values to round.
        self.error = self.target.clone()
        self.codes = torch.empty_like(self.target, dtype=torch.int8)
        self._loss = self.target.new_zeros(len(weights), len(weights[0]))
        self.groups = order // (order.shape[1] // self.scale.shape[1])
        # Asked for column by column, if the weights have the same.
        alike = bool((self.groups == self.groups[0]).all())
        self._group_list: list[int] | None = self.groups[0].tolist() if alike else None

    def grids(self) -> list[WeightGrid]:
        """Return the grids as they are now."""
        units = [None] * len(self.scale) if self._unit is None else self._unit
        return [
            WeightGrid(self.scheme, scale.T.contiguous(), offset.T.contiguous(), unit)
            for scale, offset, unit in zip(self.scale, self.offset, units, strict=True)
        ]

    def natural_codes(self) -> torch.Tensor:
        """Return the codes, int8, shape (batch, out, in)."""
        codes = torch.empty_like(self.codes)
        put(codes, self.feedback.order, self.codes)
        return codes.mT

    def group_grid(self, group: int) -> Grid:
        """Return scale and offset of all rows in one group, shape (batch, out)."""
        unit = None if self._unit is None else self._unit[..., 0]
        return Grid(self.scheme, self.scale[:, group], self.offset[:, group], unit)

    def forward(self, fit: Fit | None = None) -> None:
        """Choose all codes, on the grid as it is.

        Parameters
        ----------
        fit : Fit, optional
            Chooses the grid of each group when its turn comes, in the place of the one that is
            there.  Groups must lie in the order of the feedback.
        """
        self._choose(0, self.target.shape[1], fit)

    def keep_nearest(self) -> None:
        """Take back the rows whose error plain rounding makes smaller.

        Losses of columns add up, so rows are decided as soon as plain rounding has lost more.
        """
        upper, weights = self.feedback.upper, self.feedback.diagonal
        batch, columns, count = self.target.shape
        rows = torch.arange(count, device=self.target.device).expand(batch, -1)
        error, loss = torch.empty_like(self.error), torch.zeros_like(self._loss)
        for start in range(0, columns, _COMPARED):
            stop = min(start + _COMPARED, columns)
            part = slice(start, stop)
            error[:, part] = self._nearest(part, rows)[1]
            own = (upper[:, :stop, part].mT @ error[:, :stop]).square_()
            loss += (weights[:, None, part] @ own)[:, 0]
            undecided = loss < self._loss.gather(1, rows)
            most = int(undecided.sum(dim=1).max())
            if not most:
                return
            if 2 * most <= rows.shape[1]:
                # As many of each weight, so some that are decided are carried along.
                kept = undecided.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
                rows, loss, undecided = (item.gather(1, kept) for item in (rows, loss, undecided))
                seen = error[:, :stop]
                error = error.new_empty(batch, columns, most)
                error[:, :stop] = seen.gather(2, kept[:, None].expand(-1, stop, -1))
        codes = self._nearest(slice(None), rows)[0]
        for index, better in enumerate(undecided):
            own = rows[index, better]
            self.error[index][:, own] = error[index][:, better]
            self.codes[index][:, own] = codes[index][:, better]

    def levels(self, places: torch.Tensor | None, group: int) -> torch.Tensor:
        """Return the levels, values in steps, of the codes of some columns in one group."""
        codes = self.codes if places is None else take(self.codes, places)
        if isinstance(self.scheme.dtype, TableType):
            levels: torch.Tensor = decode_table(codes, self.scheme.dtype)
            return levels
        floats = codes.float()
        return floats if self.scheme.symmetric else floats.sub_(self.offset[:, group, None])

    def round_levels(self, places: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Round values in steps to levels, in place."""
        dtype = self.scheme.dtype
        if isinstance(dtype, TableType):
            return places.copy_(decode_table(encode_table(places, dtype), dtype))
        round_places(places, offset, self.scheme)
        return places if self.scheme.symmetric else places.sub_(offset)

    def codes_of(self, levels: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Return the codes of levels, int8."""
        dtype = self.scheme.dtype
        if isinstance(dtype, TableType):
            codes: torch.Tensor = encode_table(levels, dtype)
            return codes
        return (levels if self.scheme.symmetric else levels + offset).to(torch.int8)

    def _nearest(self, part: slice, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and errors of plain rounding, (batch, columns, rows)."""

        def of_rows(item: torch.Tensor) -> torch.Tensor:
            if rows.shape[1] == self.target.shape[2] or item.shape[2] == 1:
                return item
            return item.gather(2, rows[:, None].expand(-1, item.shape[1], -1))

        target = of_rows(self.target[:, part])
        scale = of_rows(self._of_columns(self.scale, part))
        offset = of_rows(self._of_columns(self.offset, part))
        levels = self.round_levels(target / scale, offset)
        return self.codes_of(levels, offset), torch.addcmul(target, levels, scale, value=-1)

    def _of_columns(self, parameter: torch.Tensor, part: slice) -> torch.Tensor:
        """Return scale or offset of columns, one for all if they share it."""
        return parameter if parameter.shape[1] == 1 else take(parameter, self.groups[:, part])

    def _by_column(self, parameter: torch.Tensor, part: slice) -> Sequence[torch.Tensor]:
        """Return scale or offset of each column, shape (batch, out)."""
        if self._group_list is None:
            return self._of_columns(parameter, part).unbind(1)
        groups = parameter.unbind(1)
        return [groups[group] for group in self._group_list[part]]

    def _choose(self, start: int, stop: int, fit: Fit | None) -> None:
        """Choose the codes of columns, whose values hold what they owe to those before them.

        The second half owes to the first one, so products are as large as they can be.
        """
        size = self.target.shape[1] // self.scale.shape[1]
        if fit is not None and stop - start == size:
            self._choose_grid(slice(start, stop), fit)
            fit = None
        if fit is None and stop - start <= INNER:
            self._choose_few(slice(start, stop))
            return
        middle = half_way(start, stop, INNER if fit is None else size)
        self._choose(start, middle, fit)
        owed = self.feedback.upper[:, start:middle, middle:stop].mT
        self.error[:, middle:stop].baddbmm_(owed, self.error[:, start:middle])
        self._choose(middle, stop, fit)

    def _choose_grid(self, part: slice, fit: Fit) -> None:
        """Choose the grid of the group of some columns for what is left to reach.

        That is the optimum of these columns and those to come, given the errors so far.
        """
        target, own = self.target[:, part], self.feedback.upper[:, part, part].mT
        one = torch.eye(own.shape[1], device=own.device, dtype=own.dtype).expand_as(own)
        # One product with the inverse of a small triangle is faster than to solve for all rows.
        apart = torch.linalg.solve_triangular(own, one, upper=False, unitriangular=True)
        moments = self.feedback.hessian.diagonal(dim1=1, dim2=2)[:, part]
        units = [None] * len(target) if self._unit is None else self._unit
        found = []
        for index, unit in enumerate(units):  # one at a time, which caches like better
            left = self.error[index, part] - target[index]
            sets = torch.addmm(target[index], apart[index], left).T.contiguous()
            importance = moments[index].expand_as(sets)[:, None]
            found.append(fit_sets(sets[:, None], self.scheme, fit, importance, unit))
        group = self.groups[:, part.start : part.start + 1]
        scales, offsets = zip(*found, strict=True)
        put(self.scale, group, torch.stack(scales).mT)
        put(self.offset, group, torch.stack(offsets).mT)

    def _choose_few(self, part: slice) -> None:
        """Choose the codes of a few columns, one after the other; errors replace their values."""
        target, values = self.target[:, part], self.error[:, part]
        owed = self.feedback.upper[:, part, part, None].contiguous()
        errors, places = torch.empty_like(values), torch.empty_like(values)
        columns: list[Sequence[torch.Tensor]]
        columns = [item.unbind(1) for item in (values, target, owed, places, errors)]
        columns += [self._by_column(item, part) for item in (self.scale, self.offset)]
        for column, own in enumerate(zip(*columns, strict=True), start=1):
            value, wanted, shares, place, error, scale, offset = own
            torch.div(value, scale, out=place)
            self.round_levels(place, offset)
            torch.addcmul(wanted, place, scale, value=-1, out=error)
            if column < len(columns[0]):
                values[:, column:].addcmul_(shares[:, column:], error[:, None])
        self.codes[:, part] = self.codes_of(places, self._of_columns(self.offset, part))
        # The value that was rounded, less what it became.
        lost = values.sub_(target).add_(errors).square_()
        self._loss += (self.feedback.diagonal[:, None, part] @ lost)[:, 0]
        values.copy_(errors)


def half_way(start: int, stop: int, unit: int) -> int:
    """Return the middle of columns, a whole number of units of them from the start."""
    units = -(-(stop - start) // unit)
    return start + unit * -(-units // 2)


def take(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return rows of contiguous matrices, (batch, rows, columns), at places (batch, count)."""
    columns = tensor.shape[2]
    found = tensor.view(-1, columns).index_select(0, _flat(tensor, places))
    return found.view(*places.shape, columns)


def put(tensor: torch.Tensor, places: torch.Tensor, rows: torch.Tensor) -> None:
    """Write what :func:`take` returns."""
    flat = tensor.view(-1, tensor.shape[2])
    flat.index_copy_(0, _flat(tensor, places), rows.flatten(0, 1))


def _flat(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the places in the rows of all matrices."""
    batch, rows = tensor.shape[:2]
    first = torch.arange(0, batch * rows, rows, device=places.device)
    return (places + first[:, None]).flatten()
