"""The sections of a store: of each owner's files, each unfinished job's checkpoints, each unfinished upload's parts."""

import re

from app.storage.base import Section, Storage

SECTION = re.compile(r"[a-z]+/[a-z0-9_-]{1,200}")
OWNERS, CHECKPOINTS, UPLOADS = "owners", "checkpoints", "uploads"
"""Kinds of sections."""
_PLAIN = re.compile(r"[a-z0-9_]{1,100}")
_QUOTED = "x-"
"""Before the name, in hexadecimal, of an owner whose name is not plain."""


def name_owner_section(owner: str) -> str:
    """Return the name of the section of an owner's models, datasets, artifacts and logs."""
    plain = owner if _PLAIN.fullmatch(owner) else _QUOTED + owner.encode().hex()
    return f"{OWNERS}/{plain}"


def name_owner(section: str) -> str:
    """Return whose section this is."""
    name = section.removeprefix(f"{OWNERS}/")
    return bytes.fromhex(name.removeprefix(_QUOTED)).decode() if name.startswith(_QUOTED) else name


def owner_storage(storage: Storage, owner: str) -> Section:
    """Return the section of an owner's models, datasets, artifacts and logs."""
    return storage.section(name_owner_section(owner))


def checkpoint_storage(storage: Storage, job_id: str) -> Section:
    """Return the section that holds the checkpoints of a job and nothing else."""
    return storage.section(f"{CHECKPOINTS}/{job_id}")


def upload_storage(storage: Storage, upload_id: str) -> Section:
    """Return the section that holds the parts of a resumable upload and nothing else."""
    return storage.section(f"{UPLOADS}/{upload_id}")
