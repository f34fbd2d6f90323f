"""The learning rate of every step of a training run."""

from math import cos, pi

from app.recipes.training import TrainingSettings


def learning_rate(settings: TrainingSettings, step: int, num_steps: int) -> float:
    """Return the learning rate of a step, counted from 0: a linear warm-up to the peak, then the schedule.

    What comes after the warm-up is the schedule's whole: `cosine` and `linear` fall over it to (almost) zero, `step`
    divides by ten at its half and again at its three quarters.
    """
    num_warmup = round(settings.warmup_fraction * num_steps)
    if step < num_warmup:
        return settings.learning_rate * (step + 1) / (num_warmup + 1)
    done = (step - num_warmup) / max(num_steps - num_warmup, 1)
    return settings.learning_rate * _share(settings, done)


def _share(settings: TrainingSettings, done: float) -> float:
    match settings.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "step":
            return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
        case "cosine":
            return 0.5 * (1 + cos(pi * done))
