"""A student made of the teacher's own layers, and one of the catalogue, each taught by the teacher.

Run `pare serve` in another terminal, then: python examples/students.py [derive] [take]
"""

import sys
from typing import Any

import torch

import pare
from pare.demo_model import load_digits_split, train_cnn

STEPS: dict[str, list[dict[str, Any]]] = {
    "derive": [{"kind": "derive_student", "width": 0.5}, {"kind": "distill", "epochs": 3}],
    "take": [{"kind": "take_student", "student": "resnet20"}, {"kind": "distill", "epochs": 3}],
}


def main() -> None:
    """Train a small CNN on scikit-learn's digits, and let the service make students of it."""
    torch.set_num_threads(1)
    digits = load_digits_split()
    teacher = train_cnn(digits, lambda *_: None)
    for name in sys.argv[1:] or STEPS:
        result = pare.Client().optimize(
            teacher,
            torch.rand(2, 1, 8, 8),
            data={"image": digits.training_images.numpy(), "label": digits.training_labels.numpy()},
            evaluation_data={"image": digits.held_out_images.numpy(), "label": digits.held_out_labels.numpy()},
            task="classification",
            recipe=STEPS[name],
        )
        print(result.table())


if __name__ == "__main__":
    main()
