"""The written list of the catalogue's architectures, complete against app.recipes.architectures."""

from app.recipes.architectures import ARCHITECTURES
from worker.engine.catalogue.entry import Entry
from worker.engine.catalogue.images import large_resnet, mobilenet_v2, small_resnet
from worker.engine.catalogue.transformers import bert, gpt, vit

CATALOGUE: dict[str, Entry] = {
    **{f"resnet{depth}": small_resnet(depth) for depth in (20, 32, 44, 56, 110)},
    **{f"resnet{depth}": large_resnet(depth) for depth in (18, 34, 50, 101, 152)},
    "mobilenet_v2": mobilenet_v2(),
    "vit": vit(),
    "bert": bert(),
    "gpt": gpt(),
}

assert CATALOGUE.keys() == ARCHITECTURES.keys()
