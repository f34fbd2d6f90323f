"""Ids: a prefix that says what the thing is, and 26 random characters that nobody can guess."""

import secrets
import string
from typing import Literal

Prefix = Literal["mdl", "dst", "job", "art", "upl", "whk", "msg", "dsp", "key", "aud"]

ALPHABET = string.ascii_lowercase + string.digits
LENGTH = 26  # log2(36) * 26 = 134 bits
_NUM_IDS = len(ALPHABET) ** LENGTH


def new_id(prefix: Prefix) -> str:
    """Return a new id, for example job_k3v0q7m2c9x1f8z5a4b6n0p2r7."""
    # One call for all characters: each asks the kernel.
    number, characters = secrets.randbelow(_NUM_IDS), []
    for _ in range(LENGTH):
        number, digit = divmod(number, len(ALPHABET))
        characters.append(ALPHABET[digit])
    return prefix + "_" + "".join(characters)
