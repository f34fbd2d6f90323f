"""What intake reports about a program: its signature, layers, numbers and what to know about it."""

from torch import nn

from app.recipes.facts import Capability, LayerFacts, ModelFacts
from worker.engine.measure.macs import count_macs
from worker.engine.programs.program import Program


def describe(program: Program, capabilities: tuple[Capability, ...] = ()) -> ModelFacts:
    """Return the facts of a program."""
    signature, module = program.signature, program.module
    macs = count_macs(program)
    parameters = list(module.parameters())
    return ModelFacts(
        inputs=signature.inputs,
        outputs=signature.outputs,
        dynamic_batch=signature.batch_size is None,
        batch_size=signature.batch_size,
        exported_in=program.exported_in,
        parameters=sum(parameter.numel() for parameter in parameters),
        buffers=sum(buffer.numel() for buffer in module.buffers()),
        parameter_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        macs=macs.total,
        uncounted_operators=macs.uncounted,
        layers=_layers(program, macs.by_layer),
        tied=program.tied,
        tokenizer=program.tokenizer is not None,
        capabilities=capabilities,
        warnings=_warnings(program),
    )


def _layers(program: Program, macs: dict[str, int]) -> tuple[LayerFacts, ...]:
    layers = []
    for name, module in program.module.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if name and own and is_layer(module):
            weight = own.get("weight", next(iter(own.values())))
            layers.append(
                LayerFacts(
                    name=name,
                    type=type(module).__name__,
                    shape=tuple(weight.shape),
                    parameters=sum(parameter.numel() for parameter in own.values()),
                    macs=macs.get(name, 0),
                )
            )
    return tuple(layers)


def is_layer(module: nn.Module) -> bool:
    """Whether import made this module a layer, not only a holder of names."""
    return type(module) is not nn.Module


def _warnings(program: Program) -> tuple[str, ...]:
    signature, warnings = program.signature, list(program.notes)
    if signature.batch_size is not None:
        warnings.append(
            f"The batch is fixed at {signature.batch_size}; the model is trained and measured at exactly that batch. "
            "Export with a dynamic batch to change this."
        )
    for word, size in signature.example_sizes.items():
        if word != "batch":
            warnings.append(f"The size {word} may vary; it is measured at {size}, its value when exported.")
    loose = [
        name
        for path, module in program.module.named_modules()
        if not is_layer(module) or not path
        for name in (f"{path}.{attribute}".lstrip(".") for attribute, _ in module.named_parameters(recurse=False))
    ]
    if loose:
        shown = ", ".join(loose[:5]) + (", ..." if len(loose) > 5 else "")
        warnings.append(f"{len(loose)} parameters belong to no layer and are only trained: {shown}.")
    frozen = sum(not parameter.requires_grad for parameter in program.module.parameters())
    if frozen:
        warnings.append(f"{frozen} parameters were exported frozen (requires_grad=False) and stay as they are.")
    return tuple(warnings)
