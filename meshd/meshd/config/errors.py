"""What can be wrong with a configuration.

ConfigError               root; the message is for the person who wrote the value
  ConfigUnreadable        the file cannot be read at all (missing, no permission, not text, too large)
  ConfigSyntax            the file is not TOML; the message has line and column
  UnknownKey              a section or a key that does not exist; `suggestion` is the nearest that does
  BadValue                the key exists, the value has a wrong type or lies outside its range

All are raised before anything is started: no state exists that would have to be undone.
"""

from __future__ import annotations


class ConfigError(Exception):
    """The configuration cannot be used. `origin` says where the fault is: a file, a variable, an option."""

    code = "config_error"

    def __init__(self, message: str, *, origin: str, key: str = "", suggestion: str = "") -> None:
        super().__init__(f"{origin}: {message}")
        self.message = message
        self.origin = origin
        self.key = key
        self.suggestion = suggestion


class ConfigUnreadable(ConfigError):
    """The file cannot be read."""

    code = "config_unreadable"


class ConfigSyntax(ConfigError):
    """The file is not TOML."""

    code = "config_syntax"


class UnknownKey(ConfigError):
    """No such section or key."""

    code = "config_unknown_key"


class BadValue(ConfigError):
    """Wrong type, or outside the range."""

    code = "config_bad_value"
