"""The zip of a Hugging Face folder: which files it may hold, and the few that are written out under names of ours."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from worker.engine.programs.archive import Archive
from worker.engine.programs.hugging_face.pooling import Pooling, read_pooling
from worker.engine.programs.hugging_face.tokenizer import NoTokenizer, check_tokenizer
from worker.engine.programs.json_reader import mapping, parse_json, record, text
from worker.engine.programs.rejections import reject, shown
from worker.engine.programs.weights_file import Stored, read_header

MAX_SHARDS = 1000
_SMALL = 4 * 2**20
_TOKENIZER_BYTES = 64 * 2**20
_SAFE_FIX = 'Save the model with model.save_pretrained("folder") (safetensors is its default) and zip that folder.'
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors")
_POOLING = re.compile(r"1_Pooling/config\.json")
_UNUSED = re.compile(
    r"(generation_config|preprocessor_config|processor_config|image_processor|tokenizer_config|special_tokens_map"
    r"|added_tokens|vocab|config_sentence_transformers|sentence_[a-z0-9]+_config|data_config|chat_template"
    r"|model_card|[0-9]_Normalize/config)\.json|vocab\.txt|merges\.txt|bpe\.codes|(spiece|tokenizer)\.model"
    r"|sentencepiece\.bpe\.model|chat_template\.jinja|LICENSE(\.txt|\.md)?|[A-Z_]+\.md|\.git(attributes|ignore)"
    r"|(.*/)?\.DS_Store|__MACOSX/.*|.*\.(png|jpg|jpeg|gif|svg)|[0-9]_[A-Za-z]+/"
)
"""What people's folders hold besides; never opened."""
_PICKLES = re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib|msgpack|h5|ot|npy)")


@dataclass(frozen=True)
class Folder:
    """The parts of the zip that are used."""

    config: bytes
    weights: Path
    """Folder with the safetensors files, and nothing else, under the names that transformers expects."""
    tensors: dict[str, Stored]
    """The headers of all of them together."""
    tokenizer: bytes | None
    """tokenizer.json, written anew."""
    pooling: Pooling | None
    """sentence-transformers: what follows the transformer."""
    notes: tuple[str, ...] = ()
    """What of the folder is not used, though it might be missed."""


def unpack(path: Path, directory: Path) -> Folder:
    """Check the zip at `path` and write its weights below `directory`; raises ModelRejected."""
    with Archive(path, deflated=True) as archive:
        _strip_root(archive)
        _check_members(archive)
        if "config.json" not in archive.members:
            reject("config_missing", f"The zip has no config.json; it has {shown(sorted(archive.members)[:5])}.")
        weights = directory / "hugging_face"
        weights.mkdir()
        tokenizer, notes = _read_tokenizer(archive)
        modules = archive.read("modules.json", _SMALL) if "modules.json" in archive.members else None
        layer = archive.read("1_Pooling/config.json", _SMALL) if "1_Pooling/config.json" in archive.members else None
        return Folder(
            config=archive.read("config.json", _SMALL),
            weights=weights,
            tensors=_write_weights(archive, weights),
            tokenizer=tokenizer,
            pooling=None if modules is None else read_pooling(modules, layer),
            notes=notes,
        )


def _read_tokenizer(archive: Archive) -> tuple[bytes | None, tuple[str, ...]]:
    """Return the tokenizer, or a note that says why there is none: the model can do without."""
    if "tokenizer.json" not in archive.members:
        return None, ()
    try:
        return check_tokenizer(archive.read("tokenizer.json", _TOKENIZER_BYTES)), ()
    except NoTokenizer as error:
        return None, (
            f"tokenizer.json was left out, so that no column of text can feed this model: {error} Tokenize the text "
            "yourself and bind the numbers, or save the tokenizer with tokenizer.save_pretrained of transformers and "
            "upload the folder again.",
        )


def _strip_root(archive: Archive) -> None:
    members = {name: member for name, member in archive.members.items() if not name.startswith("__MACOSX/")}
    roots = {name.partition("/")[0] for name in members}
    if "config.json" not in members and len(roots) == 1 and all("/" in name for name in members):
        members = {name.partition("/")[2]: member for name, member in members.items() if not name.endswith("/")}
    archive.members = {name: member for name, member in members.items() if name}


def _check_members(archive: Archive) -> None:
    for name in archive.members:
        if name.endswith(".py"):
            reject(
                "remote_code",
                f"The zip holds Python code ({shown(name)}), which is never run.",
                "Leave it out if the model is one of transformers' own architectures; otherwise export the live model "
                "with torch.export and upload the .pt2.",
            )
        if _PICKLES.fullmatch(name):
            reject("pickled_weight", f"The zip holds {shown(name)}, a format that runs code when loaded.", _SAFE_FIX)
        used = name in ("config.json", "model.safetensors", _INDEX, "tokenizer.json", "modules.json")
        if not (used or _SHARD.fullmatch(name) or _POOLING.fullmatch(name) or _UNUSED.fullmatch(name)):
            reject(
                "unknown_member",
                f"The zip holds {shown(name)}, which is not part of a Hugging Face folder that Pare reads.",
                "Zip config.json, the .safetensors weights and the tokenizer's files; nothing else is needed.",
            )


def _write_weights(archive: Archive, folder: Path) -> dict[str, Stored]:
    shards = sorted(name for name in archive.members if _SHARD.fullmatch(name))
    single = "model.safetensors" in archive.members
    if single == bool(shards) or len(shards) > MAX_SHARDS:
        reject(
            "weights_missing",
            f"The zip needs either model.safetensors or the shards model-00001-of-0000N.safetensors; it has "
            f"{'both' if single else f'{len(shards)} shards'}.",
            _SAFE_FIX,
        )
    tensors: dict[str, Stored] = {}
    places: dict[str, str] = {}
    for name in shards or ["model.safetensors"]:
        with (folder / name).open("xb") as file:
            for chunk in archive.chunks(name):
                file.write(chunk)
        for tensor, stored in read_header(folder / name)[0].items():
            if tensor in tensors:
                reject("weights_damaged", f"The tensor {tensor} is in {places[tensor]} and in {name}.", _SAFE_FIX)
            tensors[tensor], places[tensor] = stored, name
    # Causal models look for it, and stumble where the hub cannot be asked.
    (folder / "generation_config.json").write_text("{}")
    if shards:
        _check_index(archive, shards, places)
        # Written anew: transformers opens the files that the index names.
        (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tensors


def _check_index(archive: Archive, shards: list[str], places: dict[str, str]) -> None:
    numbers = [match.groups() for name in shards if (match := _SHARD.fullmatch(name))]
    expected = [(f"{index + 1:05d}", f"{len(shards):05d}") for index in range(len(shards))]
    if numbers != expected:
        reject("weights_missing", f"The shards {shown(shards)} are not 1 to N of N.", _SAFE_FIX)
    if _INDEX in archive.members:
        index = record(parse_json(archive.read(_INDEX, 16 * 2**20), _INDEX), _INDEX, ("weight_map",), ("metadata",))
        given = {name: text(place, _INDEX) for name, place in mapping(index["weight_map"], _INDEX).items()}
        if given != places:
            wrong = sorted(set(given.items()) ^ set(places.items()))[0]
            reject("weights_damaged", f"{_INDEX} and the shards disagree about {shown(wrong)}.", _SAFE_FIX)
