"""The text of a key: `pare_<environment>_<id>_<secret>_<checksum>`.

The prefix lets scanners find a key that leaked, the environment keeps a key of the trial service out of the real one,
and the checksum (CRC-32 of all before it) refuses typing errors and guesses without a look into the database.
"""

import hashlib
import re
import secrets
import string
import zlib
from dataclasses import dataclass, field

from app.errors import NotAuthenticated

ALPHABET = string.ascii_letters + string.digits
SECRET_CHARACTERS = 32  # log2(62) * 32 = 190 bits
MAX_CHARACTERS = 120
ENVIRONMENT = r"[a-z0-9]{1,16}"
_FORM = re.compile(rf"pare_({ENVIRONMENT})_([a-z0-9]{{26}})_([A-Za-z0-9]{{{SECRET_CHARACTERS}}})_([0-9a-f]{{8}})")


@dataclass(frozen=True)
class Token:
    """A key as its holder sends it."""

    environment: str
    key_id: str
    """The id of its row: key_<26 characters>."""
    secret: str = field(repr=False)

    @property
    def digest(self) -> str:
        """SHA-256 of the secret: all that is kept of it. A fast hash will do for 190 random bits."""
        return hashlib.sha256(self.secret.encode()).hexdigest()

    def render(self) -> str:
        """Return the text."""
        body = f"pare_{self.environment}_{self.key_id.removeprefix('key_')}_{self.secret}"
        return f"{body}_{_checksum(body)}"


def new_token(environment: str, key_id: str) -> Token:
    """Return a token with a fresh secret."""
    return Token(environment, key_id, "".join(secrets.choice(ALPHABET) for _ in range(SECRET_CHARACTERS)))


def parse_token(text: str, environment: str) -> Token:
    """Return the token that a text spells; raises NotAuthenticated for one that no key of this service can have."""
    found = _FORM.fullmatch(text) if len(text) <= MAX_CHARACTERS else None
    if found is None or _checksum(text[: found.start(4) - 1]) != found[4]:
        raise NotAuthenticated("this is not a key, or not all of it: its form or its checksum is wrong")
    if found[1] != environment:
        raise NotAuthenticated(f"the key is for the environment {found[1]!r}; this service is {environment!r}")
    return Token(found[1], f"key_{found[2]}", found[3])


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
