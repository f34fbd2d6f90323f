"""Inner features: which layers are paired, and what the losses on them mean."""

import pytest
import torch
from torch import Tensor, fx, nn

from worker.engine.training.features import Pair, Pairs, choose_pairs, make_pairs, relative_error


def chain(num_blocks: int, *, norms: bool = True, prefix: str = "block") -> fx.GraphModule:
    layers: dict[str, nn.Module] = {}
    for place in range(num_blocks):
        layers[f"{prefix}{place}"] = nn.Linear(4, 4)
        if norms:
            layers[f"norm_{prefix}{place}"] = nn.LayerNorm(4)
    module = nn.Sequential()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return fx.symbolic_trace(module)


def tokens(name: str = "norm") -> Pairs:
    return Pairs([Pair(name, name, channels_first=False, has_positions=True)])


def maps(name: str = "conv") -> Pairs:
    return Pairs([Pair(name, name, channels_first=True, has_positions=True)])


def relations(features: Tensor) -> Tensor:
    return torch.softmax(features @ features.transpose(1, 2) / features.shape[-1] ** 0.5, -1)


def test_other_depths_are_paired_evenly_and_at_their_ends() -> None:
    chosen = choose_pairs(chain(6), chain(12, prefix="layer"))
    assert chosen == [
        ("norm_block0", "norm_layer2"), ("norm_block2", "norm_layer5"), ("norm_block3", "norm_layer8"),
        ("norm_block5", "norm_layer11"),
    ]  # fmt: skip
    assert choose_pairs(chain(2), chain(3)) == [("norm_block0", "norm_block0"), ("norm_block1", "norm_block2")]


def test_namesakes_are_paired_and_without_norms_weighted_layers_but_the_last() -> None:
    assert choose_pairs(chain(6), chain(6))[-1] == ("norm_block5", "norm_block5")
    assert choose_pairs(chain(3, norms=False), chain(3, norms=False)) == [("block0", "block0"), ("block1", "block1")]
    assert choose_pairs(chain(1, norms=False), chain(3, norms=False)) == []


def test_the_hidden_loss_is_relative_and_ignores_padding() -> None:
    theirs = torch.randn(2, 3, 4)
    assert tokens().compare_hidden([2 * theirs], [theirs], None).item() == pytest.approx(1.0)
    torch.testing.assert_close(relative_error(5 * theirs, 10 * theirs), torch.tensor(0.25))
    padding = torch.tensor([[True, True, False], [True, False, False]])
    mine = torch.randn(2, 3, 4)
    loss = tokens().compare_hidden([mine], [theirs], padding)
    noisy, other = mine.clone(), theirs.clone()
    noisy[~padding], other[~padding] = 99.0, -99.0
    torch.testing.assert_close(tokens().compare_hidden([noisy], [other], padding), loss)


def test_the_relation_loss_is_the_divergence_of_what_tokens_say_about_each_other() -> None:
    mine, theirs = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    wanted, got = relations(theirs), relations(mine)
    torch.testing.assert_close(
        tokens().compare_attention([mine], [theirs], None), (wanted * (wanted / got).log()).sum(-1).mean()
    )
    # Turned features have the same relations, and so have those of another width, scaled to it.
    turned = theirs @ torch.linalg.qr(torch.randn(6, 6)).Q
    assert tokens().compare_attention([turned], [theirs], None).item() == pytest.approx(0.0, abs=1e-5)
    wide = torch.cat([theirs, torch.zeros(2, 5, 18)], -1) * 2**0.5  # (24 / 6) ** (1 / 4)
    assert tokens().compare_attention([wide], [theirs], None).item() == pytest.approx(0.0, abs=1e-5)


def test_padding_has_no_relations() -> None:
    mine, theirs = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    padding = torch.tensor([[True, True, False, False], [True, True, True, True], [False] * 4])
    loss = tokens().compare_attention([mine.requires_grad_(True)], [theirs], padding)
    wanted = [
        (relations(theirs[row : row + 1, :size]), relations(mine[row : row + 1, :size]))
        for row, size in ((0, 2), (1, 4))
    ]
    rows = torch.cat([(one * (one / other).log()).sum(-1).flatten() for one, other in wanted])
    torch.testing.assert_close(loss, rows.mean())
    (gradient,) = torch.autograd.grad(loss, mine)
    assert gradient.isfinite().all()
    assert not gradient[~padding].any()


def test_the_energy_of_maps_is_free_of_scale_and_of_image_size() -> None:
    theirs = torch.rand(2, 3, 4, 4)
    assert maps().compare_attention([7 * theirs], [theirs], None).item() == pytest.approx(0.0, abs=1e-6)
    larger = theirs.repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert maps().compare_attention([larger], [theirs], None).item() == pytest.approx(0.0, abs=1e-6)
    assert maps().compare_attention([theirs.flip(-1)], [theirs], None) > 1e-3
    where = torch.zeros(1, 1, 1, 2)
    where[..., 0] = 1.0
    # Two unit vectors at a right angle are sqrt(2) apart.
    assert maps().compare_attention([where], [where.flip(-1)], None).item() == pytest.approx(2.0)


def test_projections_stand_between_different_widths_only_and_are_seeded() -> None:
    layers = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 1), "norm": nn.BatchNorm2d(8)})
    mine = [torch.rand(2, 8, 4, 4), torch.rand(2, 8, 4, 4)]
    theirs = [torch.rand(2, 16, 4, 4), torch.rand(2, 8, 2, 2)]
    names = [("conv", "conv"), ("norm", "norm")]
    first, second, none = (
        make_pairs(names, layers, mine, theirs, project=project, seed=0) for project in (True, True, False)
    )
    assert [pair.projection is not None for pair in first.pairs] == [True, False]
    assert len(first.parameters()) == 2
    assert all(torch.equal(*both) for both in zip(first.parameters(), second.parameters(), strict=True))
    assert first.compare_hidden(mine, theirs, None).isfinite()
    assert none.parameters() == []
