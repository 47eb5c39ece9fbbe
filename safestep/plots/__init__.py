"""Draw a run, or radii, on matplotlib axes; may import workers and below.

Each figure of the report is one entry: a plot function under ``@figure`` of ``registry``, in one of
the modules below. The order of the modules is the order of the figures.
"""

from safestep.plots import ladder, loss, loss_change, steps, rates, radii, worker_heatmap, workers
from safestep.plots.ladder import *
from safestep.plots.loss import *
from safestep.plots.loss_change import *
from safestep.plots.steps import *
from safestep.plots.rates import *
from safestep.plots.radii import *
from safestep.plots.worker_heatmap import *
from safestep.plots.workers import *

__all__: list[str] = []
__all__ += ladder.__all__
__all__ += loss.__all__
__all__ += loss_change.__all__
__all__ += steps.__all__
__all__ += rates.__all__
__all__ += radii.__all__
__all__ += worker_heatmap.__all__
__all__ += workers.__all__
