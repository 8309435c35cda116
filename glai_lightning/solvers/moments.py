"""Second moments of features and targets, which hold all that a least-squares solve needs to know of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glai_lightning.checks import UserValueError
from glai_lightning.solvers.processes import Processes

#: Rows whose products are computed at a time.
_ROWS = 512
#: Significant bits of the leading part of a number, and how many products of two such parts have an exact sum.
_LEADING_BITS, _EXACT_ROWS = 20, 2**13
#: The same for sums that are added up over as many processes as there may be.
_SHARED_BITS = 40
#: Largest feature or target, whose products with others can still be summed.
_LARGEST = 1e150


@dataclass(frozen=True)
class Covariances:
    """Means and covariances of features and targets, in float64; around zero, means are zero.

    Args:
        samples: how many samples they are of.
        features_mean: (F,).
        targets_mean: (C,).
        features: covariance of the features, (F, F).
        cross: covariance of features and targets, (F, C).
        targets: variances of the targets, (C,).
        resolution: how exact ``features`` is.
    """

    samples: int
    features_mean: Tensor
    targets_mean: Tensor
    features: Tensor
    cross: Tensor
    targets: Tensor
    resolution: float

    def difference(self) -> "Covariances":
        """Return those of the second one-hot column minus the first: of a single target, -1 or 1."""
        uncentred = self.targets + self.targets_mean.square()
        mean = self.targets_mean[1:] - self.targets_mean[:1]
        # One-hot columns are never 1 together.
        variance = uncentred.sum(0, keepdim=True) - mean.square()
        return replace(self, targets_mean=mean, cross=self.cross[:, 1:] - self.cross[:, :1], targets=variance)

    def half_squared_error(self, weight: Tensor, bias: Tensor | None) -> tuple[float, Tensor]:
        """Return half the mean over samples of the squared errors, summed over outputs, and its gradient.

        Args:
            weight: (C, F), float64.
            bias: (C,), float64, or ``None`` without.

        Returns:
            The half squared error, and its gradient (C, F), or (C, F + 1) with that by the bias last.
        """
        cross = self.cross.t()
        explained = weight @ self.features
        errors = self.targets.sum() - 2.0 * (weight * cross).sum() + (weight * explained).sum()
        gradient = explained - cross
        if bias is not None:
            offset = weight @ self.features_mean + bias - self.targets_mean
            errors = errors + offset.square().sum()
            gradient = torch.cat([gradient + offset.outer(self.features_mean), offset.unsqueeze(1)], dim=1)
        return 0.5 * float(errors.clamp(min=0.0)), gradient


class Moments:
    """Sums over samples of the products of [features, 1] with [features, 1, targets]: F (F + C) numbers.

    Features of up to 32 bits are summed in float64. Sums over float64 features are kept in two parts, ``high`` and
    ``low``, with about 73 significant bits: products of the leading bits of features are exact in float64, and the rest
    is small (the splitting of Ozaki, Ogita, Oishi and Rump 2012, with two parts). So the order and the grouping of the
    samples do not matter to a solve, even where features are ill-conditioned.

    Args:
        num_features: F.
        num_targets: C.
        device: where the sums are held.

    Attributes:
        high: the sums, (F + 1, F + 1 + C); of the first F + 1 columns the upper triangle counts.
        low: what is to be added to ``high``; 0-d where there is nothing.
        squares: the sums of squared targets, in two parts too, (2, C).
    """

    def __init__(self, num_features: int, num_targets: int, device: torch.device | str = "cpu") -> None:
        self.num_features = num_features
        self.high = torch.zeros(num_features + 1, num_features + 1 + num_targets, dtype=torch.float64, device=device)
        self.low = self.high.new_zeros(())
        self.squares = self.high.new_zeros(2, num_targets)

    @property
    def num_targets(self) -> int:
        """C."""
        return self.squares.shape[1]

    @property
    def samples(self) -> int:
        """How many samples were added."""
        return round(float(self.high[-1, self.num_features]))

    @property
    def targets_sum(self) -> Tensor:
        """The sums of the targets, (C,); of one-hot targets the number of samples of each class."""
        return self.high[-1, self.num_features + 1 :]

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add features (n, F), of any floating dtype, and targets (n, C), float64, that ``check_summable`` let pass."""
        if features.dtype == torch.float64:
            for start in range(0, len(features), _EXACT_ROWS):
                rows = slice(start, start + _EXACT_ROWS)
                self._add_in_parts(features[rows], targets[rows].to(features))
            self.high, self.low = _two_sum(self.high, self.low)
        else:
            for columns in self._columns(features, targets):
                self._multiply_into(self.high, columns)
                self.squares[0] += columns[:, self.num_features + 1 :].square().sum(0)

    def _columns(self, features: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Yield rows of [features, 1, targets] in float64, some at a time, all in the same memory."""
        size = self.num_features + 1
        memory = self.high.new_ones(min(len(features), _ROWS), self.high.shape[1])
        for start in range(0, len(features), _ROWS):
            columns = memory[: len(features) - start]
            columns[:, : size - 1] = features[start : start + _ROWS]
            columns[:, size:] = targets[start : start + _ROWS]
            yield columns

    def _multiply_into(self, sums: Tensor, columns: Tensor) -> None:
        """Add the products of columns (n, F + 1 + C), of which what lies below the diagonal is left out."""
        size = self.num_features + 1
        step = max(128, -(-size // 8))
        for start in range(0, size, step):
            block = slice(start, min(start + step, size))
            sums[block, start:].addmm_(columns[:, block].t(), columns[:, start:])

    def _add_in_parts(self, features: Tensor, targets: Tensor) -> None:
        size = self.num_features + 1
        largest = torch.cat([_largest(features), features.new_ones(1), _largest(targets)]).to(self.high)
        large = _pushing_out(torch.frexp(largest)[1] - _LEADING_BITS)
        products = torch.zeros_like(self.high)
        of_rest, of_targets = products.new_zeros(len(largest), size), products.new_zeros(size, self.num_targets)
        leading, rest = products.new_empty(0), products.new_empty(0)
        for columns in self._columns(features, targets):
            leading = torch.add(columns, large, out=leading.resize_(0)).sub_(large)
            rest = torch.sub(columns, leading, out=rest.resize_(0))
            self._multiply_into(products, leading)
            own, others = leading[:, size:], rest[:, size:]
            squares = torch.stack([own.square().sum(0), (others * (2.0 * own + others)).sum(0)])
            self.squares = torch.stack(_joined(self.squares, squares))
            # (a + r)' (a + r) = a'a + m'r + r'm with m = a + r / 2.
            middle = leading.add_(rest, alpha=0.5)
            of_rest.addmm_(middle.t(), rest[:, :size])
            if bool(others.any()):
                of_targets.addmm_(middle[:, :size].t(), others)
        self.high, errors = _two_sum(self.high, products)
        self.low = errors.add_(self.low).add_(of_rest.t())
        self.low[:, :size] += of_rest[:size]
        self.low[:, size:] += of_targets

    def plus(self, other: "Moments", sign: float = 1.0) -> "Moments":
        """Return the sums over the samples of both, or with ``sign=-1`` without those of the other."""
        together = Moments(self.num_features, 0, self.high.device)
        theirs = other.high.to(self.high.device)
        if self.low.ndim or other.low.ndim:
            high, errors = _two_sum(self.high, sign * theirs)
            together.high, together.low = _two_sum(high, errors + self.low + sign * other.low.to(high.device))
        else:
            together.high = self.high + sign * theirs
        together.squares = torch.stack(_joined(self.squares, sign * other.squares.to(self.high.device)))
        return together

    def with_targets(self, count: int, positions: list[int]) -> "Moments":
        """Return the same with ``count`` targets, among which those of now are at ``positions``."""
        size = self.num_features + 1
        places = torch.tensor([*range(size), *(size + position for position in positions)], device=self.high.device)
        wider = Moments(self.num_features, count, self.high.device)
        wider.high[:, places] = self.high
        if self.low.ndim:
            wider.low = torch.zeros_like(wider.high)
            wider.low[:, places] = self.low
        wider.squares[:, places[size:] - size] = self.squares
        return wider

    def emptied_of(self, targets: Tensor) -> "Moments":
        """Return the same with exact zeros for one-hot targets of which no sample is left, by a mask (C,)."""
        moments = self.plus(Moments(self.num_features, self.num_targets, self.high.device))
        gone = torch.cat([targets.new_zeros(self.num_features + 1), targets])
        moments.high[:, gone] = 0.0
        if moments.low.ndim:
            moments.low[:, gone] = 0.0
        moments.squares[:, targets] = 0.0
        return moments

    def sum_over(self, processes: Processes, largest: Tensor, *, in_parts: bool) -> None:
        """Add up what each process was given, in one reduction.

        Args:
            processes: those that share the samples; all call this with equal numbers of features and targets.
            largest: the largest ``scales`` of any process.
            in_parts: whether any process keeps its sums in two parts.
        """
        if not in_parts:
            flat = torch.cat([self.high.flatten(), self.squares.flatten()])
            processes.sum(flat)
            self.high, self.squares = (
                part.clone() for part in torch.split(flat, [self.high.numel(), self.squares.numel()])
            )
        else:
            exponents = torch.frexp(largest)[1]
            grid = exponents[: len(self.high)].unsqueeze(1) + exponents - _SHARED_BITS
            # Leading bits on a common grid, whose sums are exact.
            leading = _rounded(self.high, grid)
            flat = torch.cat([leading.flatten(), (self.high - leading + self.low).flatten(), self.squares.flatten()])
            processes.sum(flat)
            high, low, self.squares = torch.split(flat, [self.high.numel(), self.high.numel(), self.squares.numel()])
            self.high, self.low = (part.reshape(self.high.shape) for part in _two_sum(high, low))
        self.high = self.high.reshape(self.num_features + 1, -1)
        self.squares = self.squares.reshape(2, -1)

    def scales(self) -> Tensor:
        """Return the root of the sum of squares of each column, (F + 1 + C,): no product of columns is larger."""
        return torch.cat([self.high.diagonal(), self.squares[0]]).clamp(min=0.0).sqrt()

    def covariances(self, *, centred: bool = True) -> Covariances:
        """Return means and covariances, or second moments around zero."""
        size, n = self.num_features + 1, float(self.samples)
        kept = [*range(self.num_features), *range(size, self.high.shape[1])]
        sums = self._sums()
        moments = self.high.new_empty(self.num_features, len(kept))
        for start in range(0, self.num_features, _ROWS // 4):
            rows = slice(start, min(start + _ROWS // 4, self.num_features))
            high, low = self.high[rows, kept], self.low[rows, kept] if self.low.ndim else self.low
            if centred:
                left = tuple(part[rows].unsqueeze(1) for part in sums)
                moments[rows] = _centred((high, low), left, tuple(part[kept] for part in sums), n)
            else:
                moments[rows] = (high + low) / n
        features, cross = torch.split(moments, [self.num_features, self.num_targets], dim=1)
        means = torch.split((sums[0] + sums[1])[kept], [self.num_features, self.num_targets])
        of_targets = tuple(part[size:] for part in sums)
        squares = self.squares[0], self.squares[1]
        variances = _centred(squares, of_targets, of_targets, n) if centred else self.squares.sum(0) / n
        return Covariances(
            samples=self.samples,
            features_mean=means[0] / n * centred,
            targets_mean=means[1] / n * centred,
            features=features.triu() + features.triu(1).t(),
            cross=cross.clone(),
            targets=variances,
            resolution=float(self.high.diagonal()[:-1].max()) / n * (2.0**-68 if self.low.ndim else 2.0**-50),
        )

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Return the sums of all columns, (F + 1 + C,), in two parts."""
        ones = self.num_features
        high = torch.cat([self.high[:ones, ones], self.high[ones, ones:]])
        if not self.low.ndim:
            return high, torch.zeros_like(high)
        return high, torch.cat([self.low[:ones, ones], self.low[ones, ones:]])


def check_summable(name: str, values: Tensor, first_row: int = 0) -> None:
    """Check that numbers (n, K), the first of them of a row that messages count from, can be multiplied and summed.

    Raises:
        ValueError: if one is not finite, or too large to be squared.
    """
    most = min(_LARGEST, torch.finfo(values.dtype).max)
    if len(values) and not bool((_largest(values) <= most).all()):
        row = int((values.abs() <= most).all(1).logical_not().nonzero()[0])
        raise UserValueError(
            f"Expected {name} to be finite, and their squares too, but got {_worst(values[row])} in row "
            f"{first_row + row} (counted from 0)."
        )


def _largest(columns: Tensor) -> Tensor:
    """Return the largest absolute value of each column, NaN where there is one."""
    return torch.maximum(columns.amax(0), columns.amin(0).neg())


def _worst(row: Tensor) -> str:
    """Name the number that cannot be summed."""
    if bool(row.isnan().any()):
        return "NaN"
    return "infinity" if bool(row.isinf().any()) else f"{float(row[row.abs().argmax()]):g}"


def _rounded(values: Tensor, exponents: Tensor) -> Tensor:
    """Round numbers to multiples of two to some powers."""
    large = _pushing_out(exponents)
    return (values + large) - large


def _pushing_out(exponents: Tensor) -> Tensor:
    """Return the large numbers that push out the digits of smaller ones below two to some powers."""
    return torch.ldexp(torch.full_like(exponents, 3, dtype=torch.float64), exponents + 51)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rounded sum and its rounding error (Knuth)."""
    total = a + b
    of_b = total - a
    error = (total - of_b).neg_().add_(a)
    return total, error.add_(torch.sub(b, of_b, out=of_b))


def _two_product(a: Tensor, b: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the rounded product and its rounding error (Dekker)."""
    b = torch.as_tensor(b, dtype=a.dtype, device=a.device)
    product = a * b
    (a_high, a_low), (b_high, b_low) = (tuple(_halves(value)) for value in (a, b))
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(value: Tensor) -> Iterator[Tensor]:
    large = 134217729.0 * value
    high = large - (large - value)
    yield from (high, value - high)


def _joined(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Add numbers in two parts, (2, ...) each."""
    high, error = _two_sum(a[0], b[0])
    return _two_sum(high, error + a[1] + b[1])


def _centred(products: tuple[Tensor, Tensor], left: tuple[Tensor, ...], right: tuple[Tensor, ...], n: float) -> Tensor:
    """Return (n p - s t) / n^2 for sums of products p, and sums s and t, all in two parts, rounded once."""
    scaled, error = _two_product(products[0], n)
    subtracted, of_sums = _two_product(left[0], right[0])
    difference, last = _two_sum(scaled, -subtracted)
    small = error + products[1] * n - of_sums - left[0] * right[1] - left[1] * right[0]
    return (difference + (last + small)) / n**2
