"""What a kernel's result may differ from its float32 reference, as |out - reference| / |reference|, by input dtype.

Inputs are taken as given, so only sums and the result's own rounding count. FP8 products on Hopper are summed with
fewer bits than float32 has (1.5e-4 has been measured for good kernels).
"""

import torch

SUMS = {torch.float32: 1e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5, torch.float8_e4m3fn: 5e-4}  # float32 results
ROUNDED = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float8_e4m3fn: 4e-3}  # in bfloat16


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Over the finite entries; the others must be the same."""
    actual, expected = actual.float().cpu(), expected.float().cpu()
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    assert torch.equal(actual[~finite], expected[~finite])
    return float((actual - expected)[finite].norm() / expected[finite].norm().clamp_min(1e-30))


def poison_memory(num_bytes: int = 1 << 30) -> None:
    """Leave NaN in the memory that the next torch.empty gets."""
    for size in (num_bytes, 1 << 20, 1 << 16, 1 << 12):
        torch.full((size // 4,), float("nan"), device="cuda")
    torch.cuda.synchronize()
