"""Exporting live modules: the batch varies where it can, the module stays as it was, the file holds no examples."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pare.errors import ExportFailed, UsageError
from pare.export import export_module

torch.set_num_threads(1)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 4)
        self.right = nn.Linear(5, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total: Tensor = self.left(a) + self.right(b)
        return total


class ComputesWithTheBatch(nn.Module):
    """Allows one batch size only: the value of axis 0 decides the shape of the weight's reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, 3) * self.weight


class BranchesOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x


def _dropout_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))


@pytest.mark.parametrize("example_batch", [1, 2, 7])
def test_batch_varies_whatever_the_example_batch_is(tmp_path: Path, example_batch: int) -> None:
    net = _dropout_net().eval()
    exported = export_module(net, torch.randn(example_batch, 3), tmp_path / "m.pt2")

    assert exported.dynamic_batch
    assert exported.notes == ()
    module = torch.export.load(exported.path).module()
    for batch in (1, 5):
        x = torch.randn(batch, 3)
        assert torch.equal(module(x), net(x))


def test_several_inputs_share_the_batch_and_keyword_inputs_work(tmp_path: Path) -> None:
    net = TwoInputs()
    by_position = export_module(net, (torch.ones(2, 3), torch.ones(2, 5)), tmp_path / "p.pt2")
    by_name = export_module(net, {"a": torch.ones(2, 3), "b": torch.ones(2, 5)}, tmp_path / "n.pt2")

    assert by_position.dynamic_batch
    assert by_name.dynamic_batch
    a, b = torch.randn(4, 3), torch.randn(4, 5)
    assert torch.equal(torch.export.load(by_position.path).module()(a, b), net(a, b))
    assert torch.equal(torch.export.load(by_name.path).module()(a=a, b=b), net(a, b))


def test_falls_back_to_the_examples_batch_and_says_why(tmp_path: Path) -> None:
    exported = export_module(ComputesWithTheBatch(), torch.ones(4, 3), tmp_path / "m.pt2")

    assert not exported.dynamic_batch
    (note,) = exported.notes
    assert "fixed batch of the example inputs (4)" in note
    assert len(note) > 60
    assert torch.export.load(exported.path).module()(torch.ones(4, 3)).shape == (4, 3)


def test_inputs_that_do_not_share_axis_0_are_exported_as_they_are(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a[:, None] * b[None, :]

    exported = export_module(Outer(), (torch.ones(2), torch.ones(3)), tmp_path / "m.pt2")

    assert not exported.dynamic_batch
    assert "not one batch: [(2,), (3,)]" in exported.notes[0]


def test_a_fixed_batch_can_be_asked_for(tmp_path: Path) -> None:
    exported = export_module(_dropout_net(), torch.ones(2, 3), tmp_path / "m.pt2", dynamic_batch=False)

    assert not exported.dynamic_batch
    assert exported.notes == ()


@pytest.mark.parametrize("works", [True, False])
def test_every_part_keeps_its_mode_and_its_weights(tmp_path: Path, works: bool) -> None:
    inner = _dropout_net()
    net = nn.Sequential(inner, nn.Identity() if works else BranchesOnData())
    net.train()
    inner[2].eval()
    modes = [part.training for part in net.modules()]
    weights = {name: value.clone() for name, value in net.state_dict().items()}

    if works:
        export_module(net, torch.randn(4, 3), tmp_path / "m.pt2")
    else:
        with pytest.raises(ExportFailed):
            export_module(net, torch.randn(4, 3), tmp_path / "m.pt2")

    assert [part.training for part in net.modules()] == modes
    assert sorted(set(modes)) == [False, True]
    for name, value in net.state_dict().items():
        assert torch.equal(value, weights[name])
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_module_in_train_mode_is_exported_as_it_behaves_in_eval_mode(tmp_path: Path) -> None:
    net = _dropout_net().train()
    path = export_module(net, torch.randn(4, 3), tmp_path / "m.pt2").path

    x = torch.randn(6, 3)
    assert torch.equal(torch.export.load(path).module()(x), net.eval()(x))


def test_the_file_does_not_hold_the_examples(tmp_path: Path) -> None:
    secret = torch.full((4, 3), 1234.5678)
    path = export_module(_dropout_net(), secret, tmp_path / "m.pt2").path

    assert secret.numpy().tobytes()[:16] not in path.read_bytes()


def test_what_cannot_be_exported_is_an_error_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ExportFailed) as caught:
        export_module(BranchesOnData(), torch.ones(2, 3), tmp_path / "m.pt2")

    assert caught.value.code == "export_failed"
    assert "BranchesOnData" in caught.value.detail
    assert not (tmp_path / "m.pt2").exists()


@pytest.mark.parametrize("wrong", [(), 3, (1, 2), {"x": [1.0]}])
def test_example_inputs_must_be_tensors(tmp_path: Path, wrong: object) -> None:
    with pytest.raises(UsageError):
        export_module(_dropout_net(), wrong, tmp_path / "m.pt2")
