"""Architectures, data sets, losses and the training loop: networks trained for their certified radii.

    from lipbounds.training import Config, fit

    fitted = fit(Config(dataset="digits", loss="crm", constants="recursion", epochs=30))

Nothing in `lipbounds` needs this package: bounds are computed for any JAX function.
"""

if not __name__.startswith("lipbounds."):
    raise ImportError("this folder is the package lipbounds.training: write `import lipbounds.training`")

from lipbounds.training.callbacks import Callback as Callback
from lipbounds.training.callbacks import TensorBoard as TensorBoard
from lipbounds.training.callbacks import Trackio as Trackio
from lipbounds.training.config import Config as Config
from lipbounds.training.loop import Fitted as Fitted
from lipbounds.training.loop import fit as fit
from lipbounds.training.loop import resume as resume
from lipbounds.training.presets import PRESETS as PRESETS
from lipbounds.training.presets import preset as preset
from lipbounds.training.runs import Run as Run
from lipbounds.training.runs import open_run as open_run
