"""The formats that are enforced.

A format of strings stands here as an ECMA-262 pattern where llguidance has none that is strict enough, such as days of months in leap
years. Those of numbers, and some of strings, are OpenAPI's and pydantic's.
"""

from __future__ import annotations

__all__ = ["COMPILED", "FREE", "INTEGERS", "LONGEST", "PATTERNS"]

COMPILED = frozenset({"duration", "ipv4", "ipv6", "uri", "uuid"})  # llguidance enforces them

YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"  # not 0000, which Python and SQL do not know
FOURTH = "(?:0[48]|[2468][048]|[13579][26])"
LEAP_YEAR = f"(?:[0-9]{{2}}{FOURTH}|{FOURTH}00)"
SHORT = "(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
LONG = "(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31"
DATE = f"(?:{YEAR}-(?:{SHORT}|{LONG})|{LEAP_YEAR}-02-29)"
CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
TIME = f"{CLOCK}:[0-5][0-9](?:\\.[0-9]{{1,9}})?(?:Z|[+-]{CLOCK})"  # no leap seconds

SIGN = "[A-Za-z0-9]"
INNER = "[A-Za-z0-9-]"
# up to 63 characters; hyphens at both the third and the fourth place are left to internationalized names
LABEL = f"{SIGN}(?:{SIGN}|{INNER}(?:{SIGN}(?:{INNER}{{0,59}}{SIGN})?|-{SIGN}(?:{INNER}{{0,58}}{SIGN})?))?"
HOST = f"{LABEL}(?:\\.{LABEL})*"
ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"

PATTERNS = {
    "date": f"^{DATE}$",
    "date-time": f"^{DATE}T{TIME}$",
    "email": f"^{ATOM}{{1,30}}(?:\\.{ATOM}{{1,30}})?@{HOST}$",
    "hostname": f"^{HOST}$",
    "time": f"^{TIME}$",
}
LONGEST = {"email": 254, "hostname": 253}  # characters
INTEGERS = {"int32": 31, "int64": 63}  # bits of the magnitude; of a schema whose type is integer
FREE = {  # formats that every value of these types has: they say what it is for, or how a program keeps it
    "binary": {"string"}, "password": {"string"}, "path": {"string"},
    "double": {"integer", "number"}, "float": {"integer", "number"},
}  # fmt: skip
