"""Units, through pint. Loaded when the first unit shows up, never before.

pint costs about 0.4 s and 30 MiB on a desktop; a mesh that is asked for sums only never pays. It is
used for the definitions: each unit's exact factor to base units and its dimension. The arithmetic
itself stays with our own bounded exact numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, Final, cast

from meshd_plugins.expressions import ExpressionError, Unit, UnitAtom

_KELVIN: Final[Mapping[str, tuple[Fraction, Fraction]]] = {
    # name: (factor, offset) so that kelvin = value * factor + offset; exact by definition
    "kelvin": (Fraction(1), Fraction(0)),
    "degC": (Fraction(1), Fraction(27315, 100)),
    "degF": (Fraction(5, 9), Fraction(45967, 180)),
}

Dimension = tuple[tuple[str, Fraction], ...]
"""Base dimensions and their powers, sorted; () is a plain number."""

POWER_MAX: Final = 16
"""Largest power of a unit in a result."""


@dataclass(frozen=True, slots=True)
class Definition:
    """One unit in base units."""

    factor: Fraction
    dimension: Dimension


@cache
def _registry() -> Any:
    import pint  # here and not above: half a second and 30 MiB, only when a unit shows up

    make: Any = pint.UnitRegistry  # its annotation says float only; Fraction is documented
    return make(non_int_type=Fraction)


@cache
def definition(name: str) -> Definition:
    """Look up a unit of `meshd_plugins.expressions.unit_words`. Raises ExpressionError(bad_units)."""
    registry = _registry()
    try:
        base = registry.Quantity(Fraction(1), name).to_base_units()
    except Exception as error:
        raise ExpressionError(f"the unit {name!r} is not known", code="bad_units") from error
    powers = cast("Mapping[str, Any]", base.dimensionality)
    dimension = tuple(sorted((key, Fraction(value)) for key, value in powers.items()))
    return Definition(Fraction(base.magnitude), dimension)


def dimension_of(unit: Unit) -> Dimension:
    """The dimension of a product of units."""
    powers: dict[str, Fraction] = {}
    for atom in unit.atoms:
        for key, power in definition(atom.name).dimension:
            powers[key] = powers.get(key, Fraction(0)) + power * atom.power
    return tuple(sorted((key, power) for key, power in powers.items() if power))


def factor_of(unit: Unit) -> Fraction:
    """How many base units one of it is, exactly."""
    factor = Fraction(1)
    for atom in unit.atoms:
        factor *= definition(atom.name).factor ** atom.power
    return factor


def is_temperature(unit: Unit | None) -> bool:
    """Whether it is a scale with a zero point of its own (°C, °F)."""
    return unit is not None and any(atom.name in ("degC", "degF") for atom in unit.atoms)


def temperature_scale(unit: Unit) -> tuple[Fraction, Fraction]:
    """Factor and offset to kelvin of a lone °C, °F or K. Raises ExpressionError(bad_units)."""
    if len(unit.atoms) == 1 and unit.atoms[0].power == 1:
        scale = _KELVIN.get(unit.atoms[0].name)
        if scale is not None:
            return scale
    raise ExpressionError(f"{unit.shown} is no temperature", code="bad_units")


def refuse_temperature(unit: Unit | None) -> None:
    """Refuse to compute with degrees on a scale: 20 °C + 5 °C has no one meaning."""
    if unit is not None and is_temperature(unit):
        raise ExpressionError(
            f"temperatures in {unit.shown} can only be converted: use K for differences",
            code="bad_units",
        )


def multiply(left: Unit | None, right: Unit | None, sign: int) -> tuple[Unit | None, Fraction]:
    """Multiply (sign 1) or divide (-1) units; equal dimensions merge into the left one's unit.

    Returns the unit (None: a plain number) and the factor by which the product is to be multiplied.
    """
    atoms = list(left.atoms) if left else []
    factor = Fraction(1)
    for atom in right.atoms if right else ():
        power = atom.power * sign
        for index, present in enumerate(atoms):
            if definition(present.name).dimension == definition(atom.name).dimension:
                ratio = definition(atom.name).factor / definition(present.name).factor
                factor *= ratio**power
                atoms[index] = UnitAtom(present.name, present.shown, present.power + power)
                break
        else:
            atoms.append(UnitAtom(atom.name, atom.shown, power))
    kept = tuple(atom for atom in atoms if atom.power)
    if any(abs(atom.power) > POWER_MAX for atom in kept):
        raise ExpressionError(f"a unit's power is beyond {POWER_MAX}", code="too_large")
    return (Unit(kept) if kept else None), factor
