"""What runs are said to have shown: numbers, verdicts and the table of an op's speed."""

from collections.abc import Callable, Mapping

import torch
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision

RESAMPLES = 100


def paired(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean change from the same images before to after, and its standard error."""
    difference = after.double() - before.double()
    error = difference.std().item() / len(difference) ** 0.5 if len(difference) > 1 else float("inf")
    return difference.mean().item(), error


def resampled_error(change: Callable[[Tensor], float], count: int) -> float:
    """Standard error of a change that is no mean over images: its deviation over ``count`` images drawn anew,
    with replacement, of which ``change`` gets the indices."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.tensor([change(torch.randint(count, (count,), generator=generator)) for _ in range(RESAMPLES)])
        .std()
        .item()
    )


def verdict(change: float, error: float) -> str:
    """Whether the claim that ``change`` is above 0 shows."""
    if change > 2 * error:
        return "the claim shows here"
    if change < -2 * error:
        return "the claim did NOT show here, the opposite did"
    return "the claim did NOT show here, the change is within two standard errors"


def compare_right(before: Tensor, after: Tensor) -> str:
    """The change of accuracy from what was right to what is, both [N] bool, in words, and whether it is the
    claimed rise."""
    change, error = paired(before, after)
    old, new = (percent(right.double().mean().item()) for right in (before, after))
    return (
        f"from {old} % to {new} % ({100 * change:+.1f} ± {100 * error:.2g} points): {verdict(change, error)}"
    )


def mean_average_precision(probability: Tensor, target: Tensor) -> float:
    """The mean over those labels that some image has; both are [N, L]."""
    known = target.any(0)
    return multilabel_average_precision(probability[:, known], target[:, known], int(known.sum())).item()


def compare_map(before: Tensor, after: Tensor, target: Tensor) -> str:
    """The change of mAP with its standard error, by the same resampled images for both, and the verdict; all
    are [N, L]."""

    def change(chosen: Tensor) -> float:
        old, new = (mean_average_precision(x[chosen], target[chosen]) for x in (before, after))
        return new - old

    old, new = (mean_average_precision(x, target) for x in (before, after))
    error = resampled_error(change, len(target))
    return (
        f"from {100 * old:.1f} % to {100 * new:.1f} % ({100 * (new - old):+.1f} ± {100 * error:.2g} points): "
        f"{verdict(new - old, error)}"
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def op_table(name: str, milliseconds: Mapping[str, float]) -> Table:
    table = Table(title=f"{name} of one batch")
    table.add_column("backend")
    table.add_column("milliseconds", justify="right")
    table.add_column("speed", justify="right")
    eager = milliseconds["reference"]
    for backend, value in milliseconds.items():
        label = "reference (eager PyTorch)" if backend == "reference" else backend
        table.add_row(label, f"{value:.2f}", f"{eager / value:.1f} x")
    return table


def op_sentence(name: str, milliseconds: Mapping[str, float]) -> str:
    eager = milliseconds["reference"]
    fused = {backend: value for backend, value in milliseconds.items() if backend != "reference"}
    if not fused:
        return f"One {name} took {eager:.2f} ms in eager PyTorch; no fused backend was measured here."
    best = min(fused, key=lambda backend: fused[backend])
    return (
        f"One {name} took {eager:.2f} ms in eager PyTorch and {fused[best]:.2f} ms on the {best} backend, "
        f"{eager / fused[best]:.1f} times the speed."
    )
