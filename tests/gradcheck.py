"""How gradients are proved: the complex step (Squire and Trapp 1998, SIAM Review 40(1))."""

from collections.abc import Callable

import numpy as np

STEP = 1e-30


def complex_step(f: Callable[[np.ndarray], complex], x: np.ndarray) -> np.ndarray:
    """The gradient of f, real and scalar, at x (float64): Im f(x + ih) / h for each element of x.

    f(x + ih) = f(x) + ih f'(x) + O(h^2). Nothing is subtracted, so h can be so small that the error vanishes, and the
    derivative is good to the last digits. f must be built of analytic functions.
    """
    grad, z = np.empty_like(x), x.astype(np.complex128)
    for i in np.ndindex(x.shape):
        z[i] += 1j * STEP
        grad[i] = f(z).imag / STEP
        z[i] = x[i]
    return grad


def assert_gradient(actual: np.ndarray, exact: np.ndarray, name: str = "") -> None:
    """actual is within 1e-12 of exact, relative to the tensor's largest gradient.

    Element by element would be the wrong norm: the true gradient of attention's key bias is zero.
    """
    assert actual.shape == exact.shape
    scale = np.abs(exact).max()
    assert scale > 0, f"{name}: a gradient that is zero everywhere proves nothing"
    error = np.abs(actual - exact).max() / scale
    assert error < 1e-12, f"{name}: off by {error:.1e} of its largest gradient"
