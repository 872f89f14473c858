"""What the tests of native kernels share: thread counts, new inputs each time, and how close is close enough."""

import contextlib
import os

import torch

# Unit roundoffs: float32 has 24 significant bits, bf16 has 8.
FLOAT32, BF16 = 2.0**-24, 2.0**-8


@contextlib.contextmanager
def threads(count):
    """Torch, and so the kernels, on that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seed_anew():
    """Seeds torch with a number that a failing test's output shows."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


def nans():
    """NaN in float32 with every bit of the payload set, of either sign, and with the last one alone."""
    return torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)


def check_operator(operator, *arguments):
    """What torch.library can check of a custom operator, and that results are laid out as those without data are."""
    torch.library.opcheck(operator, arguments)
    results = operator(*arguments)
    shadows = operator(*(value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments))
    if isinstance(results, torch.Tensor):
        results, shadows = [results], [shadows]
    assert list(map(layout, shadows)) == list(map(layout, results))


def layout(tensor):
    """Type, shape and strides; the stride of a dimension of size one means nothing."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return tensor.dtype, tensor.shape, strides


def assert_within(got, expected, tolerance, what):
    """Each number of ``got`` within its own tolerance of the float64 one.

    The error says which number is the worst.
    """
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    if got.numel() == 0:
        return
    assert got.isfinite().all(), f"{what}: not finite"
    excess = ((got.double() - expected).abs() - tolerance).flatten()
    worst = int(excess.argmax())
    assert excess[worst] <= 0, (
        f"{what}: at {worst} of {got.numel()} {got.flatten()[worst].item()}, not {expected.flatten()[worst].item()} "
        f"within {(torch.zeros_like(expected) + tolerance).flatten()[worst].item():.3g}"
    )
