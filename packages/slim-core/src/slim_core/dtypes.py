"""Value types of quantized tensors, and the names of floating-point storage types."""

from __future__ import annotations

from dataclasses import dataclass, field

from slim_core.validate import check_choice, check_int

FLOAT_NAMES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class IntType:
    """A signed two's complement integer type of 2 to 8 bits, stored in int8."""

    bits: int

    def __post_init__(self) -> None:
        check_int("bits", self.bits, low=2, high=8)

    @property
    def min(self) -> int:
        """Smallest value, ``-2**(bits-1)``."""
        return -(1 << (self.bits - 1))

    @property
    def max(self) -> int:
        """Largest value, ``2**(bits-1) - 1``."""
        return (1 << (self.bits - 1)) - 1

    def __str__(self) -> str:
        return f"int{self.bits}"


@dataclass(frozen=True, slots=True)
class TableType:
    """A type whose codes are places in a table of values.

    Parameters
    ----------
    name : str
    bits : int
    levels : tuple of float
        Ascending.  With a sign bit the values from 0 on, by the code without its highest bit,
        which is the sign; else all values by their code.
    sign_bit : bool
    mantissa_bits, bias : int
        Of types with a sign bit, which are floating-point types: the bits of the mantissa, and
        what is added to exponents.
    """

    name: str
    bits: int
    levels: tuple[float, ...] = field(repr=False, compare=False)
    sign_bit: bool = True
    mantissa_bits: int = 0
    bias: int = 0

    @property
    def max(self) -> float:
        """Largest value."""
        return self.levels[-1]

    def __str__(self) -> str:
        return self.name


CodeType = IntType | TableType

INT8 = IntType(8)
INT4 = IntType(4)


def float_name(dtype: object) -> str:
    """Return ``float32``, ``float16`` or ``bfloat16`` for a numpy, torch or config dtype.

    >>> float_name("torch.bfloat16")
    'bfloat16'
    """
    return check_choice("dtype", str(dtype).removeprefix("torch."), FLOAT_NAMES)
