"""The words and symbols that are read as units, and the units library's name of each.

A table of our own, so that reading a text needs no units library and so that words such as "in", "a"
or "may" are never units by accident. Symbols keep their case (mW is not MW); words do not.
Months and years are left out on purpose: neither has one exact length.
"""

from __future__ import annotations

from typing import Final

_SYMBOLS: Final[dict[str, str]] = {
    "nm": "nanometer", "um": "micrometer", "µm": "micrometer", "μm": "micrometer", "mm": "millimeter", "cm": "centimeter", "dm": "decimeter",
    "m": "meter", "km": "kilometer", "ft": "foot", "yd": "yard", "mi": "mile", "nmi": "nautical_mile",
    "µg": "microgram", "mg": "milligram", "g": "gram", "kg": "kilogram", "lb": "pound", "lbs": "pound", "oz": "ounce",
    "ns": "nanosecond", "us": "microsecond", "µs": "microsecond", "ms": "millisecond", "s": "second", "sec": "second", "secs": "second",
    "min": "minute", "mins": "minute", "h": "hour", "hr": "hour", "hrs": "hour",
    "C": "degC", "°C": "degC", "F": "degF", "°F": "degF", "K": "kelvin",
    "bit": "bit", "kbit": "kilobit", "Mbit": "megabit", "Gbit": "gigabit", "B": "byte", "kB": "kilobyte", "KB": "kilobyte",
    "MB": "megabyte", "GB": "gigabyte", "TB": "terabyte", "KiB": "kibibyte", "MiB": "mebibyte", "GiB": "gibibyte", "TiB": "tebibyte",
    "ml": "milliliter", "mL": "milliliter", "cl": "centiliter", "dl": "deciliter", "l": "liter", "L": "liter", "gal": "gallon",
    "mph": "mile_per_hour", "kph": "kilometer_per_hour", "kmh": "kilometer_per_hour", "kn": "knot",
    "J": "joule", "kJ": "kilojoule", "MJ": "megajoule", "cal": "calorie", "kcal": "kilocalorie", "Wh": "watt_hour", "kWh": "kilowatt_hour", "MWh": "megawatt_hour",
    "mW": "milliwatt", "W": "watt", "kW": "kilowatt", "MW": "megawatt", "hp": "horsepower", "V": "volt", "mV": "millivolt", "kV": "kilovolt",
    "A": "ampere", "mA": "milliampere", "Ah": "ampere_hour", "mAh": "milliampere_hour", "Ω": "ohm",
    "Hz": "hertz", "kHz": "kilohertz", "MHz": "megahertz", "GHz": "gigahertz",
    "N": "newton", "kN": "kilonewton", "Pa": "pascal", "hPa": "hectopascal", "kPa": "kilopascal", "MPa": "megapascal", "bar": "bar", "mbar": "millibar", "psi": "psi", "atm": "atmosphere",
    "ha": "hectare",
}  # fmt: skip

_WORDS: Final[dict[str, str]] = {
    "nanometre": "nanometer", "micrometre": "micrometer", "millimetre": "millimeter", "centimetre": "centimeter", "metre": "meter", "kilometre": "kilometer",
    "nanometer": "nanometer", "micrometer": "micrometer", "millimeter": "millimeter", "centimeter": "centimeter", "meter": "meter", "kilometer": "kilometer",
    "yard": "yard", "mile": "mile", "microgram": "microgram", "milligram": "milligram", "gram": "gram", "kilogram": "kilogram", "kilo": "kilogram",
    "tonne": "metric_ton", "pound": "pound", "ounce": "ounce",
    "nanosecond": "nanosecond", "microsecond": "microsecond", "millisecond": "millisecond", "second": "second", "minute": "minute", "hour": "hour", "day": "day", "week": "week",
    "kelvin": "kelvin", "bit": "bit", "byte": "byte", "kilobit": "kilobit", "megabit": "megabit", "gigabit": "gigabit",
    "kilobyte": "kilobyte", "megabyte": "megabyte", "gigabyte": "gigabyte", "terabyte": "terabyte", "kibibyte": "kibibyte", "mebibyte": "mebibyte", "gibibyte": "gibibyte", "tebibyte": "tebibyte",
    "millilitre": "milliliter", "centilitre": "centiliter", "litre": "liter", "milliliter": "milliliter", "centiliter": "centiliter", "liter": "liter",
    "gallon": "gallon", "quart": "quart", "pint": "pint", "cup": "cup", "tablespoon": "tablespoon", "teaspoon": "teaspoon",
    "knot": "knot", "joule": "joule", "kilojoule": "kilojoule", "megajoule": "megajoule", "calorie": "calorie", "kilocalorie": "kilocalorie",
    "watt": "watt", "kilowatt": "kilowatt", "megawatt": "megawatt", "volt": "volt", "ampere": "ampere", "amp": "ampere", "ohm": "ohm", "newton": "newton", "pascal": "pascal",
    "acre": "acre", "hectare": "hectare",
}  # fmt: skip

_IRREGULAR: Final[dict[str, str]] = {
    "inch": "inch", "inches": "inch", "foot": "foot", "feet": "foot", "celsius": "degC", "centigrade": "degC", "fahrenheit": "degF",
    "hertz": "hertz", "horsepower": "horsepower",
}  # fmt: skip

_BY_WORD: Final[dict[str, str]] = (
    _WORDS | {f"{word}s": name for word, name in _WORDS.items()} | _IRREGULAR
)

_LOOSE_CASE: Final[frozenset[str]] = frozenset({"km", "cm", "mm", "kg", "ft", "lb", "lbs", "mph"})
"""Symbols that are often shouted and mean one thing in any case."""


def unit_named(word: str) -> str | None:
    """The units library's name for a word, or None when it is no unit here.

    "in" is not answered here: whether it is the inch depends on its place.
    """
    if word in _SYMBOLS:
        return _SYMBOLS[word]
    lowered = word.lower()
    if lowered in _LOOSE_CASE:
        return _SYMBOLS[lowered]
    # A one-letter word in the wrong case ("M", "S") is too easily something else.
    return _BY_WORD.get(lowered) if len(word) > 1 else None
