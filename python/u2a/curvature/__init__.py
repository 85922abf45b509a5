"""Curvature operators over a model's parameters: products, sums, inverses where they have one.

Gauss-Newton, Hessian, empirical Fisher, K-FAC, EK-FAC, diagonal and stored features share one
interface (`u2a.curvature.base.Curvature`); `u2a.solve` takes any of them.
"""

from u2a.curvature.base import Curvature, Damped, Operator, Sum, as_scipy, dense, undamped
from u2a.curvature.features import Diagonal, Features, row_features
from u2a.curvature.gauge import symmetry
from u2a.curvature.kfac import EKFAC, KFAC, fisher_diagonal
from u2a.curvature.lanczos import Spectrum, lanczos
from u2a.curvature.model import EmpiricalFisher, GaussNewton, Hessian
from u2a.curvature.stream import Stream

__all__ = [
    "EKFAC",
    "KFAC",
    "Curvature",
    "Damped",
    "Diagonal",
    "EmpiricalFisher",
    "Features",
    "GaussNewton",
    "Hessian",
    "Operator",
    "Spectrum",
    "Stream",
    "Sum",
    "as_scipy",
    "dense",
    "fisher_diagonal",
    "lanczos",
    "row_features",
    "symmetry",
    "undamped",
]
