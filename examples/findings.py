"""What runs are said to have shown: numbers, verdicts and the table of an op's speed."""

from collections.abc import Mapping

from rich.table import Table
from torch import Tensor


def paired(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean change from the same images before to after, and its standard error."""
    difference = after.double() - before.double()
    error = difference.std().item() / len(difference) ** 0.5 if len(difference) > 1 else float("inf")
    return difference.mean().item(), error


def verdict(change: float, error: float) -> str:
    """Whether the claim that ``change`` is above 0 shows."""
    if change > 2 * error:
        return "the claim shows here"
    if change < -2 * error:
        return "the claim did NOT show here, the opposite did"
    return "the claim did NOT show here, the change is within two standard errors"


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
